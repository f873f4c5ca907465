"What a machine can check of the house: its face, its directions, its manners"
import ast, importlib, inspect, json, re, subprocess, sys
from pathlib import Path
import pytest
from house import pages

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'sdlab'

PAGES = pages()
def source(module): return (PACKAGE/(module.replace('.', '/')+'.py')).read_text(encoding='utf-8')
def public(module):
    "Functions and classes that `module` itself defines and exports"
    m = importlib.import_module(f'sdlab.{module}')
    return {o: getattr(m, o) for o in m.__all__ if getattr(getattr(m, o, None), '__module__', None)==m.__name__ and (inspect.isfunction(getattr(m, o)) or inspect.isclass(getattr(m, o)))}

def fresh(code):
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode==0, p.stderr
    return p.stdout

# the face
def test_import_is_light():
    heavy = fresh('import sys; before=set(sys.modules); import sdlab; print(*sorted({m.split(".")[0] for m in set(sys.modules)-before}))').split()
    assert not {'torch','transformers','numpy','pandas','datasets','trl','matplotlib'} & set(heavy), heavy
    assert set(heavy)=={'sdlab'}, heavy

def test_vocabulary_import_is_not_heavier_than_it_must_be():
    loaded = fresh('import sys; from sdlab.all import *; print(*[m for m in ("trl","peft","seaborn","sklearn","fastcore","nbdev") if m in sys.modules])').split()
    assert not loaded, f'{loaded} must be imported in the functions that use them'

VOCABULARY = '''COLORS curve bars heat Plan rows encode prompt_ids collate batches split overlap fingerprint Decoding LM load find_blocks generate extract agree Task
    pocket_tasks pocket_rows scan distances influence relative_update deepest random_spans cka cost without prune rewrite summary tune score recovery
    step tried study recipe Weights Run Evaluation train Picker Reader Watch Map Compare workflow'''.split()
def test_star_brings_the_vocabulary():
    names = fresh('from sdlab.all import *; print(*dir())').split()
    assert not set(VOCABULARY)-set(names), sorted(set(VOCABULARY)-set(names))
    assert not {'torch','np','pd','plt','nn','F','os','sys','Path','annotations'} & set(names)

def test_lazy_names():
    import sdlab
    from sdlab.core.model import load
    assert sdlab.load is load and sdlab.core.model.load is load
    with pytest.raises(AttributeError, match='no_such_name'): sdlab.no_such_name

# pages
@pytest.mark.parametrize('module', PAGES)
def test_page_is_in_its_wing(module):
    n, nb = PAGES[module]
    assert nb.stem[3:]==module.split('.')[-1]
    if '.' in module: assert nb.parent.name==module.split('.')[0]

# manners
def unexplained(name, f, skip=()):
    "What is missing from `f`: its docstring, or the comment of an argument. A method's docstring may name its arguments instead"
    from fastcore.docments import docments
    if not (inspect.getdoc(f) or '').strip(): yield f'{name}: no docstring'
    docs, plain = docments(f, full=True), lambda p: p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    told = re.findall(r'`(\w+)`', inspect.getdoc(f) or '') if '.' in name else ()
    for p in filter(plain, inspect.signature(f).parameters.values()):
        if p.name not in ('self', 'cls', *skip, *told) and not getattr(docs.get(p.name), 'docment', None): yield f'{name}: no comment on {p.name}'

def unexplained_class(name, c):
    "The same of a class: itself, its fields, its methods (one that overrides an explained one needs nothing)"
    from fastcore.docments import docments
    own = vars(c)
    if not own.get('__doc__') or own['__doc__'].startswith(f'{name}('): yield f'{name}: no docstring'
    if hasattr(c, '__dataclass_fields__'):
        docs = docments(c, full=True)
        yield from (f'{name}: no comment on {k}' for k in own.get('__annotations__', {}) if not k.startswith('_') and not getattr(docs.get(k), 'docment', None))
    elif '__init__' in own: yield from (o for o in unexplained(name, own['__init__']) if 'docstring' not in o)
    for k,f in own.items():
        if isinstance(f, property) and len(inspect.getsource(f.fget).splitlines())<=2: continue      # its name and its line say it
        f = getattr(f, '__func__', f.fget if isinstance(f, property) else f)
        if k.startswith('_') or not inspect.isfunction(f) or f.__module__!=c.__module__: continue
        if any(k in vars(b) for b in c.__mro__[1:]): continue
        yield from unexplained(f'{name}.{k}', f, skip=('ax',))

