"The picker driven without a hand: state in, plan and figure out; two at once, broken off, closed, out of order, and with text that would be markup"
import gc, threading, time
import pytest, torch, traitlets
from families import L, tiny, tokenizer
from sdlab.compress.prune import prune
from sdlab.core.units import without
from sdlab.measure.exact import ExactLoss, quality
from sdlab.measure.scores import measured_steps
from sdlab.core.data import batches
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.lab.picker import Limits, Picker, _pass_of
from sdlab.measure.cost import cost
from sdlab.measure.importance import distances, random_spans

TEXTS = [dict(prompt=f'{a}+{b}=', completion=f'{a+b}, of course') for a in range(2, 6) for b in range(3)]
BAD = '<img src=x onerror=alert(1)> <script>alert(2)</script> שלום 😀 & "quotes"'


@pytest.fixture
def lm(): return LM(tiny('Qwen3'), tokenizer(), 'tiny')

@pytest.fixture
def picker(lm):
    with Picker(lm, TEXTS, prompt='2+2=', limits=Limits(4, tokens=6)) as p: yield p

def hooked(*models): return [o for m in models for o in m.modules() if o._forward_hooks or o._forward_pre_hooks]
def state(lm): return {k: v.clone() for k, v in lm.model.state_dict().items()}
def same(lm, was): return all(torch.equal(v, was[k]) for k, v in lm.model.state_dict().items())
def until(f, seconds=30):
    end = time.monotonic()+seconds
    while not f():
        assert time.monotonic()<end, 'it did not happen'
        time.sleep(.005)
def threads(): return [o for o in threading.enumerate() if o.name=='sdlab-worker']


def test_plan_is_what_is_shown(picker):
    p = picker
    for first, n, part in ((0, 1, 'block'), (4, 2, 'block'), (1, 5, 'block'), (2, 3, 'attention'), (5, 1, 'mlp')):
        p.part = part
        p.pick(first, n)
        assert (p.plan.n, p.plan.parts[part], p.cut)==(L, tuple(range(first, first+n)), (first, n, part))
        assert Plan.from_json(p.plan.to_json())==p.plan and p.plan.evidence['by']=='hand'
        assert p.plan.strip in p.text() and len(p.figure().axes)>=3
    p.wait(60)
    p.check()
    assert set(map(tuple, p.history[['first', 'dropped', 'part']].values.tolist()))>={(5, 1, 'mlp')}


def test_numbers_are_those_of_the_functions(lm, picker):
    p = picker
    assert p.numbers['perplexity'] is None or p.history.shape[0]==1       # before it is measured there is no number, and no invented one
    p.pick(1, 3).wait()
    cut, c = without(lm, p.plan), cost(lm, Plan(L, (1, 2, 3)))
    few = [TEXTS[i] for i in (0, 3, 6, 9)]
    want = ExactLoss(lm, batches(lm, few))(p.plan)
    for k in ('loss', 'kl', 'perplexity', 'kl_stderr'): assert p.numbers[k]==pytest.approx(want[k], rel=1e-4), k
    assert p.numbers['perplexity_before']==pytest.approx(want['whole'], rel=1e-4) and (p.numbers['texts'], p.numbers['tokens'])==(4, want['n'])
    assert [p.numbers[k] for k in ('params', 'macs', 'bytes', 'blocks', 'params_before', 'blocks_before')]==[c.params, c.macs, c.bytes, 3, c.whole.params, L]
    assert p.numbers['score']==pytest.approx(distances(lm, batches(lm, TEXTS)).score(1, 3)[0], abs=1e-5)
    assert p.answers=={'teacher': lm.reply('2+2=', 6), 'student': cut.reply('2+2=', 6)}
    assert p.history.iloc[-1].kl==p.numbers['kl'] and p.history.iloc[-1].blocks=='1–3'


