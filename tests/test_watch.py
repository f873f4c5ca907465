"What a notebook would not show of Watch: kills, pauses, other processes, interrupts, hostile text, and what is left after each"
import json, os, signal, subprocess, sys, textwrap, threading, time
from pathlib import Path
import pandas as pd, pytest, torch
import families
from forks import Fork
from sdlab.core.answers import Task
from sdlab.core.data import rows
from sdlab.core.model import LM, load
from sdlab.core.store import OldKeyword, only_writer
from sdlab.heal.train import Evaluation, Run, Weights
from sdlab.heal.tune import training_log, tune
from sdlab.lab.watch import Watch, _RunRecord, run_snapshots

TEXTS = ['Ann has 12 pens', 'the', 'One day a small dog', 'far away', 'x+y', 'who ran to the river?']
HOW = dict(epochs=2, lr=1e-3, batch_size=8, save_steps=2)
N = 6                                                                        # steps of a whole run

def small(): return LM(families.tiny('Llama', max_position_embeddings=512), families.tokenizer(chat=True), 'tiny')
def echo(n=24): return rows([dict(prompt=f'say {(c := "abcdefgh"[i%8])}{i}', completion=f'{c}{c} #### {c}', reference=f'{c} and {c} #### {c}') for i in range(n)])
def asked(n=4): return {'echo': Task('echo', echo(n), max_new_tokens=4)}

def make(out=None, arms=2, probe=None, resume=True, **more):
    lm = small()
    both = {'SFT': (lm, 'reference'), 'self-data': (lm, 'completion')}
    how = dict(run=Run(out, resume=resume), evaluation=Evaluation(probe=probe, every=2), **HOW)
    seen = dict(teacher=lm, texts=TEXTS, prompts=['say a1'], tasks=asked(), max_new_tokens=4)
    return Watch(dict(list(both.items())[:arms]), echo(), **{**seen, **how, **more})

def workers(): return [o for o in threading.enumerate() if o.name == 'sdlab-worker']
def state(lm): return {k: v.clone() for k, v in lm.model.state_dict().items()}
def close(a, b, eps=1e-6): return max((a[k]-b[k]).abs().max().item() for k in a) < eps
def states(w): return w.frame().state.tolist()
def lines(w): return [l.get_xydata().tolist() for ax in w.figure().axes for l in ax.get_lines()]

def until(f, seconds=120):
    end = time.monotonic()+seconds
    while not f():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)

class Gate:
    "A probe that lets the training pass only when it may"
    def __init__(self, free=0): self.free, self.looks = threading.Semaphore(free), 0
    def __call__(self, lm):
        self.looks += 1
        assert self.free.acquire(timeout=120)
        return dict(looks=self.looks)
    def open(self): self.free.release(10**4)

@pytest.fixture(autouse=True)
def nothing_runs_on():
    yield
    until(lambda: not workers(), 30)

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return make(tmp_path_factory.mktemp('whole')/'run').run()

# ---- a run

def test_the_same_as_tune(whole):
    "Bit for bit, looks and all, from a thread of its own; the log is the one that the student carries"
    lm = small()
    for name, on in (('SFT', 'reference'), ('self-data', 'completion')):
        alone = tune(lm, echo(), on=on, **HOW, run=Run(progress=False))
        assert close(state(whole.students[name]), state(alone), 1e-7)
        mine, theirs = whole.log[whole.log.arm == name].reset_index(drop=True), training_log(whole.students[name])
        assert mine.step.tolist() == theirs.step.tolist() == list(range(N+1))
        for k in ('loss', 'echo', 'cka', 'tokens'): assert mine[k].dropna().tolist() == pytest.approx(theirs[k].dropna().tolist(), rel=1e-4)
    assert states(whole) == ['finished', 'finished'] and not whole.running and whole.error == '' and not workers()

