"""What a user sees, in a real browser: the instruments in JupyterLab and in voila, by mouse and by keyboard, with the network refused and counted.

One worker takes all of it (conftest.py), so that there is one browser at a time. Without Chromium, and where it cannot be installed, every test here skips and says so. Screenshots for the docs are taken only when asked for: `pytest tests/test_browser.py --screenshots`."""
import re, signal, subprocess, sys
import pytest
from browser import Chrome, House, Missing, ROOT, wait_for

@pytest.fixture(scope='module')
def chrome():
    try: c = Chrome()
    except Missing as e: pytest.skip(str(e))
    with c: yield c

@pytest.fixture(scope='module')
def house():
    with House() as h: yield h

@pytest.fixture(scope='module')
def lab(chrome, house): return house.lab()

@pytest.fixture
def opened(chrome, lab, house):
    "Opens a notebook in JupyterLab; afterwards nothing may have asked the outside or complained"
    screens = []
    def open(nb, name=None, leave='', swap={}, **kwargs):
        screens.append(chrome.lab(lab, house.copy(nb, name, leave, swap), **kwargs))
        return screens[-1]
    yield open
    for s in screens: s.close()
    for s in screens: quiet(s, house)

@pytest.fixture
def pictures(request):
    "Takes a screenshot for the docs, if they were asked for"
    if not request.config.getoption('--screenshots'): return lambda *args, **kwargs: None
    def take(screen, name, of=None, ready='True'):
        screen.until(ready, 300)
        screen.picture(ROOT/'images'/f'lab_{name}.png', of)
    return take

def quiet(screen, house):
    assert screen.outside==[] and house.outside()==[], 'asked another machine'
    assert screen.errors==[], 'console errors'

def value_of(locator): return float(re.search(r'-?[\d.]+(?:e[-+]?\d+)?$', locator.inner_text().strip()).group())

# -- what watches can itself fail

def test_what_is_asked_outside_is_refused_and_counted(chrome):
    with House() as h, chrome.page() as s:
        s.page.set_content('<img src="https://example.com/a.png"><script src="https://cdn.example.com/b.js"></script><script>new WebSocket("wss://example.com/c"); fetch("http://10.0.0.1/d").catch(() => 0)</script>')
        wait_for(lambda: s.page.evaluate('1') and len(s.outside)>=4, 10, 'four requests')
        assert {'example.com' in u or '10.0.0.1' in u for u in s.outside}=={True} and s.errors
        for ask in ('urllib.request.urlopen("http://example.com", timeout=5)', 'socket.create_connection(("10.0.0.1", 80), 2)'):
            p, log = h.start(sys.executable, '-c', f'import socket, urllib.request; {ask}', log='ask.log')
            p.wait(30)
            assert p.returncode and 'nothing leaves this machine' in log.read_text()
        assert [l.split()[1] for l in h.outside()]==['example.com', '10.0.0.1']

def test_a_house_leaves_nothing_running():
    stubborn = 'import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True); print("up", flush=True); time.sleep(600)'
    with House() as h:
        p, log = h.start(sys.executable, '-c', stubborn, log='s.log')
        wait_for(lambda: 'up' in log.read_text() and len(h.pids())==2, 20, 'both')
        h.patience = 1
    assert h.pids()==[] and not h.home.exists() and p.returncode==-signal.SIGKILL
    # nor does one whose owner was killed
    owner = subprocess.Popen([sys.executable, '-c', 'import sys, time; sys.path.insert(0, "tests"); from browser import House; h = House(); h.start(sys.executable, "-c", "import time; time.sleep(600)", log="l"); print(h.home, flush=True); time.sleep(600)'],
        cwd=ROOT, stdout=subprocess.PIPE, text=True)
    h.home = type(h.home)(owner.stdout.readline().strip())
    wait_for(h.pids, 10, 'the process')
    owner.kill(), owner.wait()
    wait_for(lambda: not h.pids(), 20, 'the orphan to end')
    h.close()

# -- the base

