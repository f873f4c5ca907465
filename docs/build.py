"""The documentation site, offline: every notebook with the outputs it keeps, the API with its docments, families and benchmarks.

    python docs/build.py [--out _docs] [--only index core/00_plot api/core.plan ...]        (make docs)

Notebooks become Markdown pages in `_proc/site`, mkdocs-material makes the site from them. What a page must not do is ask anybody for
anything: equations are MathML (mathml.py), figures are files beside the page, fonts are the reader's own, a live widget is shown as
the text or the picture that was kept with it. `outside(site)` finds every request that a page would make; the build fails if there is one."""
import argparse, html, importlib, inspect, json, os, re, shutil, sys, textwrap
from base64 import b64decode
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT/'tests')]
from mathml import equations, mathml
from sync import notebooks

WINGS = dict(core='what is a model, a decision, a row, an answer, a folder?', measure='what does each unit do, how alike are two models, what does one cost?',
             compress='what do we take away?', heal='how is it brought back?', judge='what was lost, what came back?', experiment='what is compared with what?', lab='where the hands are')
OTHER = {'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}

# -- the pieces of a page that no Markdown may touch: they are put in when the page is made

class Kept(dict):
    "Pieces of HTML by a name that stands for them in the Markdown"
    def inline(self, text): self[k := f'KEPT{len(self)}PIECE'] = text; return k
    def block(self, text): return f'\n\n{self.inline(text)}\n\n'

def filled(text, kept): # HTML of a page -> the same with its pieces
    return re.sub(r'<p>\s*(KEPT\d+PIECE)\s*</p>|(KEPT\d+PIECE)', lambda m: kept[m[1] or m[2]], text)

def shown_math(text, kept): return equations(text, lambda tex, display: (kept.block if display else kept.inline)(mathml(tex, display)))

# -- notebooks

HIDDEN = {'hide', 'hide_cell', 'default_exp', 'include: false'}
def flags(source): return {m[1].strip() for m in re.finditer(r'^#\|\s*(.*)$', source, re.M)}
def hidden(source): return any(f in HIDDEN or f.startswith('default_exp') for f in flags(source))
def bare(source): return '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip('\n')

def relinked(text, at, page, links):
    "Markdown that lies in the folder `at` of the repository, its relative links leading to what `links` has for them, as seen from `page`"
    def link(m):
        to, _, part = m[2].partition('#')
        new = links.get(os.path.normpath(os.path.join(at, to))) if to and not re.match(r'[a-z]+:', to) else None
        return m[1]+os.path.relpath(new, os.path.dirname(page) or '.')+(f'#{part}' if part else '') if new else m[0]
    return re.sub(r'(\]\(|src="|href=")([^)"\s]+)', link, text)

ANSI = re.compile(r'\x1b\[[0-9;]*[A-Za-z]')
def joined(s): return ''.join(s) if isinstance(s, list) else s
def plain(text, kind): return f'<pre class="{kind}">{html.escape(ANSI.sub("", text).rstrip())}</pre>' if text.strip() else ''

def marked(text): # Markdown of an output as HTML
    import markdown
    return markdown.markdown(text, extensions=['tables', 'fenced_code', 'sane_lists'])

def quiet(text): # HTML of an output without what would run or fetch
    return re.sub(r'<script\b.*?</script\s*>|<link\b[^>]*>|<iframe\b.*?</iframe\s*>', '', text, flags=re.S|re.I)

def picture(data, kind, name, files): # `data` of an image output, kept as a file
    files[f'figures/{name}.{kind}'] = b64decode(data) if kind!='svg' else data.encode()
    return f'figures/{name}.{kind}'

LIVE = 'A live widget: open the notebook in JupyterLab to use it.'
IMAGES = {'image/png': 'png', 'image/jpeg': 'jpeg', 'image/svg+xml': 'svg'}
def output(o, name, up, files, kept):
    "HTML of one kept output: of a live widget its picture or its text, of anything else its richest form"
    if o['output_type']=='stream': return '' if o.get('name')=='stderr' else plain(joined(o['text']), 'said')
    if o['output_type']=='error': return plain('\n'.join(o['traceback']), 'said')
    data = {k: joined(v) for k,v in o.get('data', {}).items() if isinstance(v, (str, list))}
    widget = any('widget-view' in k for k in o.get('data', {}))
    for k,kind in IMAGES.items():
        if k in data: return f'<img alt="figure" loading="lazy" src="{up}{picture(data[k], kind, name, files)}">'
    if widget: return plain(LIVE if re.match(r'[\w.]+\(|<', text := data.get('text/plain', '')) or not text else text, 'widget')
    if 'text/html' in data: return f'<div class="wide">{quiet(data["text/html"])}</div>'
    if 'text/markdown' in data: return f'<div class="wide">{filled(marked(shown_math(data["text/markdown"], kept)), kept)}</div>'
    return plain(data.get('text/plain', ''), 'said')

def cell(c, i, stem, at, page, files, kept, links):
    "Markdown of one cell"
    source, up = joined(c['source']), '../'*page.count('/')
    if c['cell_type']=='raw' or c['cell_type']=='code' and hidden(source): return ''
    if c['cell_type']=='markdown': return shown_math(relinked(source, at, page, links), kept)
    code = '' if flags(source)&{'echo: false', 'hide_input'} else bare(source)
    kind = ' .exported' if flags(source)&{'export', 'exports', 'exporti'} else ''
    shown = [f'~~~~ {{ .python{kind} }}\n{code}\n~~~~'] if code else []
    outs = [output(o, f'{stem}-{i}-{j}', up, files, kept) for j,o in enumerate(c.get('outputs', [])) if 'hide_output' not in flags(source)]
    return '\n\n'.join(shown+[kept.block(f'<div class="output">{"".join(outs)}</div>')] if any(outs) else shown)

def cells_of(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def folder_of(path, root): return path.parent.relative_to(root).as_posix()

def pages_of(cells, path, root, page, files, kept, links): # Markdown
    "Cells of the notebook at `path` as a page"
    stem = page.removesuffix('.md').replace('/', '-')
    return '\n\n'.join(filter(None, (cell(c, i, stem, folder_of(path, root), page, files, kept, links) for i,c in enumerate(cells))))+'\n'

def section(path, title): # Cells
    "The part of a notebook under a heading that matches `title`"
    cells = cells_of(path)
    at = [i for i,c in enumerate(cells) if c['cell_type']=='markdown' and joined(c['source']).startswith('## ')]
    start = next((i for i in at if re.search(title, joined(cells[i]['source']).splitlines()[0], re.I)), None)
    if start is None: raise SystemExit(f'{path} has no section whose heading matches {title!r}')
    return [dict(c, source='#| echo: false\n'+joined(c['source'])) if c['cell_type']=='code' else c for c in cells[start:next((i for i in at if i>start), None)]]

# -- the API

def short(v, width=60): # A default as it is written
    text = getattr(v, '__name__', None) or repr(v)
    return text if len(text)<=width else text[:width-1]+'…'

def explained(f, skip=('self', 'cls')): # [(name, type, default, comment)], the result last
    "What the comments in a signature say"
    from fastcore.docments import docments
    said, sig = docments(f, full=True), inspect.signature(f)
    empty = inspect.Parameter.empty
    rows = [(('**' if p.kind is p.VAR_KEYWORD else '*' if p.kind is p.VAR_POSITIONAL else '')+k, '' if p.annotation is empty else inspect.formatannotation(p.annotation).strip("'"), '' if p.default is empty else short(p.default), (said.get(k) or {}).get('docment') or '')
            for k,p in sig.parameters.items() if k not in skip]
    r = said.get('return') or {}
    if r.get('docment') or sig.return_annotation is not empty: rows.append(('returns', '' if sig.return_annotation is empty else inspect.formatannotation(sig.return_annotation).strip("'"), '', r.get('docment') or ''))
    return rows

def line(c): return re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(' '.join(str(c).split())))
def table(rows): # HTML
    head = ''.join(f'<th>{c}</th>' for c in ('', 'type', 'default', ''))
    body = ''.join(f'<tr><td><code>{html.escape(k)}</code></td><td>{html.escape(t)}</td><td>{f"<code>{html.escape(d)}</code>" if d else ""}</td><td>{line(doc)}</td></tr>' for k,t,d,doc in rows)
    return f'<div class="wide"><table class="args"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>' if rows else ''

def state(c): # [(name, type, default, comment)]
    "The traits of an instrument that its class itself defines and explains"
    own = c.class_own_traits() if hasattr(c, 'class_own_traits') else {}
    said = dict(re.findall(r'^    (\w+)\s*=.*?#\s(.*)$', textwrap.dedent(inspect.getsource(c)), re.M)) if own else {}
    return [(k, type(t).__name__, short(t.default_value) if isinstance(t.default_value, (str, int, float, bool)) else '', said[k]) for k,t in own.items() if k in said]

def call(name, f, skip=('self', 'cls')): # The signature on one line, without types
    parts = []
    for k,p in inspect.signature(f).parameters.items():
        if k in skip: continue
        if p.kind is p.KEYWORD_ONLY and not any(o.startswith('*') for o in parts): parts.append('*')
        parts.append({p.VAR_KEYWORD: '**', p.VAR_POSITIONAL: '*'}.get(p.kind, '')+k+('' if p.default is p.empty else f'={short(p.default, 24)}'))
    return f"{name}({', '.join(parts)})"

def described(o): return f'\n{inspect.cleandoc(o.__doc__)}\n' if o.__doc__ else ''

def members(c): # Public methods and properties that the class itself defines
    for k,v in vars(c).items():
        f = getattr(v, '__func__', v)
        if k.startswith('_') or not (inspect.isfunction(f) or isinstance(v, property) or type(v).__name__=='cached_property'): continue
        yield k, f.fget if isinstance(f, property) else getattr(f, 'func', f) if not inspect.isfunction(f) else f, inspect.isfunction(f)

def entry(name, o, kept): # Markdown of one public name
    if inspect.isclass(o):
        out = [f'## {name}', f'~~~~ python\n{call(name, o)}\n~~~~' if '__init__' in vars(o) else '', described(o), kept.block(table(explained(o))) if '__init__' in vars(o) else '', '**State**'+kept.block(table(state(o))) if state(o) else '']
        for k,f,callable_ in members(o):
            head = f'### {name}.{k}'
            out += [head, f'~~~~ python\n{call(f"{name}.{k}", f)}\n~~~~', described(f), kept.block(table(explained(f)))] if callable_ else [f'{head}', described(f) or '*a property*']
        return '\n\n'.join(filter(None, out))
    return '\n\n'.join(filter(None, [f'## {name}', f'~~~~ python\n{call(name, o)}\n~~~~', described(o), kept.block(table(explained(o)))]))

def api(module, lesson, kept): # Markdown
    "Every public name of a module, with what its comments say"
    m = importlib.import_module(f'sdlab.{module}')
    mine = {k: getattr(m, k) for k in m.__all__ if hasattr(m, k)}
    code = {k: o for k,o in mine.items() if (inspect.isfunction(o) or inspect.isclass(o)) and o.__module__==m.__name__}
    values = [f'- `{k}`: `{short(o, 120)}`' for k,o in mine.items() if not (inspect.isfunction(o) or inspect.isclass(o))]
    head = [f'# sdlab.{module}', f'> {m.__doc__}' if m.__doc__ else '', f'The lesson that this is exported from: [{module.split(".")[-1]}](../{lesson}).' if lesson else '']
    return '\n\n'.join(filter(None, head+(['## Values\n\n'+'\n'.join(values)] if values else [])+[entry(k, o, kept) for k,o in code.items()]))+'\n'

def modules(root): # {module: page of its lesson, from the site's root}
    "Modules in the order of the book"
    out = {}
    for p in notebooks(root):
        m = re.search(r'^#\|\s*default_exp\s+([\w.]+)', '\n'.join(joined(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code'), re.M)
        if m and m[1]!='all': out[m[1]] = p.relative_to(root/'nbs').with_suffix('.md').as_posix()
    wings = [*WINGS, 'maintain']
    return dict(sorted(out.items(), key=lambda o: (wings.index(o[0].split('.')[0]), o[1])))

# -- the site

CSS = """
.output pre,.output .wide{font-size:.72rem}.output pre{background:none;border-left:3px solid var(--md-default-fg-color--lightest);padding:.4rem .8rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0;line-height:1.4;color:var(--md-default-fg-color);font-family:var(--md-code-font-family,monospace)}
.output img{background:#fff;border-radius:4px;max-width:100%;height:auto}.output .wide,.wide{overflow-x:auto}.output table,table.args{border-collapse:collapse;font-size:.68rem;font-variant-numeric:tabular-nums}
.output table{border:0!important;border-spacing:0}.output th,.output td{border-width:0 0 1px!important}table.args code{white-space:nowrap}
.output th,.output td,table.args td,table.args th{padding:.25rem .6rem;border-bottom:1px solid var(--md-default-fg-color--lightest);text-align:left;vertical-align:top}
.exported{border-left:3px solid var(--md-accent-fg-color)}pre.widget{font-style:italic}math[display=block]{margin:1em 0;overflow-x:auto}
"""
THEME = dict(name='material', font=False, language='en', features=['navigation.tabs', 'navigation.top', 'navigation.footer', 'content.code.copy', 'search.highlight', 'toc.follow'],
             palette=[dict(media='(prefers-color-scheme: light)', scheme='default', primary='blue grey', accent='indigo', toggle=dict(icon='material/weather-night', name='Dark')),
                      dict(media='(prefers-color-scheme: dark)', scheme='slate', primary='blue grey', accent='indigo', toggle=dict(icon='material/weather-sunny', name='Light'))])

def config(src, out, nav):
    "mkdocs' settings: nothing in them names an address"
    return dict(site_name='sdlab', site_url='', docs_dir=str(src), site_dir=str(out), use_directory_urls=False, theme=THEME, plugins=['search'], extra_css=['sdlab.css'], nav=nav,
                markdown_extensions=['tables', 'attr_list', 'sane_lists', 'toc', {'pymdownx.highlight': dict(use_pygments=True, guess_lang=False)}, 'pymdownx.superfences'],
                validation=dict(links=dict(not_found='warn', absolute_links='ignore', unrecognized_links='ignore', anchors='ignore'), nav=dict(omitted_files='ignore')))

def named(page): return re.sub(r'^\d+_', '', Path(page).stem).replace('_', ' ')

def contents(pages): # mkdocs' nav
    "Home, tutorials, a tab per wing, the API, tables"
    of = lambda d: [{named(p): p} for p in pages if p.startswith(d+'/')]
    first = [{'Home': 'index.md'}] if 'index.md' in pages else []
    tables = [{k: p} for k,p in {'Families': 'families.md', 'Benchmarks': 'benchmarks.md', 'all names': '90_all.md', 'Changes': 'changelog.md', 'Working on it': 'contributing.md'}.items() if p in pages]
    tabs = [{k: of(d)} for k,d in {'Tutorials': 'tutorials', 'Papers': 'papers', **{w.capitalize(): w for w in WINGS}, 'Maintaining': 'maintain', 'API': 'api'}.items() if of(d)]
    return first+tabs+([{'Tables': tables}] if tables else [])

def planned(root): # {page: function of (files, kept, links) -> Markdown}
    "Every page of the site, and how to make it"
    todo, prune = {}, root/'nbs'/'compress'/'00_prune.ipynb'
    for p in notebooks(root):
        page = p.relative_to(root/'nbs').with_suffix('.md').as_posix()
        todo[page] = lambda *args, p=p, page=page: pages_of(cells_of(p), p, root, page, *args)
    for m,lesson in modules(root).items(): todo[f'api/{m}.md'] = lambda files, kept, links, m=m, lesson=lesson: api(m, lesson, kept)
    if prune.exists(): todo['families.md'] = lambda *args: '# Families\n\n'+pages_of(section(prune, 'famil'), prune, root, 'families.md', *args)+'\nMade by running [prune](compress/00_prune.md).\n'
    for f,page in OTHER.items():
        if (root/f).exists(): todo[page] = lambda files, kept, links, f=f, page=page: relinked((root/f).read_text(encoding='utf-8'), '', page, links)
    return todo

def build(
    root=ROOT, # Of the repository
    out=None,  # Folder of the site (default: _docs in the repository); what is there is replaced
    only=(),   # Pages, such as index, core/00_plot or api/core.plan (default: all)
    work=None, # Where the Markdown pages are written (default: _proc/site in the repository)
)->Path:       # The folder of the site
    "Make the site; raises `SystemExit` with what is wrong with a page"
    root, out, src = Path(root), Path(out or Path(root)/'_docs').resolve(), Path(work or Path(root)/'_proc'/'site').resolve()
    todo = planned(root)
    if lost := [o for o in only if f'{o}.md' not in todo]: raise SystemExit(f'There is no page {lost[0]}; there are {", ".join(p[:-3] for p in todo)}')
    todo = {p: f for p,f in todo.items() if not only or p[:-3] in only}
    links = {f'nbs/{p[:-3]}.ipynb': p for p in todo if p!='families.md' and not p.startswith('api/')}|{f: p for f,p in OTHER.items() if p in todo}
    links |= {f'images/{p.name}': f'images/{p.name}' for p in (root/'images').glob('*') if p.is_file()}
    shutil.rmtree(src, ignore_errors=True)
    kept, files = Kept(), {'sdlab.css': CSS.encode()}
    for page,make in todo.items():
        try: files[page] = make(files, kept, links).encode()
        except ValueError as e: raise SystemExit(f'{page}: {e}')
    for name in (k for k in links if k.startswith('images/')): files[name] = (root/name).read_bytes()
    for name,data in files.items():
        (src/name).parent.mkdir(parents=True, exist_ok=True)
        (src/name).write_bytes(data)
    broken = made(config(src, out, contents(todo)), kept)
    if broken and not only: raise SystemExit('\n'.join(broken))
    if bad := outside(out): raise SystemExit('These pages would ask the network:\n'+'\n'.join(bad))
    return out

def made(settings, kept): # What it says of broken links
    "Run mkdocs on the pages"
    import logging, yaml
    from mkdocs.commands.build import build as run
    from mkdocs.config import load_config
    from mkdocs.plugins import BasePlugin
    class Pieces(BasePlugin):
        def on_page_content(self, text, **kwargs): return filled(text, kept)
    said = []
    class Ear(logging.Handler):
        def emit(self, record): said.append(record.getMessage())
    ear, log = Ear(logging.WARNING), logging.getLogger('mkdocs')
    path = Path(settings['docs_dir']).parent/'mkdocs.yml'
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding='utf-8')
    log.addHandler(ear)
    try:
        cfg = load_config(str(path))
        cfg.plugins['pieces'] = Pieces()
        cfg.plugins._register_event('page_content', cfg.plugins['pieces'].on_page_content)
        run(cfg)
        (Path(settings['site_dir'])/'404.html').unlink(missing_ok=True)                      # made for a server that we are not
        index = Path(settings['site_dir'])/'search'/'search_index.json'
        index.with_suffix('.js').write_text('var __index = '+index.read_text(encoding='utf-8'), encoding='utf-8')   # read where pages are opened as files
    finally: log.removeHandler(ear)
    return [o for o in said if 'link' in o]

# -- who would be asked for what

_LOADS = re.compile(r'<(?:script|img|iframe|source|video|audio|embed|object|input|track)\b[^>]*?\s(?:src|data|srcset|poster)\s*=\s*["\']?\s*((?:https?:)?//[^"\'\s>]+)|<link\b(?=[^>]*\brel\s*=\s*["\']?(?:stylesheet|preload|prefetch|preconnect|dns-prefetch|icon|modulepreload|manifest))[^>]*?\shref\s*=\s*["\']?\s*((?:https?:)?//[^"\'\s>]+)', re.I)
_STYLE = re.compile(r'url\(\s*["\']?\s*((?:https?:)?//[^)"\'\s]+)|@import\s+["\']((?:https?:)?//[^"\']+)', re.I)
_CODE = re.compile(r'(?:import\s*\(|importScripts\s*\(|fetch\s*\(|from\s+|new\s+Worker\s*\()\s*["\'`]((?:https?:)?//[^"\'`]+)', re.I)

def asked(text, kind): # Addresses that a file of this kind (.html, .css, .js) loads by itself
    "Links that a reader follows are not among them"
    if kind=='.css': return [a or b for a,b in _STYLE.findall(text)]
    if kind=='.js': return _CODE.findall(text)
    styles = re.findall(r'<style\b[^>]*>(.*?)</style>', text, re.S|re.I)+re.findall(r'\sstyle\s*=\s*"([^"]*)"', text)
    scripts = re.findall(r'<script\b[^>]*>(.*?)</script>', text, re.S|re.I)
    return [a or b for a,b in _LOADS.findall(text)]+[u for s in styles for u in asked(s, '.css')]+[u for s in scripts for u in asked(s, '.js')]

def outside(site): # ['page: address', ...]
    "Every request to another machine that opening a page of `site` would make"
    out = [f'{p.relative_to(site)}: {u}' for p in sorted(Path(site).rglob('*')) if p.suffix in ('.html', '.css', '.js', '.svg') for u in asked(p.read_text(encoding='utf-8', errors='replace'), '.html' if p.suffix=='.svg' else p.suffix)]
    lazy = [f'{p.relative_to(site)}: a diagram, whose script is fetched' for p in sorted(Path(site).rglob('*.html')) if re.search(r'class="[^"]*\bmermaid\b', p.read_text(encoding='utf-8'))]
    return out+lazy

def main(argv=None):
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--out', help='folder of the site (default: _docs)')
    a.add_argument('--only', nargs='*', default=(), help='pages to make, such as index core/00_plot api/core.plan (default: all)')
    a = a.parse_args(argv)
    os.environ.setdefault('MPLBACKEND', 'Agg')
    site = build(ROOT, a.out, tuple(a.only))
    print(f"{len(list(site.rglob('*.html')))} pages: open {os.path.relpath(site/'index.html')} (to search in them: python -m http.server -d {os.path.relpath(site)})")

if __name__=='__main__': main()
