"heal.rewrite where things go wrong: torn and foreign ledgers, full disks, kill -9, many ranks; and the real sets"
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest
import rewriter
from forks import Fork
import sdlab.heal.rewrite as R
from sdlab.core.data import Text, fingerprint, rows
from sdlab.core.generate import Decoding
from sdlab.core.store import Log, OldKeyword
from sdlab.heal.rewrite import TEMPLATES, Template, ledger, rewrite, summary, verdict
from rewriter import Teacher, answers, noted, numbered, right
from toys import CHATML

SCRIPT = Path(__file__).with_name('rewriter.py')
ASK = '{prompt} is {reference}'

@pytest.fixture
def say(monkeypatch):
    "Replace the teacher's generation; gives back the list of what was asked"
    def use(f):
        asked = []
        monkeypatch.setattr(R, 'prompt_ids', noted)
        monkeypatch.setattr(R, 'generate', answers(f, asked=asked.append))
        return asked
    return use

def go(n=6, teacher=None, **kwargs): return rewrite(teacher or Teacher(), numbered(n), **{**dict(template=ASK, progress=False), **kwargs})

# selection
def test_every_reason(say):
    texts = dict(enumerate(['So #### 1', 'So #### 9', 'So one', ' ', 'My response: #### 5', Text('So #### 6', 7), 'So  #### 7. ']))
    say(lambda p: texts[int(p.split()[2][:-3])])
    ds = go(7, decoding=7)
    assert ds['reason']==['same answer', 'other answer', 'no answer', 'empty', 'banned phrase', 'cut off', 'same answer']
    assert ds['completion']==['So #### 1', *ds['reference'][1:6], 'So  #### 7.'] and ds['written'][1]=='So #### 9'
    assert ds.column_names[:5]==['prompt', 'completion', 'reference', 'source', 'reason']
    s = summary(ds)
    assert (s.n, s.kept)==(7, 2) and s.reasons.rows.sum()==7 and abs(s.reasons.percent.sum()-100)<1e-9
    assert '2 of 7 rows' in repr(s) and len(s.examples)==6 and s.plot() is not None

@pytest.mark.parametrize('rule,text,want', [('integer', 'It is 3', 'same answer'), ('integer', 'It is 3.5', 'no answer'), (None, 'x', 'not checked'), ('exact', 'it is #### 3', 'same answer'),
                                            (lambda a,r: a=='x', 'x', 'same answer'), (lambda a,r: a=='x', 'y', 'other answer'), ('auto', '#### 3.0', 'same answer')])
def test_rules(say, rule, text, want):
    say(lambda p: text)
    assert rewrite(Teacher(), [dict(prompt='1+2', completion='It is #### 3')], ASK, rule=rule, progress=False)['reason']==[want]

def test_repeated_rows_are_asked_once(say):
    asked = say(right)
    ds = rewrite(Teacher(), numbered(2)*3, ASK, progress=False)
    assert len(ds)==6 and len(asked)==2 and ds['source']==['teacher']*6

def test_html_is_text(say):
    say(lambda p: '<script>alert(1)</script>')
    s = summary(rewrite(Teacher(), [dict(prompt='<img src=x onerror=alert(2)>', completion='<b>')], ASK, progress=False))
    assert '<script' not in s._repr_html_() and '<img' not in s._repr_html_() and '<b>' not in s._repr_html_().replace('<p><b>', '')

# templates
def test_template_by_structure(say):
    asked = say(lambda p: 'So #### 1')
    go(1, Teacher(chat=CHATML), template=None)
    assert [m['role'] for m in asked[-1]]==['system', 'user'] and '### Reference Answer:\nIt is' in asked[-1][1]['content']
    go(1, template=None)
    assert asked[-1]=='What is 0+1?'
    own = Teacher(chat=CHATML)
    own.tokenizer.init_kwargs['sdlab_rewrite'] = '{reference}! {prompt}'
    go(1, own, template=None)
    assert asked[-1]=='It is #### 1! What is 0+1?'
    with pytest.raises(ValueError, match='no template'): go(1, template='usng')
    with pytest.raises(ValueError, match='A chat model answers a plain text'): rewrite(own, ['Once upon a time.'])

def test_a_template_travels_with_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer
    from toys import toy
    t = toy()
    t.init_kwargs['sdlab_rewrite'] = '{prompt} {reference}'
    t.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).init_kwargs['sdlab_rewrite']=='{prompt} {reference}'

