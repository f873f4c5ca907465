"""What the rebuilt house costs: the same work by this tree and by the first release, in turn, each in fresh processes.

The first release is taken from the history of this repository (`git archive`) and laid beside the project in `.bench`; both run in this
environment. A figure is the median of several repetitions within a process, a ratio the median over pairs of processes."""
import io, os, statistics, subprocess, sys, tarfile
from pathlib import Path
from common import ROOT, row

FIRST = 'fe3a00f'                              # the first release
LIMIT, PAIRS = '<= 1.05', 5

SETUP = '''
import statistics, sys, time
import torch
torch.set_num_threads(1)
from sdlab.all import *
import sdlab
assert sdlab.__file__.startswith(sys.argv[1]), sdlab.__file__
silent = dict(run=Run(progress=False)) if 'Run' in globals() else dict(progress=False)
def clock(f, n):
    f()
    ts = []
    for _ in range(n):
        t = time.perf_counter(); f(); ts.append(time.perf_counter()-t)
    print('@', statistics.median(ts))
'''
WORK = {   # what is timed -> (its code, what it is)
    'spans':  ('lm = load(); bs = batches(lm, pocket_rows("sums", 256), size=32); clock(lambda: distances(lm, bs), 5)', 'distances of all spans, pocket teacher, 256 rows'),
    'CKA':    ('lm = load(); peek = without(lm, Plan(12, (5, 6))); texts = pocket_rows("sums", 256); clock(lambda: cka(peek, lm, texts), 3)', 'all pairs of layers, pocket teacher and a view, 256 texts'),
    'rewrite':('lm = load(); some = pocket_rows("sums", 96, voice=3); clock(lambda: rewrite(lm, some, progress=False), 3)', '96 word problems, greedy'),
    'tune':   ('lm = load(); some = pocket_rows("sums", 160, voice=3); clock(lambda: tune(lm, some, epochs=1, batch_size=4, lr=1e-4, **silent), 1)', '40 steps of 4 on the pocket teacher'),
    'without':('lm = load(); plan = Plan(12, (5, 6)); clock(lambda: without(lm, plan), 30)', 'a view of the pocket teacher without two blocks'),
    'import': ('import subprocess; clock(lambda: subprocess.run([sys.executable, "-c", "import sdlab"], check=True), 9)', 'a fresh interpreter with `import sdlab`'),
}

def first_release(): # Folder, or None where the history does not reach back
    "The tree of the first release, in .bench"
    at = ROOT/'.bench'/FIRST
    if at.exists(): return at
    p = subprocess.run(['git', 'archive', FIRST, 'sdlab'], cwd=ROOT, capture_output=True)
    if p.returncode: return None
    at.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(p.stdout)) as t: t.extractall(at, filter='data')
    return at

def seconds(code, tree): # Median of its repetitions
    "`code` in a fresh process of one of the trees"
    hide = 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]\n'
    env = {**os.environ, 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    p = subprocess.run([sys.executable, '-P', '-c', hide+SETUP+code, str(tree)], capture_output=True, text=True, env=env, cwd=tree)
    if p.returncode: raise RuntimeError(p.stderr[-2000:])
    return float(p.stdout.rsplit('@', 1)[1])

def compared(name, old): # A line
    code, what = WORK[name]
    pairs = []
    for i in range(PAIRS):
        trees = (ROOT, old) if i%2==0 else (old, ROOT)
        got = {t:seconds(code, t) for t in trees}
        pairs.append((got[ROOT], got[old]))
    ours, theirs = (statistics.median(o) for o in zip(*pairs))
    ratios = [a/b for a,b in pairs]
    how = f'{what}; one thread, {PAIRS} pairs of processes in turn, ratios {min(ratios):.3f} to {max(ratios):.3f}'
    return row(f'{name}, against the first release', ours, theirs, limit=LIMIT, ratio=statistics.median(ratios), how=how)

def rows():
    old = first_release()
    if old is None: return [row('against the first release', 0., None, how=f'commit {FIRST} is not in this clone')]
    return [compared(name, old) for name in WORK]