def test_every_measure_and_part_has_a_triangle(lm, picker):
    p = picker
    for part in ('block', 'attention', 'mlp'):
        for measure in p.measures:
            p.part, p.measure = part, measure
            p.wait(120)
            p.check()
            s = p.scores[measure, part]
            assert s.of_spans and s.part==part and s.sizes==tuple(range(1, L))
            assert p.best().plan.parts[part]==s.best(p.n).parts[part] and p.numbers['score']==s.score(p.first, p.n)[0]
    want = quality(lm, batches(lm, [TEXTS[i] for i in (0, 3, 6, 9)]), part='mlp')
    assert torch.allclose(p.scores['exact KL', 'mlp'].values.nan_to_num(), want['kl'].values.nan_to_num(), atol=1e-5)
    p.wait()
    assert p.numbers['kl']==pytest.approx(p.scores['exact KL', 'mlp'].score(p.first, p.n)[0], abs=1e-6)     # one number, two ways


def test_scores_that_are_there_are_not_measured_again(lm):
    with Picker(lm, TEXTS, scores=[random_spans(lm), distances(lm, batches(lm, TEXTS[:2]))], prompt='', limits=Limits(2)) as p:
        assert p.measure=='a random span (seed 0)' and p.plan.drop==random_spans(lm).best(p.n).drop
        p.measure = 'block influence'
        p.wait()
        assert p.scores['angular distance', 'block'].texts==2 and p.scores['block influence', 'block'].texts==len(TEXTS)
        p.part = 'mlp'
        p.measure = 'a random span (seed 0)'                                # of blocks only
        with pytest.raises(ValueError, match='is not measured yet'): p.best()
        p.wait(); p.check(); p.figure(); p.text()
    with pytest.raises(ValueError, match='of a model of 4 blocks, but tiny has 6'): Picker(lm, TEXTS, scores=random_spans(4))
    with pytest.raises(TypeError, match='not str'): Picker(lm, TEXTS, scores=['angular'])


def test_history_and_the_way_back(picker):
    p = picker
    for l in (0, 2, 4): p.pick(l, 1).wait()
    p.part = 'attention'
    p.wait()
    h = p.history
    assert h['first'].tolist()[-4:]==[0, 2, 4, 4] and h.part.tolist()[-1]=='attention' and h.kl.notna().all()
    i = h.index[h['first']==2][0]
    assert p.back(i).cut==(2, 1, 'block') and p.numbers['kl']==h.kl[i]
    p.wait()
    assert len(p.history)==len(h) and p.back(-1).part=='attention'
    with pytest.raises(ValueError, match='no cut 9 in the history'): p.back(9)


@pytest.fixture
def slowly(monkeypatch):
    "The exact map takes its time, however fast the machine is"
    import sdlab.lab.picker as picker
    def slow(*args, **kwargs):
        for i,step in enumerate(measured_steps(*args, **kwargs)):
            if i>=3: time.sleep(.4)
            yield step
    monkeypatch.setattr(picker, 'measured_steps', slow)
    yield
    monkeypatch.undo()

def test_the_teacher_is_left_alone(lm, slowly, monkeypatch):
    "Two pickers on one teacher, both at long work, and the teacher asked in between; then one is cancelled, one closed in the middle"
    was, answer = state(lm), lm.reply('2+2=', 8)
    a, b = (Picker(lm, TEXTS*4, prompt='2+2=', measure='exact KL', limits=Limits(8)) for _ in range(2))
    until(lambda: a.progress>.05 and b.progress>.05)
    for i in range(5):
        a.pick(i, 1); b.pick(4-i, 2)
        assert lm.reply('2+2=', 8)==answer and not hooked(lm.model)
    a.cancel()
    until(lambda: not a.worker.busy)
    assert a.doing=='' and 0<a.scores['exact KL', 'block'].values.isfinite().sum()<L*(L+1)/2-1     # what was known stays
    b.close()
    assert not hooked(lm.model, a.lm.model, b.lm.model) and same(lm, was) and not [o for o in lm.model.modules() if o.training]
    assert torch.is_grad_enabled() and a.error==b.error==''
    a.pick(0, 2).wait(60)
    monkeypatch.undo()
    assert a.numbers['kl'] is not None and a.fill().wait(120).scores['exact KL', 'block'].sizes==tuple(range(1, L))
    a.close()
    until(lambda: not threads())
    assert not hooked(lm.model, a.lm.model) and same(lm, was)
    assert next(lm.model.parameters()).untyped_storage().data_ptr()==next(a.lm.model.parameters()).untyped_storage().data_ptr()   # nothing was copied