def test_prefill_is_not_part_of_the_answer(monkeypatch):
    seen = {}
    def generate(lm, prompts, decoding, prefill='', on_batch=None):
        seen.update(prefill=prefill, decoding=decoding)
        on_batch([(0, Text('2+3 = 5. #### 5', 9))])
    monkeypatch.setattr(R, 'generate', generate)
    ds = rewrite(Teacher(), [dict(prompt='2+3?', completion='#### 5')], 'gsm8k', progress=False, decoding=(how := Decoding(44, temperature=.7, seed=3, batch_size=5)))
    assert seen==dict(prefill="Great! Let's think step by step. ", decoding=how)
    assert ds['completion']==['2+3 = 5. #### 5']

def test_loose_keywords_of_version_01(say):
    say(right)
    want = go(2, decoding=Decoding(44, seed=3))
    with pytest.warns(OldKeyword, match=r'rewrite\(max_new_tokens=...\) is decoding=Decoding\(max_new_tokens=...\)'): got = go(2, max_new_tokens=44, seed=3)
    assert fingerprint(got)==fingerprint(want)
    say(lambda p: ' three pens')
    with pytest.warns(OldKeyword, match=r'template=Template\(share=...\)'): rewrite(Teacher(), ['Ann has 12 pens. Ben has 3 pens.'], share=.5, progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'.*Decoding"): go(2, max_tokens=44)

# plain text
def test_text_is_continued_from_a_word_on(say):
    text = 'Once upon a time there was a river. Ann has 12 pens. Ben has 3 pens. Who has more? Ann has more.'
    asked = say(lambda p: Text(' a river with a great many more words than the rest of that text has room for, and then some more of them', 40))
    ds = rewrite(Teacher(), [text], progress=False)
    r = ds[0]
    assert r['prompt']+r['reference']==text and r['reference'][0]==' ' and asked==[r['prompt']]
    assert (r['source'], r['reason'], r['ended'])==('teacher', 'continued', False)
    from sdlab.core.data import completion_ids
    n = lambda t: len(completion_ids(Teacher().tokenizer, t, end=False))
    assert n(r['completion'])<=n(r['reference'])+1                    # no longer than what it stands for

# refusals
def test_wrong_rule_is_seen_before_the_teacher_is_asked(say):
    asked = say(right)
    with pytest.raises(ValueError, match="'choice' finds no answer in any of the 6 references"): go(rule='choice')
    with pytest.raises(ValueError, match="no rule 'finl'"): go(rule='finl')
    with pytest.raises(ValueError, match='all of them are empty'): rewrite(Teacher(), [''])
    assert not asked

def test_rows_without_room(say):
    say(right)
    long = dict(prompt='What is 1+1? '+'river '*600, completion='#### 2')
    with pytest.warns(UserWarning, match='1 of 3 rows leave no room'): ds = rewrite(Teacher(), [*numbered(2), long], ASK, progress=False)
    assert ds['reason']==['same answer', 'same answer', 'too long'] and ds['completion'][2]=='#### 2'
    with pytest.raises(ValueError, match='No row leaves room for an answer in a context of 512'): rewrite(Teacher(), [long], ASK, progress=False)

# the ledger
def test_resumes_without_loss_or_repetition(say, tmp_path):
    asked = say(right)
    part = go(4, out=tmp_path)
    whole = go(9, out=tmp_path)
    assert len(asked)==9 and fingerprint(whole)==fingerprint(go(9)) and list(part)==list(whole)[:4]
    asked.clear()
    assert fingerprint(go(9, out=tmp_path))==fingerprint(whole) and not asked
    assert len(ledger(tmp_path))==9
    assert go(9, out=tmp_path, rule=None)['reason']==['not checked']*9 and not asked     # another rule is only another reading

@pytest.mark.parametrize('cut', [1, 5, 30, 80])
def test_a_torn_last_line_is_repaired(say, tmp_path, cut):
    asked = say(right)
    whole = go(out=tmp_path)
    path, = tmp_path.glob('*.jsonl')
    path.write_bytes(path.read_bytes()[:-cut])
    asked.clear()
    assert fingerprint(go(out=tmp_path))==fingerprint(whole) and len(asked)==1
    lines = path.read_text().splitlines()
    assert len(lines)==7 and len({json.loads(l).get('key') for l in lines})==7

def test_a_torn_head_is_written_again(say, tmp_path):
    say(right)
    tmp_path.joinpath('rewrite-0.jsonl').write_bytes(b'{"log": 2, "sett')
    assert len(go(out=tmp_path))==6 and 'settings' in json.loads((tmp_path/'rewrite-0.jsonl').read_text().splitlines()[0])

def test_damage_in_the_middle_is_counted_and_made_good(say, tmp_path):
    asked = say(right)
    whole = go(out=tmp_path)
    path, = tmp_path.glob('*.jsonl')
    lines = path.read_bytes().split(b'\n')
    lines[3] = b'\0'*40
    path.write_bytes(b'\n'.join(lines))
    asked.clear()
    with pytest.warns(UserWarning, match='1 lines of .* are damaged'): again = go(out=tmp_path)
    assert fingerprint(again)==fingerprint(whole) and len(asked)==1

@pytest.mark.parametrize('change,says', [(dict(teacher=Teacher('b')), "teacher was 'a' and is now 'b'"), (dict(template=ASK+'!'), 'user was'), (dict(decoding=9), 'max_new_tokens was 256 and is now 9'),
                                         (dict(decoding=Decoding(temperature=.5)), 'temperature was 0 and is now 0.5')])
def test_other_settings_are_refused(say, tmp_path, change, says):
    asked = say(right)
    go(out=tmp_path)
    asked.clear()
    before = {p.name:p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='other settings') as e: go(out=tmp_path, **change)
    assert says in str(e.value) and not asked and {p.name:p.read_bytes() for p in tmp_path.iterdir()}==before

def test_what_is_no_ledger_is_refused(say, tmp_path):
    asked = say(right)
    (tmp_path/'rewrite-0.jsonl').write_text('{"text": "my thesis"}\n')
    with pytest.raises(ValueError, match='not a ledger'): go(out=tmp_path)
    assert not asked and (tmp_path/'rewrite-0.jsonl').read_text()=='{"text": "my thesis"}\n'
    with pytest.raises(ValueError, match='no ledger'): ledger(tmp_path/'nowhere')
    (tmp_path/'rewrite-0.jsonl').write_text('{"ledger": 1, "settings": {}}\n')        # as version 0.1 kept it
    with pytest.raises(ValueError, match='another version of sdlab'): go(out=tmp_path)

def test_out_that_cannot_be_written(say, tmp_path):
    asked = say(right)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='Cannot write to .*file'): go(out=tmp_path/'file'/'x')
    if Path('/dev/full').exists():
        (tmp_path/'full').mkdir()
        (tmp_path/'full'/'rewrite-0.jsonl').symlink_to('/dev/full')
        with pytest.raises(OSError, match='No space left on device.*what is done is kept'): go(out=tmp_path/'full')
    if os.geteuid():
        (tmp_path/'shut').mkdir(mode=0o500)
        with pytest.raises(PermissionError, match='Cannot write'): go(out=tmp_path/'shut')
    assert not asked

