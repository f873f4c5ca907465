"Films of students: on disk, in the plane, and in the Map"
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from sdlab.measure.cka import CKA, centred_gram, hsic
from sdlab.core.store import claim
from sdlab.measure.trajectory import Tracker, Snapshot, Projection, keep_snapshot, procrustes, project, read_snapshots
from sdlab.lab.map import Map

N, D, L = 40, 24, 6

def cloud(seed, layers=L+1, n=N, d=D): return torch.randn(layers, n, d, generator=torch.Generator().manual_seed(seed))@torch.diag(torch.linspace(2, .2, d))
def turn(d, seed=0): return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double())[0]
HOME = cloud(0)

def shot(points, step, name='student', lost=(), data='texts', texts=None): # Snapshot
    "A frame of a student that has these points, its CKA with HOME"
    keep = [l for l in range(L+1) if l not in lost]
    h = hsic(centred_gram(points[keep]), centred_gram(HOME), N)
    texts = tuple(f'text number {i}' for i in range(N)) if texts is None else texts
    return Snapshot(step, CKA(h.cka, tuple(keep), tuple(range(L+1)), (N,), name, 'the teacher', data=data), points[keep], name, texts)

def film(name='student', seed=1, steps=(0, 10, 20), lost=(3,), **kw):
    "A student that comes home"
    away = cloud(seed)
    return [shot(HOME+away*w, s, name, lost, **kw) for s, w in zip(steps, torch.linspace(.8, .1, len(steps)).tolist())]

TEACHER = shot(HOME, -1, 'the teacher')
def two(): return {'teacher': [TEACHER], 'a': film('a'), 'b': film('b', 2, (0, 5, 20), lost=(2, 3))}

# frames on disk
def same(a, b):
    assert (a.step, a.name, a.texts)==(b.step, b.name, b.texts) and torch.equal(a.cka.matrix.nan_to_num(9), b.cka.matrix.nan_to_num(9))
    assert (a.points is None)==(b.points is None) and (a.points is None or (torch.equal(a.points, b.points) and a.points.dtype==b.points.dtype))
    for k in ('student_layers', 'teacher_layers', 'groups', 'student', 'teacher', 'pool', 'unbiased', 'seed', 'data', 'blank'): assert getattr(a.cka, k)==getattr(b.cka, k)

def test_a_frame_comes_back(tmp_path):
    odd = 'a "quoted"/../name\n<b>\u202eשלום😀'
    frames = [TEACHER, replace(shot(HOME, 3, odd, texts=(odd,)*N), points=HOME.bfloat16()), replace(shot(HOME, 7), points=None)]
    m = frames[0].cka.matrix.clone(); m[2] = float('nan')
    frames[0] = replace(frames[0], cka=replace(frames[0].cka, matrix=m, blank=('Layer 2 is blank',)))
    for f in reversed(frames): assert keep_snapshot(f, tmp_path/'deep'/'er').parent==tmp_path/'deep'/'er'
    for a, b in zip(frames, read_snapshots(tmp_path/'deep'/'er'), strict=True): same(a, b)
    assert not list((tmp_path/'deep'/'er').glob('.*'))

def test_the_same_look_is_one_frame_and_two_students_share_a_folder(tmp_path):
    for f in two()['a']+two()['b']+two()['a']: keep_snapshot(f, tmp_path)
    assert [(f.step, f.name) for f in read_snapshots(tmp_path)]==[(0, 'a'), (0, 'b'), (5, 'b'), (10, 'a'), (20, 'a'), (20, 'b')]
    keep_snapshot(replace(two()['a'][0], texts=('new',)*N), tmp_path)
    assert read_snapshots(tmp_path)[0].texts[0]=='new'

def test_killed_while_writing_leaves_whole_frames(tmp_path):
    "A process that writes without end is killed: whatever can be read is whole"
    code = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_map as t
