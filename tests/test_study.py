"Studies where they are stopped, shared, changed and asked wrongly"
import json, signal
from collections import Counter
from pathlib import Path
import pandas as pd, pytest, random, torch
import walker
from datasets import Dataset
from forks import Fork
from sdlab.experiment.cli import main
from sdlab.experiment.design import Design, Planner, roots
from sdlab.experiment.forecast import forecast
from sdlab.experiment.nodes import Given, Runner, family, finish_all, walk
from sdlab.experiment.steps import step, tried
from sdlab.experiment.study import Running, Study, study

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return walker.walk(tmp_path_factory.mktemp('whole')/'s')

def marks(out): return {p.parent.name: p.stat().st_mtime_ns for p in Path(out).glob('steps/*/done.json')}

def answers(found): return found.items().sort_values(['arm', 'task', 'item']).reset_index(drop=True)

def same(a, b):
    "Do two studies say the same?"
    pd.testing.assert_frame_equal(answers(a), answers(b), check_exact=False, rtol=1e-5)
    assert a.plan==b.plan and list(a.data)==list(b.data) and marks(a.out).keys()==marks(b.out).keys()
    p, q = (o.student('both').model.state_dict() for o in (a, b))
    assert all(torch.allclose(p[n], q[n], atol=1e-5) for n in p)

def test_kill_9_anywhere(tmp_path, whole):
    "Killed again and again, each time a few steps later: what was finished is left alone, and the end is the same"
    out, was = tmp_path/'s', {}
    for k in (1, 3, 5):
        p = Fork(walker.die, str(out), k)
        assert p.wait()==-signal.SIGKILL, p.said()[-2000:]
        now = marks(out)
        assert len(now)==len(was)+k-1 and all(now[i]==t for i,t in was.items())
        was = now
    found = walker.walk(out)
    assert {k: t for k,t in marks(out).items() if k in was}==was
    same(found, whole)

def test_two_processes_share_the_steps(tmp_path, whole):
    log = tmp_path/'log'
    both = [Fork(walker.beside, str(tmp_path/'s'), str(log)) for _ in '12']
    assert [p.wait() for p in both]==[0, 0], both[0].said()[-2000:]+both[1].said()[-2000:]
    took = [line.split() for line in log.read_text().splitlines()]
    assert max(Counter(k for _,k in took).values())==1 and len({p for p,_ in took})==2
    same(Study(tmp_path/'s'), whole)

def test_a_second_run_does_nothing_and_a_changed_step_only_what_depends_on_it(tmp_path, whole):
    was = marks(whole.out)
    found = walker.walk(whole.out, say=lambda s: pytest.fail(s))
    assert marks(whole.out)==was and not found.stale
    deeper = walker.walk(whole.out, n=3)
    new = [deeper.settings['nodes'][k]['step'] for k in marks(whole.out) if k not in was]
    assert 'rewrite' not in new and Counter(new)['best']==1 and Counter(new)['prune']==1        # the rewriting is the teacher's
    assert set(deeper.stale.values()) >= {'best', 'prune', 'tune'} and 'rewrite' not in deeper.stale.values()
    assert {k: t for k,t in marks(whole.out).items() if k in was}==was
    walker.walk(whole.out)                                                                        # as the other tests find it

# A world of strings, in which a set says how it was made: the oracle of what is the same
made = []
def grow(rows, text='a', times=1)->Dataset:
    new = f"({rows[0]['text']}+{text}*{times})"
    made.append(new)
    return Dataset.from_list([dict(text=new)])

def test_staleness_against_an_oracle(tmp_path):
    "Thirty random changes of three arms: each expression is made once in all, whatever the keys say"
    draw, start = random.Random(0), dict(rows=Given(Dataset.from_list([dict(text='x')]), 'x'), lm=Given('t', 't'))
    made.clear()
    arms = {a: [step(grow, draw.choice('ab'), draw.randint(1, 2)) for _ in range(4)] for a in 'pqr'}
    wanted = set()
    for _ in range(30):
        arm, i = draw.choice('pqr'), draw.randrange(4)
        arms[arm][i] = arms[arm][i](text=draw.choice('ab'), times=draw.randint(1, 2))
        nodes = [walk(arms, a, start)['rows'] for a in arms]
        runner = Runner(tmp_path, say=lambda s: None)
        finish_all(runner, nodes)
        for a,n in zip(arms, nodes):
            text = 'x'
            for s in arms[a]:
                text = f"({text}+{s.settings.get('text', 'a')}*{s.settings.get('times', 1)})"
                wanted.add(text)
            assert runner.value(n)[0]['text']==text
    assert sorted(made)==sorted(wanted)

