"""python tests/bench/run.py [NAME ...]: run tests/bench/bench_NAME.py (all by default), each in a fresh process, and write nbs/bench.csv.

Lines of benchmarks that were not run this time stay as they were; every line says on what machine it was measured."""
import csv, json, os, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = ROOT/'nbs'/'bench.csv'
COLUMNS = 'bench what ours against unit ratio limit met how machine'.split()

_child = '''
import importlib, json, sys
from common import follow, machine
follow()
rows = importlib.import_module(sys.argv[1]).rows()
json.dump([machine(), rows], open(sys.argv[2], 'w'))
'''

def measure(name, timeout=3600): # Lines of one benchmark
    "Run `bench_<name>.py` in a process of its own"
    with tempfile.TemporaryDirectory() as d:
        out = Path(d)/'rows.json'
        env = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', **os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(ROOT)])}
        subprocess.run([sys.executable, '-c', _child, f'bench_{name}', str(out)], check=True, timeout=timeout, cwd=ROOT, env=env)
        m, rows = json.loads(out.read_text())
    where = f"{m['gpu'] or m['cpu']}, {m['cores']} cores, {m['threads']} threads, load {m['load']}, torch {m['torch']}, transformers {m['transformers']}"
    return [dict(row, bench=name, machine=where) for row in rows]

def known(path=TABLE): # Lines by benchmark, as last written
    if not path.exists(): return {}
    with open(path, newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    return {b: [r for r in rows if r['bench']==b] for b in dict.fromkeys(r['bench'] for r in rows)}

def write(by_bench, path=TABLE):
    "All lines as CSV, benchmarks in alphabetical order"
    short = lambda v: '' if v is None else f'{v:.4g}' if isinstance(v, float) else v
    with open(path, 'w', newline='', encoding='utf-8') as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        w.writeheader()
        for b in sorted(by_bench): w.writerows([{k: short(r.get(k)) for k in COLUMNS} for r in by_bench[b]])

def page(path=ROOT/'nbs'/'benchmarks.ipynb'):
    "Execute the page that shows the table, and keep its output"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    nbformat.write(nb, path)
    subprocess.run([sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', '--fname', str(path)], check=True, cwd=ROOT)

def show(r): return '  '.join(f'{k} {r[k]:.4g}' if isinstance(r[k], float) else f'{k} {r[k]}' for k in ('ours','against','ratio','limit','met') if r[k] not in (None,''))

def main(names):
    there = [p.stem[len('bench_'):] for p in sorted(HERE.glob('bench_*.py'))]
    if missing := set(names)-set(there): sys.exit(f"No benchmark named {', '.join(sorted(missing))}; there are {', '.join(there)}")
    done, failed = {b: r for b,r in known().items() if b in there}, []
    for b in names or [o for o in there if o!='gpu']: # that one is asked for where there is a GPU
        t = time.time()
        print(f'== {b}', flush=True)
        try: done[b] = measure(b)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e: failed.append(f'{b}: {e}')
        else:
            for r in done[b]: print(f"   {r['what']} [{r['unit']}]: {show(r)}")
            write(done), page()
        print(f'   {time.time()-t:.0f} s', flush=True)
    if failed: sys.exit('These benchmarks failed:\n  '+'\n  '.join(failed))

if __name__=='__main__': main(sys.argv[1:])
