"What took how long the last time: a line per notebook and test in .timings/, read by `make quick`, summed up at the end of `make test`"
import csv, os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT/'.timings'

def write(kind, seconds): # kind: 'notebooks' or 'tests'; seconds: {name: seconds}
    "Keep these, and what earlier runs said of others"
    FOLDER.mkdir(exist_ok=True)
    rows = sorted({**read(kind), **seconds}.items(), key=lambda o: -o[1])
    part = FOLDER/f'{kind}.{os.getpid()}'
    with open(part, 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows((f'{s:.2f}', k) for k,s in rows)
    os.replace(part, FOLDER/f'{kind}.csv')

def read(kind): # {name: seconds}
    path = FOLDER/f'{kind}.csv'
    if not path.exists(): return {}
    with open(path, newline='', encoding='utf-8') as f: return {k:float(s) for s,k in csv.reader(f)}

def of_files(): # {path from the root: seconds} of notebooks and of whole files of tests
    out = read('notebooks')
    for k,s in read('tests').items(): out[k.split('::')[0]] = out.get(k.split('::')[0], 0)+s
    return out

def slowest(n=20): # Lines
    "The slowest notebooks and tests, as they are kept in .timings/slowest.txt"
    rows = sorted(((s, k) for kind in ('notebooks', 'tests') for k,s in read(kind).items()), reverse=True)[:n]
    lines = [f'{s:7.1f} s  {k}' for s,k in rows]
    if lines: (FOLDER/'slowest.txt').write_text('\n'.join(lines)+'\n', encoding='utf-8')
    return lines