def test_what_it_hands_back(whole):
    assert list(whole.students) == list(whole.checkpoints) == ['SFT', 'self-data'] and whole.checkpoint == whole.checkpoints['self-data']
    assert load(whole.checkpoint).fingerprint == whole.students['self-data'].fingerprint
    assert {k: [f.step for f in v] for k, v in run_snapshots(whole.out).items()} == {'teacher': [-1], 'SFT': [0, 2, 4, 6], 'self-data': [0, 2, 4, 6]}
    assert [f.step for f in whole.snapshots('SFT')] == [0, 2, 4, 6] and whole.snapshots('teacher')[0].anchor
    assert whole.snapshots('SFT')[0].cka.diagonal.tolist() == pytest.approx([1.]*7)                      # nothing was cut: before training it is its teacher
    assert whole.log[whole.log.step == 0].cka.tolist() == pytest.approx([1., 1.])
    assert set(whole.samples.arm) == {'teacher', 'SFT', 'self-data'} and whole.samples.question.unique().tolist() == ['say a1']
    first = whole.samples[whole.samples.step <= 0].answer.unique()
    assert len(first) == 1 and first[0] == small().reply('say a1', 4)
    with pytest.raises(ValueError, match="no arm 'sft'"): whole.snapshots('sft')

def test_reopened(whole):
    again = Watch.open(whole.out)
    pd.testing.assert_frame_equal(again.log, whole.log)
    pd.testing.assert_frame_equal(again.samples, whole.samples)
    assert again.text() == whole.text() and lines(again) == lines(whole) and again.checkpoint == whole.checkpoint
    assert close(state(again.students['SFT']), state(whole.students['SFT']))
    again.stop()
    assert not (whole.out/'stop').exists()                                                          # nothing runs: nothing is left lying about
    with pytest.raises(ValueError, match='reopened to be looked at'): again.start()

def test_the_bare_minimum(tmp_path):
    "No teacher, no questions, no tasks, one arm that is just a model: a loss curve and a student"
    w = Watch({'mine': small()}, echo(), epochs=1, batch_size=8).run()
    assert states(w) == ['finished'] and w.log.loss.notna().all() and len(w.figure().axes) == 1 and w.snapshots('mine') == [] and len(w.samples) == 0
    assert w.widget is not None and w.marks == {}
    w.close()

# ---- stopped by hand

@pytest.mark.parametrize('rest', [True, False])
def test_stop_in_the_middle(tmp_path, rest, whole):
    "The student is finished as it is: looked at, saved, loadable, and honest about it; the other arm is left for later, or is next"
    gate = Gate(free=2)                                                                             # the looks of steps 0 and 2
    w = make(tmp_path/'run', probe=gate).start()
    until(lambda: gate.looks == 3)                                                                  # at step 4, looking
    assert w.running and w.frame().state.iloc[0] == 'training'
    w.stop(rest=rest)
    gate.open()
    w.wait(120)
    w.check()
    assert states(w) == ['stopped', 'waiting' if rest else 'finished']
    one = w.students['SFT']
    assert one.provenance['steps'][-1]['stopped'] == 'at step 4 of 6' and w.log[w.log.arm == 'SFT'].step.max() == 4
    assert w.log[w.log.arm == 'SFT'].echo.notna().iloc[-1] and gate.looks == (3 if rest else 7)     # the look that was on its way is the last
    assert load(w.checkpoints['SFT']).reply('say a1', 3) == one.reply('say a1', 3)
    before = one.fingerprint
    w.run()                                                                                         # goes on with what has not begun
    assert states(w) == ['stopped', 'finished'] and w.students['SFT'].fingerprint == before
    assert w.students['self-data'].fingerprint == whole.students['self-data'].fingerprint
    assert any(l.get_linestyle() == ':' for l in w.figure().axes[0].get_lines())
    anew = make(tmp_path/'run', probe=gate, resume=False)
    assert states(anew) == ['waiting', 'waiting'] and not anew.students
    w.close(), anew.close()

# ---- paused, killed, gone on with

def test_paused_and_gone_on_with_is_the_same_run(tmp_path, whole):
    gate = Gate(free=2)
    w = make(tmp_path/'run', probe=gate).start()
    until(lambda: gate.looks == 3)
    w.pause()
    gate.open()
    w.wait(120)
    assert states(w) == ['paused', 'waiting'] and w.error == '' and not w.students and not w.running
    w.run()
    assert states(w) == ['finished', 'finished']
    for k in w.names: assert close(state(w.students[k]), state(whole.students[k]), 1e-6)
    a, b = (o.log.drop(columns=['seconds', 'tokens_per_s', 'looks'], errors='ignore') for o in (w, whole))
    pd.testing.assert_frame_equal(a, b[a.columns], check_exact=False, rtol=1e-4)
    w.close()