GRID = '''
from sdlab.lab.widgets import Chart, Grid
n = 12
grid = Grid(values=[[1+((r+1)*c)%7 if c<n-r else None for c in range(n)] for r in range(n)], rows=[str(r+1) for r in range(n)], cols=[str(c) for c in range(n)],
            row_title='blocks dropped', col_title='first block', label='made up', marks=[[2, 3]])
grid'''
CHART = '''
chart = Chart(series=[dict(name='a', color='#0072b2', kind='line', x=[0, 1, 2], y=[3, 1, 4]), dict(name='<b>b</b>', color='text', kind='points', x=[0, 1, 2], y=[2, 2, None], labels=['one', '<img src=x onerror=alert(1)>', 'three'])],
              xlabel='step', ylabel='loss (nats)', label='Loss')
chart'''

def at(stage, row, col): # Point of a cell of a Grid, in pixels of the page
    stage.scroll_into_view_if_needed()
    b = stage.bounding_box()
    rows = int(re.search(r'(\d+) rows', stage.get_attribute('aria-label')).group(1))
    cell = (b['height']-48)/rows
    return b['x']+46+cell*(col+.5), b['y']+8+cell*(rows-row-.5)

def darkness(locator): # Mean brightness of what was painted in grey on a canvas: the words of the axes
    return locator.evaluate('''c => { const d = c.getContext("2d").getImageData(0, 0, 40, c.height).data; let s = 0, n = 0
        for (let i = 0; i < d.length; i += 4) if (d[i+3] > 200) { s += d[i]; n++ } return s/n }''')

def test_heat_map_and_chart(opened):
    s = opened([GRID, CHART], 'base.ipynb')
    s.run_all()
    page, stage, say = s.page, s.page.locator('.sdlab-grid .sdlab-stage'), s.page.locator('.sdlab-grid .sdlab-say')
    page.mouse.click(*at(stage, 3, 2))
    s.until('grid.selected==[3, 2]')
    assert say.inner_text()=='first block 2, blocks dropped 4: 2'
    page.keyboard.press('ArrowRight')
    s.until('grid.selected==[3, 3]')
    page.keyboard.press('ArrowUp')
    s.until('grid.selected==[4, 3]')
    page.mouse.move(*at(stage, 0, 0))
    assert say.inner_text()=='first block 0, blocks dropped 1: 1'                # hover tells, and does not choose
    page.mouse.click(*at(stage, 11, 11))                                          # no cell there
    page.mouse.move(2, 2)
    assert say.inner_text()=='first block 3, blocks dropped 5: 2' and s.kernel.ask('grid.selected')==[4, 3]
    s.kernel.ask(do='grid.selected = [0, 7]')
    wait_for(lambda: say.inner_text().startswith('first block 7'), 10, 'the page to follow')
    assert say.get_attribute('aria-live')=='polite'
    said = page.locator('.sdlab-grid').aria_snapshot()
    assert 'application "made up. 12 rows (blocks dropped) by 12 columns (first block)' in said and 'status: "first block 7' in said
    chart = page.locator('.sdlab-chart .sdlab-stage')
    chart.focus()
    for k, want in (('ArrowRight', [0, 0]), ('ArrowDown', [1, 0]), ('ArrowRight', [1, 1])):
        page.keyboard.press(k)
        s.until(f'chart.selected=={want}')
    assert page.locator('.sdlab-chart .sdlab-say').inner_text()=='<b>b</b>: <img src=x onerror=alert(1)>'    # text stays text
    assert not page.locator('.sdlab-chart img, .sdlab-legend b').count()

    back = page.locator('.sdlab-grid .sdlab-back')
    assert darkness(back)<110                                                     # dark words on a light page
    s.command('apputils:change-theme', theme='JupyterLab Dark')
    s.page.locator('body[data-jp-theme-light="false"]').wait_for(state='attached')
    wait_for(lambda: darkness(back)>145, 20, 'light words on the dark page')

# -- the instruments, whoever shows them: `me` is their name in the kernel, `box` where they are on the page

