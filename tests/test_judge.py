"Judging against sums done by hand, and what a judge must refuse"
import itertools, math
import numpy as np, pandas as pd, pytest, torch
import families
from sdlab.core.answers import Task
from sdlab.core.stats import wilson
from sdlab.core.data import rows
from sdlab.core.model import LM
from sdlab.judge.recovery import Recovery, recovery
from sdlab.judge.score import score, score_all, total

def lm(seed=0, name='Llama', vocab=None):
    return LM(families.tiny(name, seed=seed, **(dict(vocab_size=vocab) if vocab else {})), families.tokenizer(), f'{name} {seed}')

@pytest.fixture(scope='module')
def teacher(): return lm()

@pytest.fixture(scope='module')
def tasks():
    return [Task('write', [dict(prompt=f'say {c}', completion=c) for c in 'abcdef'], rule=lambda a, r: a[:1] == r, max_new_tokens=3),
            Task('pick', [dict(prompt=f'{c}?', choices=['yes', 'no', 'maybe so'], answer=i % 3) for i, c in enumerate('abcdef')], 'choice'),
            Task('tell', ['once upon', 'a time', 'x', 'there was a longer text than the others'], 'perplexity')]

def surprise(m, prompt, text):
    "Minus log-probability of `text` after `prompt`, one token after the other, no batch"
    tok = m.tokenizer
    ids = [tok.bos_token_id][:0]+tok(prompt, add_special_tokens=False).input_ids
    out = 0.
    for t in tok(text, add_special_tokens=False).input_ids:
        with torch.no_grad(): out -= m.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[t].item() if ids else 0.
        ids.append(t)
    return out

# ---- items

@pytest.mark.parametrize('name', ['Llama', 'GPT-2', 'OPT'])
def test_perplexity_by_hand(name, tasks):
    m = lm(name=name)
    got = score(m, tasks[2], batch_size=3)
    for text, nll, n in zip(tasks[2].rows['text'], got.nll, got.tokens):
        want = surprise(m, '', text+'<eos>')
        assert nll == pytest.approx(want, rel=1e-4) and n == len(text)                 # one character is one token; the first is not predicted, the end is
    assert total(got, 'perplexity') == pytest.approx(math.exp(got.nll.sum()/got.tokens.sum()))

def test_uniform_model(tasks):
    m = lm()
    m.model.get_output_embeddings().weight.data.zero_()
    got = score(m, tasks[2])
    assert total(got, 'perplexity') == pytest.approx(m.vocab, rel=1e-5) and got.score.tolist() == pytest.approx([m.vocab]*4, rel=1e-5)
    pick = score(m, tasks[1])
    assert all(a == 'no' for a in pick.answer)                                         # with every token alike the shortest option wins the sum
    assert [[round(v, 2) for v in o] for o in pick.logprob] == [[round(-k*math.log(m.vocab), 2) for k in (3, 2, 8)]]*6

@pytest.mark.parametrize('size', [1, 4, 64])
def test_choices_by_hand(teacher, tasks, size):
    got = score(teacher, tasks[1], batch_size=size)
    for r, o in zip(tasks[1].rows, got.itertuples()):
        lp = [-surprise(teacher, r['prompt'], c) for c in r['choices']]
        assert o.logprob == pytest.approx(lp, abs=2e-3)
        assert o.acc == (np.argmax(lp) == r['answer']) and o.acc_norm == (np.argmax([v/len(c) for v, c in zip(lp, r['choices'])]) == r['answer'])
    norm = score(teacher, Task('pick', tasks[1].rows, 'choice_norm'))
    assert norm.score.tolist() == got.acc_norm.tolist() and got.score.tolist() == got.acc.tolist()

def test_exact(teacher, tasks):
    got = score(teacher, tasks[0])
    said = teacher.reply(list(tasks[0].rows['prompt']), 3)
    assert got.reply.tolist() == said and got.score.tolist() == [float(s[:1] == c) for s, c in zip(said, 'abcdef')]

def test_model_is_left_as_it_was(teacher, tasks):
    teacher.model.train()
    before, dice = {k: v.clone() for k, v in teacher.model.state_dict().items()}, torch.get_rng_state()
    a = score_all({'a': teacher}, tasks)
    assert all(m.training for m in teacher.model.modules()) and torch.equal(dice, torch.get_rng_state())
    teacher.model.eval()
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())
    assert a.score.tolist() == score_all({'a': teacher}, tasks).score.tolist()

