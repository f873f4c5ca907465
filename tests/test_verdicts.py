"Beyond the score: how answers are said, how far a model has moved, and public benchmarks on live models"
import json, math, sys, types
import numpy as np, pandas as pd, pytest, torch
import families
from sdlab.core.answers import Task
from sdlab.core.data import encode
from sdlab.core.model import LM
from sdlab.judge.degeneration import degeneration, looping, repeated
from sdlab.judge.recovery import Recovery
from sdlab.judge.score import score, score_all
from sdlab.judge.shift import shift
import sdlab.judge.harness as H
from sdlab.judge.harness import OPENLLM_V1, harness

def lm(seed=0, name='Llama', chat=False, **kw): return LM(families.tiny(name, seed=seed, **kw), families.tokenizer(chat), f'{name} {seed}')

@pytest.fixture(scope='module')
def arms(): return dict(teacher=lm(), pruned=lm(1))

# ---- items

def test_items_say_whether_an_answer_ended():
    "Against the model's own `generate`, one prompt at a time"
    m = lm(3)
    task = Task('say', [dict(prompt=f'say {c}', completion='ab') for c in 'abcdefgh'], rule='exact', max_new_tokens=9)
    got = score(m, task, batch_size=3)
    for r, o in zip(task.rows, got.itertuples()):
        ids = m.tokenizer(r['prompt'], return_tensors='pt', add_special_tokens=False).input_ids
        new = m.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=sorted(m.stops), pad_token_id=0)[0, ids.shape[1]:].tolist()
        stops = [i for i, t in enumerate(new) if t in m.stops]
        assert o.ended == bool(stops) and o.reply_tokens == (stops[0] if stops else 9) and o.reference_tokens == 2
    full = score(m, Task('long', [dict(prompt='a'*120, completion='b')], rule='exact', max_new_tokens=50))
    assert full.reply_tokens[0] <= 8 and (full.reply_tokens[0] == 8) == (not full.ended[0])    # the context of 128 is the limit

# ---- degeneration

def test_repetition_and_circles():
    assert repeated('') == 0 and repeated('x y z') == 0 and repeated('a b a b a b', n=2) == pytest.approx(1-2/5)
    assert looping('') == 0 and looping('x '*7) == 0 and looping('x '*7, least=7) == 7 and looping('a b c '*3) == 9 and looping('a b c a b c a b') == 0
    assert looping('東京 '*9) == 18                                                              # words without spaces between them

def test_health_of_models(arms):
    tasks = [Task('say', [dict(prompt=f'say {c}', completion='abcd') for c in 'abcdef'], rule='exact', max_new_tokens=6), Task('tell', ['once upon', 'a time'], 'perplexity')]
    items = score_all(arms, tasks)
    h = degeneration(items)
    f = h.frame().set_index(['arm', 'sign'])
    for a in arms:
        o = items[(items.arm == a)&(items.task == 'say')]
        assert f.loc[(a, 'never_stopped'), 'value'] == (~o.ended.astype(bool)).mean() and f.loc[(a, 'length'), 'value'] == pytest.approx(o.reply_tokens.sum()/24)
    assert (f.low <= f.value+1e-9).all() and (f.value <= f.high+1e-9).all() and (f.n == 6).all() and set(h.tasks) == {'say'}
    assert degeneration(Recovery(items)).frame().equals(h.frame()) and 'teacher' in repr(h) and 'stopped early' in h._repr_html_()
    import matplotlib.pyplot as plt
    assert h.plot(what='length').get_ylabel().startswith('length')
    plt.close('all')
    words = degeneration({a: list(items[(items.arm == a)&(items.task == 'say')].reply) for a in arms}, lm=arms['teacher'], references=['abcd']*6)
    assert words.items.wanted.tolist() == [4.]*12 and words.items.never_stopped.isna().all()     # tokens of `lm`; an end cannot be seen in a text

# ---- shift