def seen(box): # The same
    "Scrolled to: JupyterLab paints no cell that is out of sight"
    box.scroll_into_view_if_needed()
    wait_for(lambda: box.inner_text().strip(), 20, 'something to be painted')
    return box

def nameless(box): # Controls without a name
    "What a screen reader would call only 'button' or 'slider'"
    return [l.strip() for l in box.aria_snapshot().splitlines() if re.match(r'\s*- (button|slider|textbox|combobox|checkbox|spinbutton|application|grid|radio)\b(?! "[^"])', l)]

def walks_the_triangle(s, box, me):
    "By click, by keyboard, by slider; the numbers follow; back through what was tried"
    stage, numbers, tried = seen(box).locator('.sdlab-grid .sdlab-stage'), box.get_by_role('row', name=re.compile('^Parameters')), box.locator('.sdlab-tried')
    def shows(*cut):
        s.until(f'list({me}.cut)=={[*cut]!r} and {me}.cut in {me}._known', 60)
        assert s.kernel.ask(f'list({me}.plan.drop)')==list(range(cut[0], cut[0]+cut[1]))       # `.plan` is always what the picture shows
        want = s.kernel.ask(f'{me}.numbers')
        def on_page():
            cells = numbers.get_by_role('cell').all_inner_texts()
            return len(cells)>2 and abs(float(cells[2].split()[0])*1e6/want['params']-1)<.01
        wait_for(on_page, 20, 'the new parameters on the page')
        wait_for(lambda: f"{want['perplexity']:.4g}" in box.get_by_role('row', name=re.compile('^Perplexity')).inner_text(), 20, 'the new perplexity on the page')
        assert box.get_by_role('img', name=re.compile('drops')).get_attribute('aria-label').split(':')[0]==s.kernel.ask(f'str({me}.plan)').split(':')[0]
        return want['params']
    s.page.mouse.click(*at(stage, 2, 4))
    a = shows(4, 3, 'block')
    s.page.keyboard.press('ArrowRight')
    assert shows(5, 3, 'block')==a
    s.page.keyboard.press('ArrowUp')
    assert shows(5, 4, 'block')<a
    slider = box.get_by_role('slider').first
    slider.focus()
    s.page.keyboard.press('ArrowLeft')
    s.page.keyboard.press('ArrowLeft')
    assert shows(5, 2, 'block')>a
    rows = tried.locator('tbody tr')
    wait_for(lambda: rows.filter(has_text=re.compile('blocks 4.6')).count(), 20, 'the history')
    rows.filter(has_text=re.compile('blocks 4.6')).click()
    assert shows(4, 3, 'block')==a
    s.page.keyboard.press('ArrowDown')                                                       # and on by keyboard
    shows(5, 3, 'block')

def reads_and_drops(s, box, me):
    "Search, drop by button, undo by key, filter what was dropped"
    n, rows = s.kernel.ask(f'len({me})'), seen(box).get_by_role('article')
    one = s.kernel.ask(f'{me}.view.prompt.iloc[3]')
    box.get_by_role('textbox', name='search').fill(one)
    s.until(f'{me}.search=={one!r}')
    wait_for(lambda: rows.count()==len(s.kernel.ask(f'{me}.shown')), 10, 'the page to be filtered')
    i = s.kernel.ask(f'{me}.shown[0]')
    assert one.split()[0] in rows.first.inner_text()
    rows.first.get_by_role('button', name=f'Drop, row {i}').click()
    s.until(f'len({me}.rows)=={n-1}')
    rows.first.get_by_role('button', name=f'Drop, row {i}').press('u')                        # undo, by key
    s.until(f'len({me}.rows)=={n}')
    rows.first.press('d')                                                                     # drop, by key
    s.until(f'len({me}.rows)=={n-1}')
    box.get_by_role('textbox', name='search').fill('')
    box.get_by_role('combobox', name='by hand').select_option('dropped')
    s.until(f'{me}.shown=={[i]}')
    wait_for(lambda: rows.count()==1 and 'dropped by hand' in rows.first.inner_text(), 10, 'the dropped row')
    box.get_by_role('combobox', name='by hand').select_option('all rows')
    box.get_by_role('button', name='next ▶').click()
    s.until(f'{me}.page==2')

