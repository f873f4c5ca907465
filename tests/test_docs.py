"The documentation site: equations without a script, pages that ask nobody for anything, and a check that would see it if one did"
import json, re, sys
from pathlib import Path
from xml.etree import ElementTree
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))
pytest.importorskip('material', reason='mkdocs-material is not installed')
import build as B, mathml as M
from sync import notebooks

# equations
def shape(tex, display=False):
    "Tags and text of an equation, without its annotation"
    root = ElementTree.fromstring(M.mathml(tex, display).replace('&#160;', ' '))
    def walk(e): return f"{e.tag}({', '.join(walk(c) for c in e)})" if len(e) else f"{e.tag}:{e.text or ''}"
    return walk(root[0][0])

@pytest.mark.parametrize('tex, want', [
    ('h_{l+1}', 'mrow(msub(mi:h, mrow(mi:l, mo:+, mn:1)))'),
    (r'\tfrac12', 'mrow(mfrac(mn:1, mn:2))'),                                           # TeX takes one digit, not twelve
    ('x^24', 'mrow(msup(mi:x, mn:2), mn:4)'),
    ("y'", 'mrow(msup(mi:y, mo:′))'),
    (r'\lVert X^\top\rVert_F^2', 'mrow(mo:‖, msup(mi:X, mo:⊤), msubsup(mo:‖, mi:F, mn:2))'),
    (r'\text{if } a<b', 'mrow(mtext:if , mi:a, mo:<, mi:b)'),
    (r'\mathbb E', 'mrow(mi:𝔼)'),
    (r'\begin{cases}a&b\\c\end{cases}', 'mrow(mrow(mo:{, mtable(mtr(mtd(mi:a), mtd(mi:b)), mtr(mtd(mi:c)))))')])
def test_equations(tex, want): assert shape(tex)==want

def test_sums_have_their_limits_below_only_on_their_own_line():
    assert 'munder' in shape(r'\sum_v p_v', True) and 'munder' not in shape(r'\sum_v p_v')

@pytest.mark.parametrize('tex', [r'\foo x', 'x_', '{a', r'\frac{1}', 'a}', r'\begin{tikz}a\end{tikz}'])
def test_what_is_not_known_is_refused(tex):
    with pytest.raises(ValueError, match=re.escape(f'${tex}$')): M.mathml(tex)

def test_code_and_money_are_no_equations():
    seen = []
    M.equations('It costs $5 or $6 a piece; `a $x$ b` and\n```\n$y$\n```\nbut $z$ and $$w$$', lambda t, d: seen.append((t, d)) or '')
    assert seen==[('z', False), ('w', True)]

def test_every_equation_of_the_book_can_be_drawn():
    bad = []
    for p in notebooks(ROOT):
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            def try_(tex, display):
                try: ElementTree.fromstring(M.mathml(tex, display).replace('&#160;', ' '))
                except (ValueError, ElementTree.ParseError) as e: bad.append(f'{p.name}: {e}')
                return ''
            if c['cell_type']=='markdown': M.equations(''.join(c['source']), try_)
    assert not bad, '\n'.join(bad)

# outputs
def shown(data, kind='execute_result', **kwargs):
    files, kept = {}, B.Kept()
    return B.output(dict(output_type=kind, data=data, metadata={}, **kwargs), 'n', '../', files, kept), files

WIDGET = {'application/vnd.jupyter.widget-view+json': dict(model_id='1', version_major=2, version_minor=0)}
def test_a_kept_widget_is_its_picture_or_its_text():
    assert 'widget-view' not in shown(WIDGET)[0] and 'JupyterLab' in shown(WIDGET)[0]
    assert shown({**WIDGET, 'text/plain': ['drops 2/12\n', 'of <b>']})[0]=='<pre class="widget">drops 2/12\nof &lt;b&gt;</pre>'
    assert 'VBox' not in shown({**WIDGET, 'text/plain': 'VBox(children=(IntSlider(value=1),))'})[0]
    text, files = shown({**WIDGET, 'text/plain': 'x', 'image/png': 'iVBORw0KGgo='})
    assert 'src="../figures/n.png"' in text and files['figures/n.png'].startswith(b'\x89PNG')

def test_other_outputs():
    assert shown({'text/html': '<table><tr><td>1</td></tr></table><script src="https://x.org/a.js"></script>', 'text/plain': '1'})[0]=='<div class="wide"><table><tr><td>1</td></tr></table></div>'
    assert '<strong>a</strong>' in shown({'text/markdown': '**a**', 'text/plain': 'a'})[0]
    assert shown({'text/plain': '<script>'})[0]=='<pre class="said">&lt;script&gt;</pre>'
    say = lambda name: B.output(dict(output_type='stream', name=name, text=['\x1b[31mred\x1b[0m\n']), 'n', '', {}, B.Kept())
    assert say('stdout')=='<pre class="said">red</pre>' and say('stderr')==''

# the check itself can fail
@pytest.mark.parametrize('name, text', [
    ('a.html', '<script src="https://cdn.org/x.js"></script>'), ('a.html', "<link href='//cdn.org/x.css' rel='stylesheet'>"), ('a.html', '<link rel="preconnect" href="https://fonts.org">'),
    ('a.html', '<img alt="" src="http://x.org/a.png">'), ('a.html', '<iframe src=https://x.org></iframe>'), ('a.html', '<style>@import "https://x.org/a.css"</style>'),
    ('a.html', '<div style="background:url(https://x.org/a.png)"></div>'), ('a.html', '<script type="module">import("https://cdn.org/m.js")</script>'),
    ('a.css', '@font-face{src:url("https://fonts.org/a.woff2")}'), ('a.js', 'fetch("https://x.org/data")'), ('a.html', '<pre class="mermaid">graph</pre>')])