SCRIPT = '''
    import os, signal, sys, time
    sys.path.insert(0, {tests!r})
    import test_watch as t
    if __name__ == '__main__':
        w = t.make({out!r}, probe=lambda lm: dict(looks=0))
        w.start()
        t.until(lambda: len(w.log) > 1)
'''

def killed(out):
    looks = []
    def probe(lm):
        looks.append(1)
        if len(looks) == 3: os.kill(os.getpid(), signal.SIGKILL)
        return dict(looks=0)
    make(out, probe=probe).run()

def slowly(out, seconds=.3):
    def probe(lm): time.sleep(seconds); return dict(looks=0)
    make(out, probe=probe).run()

def test_kill_9(tmp_path, whole):
    "Killed while it looks at step 4: the folder tells what was seen, the same call goes on from its last checkpoint, and the end is the same"
    out = tmp_path/'run'
    p = Fork(killed, str(out))
    assert p.wait() == -signal.SIGKILL, p.said()[-2000:]
    with open(out/'events.jsonl', 'a') as f: f.write('{"kind": "row", "ar')                         # and half a line
    seen = Watch.open(out)
    assert not seen.running and states(seen) == ['killed', 'waiting'] and seen.log.step.tolist() == [0, 1, 2, 3, 4] and not seen.students
    assert [f.step for f in seen.snapshots('SFT')] == [0, 2] and 'killed' in seen.text() and seen.figure() is not None
    w = make(out, probe=lambda lm: dict(looks=0)).run()
    assert states(w) == ['finished', 'finished'] and w.log[w.log.arm == 'SFT'].step.tolist() == list(range(N+1))
    for k in w.names: assert close(state(w.students[k]), state(whole.students[k]), 1e-5)
    assert seen.log.equals(w.log) and [f.step for f in seen.snapshots('SFT')] == [0, 2, 4, 6]          # who looks on sees it too
    w.close()

def test_from_another_process(tmp_path):
    "Seen while it runs, kept out, and stopped in order from outside"
    out = tmp_path/'run'
    p = Fork(slowly, str(out))
    try:
        until(lambda: (out/'events.jsonl').exists() and Watch.open(out).log.step.max() >= 1)
        seen = Watch.open(out)
        assert seen.running and seen.frame().state.iloc[0] == 'training' and 'training' in seen.text()
        late = make(out, probe=lambda lm: dict(looks=0))
        late.start().wait(60)
        with pytest.raises(ValueError, match='being written to by another run'): late.check()
        seen.stop()
        assert p.wait(120) == 0, p.said()[-2000:]
    finally: p.kill()
    assert not seen.running and states(seen)[0] in ('stopped', 'finished')
    assert seen.students['SFT'].provenance['steps'][-1]['steps'] == seen.log[seen.log.arm == 'SFT'].step.max()

def test_a_stop_asked_of_another_process_is_left(tmp_path):
    w = make(tmp_path/'run')
    with only_writer(w.out):                                                       # as another process holds it
        (w.out/'stop').write_text('all')
        w.start().wait(60)
        assert (w.out/'stop').read_text() == 'all'
    with pytest.raises(ValueError, match='being written to by another run'): w.check()
    w.close()

def test_a_program_that_ends_pauses(tmp_path):
    "No crash in a thread that is torn away, and nothing is taken for finished"
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path/'run')))], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0 and 'Error' not in p.stderr, p.stderr[-2000:]
    assert states(Watch.open(tmp_path/'run'))[0] in ('paused', 'finished')

def test_the_newer_of_two_trains(tmp_path):
    "A cell that is run twice does not train twice"
    gate = Gate(free=1)
    a = make(tmp_path/'a', probe=gate).start()
    until(lambda: gate.looks == 2)
    threading.Timer(.3, gate.open).start()
    b = make(tmp_path/'b').start()
    assert states(a)[0] == 'paused' and not a.running and len(workers()) == 1
    b.wait(240)
    assert states(b) == ['finished', 'finished']
    a.close(), b.close()