def test_an_interrupt_while_the_map_fills(lm, slowly, monkeypatch):
    "Ctrl-C in a cell that waits: the map stops at once, nothing is hooked, and the instrument goes on"
    was = state(lm)
    with Picker(lm, TEXTS*4, prompt='', measure='exact loss', limits=Limits(16)) as p:
        until(lambda: p.progress>.05)
        def interrupted(*a, **k): raise KeyboardInterrupt
        monkeypatch.setattr(p.worker._cond, 'wait_for', interrupted)
        with pytest.raises(KeyboardInterrupt): p.wait()
        monkeypatch.undo()
        p.wait(20)
        n = p.scores['exact loss', 'block'].values.isfinite().sum()
        assert 0<n<L*(L+1)/2-1 and p.doing=='' and p.error==''
        assert not hooked(lm.model, p.lm.model) and same(lm, was)
        p.pick(3, 1).wait()
        assert p.numbers['loss'] is not None and p.scores['exact loss', 'block'].values.isfinite().sum()==n


def test_scores_of_some_sizes_are_completed(lm):
    "What was handed in for one size is no reason never to measure the others"
    some = quality(lm, batches(lm, TEXTS), sizes=3)
    with Picker(lm, TEXTS, scores=some, prompt='', n=2, measure='exact loss', limits=Limits(4)) as p:
        p.wait(60)
        assert p.scores['exact loss', 'block'].sizes==tuple(range(1, L)) and p.best().n==2

def test_what_is_looked_at_does_not_wait_for_the_exact_map(lm, slowly):
    with Picker(lm, TEXTS*4, prompt='', measure='exact KL', limits=Limits(8)) as p:
        until(lambda: p.progress>.05)
        p.measure = 'angular distance'
        until(lambda: p._shown() is not None and p._shown().sizes==tuple(range(1, L)), 5)
        assert not p.scores['exact KL', 'block'].sizes==tuple(range(1, L))

def test_the_newest_wins(picker):
    "A slider that is dragged: what was passed over is not measured, what it stops at is"
    p = picker
    p.wait()
    before, gate = len(p.history), threading.Event()
    p.worker.now(lambda: gate.wait(10), key='held')
    for n in (2, 3, 4, 5, 4, 3): p.n = n
    gate.set()
    p.wait()
    assert p.history.dropped.tolist()[before:]==[3] and p.numbers['kl'] is not None and p.plan.parts['block']==tuple(range(p.first, p.first+3))


def test_out_of_order(picker):
    p = picker
    assert p.figure() and p.text() and p.history.shape==(0, 12) or len(p.history)<=1     # before anything is measured
    p.measure = 'exact KL'
    p.pick(2, 2)
    p.cancel()
    p.widget
    p.wait()
    p.prompt = ''
    p.wait()
    assert p.answers=={'teacher': '', 'student': ''} and 'prompt' not in p.text()
    p.prompt = '3+3='
    p.wait()
    assert p.answers['teacher']