def test_a_request_is_seen(tmp_path, name, text):
    (tmp_path/name).write_text(text)
    assert len(B.outside(tmp_path))==1, text

@pytest.mark.parametrize('text', ['<a href="https://arxiv.org/abs/2410.09982">paper</a>', '<img src="images/a.png">', '<img src="data:image/png;base64,AAAA">', '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
                                  '<pre>load("https://x.org")</pre>', '<link rel="canonical" href="https://x.org/a.html">'])
def test_a_link_is_no_request(tmp_path, text):
    (tmp_path/'a.html').write_text(text)
    assert B.outside(tmp_path)==[]

# the site
@pytest.fixture(scope='module')
def site(tmp_path_factory):
    at = tmp_path_factory.mktemp('docs')
    return B.build(ROOT, at/'site', ('index', 'core/05_plan', 'measure/05_cka', 'api/core.plan', 'families', 'benchmarks'), at/'work')

def read(site, page): return (site/page).read_text(encoding='utf-8')

def test_pages_are_there_and_ask_nobody(site):
    assert B.outside(site)==[]
    for p in ('index.html', 'core/05_plan.html', 'measure/05_cka.html', 'api/core.plan.html', 'families.html', 'benchmarks.html', 'search/search_index.json', 'sdlab.css'): assert (site/p).stat().st_size
    pages = [p.read_text(encoding='utf-8') for p in site.rglob('*.html')]
    assert not any('KEPT' in t or 'mathjax' in t.lower() or 'widget-view' in t or 'fonts.g' in t for t in pages)

def test_equations_figures_and_code_of_a_notebook(site):
    text = read(site, 'measure/05_cka.html')
    assert '<math display="block">' in text and '<math display="inline">' in text and '$$' not in re.sub(r'<code.*?</code>|<annotation.*?</annotation>', '', text, flags=re.S)
    figures = re.findall(r'<img[^>]*src="\.\./(figures/[^"]+)"', text)
    assert figures and all((site/f).read_bytes()[:4]==b'\x89PNG' for f in figures)
    assert '#| export' not in text and 'default_exp' not in text

def test_the_api_says_what_the_comments_say(site):
    from fastcore.docments import docments
    from sdlab.core.plan import Plan
    import html
    text = html.unescape(re.sub('</?code>', '`', read(site, 'api/core.plan.html')))
    for k,v in docments(Plan, full=True).items():
        if v.get('docment'): assert ' '.join(v['docment'].split()) in text, k
    assert 'Plan.from_json' in text and '05_plan.html' in text

def test_the_state_of_an_instrument_is_told():
    import traitlets
    from sdlab.lab import widgets
    class Dial(widgets.Instrument):
        n = traitlets.Int(3)      # How far it is turned, 0..10
        label = traitlets.Unicode('')
    assert B.state(Dial)==[('n', 'Int', '3', 'How far it is turned, 0..10')]
    assert B.line('a `Plan` <b>')=='a <code>Plan</code> &lt;b&gt;'

def test_tables_and_links(site):
    assert all(k in read(site, 'families.html') for k in ('Llama', 'Mixtral', 'GPT-2')) and 'torch_cka' in read(site, 'benchmarks.html')
    home = read(site, 'index.html')
    assert 'href="core/05_plan.html"' in home and 'src="images/recovery.png"' in home and (site/'images'/'recovery.png').exists()

def test_an_unknown_page_and_an_unknown_equation_end_it(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='There is no page core/00_none'): B.build(ROOT, tmp_path/'s', ('core/00_none',), tmp_path/'w')
    monkeypatch.setitem(M.SIGNS, 'top', None), monkeypatch.delitem(M.SIGNS, 'top')
    with pytest.raises(SystemExit, match=r'measure/05_cka.md: \\top is not known'): B.build(ROOT, tmp_path/'s', ('measure/05_cka',), tmp_path/'w')

@pytest.mark.xdist_group('browser')
def test_in_a_real_browser(site):
    "Every page opened, equations drawn, the search used: nothing asked elsewhere, no complaint"
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread
    from browser import Chrome, Missing
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    try: chrome = Chrome()
    except Missing as e: pytest.skip(str(e))
    with chrome, ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            with chrome.page() as s:
                at = f'http://127.0.0.1:{server.server_port}'
                for p in sorted(site.rglob('*.html')): s.page.goto(f'{at}/{p.relative_to(site)}')
                s.page.goto(f'{at}/measure/05_cka.html')
                assert all(b['width']>3 and b['height']>3 for b in (m.bounding_box() for m in s.page.locator('math[display=block]').all()))
                assert s.page.evaluate("[...document.querySelectorAll('.output img')].length")>0
                ask = s.page.locator('[data-md-component=search-query]')
                ask.click(), ask.press_sequentially('decision', delay=20)
                s.page.locator('.md-search-result__item').first.wait_for()
                assert s.outside==[] and s.errors==[]
        finally: server.shutdown()