KERNEL = '''
import sys; sys.path.insert(0, {tests!r})
import threading, time
import test_watch as t
def probe(lm): print('ready', flush=True); time.sleep(.2); return dict(looks=0)
w = t.make({out!r}, probe=probe)
'''
def test_an_interrupted_kernel(tmp_path):
    "Ctrl-C in a cell that waits: it is raised, no thread goes on, and the same object can be started again"
    from jupyter_client.manager import start_new_kernel
    from test_widgets import ask
    m, c = start_new_kernel(kernel_name='python3')
    try:
        assert 'Error' not in ask(c, KERNEL.format(tests=str(Path(__file__).parent), out=str(tmp_path/'run')))
        assert 'KeyboardInterrupt' in ask(c, 'w.run()', m.interrupt_kernel)
        said = ask(c, 'print(t.states(w), [o.name for o in threading.enumerate() if "sdlab" in o.name], w.running)')
        assert "['paused', 'waiting'] [] False" in said, said
        m2 = ask(c, 'import builtins; probe.__globals__["print"] = lambda *a, **k: None; w.run(); builtins.print(t.states(w))')
        assert "['finished', 'finished']" in m2, m2
    finally: c.stop_channels(); m.shutdown_kernel(now=True)

# ---- what goes wrong

def test_errors_are_seen_and_raised(tmp_path):
    "A probe that breaks in the thread: one sentence in the widget and in the text, the exception for who asks; mended, the run goes on"
    broken = [True]
    def probe(lm):
        if broken[0] and lm.model.get_input_embeddings() is not None and len(seen) == 1: raise RuntimeError('<b>no such file</b>')
        seen.append(1)
        return dict(looks=0)
    seen = []
    w = make(tmp_path/'run', probe=probe)
    status = w.widget.children[1].children[0]
    w.start().wait(120)
    assert w.error == 'RuntimeError: <b>no such file</b>' and '&lt;b&gt;no such file' in status.value and '<b>no such' not in status.value
    assert states(w) == ['failed', 'waiting'] and 'no such file' in w.text() and not w._views.start.disabled
    seen_again = Watch.open(tmp_path/'run')
    assert seen_again.error == 'SFT failed: <b>no such file</b>' and seen_again.error in seen_again.text() and '&lt;b&gt;' in seen_again.widget.children[1].children[0].value
    seen_again.close()
    with pytest.raises(RuntimeError, match='no such file'): w.check()
    with pytest.raises(RuntimeError): w.run()
    broken[0] = False
    w.run()
    assert states(w) == ['finished', 'finished'] and w.error == ''
    w.close()

def test_nan(tmp_path):
    w = make(tmp_path/'run', lr=1e30, max_grad_norm=0., arms=1)
    with pytest.raises(ValueError, match='NaN or infinite'): w.run()
    assert states(w) == ['failed'] and Watch.open(tmp_path/'run').figure() is not None
    w.close()

def test_what_is_refused(tmp_path, whole):
    lm = small()
    with pytest.raises(ValueError, match='No rows'): Watch({'a': lm}, [])
    with pytest.raises(ValueError, match="no column 'answer'"): Watch({'a': (lm, 'answer')}, echo())
    with pytest.raises(TypeError, match=r'should be \(LM, column\)'): Watch({'a': (lm, 3)}, echo())
    with pytest.raises(TypeError, match='Watch shows it'): Watch({'a': lm}, echo(), run=Run(progress=False))
    with pytest.raises(ValueError, match='prompts was'): make(whole.out, prompts=['other'])
    with pytest.raises(ValueError, match='how.lr was'): make(whole.out, lr=1.)
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.tex').write_text('all of it')
    with pytest.raises(ValueError, match='exists and is no watch'): make(tmp_path/'mine')
    with pytest.raises(ValueError, match='exists and is no watch'): make(tmp_path/'mine', resume=False)
    assert (tmp_path/'mine'/'thesis.tex').exists()
    with pytest.raises(FileNotFoundError, match='no run of Watch'): Watch.open(tmp_path/'mine')
    w = make(weigth_decay=1.)
    with pytest.raises(TypeError, match='did you mean weight_decay'): w.run()
    w.close()

def test_a_damaged_record_is_named(tmp_path):
    r = _RunRecord(tmp_path)
    r.add('row', 'a', 1)
    with open(r.log.path, 'a') as f: f.write('rubbish\n')
    r.add('row', 'a', 2)
    with pytest.warns(UserWarning, match='events.jsonl are damaged'): assert [e['step'] for e in r.events()]==[1, 2]