@pytest.mark.parametrize('module', [m for m in PAGES if m!='all'])
def test_everything_public_is_explained(module):
    bad = [w for name,o in public(module).items() for w in (unexplained_class if inspect.isclass(o) else unexplained)(name, o)]
    assert not bad, '\n'.join(bad)

def test_that_the_explained_check_can_fail():
    def silent(x, y): pass
    assert list(unexplained('silent', silent))==['silent: no docstring', 'silent: no comment on x', 'silent: no comment on y']
    def brief(self, x, y): "Adds `x`"
    assert list(unexplained('A.brief', brief))==['A.brief: no comment on y'] and len(list(unexplained('brief', brief)))==2

FAMILIES = 'llama mistral mixtral qwen gemma phi gpt2 gpt-2 neox opt falcon bloom starcoder olmo granite cohere smollm stablelm glm mamba deepseek'.split()
def named(node):
    "Family names in the strings of a condition"
    strings = [c.value.lower() for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return [s for s in strings for f in FAMILIES if re.search(rf'(?<![a-z]){re.escape(f)}' + (r'(?![a-z])' if len(f)<5 and f not in ('qwen', 'olmo') else ''), re.sub('for(causallm|conditional)|model|config', ' ', s))]
def conditions(tree):
    for n in ast.walk(tree):
        if isinstance(n, (ast.If, ast.IfExp, ast.While, ast.Assert)): yield n.test
        elif isinstance(n, ast.Compare): yield n
        elif isinstance(n, ast.match_case): yield n.pattern
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ('startswith','endswith','get'): yield n

@pytest.mark.parametrize('module', PAGES)
def test_no_family_is_named_in_a_condition(module):
    bad = [(c.lineno, named(c)) for c in conditions(ast.parse(source(module))) if hasattr(c, 'lineno') and named(c)]
    assert not bad, f'{module}: {bad}'

def test_that_family_check_can_fail():
    seen = lambda s: [o for c in conditions(ast.parse(s)) for o in named(c)]
    assert seen("if cfg.model_type=='qwen2': pass") and seen("x = 'Llama' in name") and seen("{'opt': 1}.get('opt')")
    assert seen("if type(m).__name__=='OPTForCausalLM': pass") and not seen("x = 'optional' if y=='option' else 'none'")

def tracked():
    p = subprocess.run(['git','ls-files','-co','--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if p.returncode: pytest.skip('not a git checkout')
    return [ROOT/f for f in p.stdout.splitlines() if (ROOT/f).is_file()]

MACHINE = re.compile(r'(?<![\w.:/])/(?:work|root|home/\w+|Users/\w+|tmp/(?!tmp\b)\w+)/')
def test_no_path_of_a_machine():
    bad = []
    for f in tracked():
        if f.suffix in ('.safetensors','.png','.parquet') or f==Path(__file__).resolve(): continue
        for i,l in enumerate(f.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
            if m := MACHINE.search(l): bad.append(f'{f.relative_to(ROOT)}:{i}: {l[max(0,m.start()-40):m.end()+40].strip()}')
    assert not bad, '\n'.join(bad[:20])

def test_nothing_big_is_tracked():
    big = {f.relative_to(ROOT).as_posix(): f.stat().st_size for f in tracked() if f.stat().st_size>8*2**20}
    assert not big, big

def test_no_stored_errors():
    "A notebook keeps outputs that its run gave, and no traceback among them"
    bad = [nb.relative_to(ROOT) for nb in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in nb.parts
           for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', []) if o['output_type']=='error']
    assert not bad, bad

def test_figures_of_the_readme_exist():
    links = re.findall(r'\]\((images/[^)\s]+)|src="(images/[^"]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert not [a or b for a,b in links if not (ROOT/(a or b)).exists()]

def test_notebook_pages_open_alike():
    "`# name` and its question, then where it is exported to"
    bad = []
    for m,(_,nb) in PAGES.items():
        cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
        first, second = (''.join(c['source']) for c in cells[:2])
        if not re.match(r'# \S+.*\n+> .*\?', first) or not second.startswith('#| default_exp'): bad.append(nb.name)
    assert not bad, bad