from dataclasses import replace
big = t.shot(t.HOME, 0)
print('go', flush=True)
for i in range(10**6): t.keep_snapshot(replace(big, step=i%50), {str(tmp_path)!r})
'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline().strip()=='go'
        for _ in range(3): # read while it writes, too
            time.sleep(.3)
            if list(tmp_path.glob('snapshot-*.safetensors')): [same(f, shot(HOME, f.step)) for f in read_snapshots(tmp_path)]
    finally: p.send_signal(signal.SIGKILL); p.wait()
    frames = read_snapshots(tmp_path)
    assert frames
    for f in frames: same(f, shot(HOME, f.step))

def test_what_is_no_film_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='There is no folder'): read_snapshots(tmp_path/'nothing')
    with pytest.raises(FileNotFoundError, match='holds no snapshots'): read_snapshots(tmp_path)
    p = keep_snapshot(TEACHER, tmp_path)
    p.write_bytes(p.read_bytes()[:200])
    with pytest.raises(ValueError, match=f'{p.name} is not a snapshot'): read_snapshots(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='Cannot write to'): keep_snapshot(TEACHER, tmp_path/'file')
    with pytest.raises(ValueError, match='expected 7 layers x 40 texts'): replace(TEACHER, points=HOME[:3])

# in the plane
@pytest.mark.parametrize('method', ['pca', 'mds'])
def test_what_cka_does_not_see_does_not_move(method):
    x = HOME.double()
    flipped = x.clone(); flipped[..., 0] *= -1
    wide = torch.nn.functional.pad(x, (0, 8))@turn(D+8)
    for y in (x@turn(D)*3-7, flipped, wide, .01*x):
        p = project([TEACHER, shot(y.float(), 5)], 4, method)
        assert p.moved[1].max()<2e-3, p.moved[1].max()
    p = project([shot(HOME, 5), TEACHER, shot(HOME, 6)], 4, method)
    assert p.anchor==1 and (p.xy[0]-p.xy[1]).abs().max()<1e-9 and (p.xy[2]-p.xy[1]).abs().max()<1e-9

@pytest.mark.parametrize('method', ['pca', 'mds'])
def test_a_frame_does_not_depend_on_its_company(method):
    a, b, c = film()
    alone, together = project([TEACHER, b], 4, method), project([a, TEACHER, c, b], 4, method)
    assert torch.allclose(alone.xy[1], together.xy[3], atol=1e-12) and torch.allclose(alone.stress[1], together.stress[3])

def test_a_student_that_comes_home_comes_nearer():
    p = project([TEACHER, *film()], 4)
    far = p.moved.mean(1)
    assert far[1]>far[2]>far[3]>far[0]==0
    d = p.frame()
    assert d.shape==(4*N, 6) and d.groupby('step').moved.mean().loc[0]==pytest.approx(far[1].item())

def test_without_a_teacher_the_first_frame_is_the_anchor():
    p = project(film(), 4)
    assert p.anchor==0 and p.moved[0].max()==0

def test_an_honest_share_of_variance():
    x = HOME[4].double(); x = x-x.mean(0)
    s = torch.linalg.svdvals(x)
    assert project([TEACHER], 4).shown[0].item()==pytest.approx((s[:2].square().sum()/s.square().sum()).item(), abs=1e-9)

def test_procrustes_is_scipys():
    from scipy.linalg import orthogonal_procrustes
    x, y = HOME[1].double(), HOME[2].double()
    assert torch.allclose(procrustes(x, y), x@torch.from_numpy(orthogonal_procrustes(x.numpy(), y.numpy())[0]), atol=1e-9)

def test_what_cannot_be_drawn_is_refused_in_a_sentence():
    a = film()
    for bad, say in (([], 'no snapshots to project'), ([TEACHER, replace(a[0], points=None)], 'has no points'), ([TEACHER, shot(HOME, 1, data='other')], 'different texts'),
                     ([shot(torch.ones(L+1, N, D), 1)], 'same state for every text')):
        with pytest.raises(ValueError, match=say): project(bad)
    for how, say in ((dict(layer=7), 'no layer 7: choose one from 0 to 6'), (dict(layer=3), 'has lost layer 3: choose one of 0, 1, 2, 4'), (dict(layer=1.5), 'no layer 1.5'), (dict(method='umap'), 'choose one of pca, mds')):
        with pytest.raises(ValueError, match=say): project(a, **how)