def test_adapters(tmp_path):
    "Trained unmerged: usable here; from the folder alone it is said that the base is missing"
    w = make(tmp_path/'run', arms=1, learn=Weights(lora=2, merge=False)).run()
    assert type(w.students['SFT'].model).__name__.startswith('Peft')
    with pytest.raises(ValueError, match='holds adapters without the model'): Watch.open(tmp_path/'run').students
    w.close()

def test_the_order_of_a_set_makes_no_other_run(tmp_path):
    "Names of modules print in another order in every process"
    from peft import LoraConfig
    names = [f'{k}_proj' for k in 'q k v o gate up down'.split()]
    mixed = set(names) | {f'x{i}' for i in range(1000)}                        # a wide table has another order
    for i in range(1000): mixed.discard(f'x{i}')
    assert mixed == set(names) and str(mixed) != str(set(names))
    for i, kind in enumerate((lambda o: LoraConfig(r=2, target_modules=o), lambda o: dict(rank=2, targets=o))):
        a = make(tmp_path/f'run{i}', learn=Weights(lora=kind(set(names))))
        b = make(tmp_path/f'run{i}', learn=Weights(lora=kind(mixed)))                         # refused, were it another run
        assert a.about == b.about
        with pytest.raises(ValueError, match='holds another watch'): make(tmp_path/f'run{i}', learn=Weights(lora=kind({'q_proj'})))

def test_after_close(whole, tmp_path):
    w = make(tmp_path/'run', arms=1).run()
    one = w.students['SFT'].fingerprint
    w.close(); w.close()
    assert len(w.log) == N+1 and w.figure() is not None and 'finished' in w.text() and w.students['SFT'].fingerprint == one
    with pytest.raises(ValueError, match='This Watch was closed'): w.start()
    with pytest.raises(ValueError, match='This Watch was closed'): w.widget

def test_closed_while_it_trains(tmp_path):
    gate = Gate(free=2)
    w = make(tmp_path/'run', probe=gate).start()
    until(lambda: gate.looks == 3)
    threading.Timer(.2, gate.open).start()
    w.close()
    assert not workers() and states(w) == ['paused', 'waiting']

# ---- the page

BAD = '<script>alert(1)</script> $x_$ שלום 😀'

def test_hostile_text_is_text(tmp_path):
    "As a question, as an answer, as the name of an arm: letters, in the page, in the figure and in the terminal"
    w = Watch({BAD: small()}, echo(), prompts=[BAD], epochs=1, batch_size=8, max_new_tokens=4, run=Run(tmp_path/'run'))
    top = w.widget
    w.run()
    w._record.add('sample', BAD, 3, prompt=0, answer=BAD)
    w._show(now=True)
    v = w._views
    for page in (v.answers.value, v.table.value, top.children[1].children[0].value, top.children[1].children[1].children[1].value): assert '<script' not in page
    assert '&lt;script&gt;' in v.answers.value and 'dir="auto"' in v.answers.value and BAD in w.text()
    w.figure().savefig(tmp_path/'f.png')
    w.close()

def test_the_widget_follows(tmp_path, whole):
    "Made before the run: charts, table and answers are those of the log, from the thread; controls and state follow each other"
    w = make(tmp_path/'run')
    v = w.widget and w._views
    assert not v.start.disabled and v.stop.disabled
    v.start.click()
    w.wait(240); w.check()
    log = w.log
    assert [s['name'] for s in v.loss.series] == ['SFT', 'self-data'] and v.loss.series[0]['y'] == pytest.approx(log[log.arm == 'SFT'].loss.dropna().tolist())
    assert w.shown == 'echo' and [o[1] for o in v.shown.options] == ['echo', 'cka'] and v.start.disabled and v.stop.disabled
    v.shown.value = 'cka'
    assert w.shown == 'cka' and v.evaluated.series[1]['y'] == pytest.approx(log[log.arm == 'self-data'].cka.dropna().tolist())
    v.evaluated.selected = [0, 1]
    assert w.step == 2 == v.step.value and 'SFT, step 2' in v.answers.value and 'step 6' not in v.answers.value
    v.step.value = N
    assert w.step == -1 and 'SFT, step 6' in v.answers.value
    w.step = 0
    assert v.step.value == 0 and 'SFT, step 0' in v.answers.value
    with pytest.raises(Exception, match="No evaluation gives 'sums'"): w.shown = 'sums'
    with pytest.raises(Exception, match='There is no question 1'): w.prompt = 1
    assert w.progress == 1. and w.doing == ''
    w.close()