def test_long_items_are_cut_and_counted(teacher):
    with pytest.warns(UserWarning, match='1 of 1 rows are longer'): score(teacher, Task('long', ['a'*200], 'perplexity'))
    with pytest.warns(UserWarning, match='2 of 2 rows .* start was cut'): got = score(teacher, Task('long', [dict(prompt='a'*200, choices=['x', 'y'], answer=0)], 'choice'))
    assert len(got.logprob[0]) == 2 and all(v < 0 for v in got.logprob[0])             # the option is still there

# ---- sums over items

def made(arms, n=40, seed=0, task='t', metric='exact'):
    g = np.random.default_rng(seed)
    hard = g.random(n)
    return pd.DataFrame([dict(task=task, metric=metric, arm=a, item=i, score=float(h < p), answer='', reference=str(i)) for a, p in arms.items() for i, h in enumerate(hard)])

def test_recovery_and_gap():
    r = Recovery(made(dict(teacher=.9, pruned=.4, sft=.7))).frame().set_index('arm')
    s = r.score
    assert r.recovery.tolist() == pytest.approx((100*s/s.teacher).tolist())
    assert r.gap_closed.tolist() == pytest.approx((100*(s-s.pruned)/(s.teacher-s.pruned)).tolist())
    assert r.loc['teacher', 'recovery'] == 100 == r.loc['teacher', 'gap_closed'] and r.loc['pruned', 'gap_closed'] == 0
    assert (r.low <= s).all() and (s <= r.high).all() and (r.n == 40).all() and (r.interval == 'Wilson').all()
    assert Recovery(made(dict(teacher=.9, sft=.7))).frame().gap_closed.isna().all()

def test_perplexity_goes_down():
    items = pd.concat([made({a: 1.}, task='p', metric='perplexity').assign(nll=np.arange(40)*k/10, tokens=10) for a, k in (('teacher', 1), ('pruned', 2))])
    f = Recovery(items, draws=500).frame().set_index('arm')
    want = {a: math.exp(sum(i*k/10 for i in range(40))/400) for a, k in (('teacher', 1), ('pruned', 2))}
    assert f.score.to_dict() == pytest.approx(want) and not f.higher_is_better.any()
    assert f.loc['pruned', 'recovery'] == pytest.approx(100*want['teacher']/want['pruned']) and f.loc['pruned', 'recovery_high'] < 100
    d = Recovery(items, draws=500).difference('teacher', 'pruned').iloc[0]
    assert d.difference < 0 and d.verdict == 'teacher is better'

def test_wilson_is_the_inverse_of_the_score_test():
    "Every share inside would not be refused at 5 %, every one outside would"
    for k, n in ((0, 7), (3, 7), (7, 7), (490, 500)):
        lo, hi = wilson(k, n)
        inside = [p for p in np.linspace(1e-6, 1-1e-6, 4001) if abs(k/n-p) <= 1.96*math.sqrt(p*(1-p)/n)]
        assert lo == pytest.approx(min(inside), abs=3e-4) and hi == pytest.approx(max(inside), abs=3e-4)

def test_bootstrap_is_the_exact_one():
    "Four items, 256 resamples: mean difference of two arms, against all of them"
    a, b = [1., 0., 1., 1.], [0., 0., 1., 0.]
    items = pd.DataFrame([dict(task='t', metric='exact', arm=k, item=i, score=v, answer='', reference='') for k, s in (('teacher', a), ('b', b)) for i, v in enumerate(s)])
    r = Recovery(items, draws=100_000)
    _, _, _, draws, _ = r._boot['t']
    got = draws[0]-draws[1]
    want = [np.mean([a[i]-b[i] for i in d]) for d in itertools.product(range(4), repeat=4)]
    for v in sorted(set(want)): assert np.isclose(got, v).mean() == pytest.approx(np.isclose(want, v).mean(), abs=.006)
    d = r.difference('teacher', 'b').iloc[0]
    assert d.difference == .5 and (d.low, d.high) == (0., 1.) and (d.only_a, d.only_b) == (2, 0) and d.verdict == 'inconclusive'

