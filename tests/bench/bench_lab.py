"""The feel of the instruments: from a slider step to numbers, a triangle of 64 blocks, ten thousand rows; in Python, and in Chromium under JupyterLab.

In the browser a time runs from the event of the key to the first frame after the page has changed, so it holds the message to the kernel, what the kernel does, the message back and
the drawing. Its bound in the same page: a slider that does nothing but put its value into a line of text. Frames are the gaps between two animation frames while keys are being pressed."""
import statistics, sys, time
from pathlib import Path
import torch
from common import paired, random_llama, row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from browser import Chrome, House, Missing

# -- in Python

def step(p, cut): # Seconds until the numbers that need no model, seconds until those that do
    t = time.perf_counter()
    p.pick(*cut)
    p.numbers
    now = time.perf_counter()-t
    while p.cut not in p._known: time.sleep(.0005)
    return now, time.perf_counter()-t

def python_rows():
    from sdlab.core.units import without
    from sdlab.core.model import load
    from sdlab.core.plan import Plan
    from sdlab.lab.picker import Picker
    from sdlab.lab.widgets import picture
    from sdlab.measure.scan import Divergence, Likelihood, scan
    teacher = load()
    with Picker(teacher, prompt='') as p:
        p.widget, p.wait(300)
        cuts = [(l, n) for n in (1, 3, 5, 7) for l in (1, 2, 3, 4)]
        now, all_ = zip(*(step(p, c) for c in cuts))
        texts, known = p._few, f"{p._known[p.cut]['texts']} texts, {p._known[p.cut]['n']} tokens"
        def ours(done=iter([(l, n) for n in (2, 4, 6) for l in range(5)])): step(p, next(done))
        def usual(): scan(without(teacher, Plan.span(12, 3, 4)), texts, Likelihood(), Divergence(teacher))
        def bare():
            with torch.no_grad():
                for b in texts: teacher.model(**{k: b[k] for k in ('input_ids', 'attention_mask', 'position_ids')}, use_cache=False)
        t = paired(ours, usual, n=5)
        u = paired(ours, bare, n=5)
    how = f'Picker on the pocket teacher, no prompt, widget built, median of {len(cuts)} cuts not seen before; '
    return [row('Picker, a step to the numbers that need no model, in Python', statistics.median(now), None, limit='< 0.05', how=how+'parameters, MACs, memory'),
            row('Picker, a step to perplexity and divergence, in Python', statistics.median(all_), None, limit='< 0.3', how=how+known),
            row('the same, against a view and a pass of cut and whole model', t.ours, t.against, ratio=t.ratio, how=f'Picker against scan(without(...), Likelihood(), Divergence(teacher)), {known}'),
            row('the same, against one bare pass of the whole model', u.ours, u.against, ratio=u.ratio, how=f'the bound of reading these texts at all, {known}')]

# -- in the browser

WATCH = '''() => {
  const w = window.sdlab = { at: 0, frames: [], last: 0 }
  addEventListener('keydown', e => { w.at = e.timeStamp }, true)
  const loop = t => { if (w.last) w.frames.push(t - w.last); w.last = t; requestAnimationFrame(loop) }
  requestAnimationFrame(loop)
  // resolves once `read` of `box` is another than before (or what `until` accepts), after the frame that shows it: milliseconds since the key
  w.changed = (box, read, until) => { const before = read(box); w.at = 0
    w.next = new Promise(done => { const look = () => { const now = read(box); if (w.at && now !== before && (!until || until(now))) { seen.disconnect(); requestAnimationFrame(() => requestAnimationFrame(t => done(t - w.at))) } }
      const seen = new MutationObserver(look); seen.observe(box, { childList: true, subtree: true, characterData: true, attributes: true }) }) }
}'''
CELL = "b => [...b.querySelectorAll('tr')].filter(r => r.cells[0] && r.cells[0].textContent.startsWith('{what}')).map(r => r.cells[2].textContent).join()"
NUMBER = 't => /^[0-9]/.test(t)'
TEXT = 'b => b.textContent'

class Bench:
    "A page whose reactions are timed"
    def __init__(self, screen):
        self.s, self.page = screen, screen.page
        self.page.evaluate(WATCH)
    def box(self, selector, i=0): # The output that holds the i-th match
        b = self.page.locator('.jp-OutputArea-output', has=self.page.locator(selector)).nth(i)
        b.scroll_into_view_if_needed()
        self.page.wait_for_timeout(500)
        return b
    def times(self, box, keys, read=TEXT, until='null', settle=None): # Seconds, one for each key
        out = []
        for k in keys:
            box.evaluate(f'b => sdlab.changed(b, {read}, {until})')
            self.page.keyboard.press(k)
            out.append(self.page.evaluate('Promise.race([sdlab.next, new Promise(f => setTimeout(() => f(1e5), 20000))])')/1000)
            if settle: settle()
        return out
    def frames(self, f=None, seconds=1.): # Gaps between frames while `f` is done, in seconds, ascending
        self.page.evaluate('() => { sdlab.frames.length = 0 }')
        if f: f()
        else: self.page.wait_for_timeout(seconds*1000)
        return sorted(x/1000 for x in self.page.evaluate('sdlab.frames'))
    def hold(self, key, times, every=.05): # A key held down: pressed again and again, whether or not an answer has come
        for _ in range(times): self.page.keyboard.press(key); self.page.wait_for_timeout(every*1000)