def test_refusals(lm, picker):
    p = picker
    was = p.cut
    for name, bad, says in (('n', 0, 'from 1 to 5'), ('n', L, 'from 1 to 5'), ('first', -1, 'is outside'), ('first', L, 'is outside'), ('part', 'head', "`part` is one of"), ('measure', 'x', '`measure` is one of')):
        with pytest.raises(ValueError, match=says): setattr(p, name, bad)
    with pytest.raises(traitlets.TraitError): p.n = 'two'
    for bad in ((5, 2), (-1, 1), (0, L), (0, 0)):
        with pytest.raises(ValueError, match='is outside a model of 6 blocks'): p.pick(*bad)
    for bad, says in ((Plan(5, (1,)), 'for a model of 5 blocks, but tiny has 6'), (Plan(L, (1, 3)), 'one run'), (Plan(L), 'one run'), (Plan(L, (1,), attn=(2,)), 'one run')):
        with pytest.raises(ValueError, match=says): p.pick(bad)
    assert p.cut==was and p.error==''
    with pytest.raises(TypeError, match='takes an LM'): Picker(lm.model, TEXTS)
    with pytest.raises(ValueError, match='`texts` is empty'): Picker(lm, [])
    with pytest.raises(ValueError, match='needs `texts` for tiny'): Picker(lm)
    with pytest.raises(ValueError, match='from 1 to 5'): Picker(lm, TEXTS, n=L)
    one = LM(tiny('Llama', num_hidden_layers=1), tokenizer(), 'one')
    with pytest.raises(ValueError, match='one block: there is nothing to choose'): Picker(one, TEXTS)


def test_an_error_is_shown_and_can_be_raised(lm):
    "A prompt that is too long: one sentence, to be read and to be raised, and the picker goes on"
    with Picker(lm, TEXTS, prompt='2+2=', limits=Limits(4)) as p:
        p.widget
        p.wait()
        p.prompt = 'x'*500
        p.wait()
        assert 'leaves no room for an answer' in p.error and 'leaves no room' in p._ui.top.children[-1].children[0].value
        with pytest.raises(ValueError, match='leaves no room'): p.check()
        p.prompt = '1+1='
        p.wait()
        assert p.error=='' and p.answers['student']


def test_closed(lm):
    p = Picker(lm, TEXTS, prompt='2+2=', limits=Limits(4))
    p.widget
    p.wait()
    kept, text = p.plan, p.text()
    p.close(); p.close()
    for act in (lambda: p.pick(0, 1), lambda: setattr(p, 'n', 3), lambda: setattr(p, 'prompt', 'a'), lambda: p.fill(), lambda: p.widget):
        with pytest.raises(ValueError, match='This Picker was closed: make a new one'): act()
    assert p.plan==kept and p.text()==text and p.figure() and p._repr_mimebundle_()=={'text/plain': text} and len(p.history)==1


def test_a_cut_model_is_shown_in_the_teachers_numbers(lm):
    cut = prune(lm, Plan(L, (1, 2)))
    with Picker(cut, TEXTS, prompt='', limits=Limits(2)) as p:
        p.pick(0, 2).wait()
        assert p.plan.n==4 and p.plan.drop==(0, 1) and p.history.blocks.tolist()[-1]=='0, 3' and 'without blocks 0, 3' in p.text()
        p.widget
        assert p._ui.grid.cols==['0', '3', '4', '5'] and 'block 3: dropped' in p._ui.strip.value
        assert prune(cut, p.plan).kept==(4, 5)