def test_divergence_by_hand(arms):
    asks = ['say a', 'and b', 'or something longer']
    got = shift({'pruned': arms['pruned']}, arms['teacher'], asks, max_new_tokens=5, batch_size=2)
    for o in got.items.itertuples():
        said = arms['teacher'].reply(o.prompt, 5)
        ended = shift_ended(arms['teacher'], o.prompt, 5)
        r = encode(arms['teacher'].tokenizer, dict(prompt=o.prompt, completion=said, ended=ended))
        p, q = (m.model(torch.tensor([r['input_ids']])).logits[0].double().log_softmax(-1) for m in arms.values())
        at = [t-1 for t, k in enumerate(r['completion_mask']) if k]
        assert o.teacher == said and o.tokens == len(at) and o.kl == pytest.approx((p.exp()*(p-q)).sum(-1)[at].sum().item(), rel=1e-3)
    f = got.frame().set_index('measure')
    assert f.loc['KL', 'value'] == pytest.approx(got.items.kl.sum()/got.items.tokens.sum()) and f.loc['ROUGE-L', 'value'] == pytest.approx(got.items.rouge.mean())
    same = shift(arms['teacher'], arms['teacher'], asks, max_new_tokens=5).frame().set_index('measure').value
    assert same['ROUGE-L'] == 1 and abs(same['KL']) < 1e-5

def shift_ended(m, prompt, n): return bool(score(m, Task('t', [dict(prompt=prompt, completion='x')], rule='exact', max_new_tokens=n)).ended[0])

def test_data_under_the_teacher(arms):
    rows = [dict(prompt='a?', completion='yes'), dict(prompt='b?', completion='no it is not')]
    got = shift(arms, arms['teacher'], ['a', 'b'], dict(x=rows), max_new_tokens=3)
    want = score(arms['teacher'], Task('x', rows, 'perplexity'))
    assert got.data.nats_per_token[0] == pytest.approx(want.nll.sum()/want.tokens.sum()) and got.data.n[0] == 2 and 'nats per token' in got._repr_html_() and 'Surprise' in repr(got)

def test_embeddings_are_never_fetched(arms, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'sentence_transformers', None)
    with pytest.raises(ImportError, match='pip install sentence-transformers'): shift(arms, arms['teacher'], ['a'], embed='all-MiniLM-L6-v2')
    class Sentence:                                                                             # stands for the package: it finds nothing on this machine
        def __init__(self, name, local_files_only): assert local_files_only; raise OSError(f'no {name}')
    monkeypatch.setitem(sys.modules, 'sentence_transformers', types.SimpleNamespace(SentenceTransformer=Sentence))
    with pytest.raises(FileNotFoundError, match='none is downloaded'): shift(arms, arms['teacher'], ['a'], embed=str(tmp_path))
    loaded = types.SimpleNamespace(encode=lambda ts: np.ones((len(ts), 3)))
    f = shift(arms, arms['teacher'], ['a', 'b'], embed=loaded, kl=False, max_new_tokens=3).frame()
    assert f[f.measure == 'cosine'].value.tolist() == pytest.approx([1, 1]) and 'KL' not in set(f.measure)

def test_other_tokens(arms):
    other = lm(vocab_size=120)
    with pytest.raises(ValueError, match='kl=False'): shift({'big': other}, arms['teacher'], ['a'])
    assert len(shift({'big': other}, arms['teacher'], ['a', 'b'], kl=False, max_new_tokens=3).items) == 2

# ---- harness

def write(folder, name, rows, **config):
    "A task of one's own: rows, and a YAML file"
    (folder/f'{name}.jsonl').write_text('\n'.join(json.dumps(r) for r in rows))
    base = dict(task=name, dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(folder/f'{name}.jsonl'))), test_split='test', doc_to_text='{{prompt}}')
    (folder/f'{name}.yaml').write_text(json.dumps({**base, **config}))                          # JSON is YAML

MEAN = lambda *ms: [dict(metric=m, aggregation='mean', higher_is_better=True) for m in ms]
ROWS = [dict(prompt=f'{c}?', choices=['yes', 'no', 'maybe so'], answer=i%3) for i, c in enumerate('abcdefg')]
ASKS = [dict(prompt=f'say {c}', completion=c) for c in 'abcde']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    pytest.importorskip('lm_eval')
    p = tmp_path_factory.mktemp('tasks')
    pick = dict(output_type='multiple_choice', doc_to_choice='{{choices}}', doc_to_target='answer', target_delimiter='')
    write(p, 'pick', ROWS, **pick, metric_list=MEAN('acc', 'acc_norm'))
    write(p, 'pick_more', ROWS[::-1], **pick, metric_list=MEAN('acc', 'acc_norm'))
    write(p, 'say', ASKS, output_type='generate_until', doc_to_target='{{completion}}', generation_kwargs=dict(until=['\n'], max_gen_toks=4, do_sample=False), metric_list=MEAN('exact_match'))
    write(p, 'endless', ASKS, output_type='generate_until', doc_to_target='{{completion}}', generation_kwargs=dict(until=['\n'], do_sample=False), metric_list=MEAN('exact_match'))
    (p/'both.yaml').write_text(json.dumps(dict(group='both', task=['pick', 'pick_more'], aggregate_metric_list=[dict(metric='acc', weight_by_size=True)])))
    return p