def plays(s, box, me):
    "The trajectory runs by itself, stops, and follows the slider"
    steps = s.kernel.ask(f'{me}.steps')
    seen(box)
    s.kernel.ask(do=f'{me}.step = {steps[0]}')
    before, canvas = s.kernel.ask(f'{me}.matrix.nansum().item()'), box.locator('.sdlab-grid .sdlab-back').first
    pixels = lambda: canvas.evaluate('c => c.toDataURL()')
    wait_for(lambda: f'step {steps[0]}' in box.inner_text(), 20, 'the first step on the page')
    first = pixels()
    box.locator('.widget-play button').first.click()
    s.until(f'{me}.step=={steps[-1]}', 60)
    assert s.kernel.ask(f'{me}.matrix.nansum().item()')!=before
    wait_for(lambda: pixels()!=first, 20, 'the heat map to change')
    handle = box.locator('.widget-hslider', has=s.page.get_by_text('Step', exact=True)).get_by_role('slider')
    handle.press('ArrowLeft')
    s.until(f'{me}.step=={steps[-2]}')
    s.kernel.ask(do=f'{me}.wait(60)')
    s.page.mouse.move(*at(box.locator('.sdlab-grid .sdlab-stage').first, 2, 2))
    assert re.search(r'layer of .* 2, layer of .* 2: [\d.]+$', box.locator('.sdlab-grid .sdlab-say').first.inner_text())

def trains_and_stops(s, box, me, steps=3):
    "A short training, seen to move, ended by hand, in order"
    seen(box).get_by_role('button', name='Start').click()
    watched_and_stopped(s, box, me, steps)

def watched_and_stopped(s, box, me, steps=3):
    line = box.locator('.sdlab-chart .sdlab-back').first
    empty = line.evaluate('c => c.toDataURL()')
    s.until(f'len({me}.log)>={steps}', 300)
    wait_for(lambda: line.evaluate('c => c.toDataURL()')!=empty, 30, 'the loss to be drawn')
    box.get_by_role('button', name='Stop', exact=True).click()
    s.until(f'not {me}.running', 120)
    wait_for(lambda: 'stopped' in box.get_by_role('table').first.inner_text(), 20, 'the page to say so')
    got = s.kernel.ask(f'[{me}.frame().state.tolist(), len({me}.students), str({me}.checkpoint)]')
    assert set(got[0])=={'stopped'} and got[1]==1 and got[2]!='None'

LEFT = """(lambda: dict(threads=[t.name for t in __import__('threading').enumerate() if t.name.startswith('sdlab')],
  hooks=sum(len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in teacher.model.modules()), blocks=teacher.n, grad=__import__('torch').is_grad_enabled()))()"""

def nothing_left(s, seconds=30):
    "No thread of ours, no hook on the teacher, all of its blocks"
    wait_for(lambda: not s.kernel.ask(LEFT)['threads'], seconds, 'the threads to end')
    got = s.kernel.ask(LEFT)
    assert got['hooks']==0 and got['blocks']==12 and got['grad']

# -- in JupyterLab

def test_choose_a_cut(opened, pictures, request):
    fewer = {} if request.config.getoption('--screenshots') else {'Limits(24, 128)': 'Limits(6, 64)'}   # texts for the exact map: the notebook itself is run with all
    s = opened('nbs/tutorials/choose_a_cut.ipynb', leave=r'\.close\(\)', swap=fewer)            # its last cell puts the instrument away
    s.run_all(300)
    s.kernel.ask(do="me_ = next(o for o in globals().values() if type(o).__name__=='Picker' and not o.closed)")
    box = s.page.locator('.jp-OutputArea-output', has=s.page.locator('.sdlab-tried')).first
    walks_the_triangle(s, box, 'me_')
    assert nameless(box)==[]
    pictures(s, 'picker', box, ready='not me_.worker.busy')