# the tracker
def test_a_tracker_gives_what_cka_gives(teacher):
    from sdlab.core.units import without
    from sdlab.core.plan import Plan
    from sdlab.core.pocket import pocket_calibration
    from sdlab.measure.cka import cka
    texts, student = pocket_calibration(6), without(teacher, Plan(12, (5, 6)))
    for how in (dict(), dict(group=8, seed=3), dict(pool='mean')):
        f, m = Tracker(teacher, texts, **how)(student, 4, 'me'), cka(student, teacher, texts, **how)
        assert torch.equal(f.cka.matrix.nan_to_num(9), m.matrix.nan_to_num(9)) and f.points.shape==(11, 24, 128) and (f.step, f.name)==(4, 'me')
        assert torch.allclose(f.points[:5], Tracker(teacher, texts, **how).teacher.points[:5], atol=1e-4) # in the order of the texts, whatever the groups
    quiet = Tracker(teacher, texts, points=False)
    assert quiet(student).points is None and quiet.teacher.points is None
    with pytest.raises(ValueError, match='at least 4 texts'): Tracker(teacher, texts.select(range(3)))
    assert not [h for b in teacher.blocks for h in (*b._forward_hooks, *b._forward_pre_hooks)]

# the Map, without a browser
def test_state_in_pictures_out():
    m = Map(two())
    assert (m.students, m.steps, m.step, m.layer, m.depth)==(['a', 'b'], [0, 5, 10, 20], 20, 6, 6)
    m.step = 5
    assert m.snapshot('a').step==0 and m.snapshot('b').step==5      # its last look up to the step
    for mode in ('one', 'both', 'difference'):
        for layer in (0, 3, 6):                             # 3 is lost
            m.mode, m.layer = mode, layer
            fig = m.figure()
            fig.canvas.draw()
            assert len([a for a in fig.axes if a.get_label()!='<colorbar>'])==(4 if mode=='both' else 3)
            assert 'lost with its block' in m.text() and ('has lost layer 3' in m.text())==(layer==3)
    assert not __import__('matplotlib.pyplot').pyplot.get_fignums()

def test_values_are_the_frames():
    m = Map(two(), 'b', step=10)
    a, b = two()['a'][1].cka, two()['b'][1].cka
    assert torch.equal(m.matrix.nan_to_num(9), a.full.nan_to_num(9))
    m.mode = 'difference'
    assert torch.equal(m.matrix.nan_to_num(9), (a.full-b.full).nan_to_num(9)) and m.matrix[2:4].isnan().all()
    d = m.frame()
    assert list(d.columns)==['student', 'teacher', 'a', 'b', 'difference', 'n'] and (d.difference.dropna()-(d.a-d.b).dropna()).abs().max()==0
    assert len(m.frame('diagonal'))==3*6+3*5 and set(m.frame('points').step)=={-1, 10}
    m.layer = 3
    with pytest.raises(ValueError, match='has lost layer 3'): m.projection
    with pytest.raises(ValueError, match="choose 'map'"): m.frame('nothing')

def test_the_scale_is_fixed_and_below_zero_is_seen():
    f = film()
    low = f[0].cka.matrix.clone(); low[2, 2] = -.2
    f[0] = replace(f[0], cka=replace(f[0].cka, matrix=low))
    m = Map(f)
    for s in m.steps:
        m.step = s
        im = m.figure().axes[0].images[0]
        assert im.get_clim()==(0, 1)
    with m:
        g = (m.widget, m._maps[0])[1]
        for s in m.steps:
            m.step = s
            assert (g.vmin, g.vmax, g.under)==(0, 1, '#56b4e9')
        m.step = 0
        assert g.values[2][2]==pytest.approx(-.2) and g.values[3]==[None]*(L+1) and list(g.hatched_rows)==[3]
        below, black = m.figure().axes[0].images[0], (0, 0, 0)
        assert below.cmap(below.norm(-.2))[:3]!=black and below.cmap(below.norm(-.2))[2]>.5
        assert m._curves.ylim[0]<=-.2 and -.2 in m._curves.series[0]['y']