def test_disk_that_fills_up_on_the_way(say, tmp_path):
    asked = say(right)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, old[1]))
        with pytest.raises(OSError, match='Cannot write to .*rewrite-0.jsonl.*what is done is kept'): go(20, out=tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    kept = len(ledger(tmp_path))
    assert 0<kept<20 and (tmp_path/'rewrite-0.jsonl').read_bytes().endswith(b'\n')       # no torn line is left behind
    asked.clear()
    assert go(20, out=tmp_path)['source']==['teacher']*20 and len(asked)==20-kept

def test_an_interrupt_leaves_a_valid_ledger(say, tmp_path):
    def stop(p):
        if p.startswith('What is 4'): raise KeyboardInterrupt
        return right(p)
    say(stop)
    with pytest.raises(KeyboardInterrupt): go(out=tmp_path)
    assert len(ledger(tmp_path))==4
    asked = say(right)
    assert len(go(out=tmp_path))==6 and len(asked)==2

def test_one_writer_at_a_time(say, tmp_path):
    say(right)
    go(1, out=tmp_path)
    with Log(tmp_path/'rewrite-0.jsonl'):
        with pytest.raises(ValueError, match='Another process is writing'): go(out=tmp_path)

# other processes
def run(out, wait=0, n=30, **env):
    return Fork(rewriter.main, str(out), wait, n, env=env)

def result(p):
    assert p.wait(500)==0, p.said()
    return json.loads(p.said().splitlines()[-1])

def asked_by(folder): return [l for f in sorted(folder.glob('asked-*.txt')) for l in f.read_text().splitlines()]

def test_kill_9(tmp_path):
    out, path = tmp_path/'out', tmp_path/'out'/'rewrite-0.jsonl'
    p, stop = run(out, .05), time.monotonic()+400
    while time.monotonic()<stop and not (path.exists() and path.read_bytes().count(b'\n')>8): time.sleep(.01)
    p.kill()
    done = len(ledger(out))
    assert 8<=done<30
    r = result(run(out))
    assert (r['rows'], r['kept'])==(30, 30)
    lines = path.read_text().splitlines()
    assert len(lines)==31 and len({json.loads(l).get('key') for l in lines})==31          # each row once
    assert len(asked_by(tmp_path))<=31                                                    # only the row that was under way is asked again

def test_ranks_share_the_rows(tmp_path):
    out = tmp_path/'out'
    rs = [result(p) for p in [run(out, RANK=str(i), WORLD_SIZE='3') for i in range(3)]]
    assert len({r['fingerprint'] for r in rs})==1 and all(r['rows']==30 for r in rs)
    assert len(list(out.iterdir()))==3 and len(asked_by(tmp_path))==30==len(set(asked_by(tmp_path)))

def test_another_number_of_ranks_goes_on(say, tmp_path, monkeypatch):
    asked = say(right)
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '1')
    with pytest.raises(TimeoutError, match='5 rows of other ranks are missing'): go(10, out=tmp_path, patience=.3)
    assert len(asked)==5
    monkeypatch.setenv('WORLD_SIZE', '1'); monkeypatch.setenv('RANK', '0')
    assert len(go(10, out=tmp_path))==10 and len(asked)==10 and len(set(asked))==10
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='needs out='): go(10)