PICK = """
from sdlab.core.model import load
from sdlab.lab.picker import Limits, Picker
teacher = load()
picker = Picker(teacher, n=2, limits=Limits(tokens=8))
picker"""

def test_interrupt_and_two_at_once(opened):
    s = opened([PICK, 'other = Picker(teacher, n=4, measure="exact KL", limits=Limits(tokens=8))\nother'], 'two.ipynb')
    s.run_all()
    boxes = s.page.locator('.jp-OutputArea-output', has=s.page.locator('.sdlab-tried'))
    s.until("other.doing!='' and other.worker.busy")
    s.page.mouse.click(*at(boxes.first.locator('.sdlab-grid .sdlab-stage'), 0, 6))             # the first while the second fills its map
    s.until('list(picker.cut)==[6, 1, "block"] and picker.cut in picker._known', 60)
    wait_for(lambda: 'exact' in boxes.nth(1).inner_text() and boxes.nth(1).get_by_role('button', name='Cancel').is_visible(), 20, 'the progress to be told')
    s.menu('Kernel', 'Interrupt Kernel')
    nothing_left(s)
    assert s.kernel.ask('[other.doing, other.error]')==['', '']
    s.page.mouse.click(*at(boxes.nth(1).locator('.sdlab-grid .sdlab-stage'), 2, 3))            # it still answers
    s.until('list(other.cut)==[3, 3, "block"] and other.cut in other._known', 60)
    s.kernel.ask(do='first, whole = picker, teacher')                                           # the first cell again, out of order
    s.page.evaluate('() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0 }')
    s.command('notebook:run-cell')
    s.until('picker is not first', 60)
    s.page.mouse.click(*at(boxes.nth(1).locator('.sdlab-grid .sdlab-stage'), 1, 4))
    s.until('list(other.cut)==[4, 2, "block"] and other.cut in other._known', 60)               # its teacher is still the old one, and whole
    assert s.kernel.ask('[whole.n, other.lm.n]')==[12, 12]
    s.kernel.ask(do='picker.close(); other.close(); first.close()')
    nothing_left(s)
    wait_for(lambda: not s.page.locator('.sdlab-tried').count(), 10, 'the closed ones to leave the page')

HANDS = ["""
from sdlab.core.model import load
from sdlab.core.plan import Plan
from sdlab.core.pocket import pocket_rows, pocket_tasks, pocket_calibration
from sdlab.compress.prune import prune
from sdlab.core.units import without
from sdlab.heal.rewrite import rewrite
import torch
teacher = load()
pruned = prune(teacher, Plan.span(12, 5, 2))
data = rewrite(teacher, pocket_rows('sums', 24, 3), progress=False)
""", """
from sdlab.lab.reader import Reader
bad = '"><script>document.title="hacked"</script> \u05e9\u05dc\u05d5\u05dd \U0001F600 <img src=x onerror="document.title=1">'
reader = Reader([dict(data[0], prompt=bad, reference=bad, completion=bad, written=bad), *data], teacher)
reader
""", """
from sdlab.heal.train import Evaluation
from sdlab.lab.watch import Watch
watch = Watch({'self-data': pruned}, data, teacher, texts=pocket_calibration().select(range(16)), prompts=[data[0]['prompt']], epochs=60, batch_size=4, lr=5e-4, evaluation=Evaluation(every=10), max_new_tokens=16)
watch
""", """
from sdlab.measure.trajectory import Tracker
from sdlab.lab.map import Map
tracker = Tracker(teacher, pocket_calibration().select(range(24)))
def film(seed, name):
    for step, size in ((0, .3), (10, .2), (20, .1)):
        student = prune(teacher, Plan.span(12, 5, 2))
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in student.model.parameters():
                if p.ndim>1: p += size*p.std()*torch.randn_like(p)
        yield tracker(student, step, name)
map_ = Map({'teacher': [tracker.teacher], 'SFT': list(film(0, 'SFT')), 'self-data': list(film(1, 'self-data'))})
map_
""", """
from sdlab.lab.compare import Compare
compare = Compare({'teacher': teacher, 'pruned': pruned}, {k: t for k, t in pocket_tasks(4).items() if k in ('sums', 'facts')}, max_new_tokens=16)
compare
"""]