def p95(x): return x[int(.95*(len(x)-1))]

CELLS = ['''
import ipywidgets as w
slider, said = w.IntSlider(0, 0, 100, description='bare'), w.HTML('0')
said.add_class('echo')
slider.observe(lambda c: setattr(said, 'value', str(c['new'])), 'value')
w.VBox([slider, said])''', '''
from sdlab.core.model import load
from sdlab.lab.picker import Picker
small = Picker(load(), n=1, first=1)
small.wait(300)
small''', '''
import sys; sys.path[:0] = {paths!r}
import torch
from bench_importance import tokenizer
from common import random_llama
from sdlab.core.model import LM
from sdlab.measure.scores import Scores
L, g = 64, torch.Generator().manual_seed(0)
turn = torch.rand(L, generator=g).cumsum(0)
spans = torch.full((L, L), float('nan'))
for n in range(1, L+1): spans[:L+1-n, n-1] = (turn[n-1:]-torch.cat([torch.zeros(1), turn])[:L+1-n])/L
big = Picker(LM(random_llama(n=L, d=64), tokenizer()), ['a '*24]*8, Scores('angular distance', spans), prompt='', n=1, first=0)
big.wait(300)
big''', '''
from sdlab.lab.reader import Reader
from sdlab.core.pocket import pocket_rows
some = [dict(r) for r in pocket_rows('sums', 500, 3)]
own = [dict(r) for r in pocket_rows('sums', 500, 0)]
rows = [dict(prompt=f"{i}: {a['prompt']}", completion=b['completion'], reference=a['completion'], written=b['completion'], source='teacher', reason='same answer' if i%7 else 'other answer') for i in range(10000) for a, b in [(some[i%500], own[i%500])]]
reader = Reader(rows)
reader''', '''
import pandas as pd
whole, turn_ = w.HTML(layout=dict(height='300px', overflow='auto')), w.IntSlider(0, 0, 9, description='whole table')
whole.add_class('whole')
turn_.observe(lambda c: setattr(whole, 'value', str(c['new'])+pd.DataFrame(rows)[['prompt', 'reference', 'written', 'reason']].to_html()), 'value')
w.VBox([turn_, whole])''']

DRAW = '''
import time, statistics
from sdlab.lab.picker import _draw_triangle
from sdlab.lab.widgets import picture
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
def once():
    t = time.perf_counter(); fig, ax = plt.subplots(figsize=(5, 4.4)); _draw_triangle(big, ax); picture(fig)
    return time.perf_counter()-t
drawn = statistics.median([once() for _ in range(6)][1:])'''

def picker_rows(b):
    med = statistics.median
    echo = b.box('.echo')
    echo.get_by_role('slider').focus()
    bare = b.times(echo, ['ArrowRight']*15)
    b.s.kernel.ask('small.wait(300) is None', seconds=300)
    box = b.box('.sdlab-tried', 0)
    slider = box.get_by_role('slider').first
    settle = lambda: b.s.until('small.cut in small._known and small.answers["student"]!=""', 60)
    slider.focus()
    now = b.times(box, ['ArrowRight']*9, CELL.replace('{what}', 'Parameters'), settle=settle)
    b.s.kernel.ask(do='small.pick(3, 1)')
    settle(), slider.focus()
    full = b.times(box, ['ArrowRight']*7, CELL.replace('{what}', 'Perplexity'), NUMBER, settle=settle)
    how = 'pocket teacher, a cut not seen before each time, answers to the prompt streaming beside; median of '
    return [row('Picker, slider key to the numbers that need no model, in JupyterLab', med(now), None, limit='< 0.05', how=f'{how}{len(now)}: parameters, MACs, memory'),
            row('the same, against a bare slider that sets a line of text', med(now), med(bare), how='what kernel, server and browser need for nothing, in the same page'),
            row('Picker, slider key to perplexity and divergence, in JupyterLab', med(full), None, limit='< 0.3', how=f'{how}{len(full)}')]