@pytest.fixture
def no_defaults(folder, monkeypatch):
    "The list of 14,000 tasks of the package takes seconds to read: an unknown name is looked for in nothing"
    import lm_eval.tasks
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, 'TaskManager', lambda include_path=None, include_defaults=True: real(include_path=include_path, include_defaults=False))

@pytest.mark.parametrize('name', ['Llama', 'GPT-2'])
def test_harness_equals_score(folder, name):
    two = dict(teacher=lm(name=name), pruned=lm(1, name=name))
    two['teacher'].model.train()
    before, dice = two['teacher'].fingerprint, torch.get_rng_state()
    got = harness(two, dict(pick=dict(metric='acc_norm'), say=None), include=folder, batch_size=3)
    assert two['teacher'].fingerprint == before and torch.equal(dice, torch.get_rng_state()) and all(m.training for m in two['teacher'].model.modules())
    assert got.tasks == dict(pick='acc_norm', say='exact_match') and got.arms == list(two)
    it = got.items.set_index(['task', 'arm'])
    for a, m in two.items():
        m.model.eval()
        ours = score(m, Task('pick', ROWS, 'choice_norm'))
        assert np.allclose(np.stack(it.loc[('pick', a), 'logprob']), np.stack(ours.logprob), atol=2e-3)
        for c in ('score', 'acc', 'acc_norm', 'answer', 'reference'): assert it.loc[('pick', a), c].tolist() == ours[c].tolist(), c
        said = score(m, Task('say', ASKS, max_new_tokens=4, rule=lambda s, r: s.split('\n')[0] == r))
        assert [o.split('\n')[0] for o in said.reply] == it.loc[('say', a), 'reply'].tolist() and said.score.tolist() == it.loc[('say', a), 'score'].tolist()
    assert 'acc_norm' in got._repr_html_() and got.difference('teacher', 'pruned').n.tolist() == [7, 5, 12]
    assert set(degeneration(got).items.task) == {'say'}

def test_harness_chat_template(folder):
    "A template that ends in a space: the harness counts that space to every option, we to the question"
    m = lm(chat=True)
    got = harness(dict(teacher=m), ['pick', 'say'], include=folder, chat=True, limit=4).items.set_index('task')
    ours = score(m, Task('pick', ROWS[:4], 'choice_norm'))
    more = np.stack(got.loc['pick', 'logprob'])-np.stack(ours.logprob)
    assert len(got) == 8 and np.ptp(more, axis=1).max() < 2e-3 and (more < -.1).all()
    tight = lm(chat=True)
    tight.tokenizer.chat_template = tight.tokenizer.chat_template.replace("assistant: {% endif %}", "assistant:{% endif %}").replace("{{ m['role'] }}: {{", "{{ m['role'] }}:{{")
    got = harness(dict(teacher=tight), 'pick', include=folder, chat=True, limit=4).items
    assert np.allclose(np.stack(got.logprob), np.stack(score(tight, Task('pick', ROWS[:4], 'choice_norm')).logprob), atol=2e-3)
    with pytest.raises(ValueError, match='no chat template'): harness(dict(teacher=lm()), 'pick', include=folder, chat=True)