def test_reader_watch_map_compare(opened, pictures, request):
    s = opened(HANDS, 'hands.ipynb')
    s.run_all()
    outs = s.page.locator('.jp-OutputArea-output', has=s.page.locator('.jupyter-widgets'))
    reader, watch, map_, compare = (outs.nth(i) for i in range(4))
    title = s.page.title()
    text = seen(reader.get_by_role('article').first)
    assert '<script>' in text.inner_text() and '\U0001F600' in text.inner_text() and not reader.locator('script, img').count() and 'hacked' not in title
    assert text.locator('.sdlab-ask').get_attribute('dir')=='auto'
    unnamed = {name: nameless(seen(box)) for name, box in (('reader', reader), ('watch', watch), ('map', map_), ('compare', compare))}
    reads_and_drops(s, reader, 'reader')
    pictures(s, 'reader', reader)
    plays(s, map_, 'map_')
    pictures(s, 'map', map_, ready='not map_.worker.busy')
    seen(compare).get_by_role('button', name='Next', exact=True).click()
    s.until('len(compare.answers)==2', 60)
    wait_for(lambda: s.kernel.ask("compare.answers['teacher']") in compare.inner_text(), 10, 'the answer on the page')
    compare.get_by_role('button', name=re.compile('^Score all')).click()
    s.until('compare.recovery is not None', 90)
    pictures(s, 'compare', compare, ready='not compare.worker.busy')
    trains_and_stops(s, watch, 'watch', 40 if request.config.getoption('--screenshots') else 3)
    pictures(s, 'watch', watch)
    pictures(s, 'jupyterlab')
    nothing_left(s)
    s.restart_and_run_all()
    assert s.kernel.ask('[len(reader.rows), len(watch.log), len(compare.answers)]')==[25, 0, 0] and outs.count()==4
    outs.nth(1).get_by_role('button', name='Start').click()
    s.until('len(watch.log)>=1', 120)
    s.menu('Kernel', 'Interrupt Kernel')                                                       # pauses: nothing goes on behind the page
    nothing_left(s, 60)
    assert not any(unnamed.values()), unnamed

# -- in voila

def test_the_workflow(chrome, house, pictures):
    server = house.workflow(n=24, judged=4, longest=64)
    with chrome.voila(server) as s:
        s.kernel.ask(do="import gc; flow = next(o for o in gc.get_objects() if type(o).__name__=='Workflow'); teacher = flow.session.teacher")
        page, panel = s.page, s.page.locator('.sdlab-workflow > .widget-tab-contents > .jupyter-widgets:not(.lm-mod-hidden)')
        done = lambda k: s.until(f'flow.standing[{k!r}]=="done"', 180)
        go = lambda word: panel.get_by_role('button', name=word, exact=True).click()
        go_on = lambda: panel.get_by_role('button', name=re.compile('^Next: ')).click()
        panel.locator('.sdlab-tried').wait_for(timeout=60_000)
        walks_the_triangle(s, panel, 'flow.picker')
        pictures(s, 'voila', ready='not flow.picker.worker.busy')
        go('Cut'), done('cut'), go_on()
        go('Write the data'), done('write')
        reads_and_drops(s, panel, "flow.made['write']")
        go_on()
        panel.get_by_role('checkbox', name=re.compile('SFT')).uncheck()
        passes = panel.get_by_role('spinbutton', name='passes')
        passes.fill('40'), passes.press('Enter')
        s.until('flow.epochs==40 and not flow.sft')
        go('Heal')
        panel.locator('.sdlab-chart').first.wait_for(timeout=60_000)
        watched_and_stopped(s, panel, "flow.made['heal']")
        done('heal'), go_on()
        go('Look inside'), done('look')
        plays(s, panel, "flow.made['look']")
        go_on()
        go('Compare'), done('compare')
        wait_for(lambda: 'self-data' in panel.inner_text(), 20, 'the table')
        nothing_left(s)
    server.stop()
    quiet(s, house)