# the page
def test_controls_and_state_follow_each_other(picker):
    p = picker
    p.widget
    ui = p._ui
    ui.n.value = 4
    assert p.n==4 and p.plan.drop==tuple(range(p.first, p.first+4)) and ui.grid.selected==[3, p.first]
    ui.grid.selected = [1, 3]                                             # a click on first block 3, two blocks
    assert p.cut==(3, 2, 'block') and ui.n.value==2
    ui.part.value = 'mlp'
    assert p.plan.mlp==(3, 4)
    ui.part.value, ui.measure.value = 'block', 'exact loss'
    p.wait(60)
    assert ui.grid.label=='exact loss (nats per token)' and all(isinstance(v, float) for v in ui.grid.values[0]) and ui.grid.values[4][2:]==[None]*4
    ui.best.click()
    assert p.first==p.scores['exact loss', 'block'].best(2).drop[0] and [1, p.first] in ui.grid.marks
    p.wait()
    tried = p.history
    ui.tried.selected = 0
    assert p.cut==(tried['first'][0], tried.dropped[0], tried.part[0])
    p.wait()
    assert ui.tried.selected==0 and ui.chart.selected==[0, 0]
    ui.chart.selected = [0, len(tried)-1]
    assert p.cut==(tried['first'].iloc[-1], tried.dropped.iloc[-1], tried.part.iloc[-1])
    ui.prompt.value = '3+2='
    p.wait()
    assert p.prompt=='3+2=' and p.answers['teacher'] in ui.teacher.value
    assert len(ui.tried.rows)==len(p.history)==len(ui.chart.series[0]['x'])
    p.check()


def test_a_wrong_control_is_told(picker):
    p = picker
    p.widget
    p._ui.tried.selected = 50
    assert 'no cut 50' in p.error
    p.pick(0, 1)
    assert p.error==''


def test_cells_fill_up(picker):
    p = picker
    p.widget
    p.cancel(); p.wait()
    p._asked.add((_pass_of('exact KL'), 'block'))                                      # as if it had been cancelled at once
    p.measure = 'exact KL'
    p.pick(2, 3).wait()
    cells = [v for row in p._ui.grid.values for v in row]
    assert p._ui.grid.values[2][2]==pytest.approx(p.numbers['kl']) and p._ui.grid.blank and p._ui.best.disabled
    assert {type(v) for v in cells}=={float, str, type(None)}             # measured, not measured yet, no cell


def test_text_is_not_markup(lm):
    t = [dict(prompt=BAD, completion='<b>yes</b>')]*3
    lm.name = BAD
    with Picker(lm, t, limits=Limits(2, tokens=4)) as p:
        p.widget
        p.wait()
        assert p.prompt==BAD
        shown = [p._ui.teacher.value, p._ui.student.value, p._ui.strip.value, p._ui.numbers.value]
        assert not any('<img' in o or '<script' in o for o in shown)
        p._said[p.cut, BAD] = p._said[None, BAD] = BAD                    # a model that answers in markup
        p._paint()
        assert '&lt;img src=x' in p._ui.student.value and '<img' not in p._ui.teacher.value and 'dir="auto"' in p._ui.student.value
        assert all('<img' not in c for row in p._ui.tried.rows for c in row) and BAD in p.text()


def test_it_speaks_to_those_who_do_not_see(picker):
    p = picker
    p.widget
    ui = p._ui
    assert all(o.description for o in (ui.part, ui.n, ui.measure, ui.prompt, ui.best, ui.fill))
    assert ui.grid.label and ui.grid.row_title and ui.grid.col_title and ui.chart.label and ui.tried.caption
    assert 'role="img"' in ui.strip.value and 'role="status"' in ui.numbers.value and 'zeros' not in ui.numbers.value


def test_a_picker_that_is_dropped_leaves_nothing(lm):
    import weakref
    p = Picker(lm, TEXTS, prompt='', limits=Limits(2))
    p.wait()
    p.close()
    until(lambda: not threads())
    r = weakref.ref(p)
    del p; gc.collect()
    assert r() is None and not hooked(lm.model)


def test_the_pocket_teacher_needs_nothing(teacher):
    with Picker(teacher) as p:
        until(lambda: p.numbers['kl'] is not None)
        assert p.prompt and p.numbers['perplexity_before']<1.05<p.numbers['perplexity']
        p.pick(11, 1)
        p.wait(120)
        p.check()
        assert p.answers['teacher'].endswith(p.answers['teacher'].split('#### ')[1])
        assert p.scores['angular distance', 'block'].texts==256