def test_harness_goes_on(folder, arms, tmp_path, monkeypatch):
    "Killed after the second of four, it asks the other two; what has changed is asked again"
    asked, real = [], H._ask
    def ask(m, task, *args):
        if len(asked) == 2 and not going: raise KeyboardInterrupt
        asked.append((m.name, task.task_name))
        return real(m, task, *args)
    monkeypatch.setattr(H, '_ask', ask)
    call, going = lambda two=arms, **kw: harness(two, ['pick', 'say'], include=folder, out=tmp_path, **kw), False
    with pytest.raises(KeyboardInterrupt): call()
    assert len(list(tmp_path.rglob('*.json'))) == 2 and not list(tmp_path.rglob('*.part-*'))
    going = True
    got = call()
    assert len(asked) == 4 == len(set(asked))
    pd.testing.assert_frame_equal(got.frame(), harness(arms, ['pick', 'say'], include=folder).frame())
    del asked[:]
    pd.testing.assert_frame_equal(call().frame(), got.frame())
    assert not asked
    call(dict(arms, pruned=lm(2)))                                                              # other weights under the same name
    assert asked == [('Llama 2', 'pick'), ('Llama 2', 'say')]
    del asked[:]
    call(limit=3)
    assert len(asked) == 4
    path = next(tmp_path.rglob('say.json'))
    path.write_text('{half')
    with pytest.raises(ValueError, match='move it away'): call()

def test_names_of_files(tmp_path):
    ps = [H._items_file(tmp_path, a, 't').relative_to(tmp_path).parts[0] for a in ('SFT', 'self-data', '../up', 'a b', 'a/b', '..', '<b>', '.hidden')]
    assert ps[:2] == ['SFT', 'self-data'] and len(set(ps)) == 8 and not any(o.startswith('.') or '/' in o for o in ps)

def test_groups_are_one_task(folder, arms, no_defaults):
    got = harness(arms, dict(both=dict(metric='acc')), include=folder)
    assert got.tasks == dict(both='acc') and got.items.groupby('arm').size().tolist() == [14, 14]
    o = got.items[got.items.arm == 'teacher']
    assert o['item'].tolist() == list(range(14)) and o.part.tolist() == ['pick']*7+['pick_more']*7
    assert o.score[:7].tolist() == o.score[7:].tolist()[::-1]                                   # the same questions from behind

def test_harness_refuses(folder, arms, no_defaults, monkeypatch, tmp_path):
    monkeypatch.setattr(H, '_ask', lambda *_: pytest.fail('a model was run'))
    call = lambda *a, **kw: harness(arms, *a, include=folder, **kw)
    with pytest.raises(ValueError, match="knows no task 'pik'; near are pick"): call(['say', 'pik'], out=tmp_path/'o')
    with monkeypatch.context() as alone, pytest.raises(ValueError, match='4 shots are not possible'):
        alone.setattr('lm_eval.api.task.ConfigurableTask.fewshot_docs', lambda self: None)      # a task that has no examples to show
        call({'pick': dict(shots=4)})
    with pytest.raises(ValueError, match="'endless' lets an answer have 256 tokens, and teacher reads 128"): call('endless')
    with pytest.raises(ValueError, match='no metric .bleu.'): call({'pick': dict(metric='bleu')})
    with pytest.raises(ValueError, match="no arm 'teacher'"): harness(dict(pruned=arms['pruned']), 'pick', include=folder)
    with pytest.raises(FileNotFoundError, match='no folder'): harness(arms, 'pick', include=folder/'none')
    write(folder, 'gone', ROWS, output_type='multiple_choice', doc_to_choice='{{choices}}', doc_to_target='answer', metric_list=MEAN('acc'))
    (folder/'gone.jsonl').unlink()
    try:
        with pytest.raises(OSError, match="task 'gone' could not be loaded"): call('gone')
    finally: (folder/'gone.yaml').unlink()
    write(folder, 'corpus', ASKS, output_type='generate_until', doc_to_target='{{completion}}', metric_list=[dict(metric='bleu', aggregation='bleu', higher_is_better=True)])
    try:
        with pytest.raises(ValueError, match="'corpus' has no metric None that is a mean"): call('corpus')
    finally: (folder/'corpus.yaml').unlink(), (folder/'corpus.jsonl').unlink()
    (folder/'mixed.yaml').write_text(json.dumps(dict(group='mixed', task=['pick', 'say'])))
    try:
        with pytest.raises(ValueError, match="'mixed' are counted in different ways .pick by acc_norm, say by exact_match"): call('mixed')
    finally: (folder/'mixed.yaml').unlink()
    assert not (tmp_path/'o').exists()
    for o in ('lm_eval', 'lm_eval.evaluator', 'lm_eval.models.huggingface', 'lm_eval.tasks'): monkeypatch.setitem(sys.modules, o, None)
    with pytest.raises(ImportError, match='pip install .lm_eval'): call('pick')