def test_choices_are_made_on_validation_items_only(whole):
    "Other evaluation items, or none: the rates are as they were; other validation items: they are open again"
    def design(tasks, seen): return Design(walker.teacher(), walker.asked(16), tasks, walker.arms(), validation=seen)
    known = forecast(design(walker.task(7), walker.task(99, 4)), whole.out)
    assert known.open==0 and known.steps.set_index('step').done['tune']==2
    assert forecast(design(walker.task(1), walker.task(98, 4)), whole.out).open>0
    assert whole.choices.groupby('arm').chosen.sum().tolist()==[1, 1]
    with pytest.raises(ValueError, match='give `validation`'): forecast(design(walker.task(1), None))

def test_a_variation_reaches_the_parents():
    depth = {'depth': dict(compare=['both'], vary={'best.n': [1, 2]})}
    d = Design('t', walker.asked(4), walker.task(1), {k: tuple(v) for k,v in walker.arms().items()}, questions=depth, validation=walker.task(2))
    plan = Planner(d, roots(d, 0, 't'), lambda nodes: None).planned(d.asked())['depth']
    def cuts(arm): return {n.step.settings.get('n', 1) for n in family(plan[arm][0].ends).values() if n.step.name=='best'}
    assert (cuts('both, n 1'), cuts('both, n 2'))==({1}, {2})

def test_what_is_not_kept_is_made_again(tmp_path):
    found = walker.walk(tmp_path/'s', keep='needed')
    sft, both = (found.runs(a)[0]['lm'] for a in ('SFT', 'both'))
    assert (found.folder(sft)/'model').exists() and not (found.folder(both)/'model').exists()
    with pytest.raises(ValueError, match='was not kept'): Study(found.out).student('both')
    assert found.student('both').n==4                                                             # it is still in memory
    again = walker.walk(tmp_path/'s', keep='needed')
    assert again.student('both').fingerprint==found.student('both').fingerprint and (found.folder(both)/'model').exists()

def test_what_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match='tiny'): study(None, walker.asked(), walker.task(1), {}, whole.out)
    with pytest.raises(ValueError, match="There is no arm 'SFTT': did you mean 'SFT'"): whole.runs('SFTT')
    with pytest.raises(ValueError, match='There is no question'): walker.walk(tmp_path/'q', ask=('everything',))
    assert not (tmp_path/'q').exists()
    with pytest.raises(ValueError, match='at least 1, not 0'): walker.walk(tmp_path/'q', workers=0)
    with pytest.raises(ValueError, match='Several workers'): walker.walk(tmp_path/'q', workers=2)
    with pytest.raises(RuntimeError, match='would be dropped'): study(walker.teacher(), walker.asked(8), walker.task(1), {'pruned': [step('best', n=6), step('prune')]}, tmp_path/'d', running=Running(say=lambda s: None))
    for kind in ('study', 'comparison'):
        (tmp_path/kind).mkdir()
        (tmp_path/kind/f'{kind}.json').write_text('{"format": 1, "teacher": "pocket"}')
        with pytest.raises(ValueError, match='another version of sdlab'): walker.walk(tmp_path/kind)
    (tmp_path/'mine').mkdir(), (tmp_path/'mine'/'thesis.txt').write_text('all of it')
    with pytest.raises(ValueError, match='is no study'): walker.walk(tmp_path/'mine')

def test_an_interrupt_is_one_sentence(tmp_path, monkeypatch, capsys):
    import sdlab.experiment.nodes as N
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(N, 'take', stop)
    assert main(['run', 'quick', '--out', str(tmp_path/'d')])==130
    assert 'goes on from there' in capsys.readouterr().err

def test_status_is_told_from_the_folder(whole):
    "What a watcher sees: every step, how it stands, and the log of a training"
    found = Study(whole.out)
    status = found.status()
    assert set(status[status.status!='stale'].status)=={'done'} and len(found.finished)==1
    log = found.progress(found.runs('SFT')[0]['lm'])
    assert len(log)>=1 and 'loss' in log
    assert {'arm', 'steps', 'wall', 'score'} <= set(found.frame().columns)

@pytest.mark.slow
def test_the_old_demo(tmp_path):
    "The demo's table, as version 0.1 printed it"
    assert main(['demo', '--out', str(tmp_path/'d')])==0
    f = Study(tmp_path/'d').recovery().frame().pivot(index='arm', columns='task', values='score')
    want = {'teacher': (100, 100, 100, 100, 1.46), 'pruned': (15, 100, 100, 98, 1.48), 'SFT': (38.5, 62, 89, 4, 1.91), 'self-data': (96.5, 100, 100, 95, 1.49),
            'SFT control': (82.5, 77, 100, 58, 1.83), 'self-data control': (100, 100, 100, 98, 1.49)}
    for a,(*shares,ppl) in want.items():
        assert [round(100*f.loc[a, t], 1) for t in ('sums', 'facts', 'choice', 'order')]==list(map(float, shares)), a
        assert round(f.loc[a, 'stories'], 2)==ppl
    page = (tmp_path/'d'/'report.html').read_text()
    assert 'What came of it' in page and 'What happened inside' in page and 'http://' not in page and '<script' not in page
