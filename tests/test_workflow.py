"lab.workflow: what is stale, the whole workflow without a browser, a cancel in the middle of each step, and the page that `sdlab lab` serves"
import importlib.util, itertools, json, re, signal, socket, subprocess, sys, threading, time, urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
import pytest
import sdlab.lab.workflow as R
from sdlab.core.plan import Plan
from sdlab.lab.workflow import WorkflowSteps, lab, lab_command, session, workflow

TINY = dict(n=8, judged=4, texts=16)
PLAN = Plan.span(12, 3, 2)

@pytest.fixture(scope='module')
def stand(): return session(**TINY)

@pytest.fixture
def r(stand, monkeypatch):
    monkeypatch.setattr(R, 'session', lambda *args, **kwargs: stand)   # opened once for all tests
    with workflow(**TINY) as it: yield it

def hooks(lm): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in lm.model.modules())
def threads(): return [t.name for t in threading.enumerate() if t.name=='sdlab-worker']
def done(r, timeout=300):
    r.wait(timeout)
    r.check()
    return r

# what is stale

def oracle(history, needs):
    "The same question by another way: a result carries the whole tree of what it was made from"
    now = {}
    def tree(k): return (now[k][0], now[k][1]) if k in now else None
    for k, mark in history: now[k] = mark, {n: tree(n) for n in needs[k]}
    def fresh(k): return k in now and all(fresh(n) and now[k][1][n]==tree(n) for n in needs[k])
    return {k: 'done' if fresh(k) else 'stale' if k in now else 'ready' if all(fresh(n) for n in needs[k]) else 'waiting' for k in needs}

def test_the_state_machine_against_an_oracle():
    "Every history of four acts with two choices each"
    needs = {s.name: s.needs for s in R.WORKFLOW}
    acts = [(k, m) for k in needs for m in 'ab']
    for history in itertools.product(acts, repeat=4):
        route = WorkflowSteps()
        for k, m in history: route.finish(k, f'{k} {m}', m)
        assert {k: route.status(k) for k in needs}==oracle(history, needs), history

def test_a_new_training_is_a_new_one():
    route = WorkflowSteps()
    for k in ('cut', 'write', 'heal', 'compare'): route.finish(k, 1, 'x' if k in ('cut', 'write') else None)
    assert route.status('compare')=='done'
    route.finish('heal', 2)
    assert route.status('compare')=='stale' and 'press Compare again' in route.why('compare') and route.value('heal')==2
    assert list(route.frame().status)==['done', 'done', 'done', 'ready', 'stale']

# the workflow

def test_the_whole_workflow(r):
    "Each button once, on eight rows; then a choice is changed and comes back"
    g, was = r.session, (r.session.teacher.fingerprint, hooks(r.session.teacher))
    seen = []
    r.observe(lambda e: seen.append(dict(e['new'])), 'standing')
    r.widget
    r.picker.pick(3, 2)
    done(r.cut())
    assert r.plan.drop==(3, 4) and r.pruned.n==10 and r.standing['heal']=='waiting' and seen[0]['cut']=='running'
    done(r.write(size=4))
    assert len(r.rows)==8 and set(r.rows.column_names)>={'prompt', 'completion', 'reference', 'source'}
    r.epochs = 1.
    done(r.heal())
    assert list(r.students)==['SFT', 'self-data'] and all(lm.n==10 for lm in r.students.values())
    done(r.look())
    assert r.made['look'].students==['SFT', 'self-data']
    done(r.compare())
    assert r.recovery.arms==['teacher', 'pruned', 'SFT', 'self-data'] and set(r.standing.values())=={'done'}
    r.made['write'].drop(0)
    assert len(r.rows)==7 and [r.standing[k] for k in ('write', 'heal', 'look', 'compare')]==['done', 'stale', 'stale', 'stale']
    with pytest.raises(ValueError, match='First: Heal'): r.compare()
    r.made['write'].undo()
    assert set(r.standing.values())=={'done'}
    done(r.cut(Plan.span(12, 8, 1)))
    assert r.standing==dict(cut='done', write='done', heal='stale', look='stale', compare='stale')
    done(r.cut(PLAN))
    assert set(r.standing.values())=={'done'}                         # the same cut again, whatever it was chosen for
    for k in r.steps.by_name:
        r.step = k
        assert r.figure().axes and r.text().count(': done')==5
    assert was==(g.teacher.fingerprint, hooks(g.teacher))
    made = list(r.made.values())
    r.close()
    assert all(o.closed for o in made) and not r.folder.exists() and not threads()