@pytest.mark.slow
def test_torchrun(tmp_path):
    out = tmp_path/'out'
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', SCRIPT, str(out), '0.01', '30'], capture_output=True, text=True, timeout=900)
    assert p.returncode==0, p.stderr
    rs = [json.loads(l) for l in p.stdout.splitlines() if l.startswith('{')]
    assert [r['rows'] for r in rs]==[30, 30] and len({r['fingerprint'] for r in rs})==1 and len(set(asked_by(tmp_path)))==30==len(asked_by(tmp_path))

# real models, real rows
@pytest.fixture(scope='module')
def stories(data):
    from sdlab.core.model import load
    return load(data/'models'/'stories-260k')

def test_real_stories_are_continued(stories, data, tmp_path):
    texts = rows(data/'tinystories'/'stories.json', limit=6)
    ds = rewrite(stories, texts, decoding=60, out=tmp_path, progress=False)
    assert ds['source']==['teacher']*6 and ds['reason']==['continued']*6
    assert all((r['prompt']+r['reference'])==t['text'][:len(r['prompt']+r['reference'])] for r,t in zip(ds, texts))
    import torch
    from sdlab.core.data import decode, prompt_ids
    for r in ds.select(range(2)):                                                          # an oracle: greedy, one row alone, by the model's own generate
        ids = torch.tensor([prompt_ids(stories.tokenizer, r['prompt'])])
        want = stories.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=sorted(stories.stops), pad_token_id=0)[0, ids.shape[1]:].tolist()
        assert r['completion'].startswith(decode(stories.tokenizer, want[:40]).rstrip('\ufffd'))
    assert fingerprint(rewrite(stories, texts, decoding=60, out=tmp_path, progress=False))==fingerprint(ds)

@pytest.mark.parametrize('name,rule', [('gsm8k/train.jsonl', 'final'), ('gsm8k/test.jsonl', 'integer'), ('dolly/dolly_train.json', 'auto'), ('llm-adapters/ARC-Easy/train.json', 'choice')])
@pytest.mark.filterwarnings('ignore:.*leave no room')
def test_real_sets_with_a_model_that_cannot(stories, data, name, rule):
    ds = rewrite(stories, rows(data/name, limit=12), 'refer', rule=rule, decoding=24, progress=False)
    assert len(ds)==12 and all(r['completion']==r['reference'] for r in ds if r['source']=='reference')
    assert all(r['reason'] in ('cut off', 'too long', 'no answer', 'other answer', 'empty', 'banned phrase') for r in ds if r['source']=='reference')

def test_real_references_can_be_read(data):
    "Every reference of the real sets has an answer under its rule, and agrees with itself"
    for name,rule in [('gsm8k/train.jsonl', 'final'), ('gsm8k/train.jsonl', 'integer'), ('gsm8k/test.jsonl', 'final'), ('llm-adapters/ARC-Challenge/train.json', 'choice'), ('llm-adapters/boolq/test.json', 'choice')]:
        got = [verdict(c, c, rule, ()) for c in rows(data/name)['completion']]
        assert set(got)=={('teacher', 'same answer')}, (name, rule, [c for c,g in zip(rows(data/name)['completion'], got) if g[0]!='teacher'][:3])
    from sdlab.core.answers import extract
    arc = rows(data/'llm-adapters/ARC-Easy/train.json')
    assert [extract(c, 'choice') for c in arc['completion']]==['ABCDE'[int(a[-1])-1] for a in arc['answer']]
    gsm = rows(data/'gsm8k/train.jsonl')['completion']
    assert sum(extract(c, 'final')==extract(c, 'integer') for c in gsm)==len(gsm)           # the two rules read GSM8K alike
