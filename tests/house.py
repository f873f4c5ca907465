"""What can be counted of the house: directions, names, sizes. `test_house.py` holds the limits, `quick.py` asks who depends on whom.

    python tests/house.py            counts, and every module that is worse than `ratchet.json` allows
    python tests/house.py --write    lower the ratchet to what is there now (never raises it)"""
import ast, io, json, re, sys, tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = 'core measure compress heal judge experiment lab'.split()
OUTSIDE = ('maintain', 'all')               # a maintainer's tools, and the list of all names: they may import from every wing
RATCHET = Path(__file__).with_name('ratchet.json')
WIDE, BODY, CELL, PARAMETERS, NAMES, HOMES = 120, 400, 60, 10, 140, 2
FIRST, TOKENS = 146_820, 158_200     # tokens of the first release, which the rebuilt house has not come below, and what it may have now: it may only fall
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    "One exported module"
    name:str   # Such as 'core.plan'
    source:str # Its text
    number:int=0 # Of its notebook, within its wing

    @cached_property
    def tree(self): return ast.parse(self.source)
    @property
    def wing(self): return self.name.split('.')[0]
    @property
    def lines(self): return self.source.splitlines()

    def imports(self): # (module, name or None) for each import from the package
        "Who is imported, anywhere in it"
        at = ['sdlab', *self.name.split('.')]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import): yield from ((a.name.removeprefix('sdlab.'), None) for a in node.names if a.name.startswith('sdlab.'))
            if not isinstance(node, ast.ImportFrom): continue
            base = [*at[:-node.level], node.module] if node.level else [node.module]
            where = '.'.join(o for o in base if o)
            if where.startswith('sdlab'): yield from ((where.removeprefix('sdlab').lstrip('.'), a.name) for a in node.names)

    def top_names(self): # Names of functions, classes and values
        "What it defines at its top"
        for node in self.tree.body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)): yield node.name
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))

    def functions(self): return (n for n in ast.walk(self.tree) if isinstance(n, FUNCTION))
    def tokens(self): return sum(t.type not in SILENT for t in tokenize.generate_tokens(io.StringIO(self.source).readline))

    def wide(self): # Lines over 120 columns (markers of cells and the list of names are nbdev's own)
        return [i for i,l in enumerate(self.lines, 1) if len(l)>WIDE and not l.startswith(('# %%', '__all__'))]
    def heavy(self): return [f.name for f in self.functions() if weight(f, self.lines)>BODY]
    def long_cells(self): return [c for c in re.split(r'^# %% .*$', self.source, flags=re.M)[2:] if len(c.strip().splitlines())>CELL]
    def sizes(self): return [len(self.wide()), len(self.heavy()), len(self.long_cells())]


def private(name): return name.startswith('_') and not name.startswith('__')

def weight(f, lines): # Characters
    "How much stands in the body of a function, without its indentation and its docstring"
    body = f.body[1:] if ast.get_docstring(f) else f.body
    if not body: return 0
    if body[0].lineno==f.lineno: return len(lines[f.lineno-1][body[0].col_offset:])
    return sum(len(l.strip()) for l in lines[body[0].lineno-1:f.end_lineno])

def pages(root=ROOT): # {module: (number, path of its notebook)}
    "Every notebook that exports a module"
    out = {}
    for nb in sorted((root/'nbs').rglob('[0-9][0-9]_*.ipynb')):
        if any(o[0]=='.' for o in nb.relative_to(root).parts): continue
        cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
        m = re.search(r'#\|\s*default_exp\s+([\w.]+)', '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='code'))
        if m: out[m[1]] = (int(nb.name[:2]), nb)
    return out

def modules(root=ROOT): # {name: Module}
    "The package as it was exported"
    files = {k:(root/'sdlab'/(k.replace('.', '/')+'.py'), n) for k,(n,_) in pages(root).items()}
    return {k:Module(k, p.read_text(encoding='utf-8'), n) for k,(p,n) in files.items() if p.exists()}

def place(m): return WINGS.index(m.wing), m.number

def wrong_directions(ms): # ['core.plan imports measure.scan', ...]
    "Imports that do not point to the left"
    inside = {k:m for k,m in ms.items() if m.wing not in OUTSIDE}
    def bad(m, o): return o in ms and o!=m.name and (o not in inside or place(inside[o])>=place(m))
    seen = {(m.name, t) for m in inside.values() for where,name in m.imports() for t in (where, f'{where}.{name}') if bad(m, t)}
    return [f'{a} imports {b}' for a,b in sorted(seen)]

def private_imports(ms): return [f'{m.name}: {n} of {o}' for m in ms.values() for o,n in m.imports() if n and private(n)]

def crowded(ms): # Functions with more parameters than anybody can keep in mind
    count = lambda f: len(f.args.posonlyargs+f.args.args+f.args.kwonlyargs)
    return [f'{m.name}.{f.name} has {count(f)}' for m in ms.values() for f in m.functions() if count(f)>PARAMETERS]

def shared_private_names(ms): # {name: modules} of private names that mean something in more than two
    homes = {}
    for m in ms.values():
        for n in filter(private, m.top_names()): homes.setdefault(n, set()).add(m.name)
    return {n:sorted(o) for n,o in homes.items() if len(o)>HOMES}

def token_count(ms): return sum(m.tokens() for m in ms.values() if m.wing in WINGS) # what the wheel holds

def worse(ms, allowed): # ['core.plan: 3 lines over 120 columns, 2 allowed', ...]
    "Modules that are worse than the ratchet; one that it does not know has none of anything"
    what = f'lines over {WIDE} columns', f'bodies over {BODY} characters', f'exported cells over {CELL} lines'
    return [f'{m.name}: {n} {w}, {a} allowed' for m in ms.values() for n,a,w in zip(m.sizes(), allowed.get(m.name, (0,0,0)), what) if n>a]

def slack(ms, allowed): # Modules that have become better, or are gone: the ratchet can be lowered
    return [k for k,a in allowed.items() if k not in ms or any(n<b for n,b in zip(ms[k].sizes(), a))]

def allowed(): return json.loads(RATCHET.read_text())

def lower(ms):
    "Write what is there now, where that is less"
    old = allowed() if RATCHET.exists() else {k:m.sizes() for k,m in ms.items()}
    new = {k:[min(a, b) for a,b in zip(m.sizes(), old.get(k, (0,0,0)))] for k,m in sorted(ms.items())}
    lines = ',\n'.join(f' "{k}": {v}' for k,v in new.items() if any(v))
    RATCHET.write_text('{\n'+lines+'\n}\n')

def main(argv):
    ms = modules()
    if '--write' in argv: lower(ms)
    print(f'{len(ms)} modules, {token_count(ms):,} tokens, {len(private_imports(ms))} private imports')
    for line in [*wrong_directions(ms), *private_imports(ms), *crowded(ms), *map(str, shared_private_names(ms).items()), *worse(ms, allowed())]: print(' ', line)

if __name__=='__main__': main(sys.argv[1:])