def test_the_scale_of_a_difference_is_that_of_the_film():
    with Map(two(), 'b', mode='difference') as m:
        g, reach = (m.widget, m._maps[0])[1], set()
        for s in m.steps:
            m.step = s
            reach.add((g.vmin, g.vmax))
            assert max(abs(v) for r in g.values for v in r if v is not None)<=g.vmax and g.palette[0]!=g.palette[-1]
        assert len(reach)==1 and (lo := next(iter(reach)))[0]==-lo[1]
        m.mode = 'both'
        assert (g.vmin, g.vmax)==(0, 1)

def test_hands_on_it():
    "Every control, as a browser would move it"
    with Map(two(), kinds=['x', 'y']*(N//2)) as m:
        top = m.widget
        every = [o for o in walk(top) if hasattr(o, 'description')]
        by = {o.description: o for o in every}
        by['Step'].value = 0
        assert m.step==0
        play = next(o for o in walk(top) if type(o).__name__=='Play')
        for i, s in enumerate(m.steps):
            play.value = i
            assert (m.step, by['Step'].value)==(s, s)
        m.step = 5
        assert play.value==1
        by['Compare'].value = 'both'
        by['against'].value = 'b'
        by['Plane'].value = 'mds'
        by['Layer'].value = 4
        assert (m.mode, m.other, m.method, m.layer)==('both', 'b', 'mds', 4)
        m.wait()
        assert [s['name'] for s in m._plane.series]==['the teacher', 'a, x', 'a, y', 'b, x', 'b, y']
        assert sorted(m._plane.series[1]['x']+m._plane.series[2]['x'])==pytest.approx(sorted(m.projection.xy[1, :, 0].tolist()))
        m._maps[1].selected = [5, 1]
        assert m.layer==5 and list(m._maps[0].selected)==[5, 5]
        m._curves.selected = [0, 0]
        assert m.layer==0
        m.layer = 6
        m.wait()._plane.selected = [2, 3]
        assert m.chosen==7 and 'text number 7' in m._plane.series[2]['labels'][3]
        m.wait().check()

def walk(o):
    yield o
    for c in getattr(o, 'children', ()): yield from walk(c)

def test_a_slider_step_computes_nothing_twice(monkeypatch):
    import sdlab.lab.map as room
    seen = []
    plain = room.project
    monkeypatch.setattr(room, 'project', lambda *a: seen.append(a) or plain(*a))
    with Map(two()) as m:
        m.widget; m.wait()
        assert len(seen)==3
        for s in m.steps*3: m.step = s
        m.figure(), m.text(), m.wait()
        assert len(seen)==3 and not m.doing
        m.layer = 4; m.wait()
        assert len(seen)==6
        assert seen[3][0][1].step==m.step                    # what is looked at comes first

def test_hand_and_worker_draw_one_at_a_time():
    "Layers are walked through while their planes are still being laid out"
    m = Map(two())
    m.widget
    for i in range(300): m.layer, m.step = i%7, m.steps[i%4]
    m.wait(60)
    assert m.error=='' and m.failed is None
    m.close()

def test_cancelled_planes_are_asked_for_again():
    with Map(two(), method='mds') as m:
        m.widget
        m.cancel(); m.wait()
        assert not m.doing
        m.step = 0; m.wait()
        assert m._ready('a') is not None and m._plane.series

def test_errors_are_shown_and_can_be_raised():
    with Map(two()) as m:
        m.widget; m.wait()
        slider = next(o for o in walk(m.widget) if getattr(o, 'description', '')=='Layer')
        slider.max = 99
        slider.value = 50
        assert m.error.startswith('There is no layer 50') and slider.value==m.layer==6
        with pytest.raises(ValueError, match='no layer 50'): m.check()
        for k, v, say in (('step', 3, 'There is no step 3: choose one of 0, 5, 10, 20'), ('method', 'umap', 'choose one of pca, mds'), ('student', 'c', 'choose one of a, b'), ('mode', 'x', 'one, both, difference'), ('chosen', 40, 'no text 40')):
            with pytest.raises(ValueError, match=say): setattr(m, k, v)

def test_what_is_no_film_is_refused():
    for bad, kind, say in (([], ValueError, 'no snapshots of a student'), ({'teacher': [TEACHER]}, ValueError, 'no snapshots of a student'), ([3], TypeError, 'not int'), ('no/such/place', FileNotFoundError, 'no folder')):
        with pytest.raises(kind, match=say): Map(bad)
    with pytest.raises(ValueError, match='no student .c.'): Map(two(), 'c')
    with pytest.raises(ValueError, match='different texts or teachers'): Map(two(), film('c', data='others'))
    with pytest.raises(ValueError, match='expected 40 names, not 2'): Map(two(), kinds='xy')
    with pytest.raises(ValueError, match='only one student'): Map(film(), mode='both')

def test_ways_to_say_what_to_show(tmp_path):
    f = film('a')
    assert Map(f).students==['a'] and Map(f[0]).steps==[0]
    assert Map([replace(o, name=f'after {o.step}') for o in f]).students==['after 20']       # one film, whatever its frames are called
    assert Map(f+film('b')).students==['a', 'b']                                              # two looks at one step: two students
    m = Map(f, film('a', 2))
    assert (m.students, m.mode, m.student, m.other)==(['a', 'a (2)'], 'both', 'a', 'a (2)')
    for o in f+[TEACHER]: keep_snapshot(o, tmp_path)
    assert Map(tmp_path).students==['a'] and Map(str(tmp_path))._anchor.anchor
    assert Map([replace(o, points=None) for o in f]).text().endswith('has no points: take it with Tracker(..., points=True)')

def test_the_folder_of_a_run_of_watch(tmp_path):
    "Two arms and the teacher, each with snapshots of its own"
    claim(tmp_path, dict(arms={'self-data': dict(folder='arm-0'), 'SFT': dict(folder='arm-1')}), 'watch')
    for place, frames in (('teacher', [TEACHER]), ('arm-0', film('self-data')), ('arm-1', film('SFT', 2))):
        for f in frames: keep_snapshot(f, tmp_path/place/'snapshots')
    m = Map(tmp_path, 'SFT')
    assert (m.students, m.mode, m.other, m._anchor.anchor)==(['self-data', 'SFT'], 'both', 'SFT', True)

def test_names_are_shown_letter_by_letter():
    bad = '<img src=x onerror=alert(1)>$\\frac$'
    films = {bad: film(bad, texts=(bad,)*N), 'b': film('b')}
    with Map({**films, 'teacher': [replace(TEACHER, name=bad, cka=replace(TEACHER.cka, teacher=bad, student=bad))]}, 'b') as m:
        m.widget; m.wait()
        html = [o.value for o in walk(m.widget) if type(o).__name__=='HTML']
        assert any('&lt;img' in h for h in html) and not any('<img' in h for h in html)
        for mode in ('one', 'both', 'difference'): m.mode = mode; m.figure().canvas.draw()
        assert bad in m.text()

def test_after_close():
    m = Map(two())
    m.widget; m.wait()
    m.close(); m.close()
    assert 'Map of a' in repr(m) and m.figure() and m._repr_mimebundle_()=={'text/plain': m.text()}
    with pytest.raises(ValueError, match='was closed'): m.widget
    with pytest.raises(ValueError, match='was closed'): m.worker
    m.step, m.layer = 0, 2                                  # the state is still a state
    assert m.matrix.shape==(7, 7) and not m.error

def test_one_look_and_no_slider():
    with Map(film()[0]) as m:
        assert not [o for o in walk(m.widget) if type(o).__name__ in ('Play', 'SelectionSlider')]
        m.wait().check()