def triangle_rows(b):
    box = b.box('.sdlab-tried', 1)
    b.s.kernel.ask('big.wait(300) is None', seconds=300)
    stage, back = box.locator('.sdlab-grid .sdlab-stage'), box.locator('.sdlab-grid .sdlab-back')
    idle = b.frames()
    stage.focus()
    moved = b.times(box, ['ArrowRight', 'ArrowUp']*8, "b => b.querySelector('.sdlab-grid .sdlab-say').textContent")
    answered = b.times(box, ['ArrowRight', 'ArrowUp']*8, "b => b.querySelector('[role=img]').getAttribute('aria-label')")
    slider = box.get_by_role('slider').first
    slider.focus()
    moving = b.frames(lambda: b.hold('ArrowRight', 40))
    redraw = []
    for _ in range(7): redraw.append(redraw_time(b, back))
    b.s.kernel.ask(do=DRAW, seconds=120)
    drawn, what = b.s.kernel.ask('drawn'), 'triangle of 64 blocks (2,015 spans), random model'
    return [row('Picker, 64 blocks: arrow key to the new cell, in JupyterLab', statistics.median(moved), None, limit='< 0.05', how=f'{what}: ring and spoken value; median of {len(moved)}'),
            row('Picker, 64 blocks: arrow key to the new strip of blocks', statistics.median(answered), None, limit='< 0.1', how=f'{what}: strip and numbers, through the kernel; median of {len(answered)}'),
            row('Picker, 64 blocks: 95 % of frames while the slider is held', p95(moving), p95(idle), how=f'{what}: 40 steps, one every 50 ms; against the frames of the page at rest; longest {max(moving)*1e3:.0f} ms'),
            row('Picker, 64 blocks: longest frame while the slider is held', max(moving), None, limit='< 0.1', how=what),
            row('Picker, 64 blocks: the whole triangle drawn anew', statistics.median(redraw), drawn, how=f'{what}: canvas in the browser against matplotlib and PNG in the kernel, before it is sent')]

def redraw_time(b, back): # Seconds that the page needs to draw a canvas anew, as after a change of theme
    return back.evaluate('''c => new Promise(done => { let start = 0; const proto = CanvasRenderingContext2D.prototype, clear = proto.clearRect
        proto.clearRect = function (...a) { if (this.canvas === c) start = performance.now(); return clear.apply(this, a) }
        document.body.dataset.theme = String(Math.random())
        const wait = () => start ? (proto.clearRect = clear, done(last - start)) : requestAnimationFrame(wait)
        let last = 0; const text = proto.fillRect; proto.fillRect = function (...a) { last = performance.now(); return text.apply(this, a) }
        requestAnimationFrame(wait) })''')/1000

def reader_rows(b):
    box = b.box('.sdlab-rows')
    idle, sheet, what = b.frames(), "b => b.querySelector('.sdlab-rows').textContent", 'ten thousand rows'
    box.get_by_role('article').first.focus()
    turned = b.times(box, ['PageDown']*12, sheet)
    paging = b.frames(lambda: b.hold('PageDown', 30, .1))
    box.get_by_role('textbox', name='search').focus()
    typed = b.times(box, list('Jill has'), sheet.replace('.sdlab-rows', '[role=status]'))
    b.s.kernel.ask(do='import time; t = time.perf_counter(); Reader(rows).close(); opened = time.perf_counter()-t', seconds=120)
    table = b.box('.whole')
    table.get_by_role('slider').focus()
    whole = b.times(table, ['ArrowRight']*3, "b => b.querySelectorAll('.whole tr').length ? b.querySelector('.whole').textContent.slice(0, 3) : ''")
    med = statistics.median
    return [row('Reader, 10,000 rows: key to the next page, in JupyterLab', med(turned), None, limit='< 0.1', how=f'{what}, median of {len(turned)}'),
            row('the same, against all rows as one table', med(turned), med(whole), how=f'{what} as the HTML of a DataFrame in an ipywidgets.HTML, from the key to the frame'),
            row('Reader, 10,000 rows: key in the search to the new rows', med(typed), None, limit='< 0.3', how=f'{what}, median of {len(typed)} letters'),
            row('Reader, 10,000 rows: 95 % of frames while paging', p95(paging), p95(idle), how=f'30 pages, one every 100 ms; against the frames of the page at rest; longest {max(paging)*1e3:.0f} ms'),
            row('Reader, 10,000 rows: longest frame while paging', max(paging), None, limit='< 0.1', how=what),
            row('Reader, 10,000 rows: opened, in Python', b.s.kernel.ask('opened'), None, how=what)]

def browser_rows():
    here = Path(__file__).resolve().parent
    cells = [c.replace('{paths!r}', repr([str(here), str(here.parents[1])])) for c in CELLS]
    with House() as house, Chrome() as chrome, chrome.lab(house.lab(), house.copy(cells, 'bench.ipynb')) as s:
        s.run_all(300)
        b = Bench(s)
        out = picker_rows(b)+triangle_rows(b)+reader_rows(b)
        if s.outside or s.errors or house.outside(): raise RuntimeError(f'the page asked other machines or complained: {s.outside} {s.errors} {house.outside()}')
        return out

def rows():
    out = python_rows()
    try: return out+browser_rows()
    except Missing as e:
        print(f'The lines in the browser are left out: {e}')
        return out