def test_what_was_done_is_not_done_again(stand, monkeypatch, tmp_path):
    "A page that is opened again on the same folder: nothing is written or trained a second time; a training that was stopped is"
    monkeypatch.setattr(R, 'session', lambda *args, **kwargs: stand)
    def walk(r, **settings):
        for k, v in settings.items(): setattr(r, k, v)
        done(r.cut(PLAN)); done(r.write()); done(r.heal())
        return {k: lm.fingerprint for k, lm in r.students.items()}
    stamps = lambda: {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob('model.safetensors')}
    with workflow(out=tmp_path, **TINY) as r: first = walk(r, sft=False, epochs=.5)
    was = stamps()
    with workflow(out=tmp_path, **TINY) as r:
        assert walk(r, sft=False, epochs=.5)==first and stamps()==was
        r.made['heal']._record.add('end', 'self-data', 1, state='stopped', why='by hand')
        done(r.heal())
        assert stamps()!=was and set(r.made['heal'].frame().state)=={'finished'}

def test_cancel_in_each_step(r, monkeypatch):
    "In the middle, from another thread, as a button does it; the step can be taken again"
    r.observe(lambda e: r.cancel() if e['new'].startswith('cutting') else None, 'doing')
    r.cut(PLAN).wait(60)
    assert r.plan is None and r.standing['cut']=='ready' and r.now==r.doing==''
    r.unobserve_all('doing')
    done(r.cut(PLAN))
    r.observe(lambda e: r.cancel() if 'row 4' in e['new'] else None, 'doing')
    r.write(size=4).wait(60)
    assert r.rows is None and r.standing['write']=='ready' and len(r.folder.glob('ledger-*/run/*.jsonl').__next__().read_text().splitlines())==5   # its head and four rows
    r.unobserve_all('doing')
    done(r.write(size=4))
    assert len(r.rows)==8
    r.own, r.epochs = False, 40.
    r.heal()
    while not len(r.made.get('heal').log if 'heal' in r.made else ()): time.sleep(.05)
    assert r.standing['heal']=='running'
    with pytest.raises(ValueError, match='Heal is still running'): r.cut(PLAN)
    r.cancel()
    done(r)
    assert list(r.students)==['SFT'] and r.standing['heal']=='done'   # a training that is stopped leaves its student
    assert 'stopped' in r.students['SFT'].provenance['steps'][-1]
    r.observe(lambda e: r.cancel() if e['new'].startswith('laying') else None, 'doing')
    r.look().wait(60)
    assert r.standing['look']=='ready' and 'look' not in r.made
    r.unobserve_all('doing')
    r.observe(lambda e: r.cancel() if ' on ' in e['new'] else None, 'doing')
    r.compare().wait(60).made['compare'].wait(60)
    assert r.standing['compare']=='ready' and r.recovery is None and not r.made['compare'].worker.busy
    assert hooks(r.session.teacher)==hooks(r.pruned)==0 and r.failed is None

def test_cancelled_before_its_first_turn(r):
    "A step that never had its turn is over all the same"
    for _ in range(5):
        r.cut(PLAN); r.cancel(); r.wait(60)
        assert r.now=='' and r.doing==''
    r.cut(PLAN)
    assert done(r).steps.value('cut') is not None

def test_errors_are_shown_and_raised(r, monkeypatch):
    def broken(*args, **kwargs): raise OSError('No space left on device')
    with monkeypatch.context() as m:
        m.setattr(R, 'take', broken)
        r.cut(PLAN).wait(60)
        assert r.error=='No space left on device' and r.standing['cut']=='ready' and not r.now
        with pytest.raises(OSError, match='No space left'): r.check()
    r.steps.finish('cut', dict(plan=PLAN, pruned=r.session.teacher), 'x')
    done(r.write(size=8))
    r.sft = r.own = False
    r.heal().wait(60)
    with pytest.raises(ValueError, match='at least one way to heal'): r.check()
    for f, what in ((r.look, 'First: Heal'), (lambda: r.cut(Plan(12)), 'drops nothing')):
        with pytest.raises(ValueError, match=what): f()

def test_buttons_do_it(r):
    "The page without a browser: what is enabled, what is said, which tab is shown"
    door, _, tabs = r.widget.children
    panel = dict(zip(r.steps.by_name, tabs.children))
    row = lambda k: panel[k].children[-2].children
    assert [row(k)[0].disabled for k in panel]==[False, False, True, True, True] and 'First: Choose a cut' in row('heal')[2].value
    assert [tabs.get_title(i) for i in range(5)][:3]==['1 Choose a cut', '2 Write the data', '3 Heal (waits)']
    assert panel['cut'].children[-1].children==(r.picker.widget,)
    r.picker.pick(5, 1)
    row('cut')[0].click()
    done(r)
    assert tabs.get_title(0)=='1 Choose a cut (done)' and row('cut')[1].layout.display=='' and 'drops 1/12' in row('cut')[2].value
    row('cut')[1].click()
    assert r.step=='write' and tabs.selected_index==1
    tabs.selected_index = 2
    assert r.step=='heal'
    assert all(o.description for k in panel for o in row(k)[:1])