def test_a_key_onto_nothing(whole):
    "An arrow key can land on an arm that was not looked at yet"
    seen = Watch.open(whole.out)
    v = seen.widget and seen._views
    v.evaluated.series = [dict(name='SFT', color='#111', x=[2, 4], y=[0., 1.]), dict(name='self-data', color='#222', x=[], y=[])]
    v.evaluated.selected = [1, 0]
    assert seen.error == '' and seen.step == -1
    v.evaluated.selected = [0, 1]
    assert seen.step == 4
    seen.close()

def test_a_slider_step_is_quick(whole):
    "What needs no model is there at once; ten steps, so that a busy machine does not decide"
    seen = Watch.open(whole.out)
    v = seen.widget and seen._views
    start = time.perf_counter()
    for i in range(10): v.step.value = i%6
    assert time.perf_counter()-start < 10*.05*4
    seen.close()

def test_a_conversation_is_one_question():
    talk = [dict(role='user', content='say a'), dict(role='assistant', content='aa'), dict(role='user', content='say b')]
    w = Watch({'a': small()}, echo(8), prompts=talk, epochs=1, batch_size=8, max_new_tokens=3).run()
    assert len(w.samples.question.unique()) == 1 and 'assistant: aa' in w.text()
    w.close()

def test_a_run_in_another_process_is_followed(tmp_path):
    "The picture of a reopened run moves while that runs"
    out = tmp_path/'run'
    p = Fork(slowly, str(out), .5)
    try:
        until(lambda: (out/'events.jsonl').exists() and len(Watch.open(out).log))
        seen = Watch.open(out)
        v = seen.widget and seen._views
        n = sum(len(s['x']) for s in v.loss.series)
        until(lambda: sum(len(s['x']) for s in v.loss.series) > n)
        assert not v.stop.disabled and v.start.disabled
        v.stop.click()
        assert p.wait(120) == 0, p.said()[-2000:]
        seen.wait(60)
        assert v.stop.disabled and states(seen)[0] in ('stopped', 'finished')
        seen.close()
    finally: p.kill()

def test_loose_keywords_of_the_first_version(tmp_path):
    "Accepted for one version, with a word"
    with pytest.warns(OldKeyword, match=r'Watch\(out=...\) is run=Run\(out=...\) since 0.2'): w = Watch({'a': small()}, echo(8), out=tmp_path/'run')
    assert w.out == tmp_path/'run' and (w.out/'watch.json').exists()
    w.close()
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'watch.json').write_text('{"format": 1, "arms": {}}')
    with pytest.raises(ValueError, match='as another version of sdlab kept it'): Watch.open(tmp_path/'old')

def test_a_study_is_seen(tmp_path):
    "Its trainings, from its folder alone: finished, running in another process, failed"
    from sdlab.core.store import locked
    from sdlab.experiment.steps import step
    from sdlab.experiment.study import Running, study
    heal = step(tune, epochs=1, batch_size=8)
    arms = {'SFT': [heal(on='reference')], 'self-data': [heal]}
    found = study(small(), echo(), asked(), arms, tmp_path/'study', running=Running(say=lambda *a: None))
    w = Watch.open(tmp_path/'study')
    assert len(w.names) == 2 and states(w) == ['finished']*2 and not w.running
    assert sorted(w.frame().learns) == ['completion', 'reference'] and w.log.groupby('arm').step.max().tolist() == [3, 3]
    assert w.figure().axes and 'of a study' in w.text() and w.widget is not None and w._views.stop.disabled
    assert close(state(w.students[w.names[1]]), state(found.student(['SFT', 'self-data'][w.frame().learns.tolist()[1] == 'completion'])))
    with pytest.raises(ValueError, match='stopped where it runs'): w.stop()
    key = w._record.keys[w.names[0]]
    (found.folder(key)/'done.json').unlink()
    with locked(found.folder(key)): assert states(w)[0] == 'training' and w.running
    assert states(w)[0] == 'killed'
    (found.folder(key)/'error.txt').write_text('Traceback\nValueError: <b>no</b>\n')
    assert states(w)[0] == 'failed'
    w.close()