def test_pairing_and_seeds():
    "Arms that agree on every item differ by exactly nothing; the seed decides the draws"
    items = made(dict(teacher=.5, twin=.5, other=.8), n=100)
    r = Recovery(items)
    d = r.difference('teacher', 'twin').iloc[0]
    assert (d.difference, d.low, d.high) == (0, 0, 0)
    assert r.difference('other', 'twin').equals(Recovery(items).difference('other', 'twin'))
    assert not r.difference('other', 'twin').equals(Recovery(items, seed=1).difference('other', 'twin'))
    shuffled = items.sample(frac=1, random_state=0).sort_values('arm', key=lambda s: s.map({'teacher': 0, 'twin': 1, 'other': 2}), kind='stable')
    assert r.frame().equals(Recovery(shuffled).frame())                               # the order of the rows is no information

def test_average_counts_each_task_once():
    both = pd.concat([made(dict(teacher=1., x=.5), n=10, task='small'), made(dict(teacher=1., x=.9), n=200, task='big', seed=1)])
    f = Recovery(both).frame().set_index(['task', 'arm'])
    assert f.loc[('average', 'x'), 'score'] == pytest.approx((f.loc[('small', 'x'), 'score']+f.loc[('big', 'x'), 'score'])/2)
    assert f.loc[('average', 'x'), 'n'] == 210 and 'average' not in set(Recovery(made(dict(teacher=1.))).frame().task)

# ---- the whole of it

def test_recovery_of_models(teacher, tasks, tmp_path):
    arms = {'pruned': lm(1), 'SFT': lm(2), '<b>self</b>': lm(3)}
    r = recovery(teacher, arms, tasks)
    f = r.frame()
    assert len(f) == 4*4 and r.arms == ['teacher', *arms] and list(r.tasks) == ['write', 'pick', 'tell']
    page = r._repr_html_()
    assert '<b>self</b>' not in page and '&lt;b&gt;self' in page and 'lower is better' in page and 'gap' in page
    assert 'teacher' in repr(r)
    p = r.to_csv(tmp_path/'deep'/'table.csv')
    back = pd.read_csv(p)
    assert back.score.tolist() == pytest.approx(f.score.tolist()) and (tmp_path/'deep'/'table.items.csv').exists()
    again = Recovery(pd.concat([score_all({'teacher': teacher}, tasks), *(score_all({k: m}, tasks) for k, m in arms.items())]))
    pd.testing.assert_frame_equal(again.frame().sort_values(['task', 'arm']).reset_index(drop=True), f.sort_values(['task', 'arm']).reset_index(drop=True))
    assert r.plot().get_ylabel().startswith('recovery') and r.plot(what='score').get_ylabel() == 'score (%)'
    import matplotlib.pyplot as plt
    plt.close('all')

def test_refusals(teacher, tasks):
    with pytest.raises(ValueError, match='no items'): Task('none', rows(['a']).select([]), 'perplexity')
    with pytest.raises(ValueError, match='lacks choices'): Task('pick', [dict(prompt='a', completion='b', answer=0)], 'choice')
    with pytest.raises(ValueError, match='at least two options'): score(teacher, Task('pick', [dict(prompt='a', choices=['x'], answer=0)], 'choice'))
    with pytest.raises(ValueError, match='no token that could be predicted'): score(LM(teacher.model, families_without_eos()), Task('t', ['a'], 'perplexity'))
    other = lm(vocab=120)
    with pytest.raises(ValueError, match="big and teacher have different vocabularies.*'tell'"): recovery(teacher, {'big': other}, tasks)
    assert len(recovery(teacher, {'big': other}, tasks[:2]).frame()) == 3*2             # answers can be compared all the same
    with pytest.raises(ValueError, match='no tasks'): recovery(teacher, {}, [])
    with pytest.raises(ValueError, match='different items'): Recovery(made(dict(teacher=1., x=1.)).iloc[:-1])
    with pytest.raises(ValueError, match='lack metric'): Recovery(made(dict(teacher=1.)).drop(columns='metric'))

def families_without_eos():
    tok = families.tokenizer()
    tok.eos_token = None
    return tok