def test_begin_again(stand, monkeypatch, tmp_path):
    "Another model and a file of rows; what was done is let go; what cannot be opened is said"
    from sdlab.core.pocket import pocket_rows
    rows = tmp_path/'rows.jsonl'
    rows.write_text('\n'.join(json.dumps(o) for o in pocket_rows('sums', 40, 3)))
    with monkeypatch.context() as m:
        m.setattr(R, 'session', lambda *args, **kwargs: stand)
        r = workflow(**TINY)
    done(r.cut(PLAN))
    r.begin(data=str(tmp_path/'none.jsonl')).wait(60)
    with pytest.raises((OSError, ValueError), match='none.jsonl'): r.check()
    assert r.plan is not None                                         # nothing was lost by trying
    done(r.begin(data=str(rows)))
    assert r.plan is None and list(r.session.tasks)==['in domain'] and len(r.session.train)==8 and set(r.standing.values())=={'ready', 'waiting'}
    r.close()

def test_after_close(stand, monkeypatch):
    monkeypatch.setattr(R, 'session', lambda *args, **kwargs: stand)
    r = workflow(**TINY)
    r.widget
    r.close(); r.close()
    for f in (r.cut, r.write, r.heal, r.look, r.compare, r.begin, lambda: r.widget, lambda: r.picker):
        with pytest.raises(ValueError, match='closed'): f()
    assert '1 Choose a cut: ready' in r.text()

def test_another_teacher_needs_rows():
    import walker
    with pytest.raises(ValueError, match='needs rows to be healed on'): session(walker.teacher())
    g = session(walker.teacher(), walker.asked(), n=5, judged=7, longest=12)
    assert len(g.train)==5 and list(g.tasks)==['in domain'] and len(g.tasks['in domain'])==7 and g.kinds is None

# the page

@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def get(address):
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    with opener.open(address, timeout=120) as page: return page.url, page.read().decode()

@pytest.mark.parametrize('end', ['SIGINT', 'SIGTERM'])
def test_sdlab_lab_serves_the_page(port, tmp_path, end):
    "Started as a command, looked at, ended: the page asks for nothing outside, and nobody gets in without the token"
    code = f'from sdlab.lab.workflow import lab; lab(port={port}, no_browser=True, out={str(tmp_path)!r})'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))   # heard also where the tests run in the background
    try:
        address = next(m[1] for line in p.stdout if (m := re.search(r'The lab is at (\S+)', line)))
        _, page = get(address)
        assert '1 Choose a cut: ready' in page and 'widget-view+json' in page
        fetched = [u for u in re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|import\([\'"]([^\'"]*)', page)]
        assert not [u for us in fetched for u in us if u.startswith(('http:', 'https:', '//'))]
        assert not re.findall(r'cdn|unpkg|googleapis', page)
        for p_ in ('', 'api/kernels', 'voila/api/themes'): assert '/login' in get(f'http://127.0.0.1:{port}/{p_}')[0]   # a stranger is asked for the token
        listing = Path(f'/proc/{p.pid}').exists() and subprocess.run(['ps', '-ef'], capture_output=True, text=True).stdout
        assert not listing or address.split('token=')[1] not in listing
    finally:
        p.send_signal(getattr(signal, end))
        rest = p.communicate(timeout=60)[0]
    assert end=='SIGTERM' or 'The lab is closed' in rest
    with socket.socket() as s: assert s.connect_ex(('127.0.0.1', port))!=0

def test_what_lab_refuses(port, monkeypatch, capsys):
    monkeypatch.setattr(R, '_wait_until_open', lambda *args: pytest.fail('it was started'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', port)); s.listen()
        with pytest.raises(ValueError, match=f'Port {port} cannot be used'): lab(port=port)
    with pytest.raises(FileNotFoundError, match='There is no file rows.jsonl'): lab(port=port, data='rows.jsonl')
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *args: None if name=='voila' else real(name, *args))
    with pytest.raises(ValueError, match='needs voila, which is not installed'): lab(port=port)

def test_a_workflow_that_cannot_begin_says_so(monkeypatch):
    monkeypatch.setenv('SDLAB_WORKFLOW', json.dumps(dict(data='<img src=x>.jsonl')))
    said = R.lab_page().value
    assert 'The workflow cannot begin' in said and '<img' not in said

def test_paths_survive_the_change_of_folder(tmp_path, monkeypatch):
    (tmp_path/'rows.jsonl').write_text('')
    monkeypatch.chdir(tmp_path)
    assert R._absolute('rows.jsonl')==str(tmp_path/'rows.jsonl') and R._absolute('someone/model')=='someone/model' and R._absolute(None) is None
    command, env, address = lab_command(1234, token='secret', teacher='x', data=None)
    assert json.loads(env['SDLAB_WORKFLOW'])==dict(teacher='x') and 'secret' not in ' '.join(command) and address=='http://127.0.0.1:1234/?token=secret'

def test_the_page_is_in_the_package():
    assets = R._assets()
    cells = json.loads((assets/'workflow.ipynb').read_text())['cells']
    assert len(cells)==1 and 'lab_page()' in ''.join(cells[0]['source']) and not cells[0]['outputs']
    assert json.loads((assets/'voila'/'templates'/'sdlab'/'conf.json').read_text())['base_template']=='lab'
