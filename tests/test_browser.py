"""What a user sees, in a real browser: the instruments in JupyterLab and in voila, by mouse and by keyboard, with the network refused and counted.

Without Chromium, and where it cannot be installed, every test here skips and says so. Screenshots for the docs are taken only when asked for: `pytest tests/test_browser.py --screenshots`."""
import re, signal, subprocess, sys
import pytest
from browser import Chrome, House, Missing, ROOT, wait_for

pytestmark = pytest.mark.xdist_group('browser')          # one worker, one browser, one after the other

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
    def open(nb, name=None, **kwargs):
        screens.append(chrome.lab(lab, house.copy(nb, name), **kwargs))
        return screens[-1]
    yield open
    for s in screens: s.close()
    for s in screens: quiet(s, house)

@pytest.fixture
def pictures(request):
    "Takes a screenshot for the docs, if they were asked for"
    wanted = request.config.getoption('--screenshots')
    return lambda screen, name, of=None: screen.picture(ROOT/'images'/f'lab_{name}.png', of) if wanted else None

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

def at(stage, row, col, rows=12, cell=30): # Point of a cell of a Grid, in pixels of the page
    stage.scroll_into_view_if_needed()
    b = stage.bounding_box()
    return b['x']+46+cell*(col+.5), b['y']+8+cell*(rows-1-row+.5)

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

def pixel(locator, x, y): # Colour of a canvas at a point
    return locator.evaluate('(c, [x, y]) => { const k = devicePixelRatio; return [...c.getContext("2d").getImageData(x*k, y*k, 1, 1).data] }', [x, y])

def darkness(locator): # Mean brightness of what was painted in grey on a canvas: the words of the axes
    return locator.evaluate('''c => { const d = c.getContext("2d").getImageData(0, 0, 40, c.height).data; let s = 0, n = 0
        for (let i = 0; i < d.length; i += 4) if (d[i+3] > 200) { s += d[i]; n++ } return s/n }''')

def test_both_themes(opened):
    s = opened([GRID], 'themes.ipynb')
    s.run_all()
    back = s.page.locator('.sdlab-grid .sdlab-back')
    assert darkness(back)<110                                                     # dark words on a light page
    s.command('apputils:change-theme', theme='JupyterLab Dark')
    s.page.locator('body[data-jp-theme-light="false"]').wait_for(state='attached')
    wait_for(lambda: darkness(back)>145, 20, 'light words on the dark page')