def test_the_list_is_what_the_package_knows():
    "Names, metrics and filters of the leaderboard's six, read from the package's own files"
    pytest.importorskip('lm_eval')
    from pathlib import Path
    import lm_eval.tasks
    home = Path(lm_eval.tasks.__file__).parent
    tm = lm_eval.tasks.TaskManager(include_path=[str(home/d) for d in ('arc', 'hellaswag', 'mmlu/default', 'truthfulqa', 'winogrande', 'gsm8k')], include_defaults=False)
    for k, v in OPENLLM_V1.items():
        cfg = tm.task_index[k].cfg
        metrics = [m['metric'] for m in cfg.get('metric_list') or cfg['aggregate_metric_list']]
        assert v['metric'] in metrics and ('filter' not in v or v['filter'] in [f['name'] for f in cfg['filter_list']]), k
    assert {k: v['shots'] for k, v in OPENLLM_V1.items()} == dict(arc_challenge=25, hellaswag=10, mmlu=5, truthfulqa_mc2=0, winogrande=5, gsm8k=5)

# ---- kinds

def made(arms, hard, task): return pd.DataFrame([dict(task=task, metric='exact', arm=a, item=i, score=float(h < p), answer='', reference=str(i)) for a, p in arms.items() for i, h in enumerate(hard)])

def test_kinds():
    hard = {t: np.random.default_rng(i).random(50) for i, t in enumerate(('sums', 'order', 'facts'))}
    r = Recovery(pd.concat([made(dict(teacher=p, pruned=q), hard[t], t) for t, p, q in (('sums', .9, .3), ('order', 1., .6), ('facts', .8, .8))]))
    f, k = r.frame().set_index(['task', 'arm']).recovery, r.by().set_index(['kind', 'arm'])
    assert k.loc[('multi-step reasoning', 'pruned'), 'recovery'] == pytest.approx((f['sums', 'pruned']+f['order', 'pruned'])/2) and k.loc[('multi-step reasoning', 'pruned'), 'n'] == 100
    assert (k.xs('teacher', level='arm').recovery == 100).all() and 'likelihood' not in k.index.get_level_values(0)
    d = r.by({'told': ['facts'], 'worked': ['sums', 'order']}, than='teacher').set_index(['kind', 'arm'])
    assert d.loc[('told', 'pruned'), 'verdict'] == 'inconclusive' and d.loc[('worked', 'pruned'), 'verdict'] == 'teacher is better'

# ---- several trainings

def test_a_bad_training_is_bad_on_every_task():
    "Runs that are all right or all wrong, alike on every task: the average is as uncertain as each of them"
    good = dict(teacher=[1], x=[1, 0, 1, 0, 1])
    items = pd.DataFrame([dict(task=t, metric='exact', arm=a, item=i, run=r, score=float(v), answer='', reference=str(i)) for t, n in (('a', 40), ('b', 30), ('c', 7)) for a, vs in good.items() for r, v in enumerate(vs) for i in range(n)])
    f = Recovery(items).frame().query("arm=='x'").set_index('task')
    assert len(f) == 4
    for k in f.index: assert (f.low[k], f.score[k], f.high[k]) == pytest.approx((.2, .6, 1.))
    assert Recovery(items).by({'both': ['a', 'b']}, than='teacher').query("arm=='x'").low.item() == pytest.approx(20.)

def test_silence_comes_back_from_a_csv(tmp_path):
    "What a public task calls its metric does not decide whether an empty answer is one"
    said = pd.DataFrame([dict(task=t, metric=m, arm='teacher', item=i, score=0., answer='', reference='', reply=r) for t, m, rs in (('say', 'exact_match', ('yes', '', '')), ('pick', 'acc', (None,)*3)) for i, r in enumerate(rs)])
    said.to_csv(tmp_path/'items.csv', index=False)
    for o in (said, pd.read_csv(tmp_path/'items.csv')):
        f = degeneration(o).frame().set_index(['task', 'sign'])
        assert set(f.index.get_level_values(0)) == {'say'} and f.loc[('say', 'empty'), 'value'] == pytest.approx(2/3) and f.loc[('say', 'empty'), 'n'] == 3
