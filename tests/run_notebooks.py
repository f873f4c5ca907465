"""python tests/run_notebooks.py [PATH ...] [--workers 2] [--timeout 600] [--flags slow]

Execute notebooks (all of nbs/ by default; paths may be notebooks or folders), each in a process of its own that is ended when its time is up.
Cells marked `#| slow` or `#| gpu` are left out unless asked for. Nothing is written. A path that holds no notebook is an error.

Many notebooks begin with the same seconds of imports. So that these are paid once, their processes are forked from one that has loaded the
libraries of others and has run nothing; of sdlab it knows nothing, and no notebook sees what another one did."""
import argparse, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, HERE)
from forks import Fork, WARM, warm
from sync import ROOT, notebooks
import timings

ENV = dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1')

def execute(path, flags):
    "What nbdev_test does with one notebook"
    sys.path[:] = ['', *(p for p in sys.path if p!=HERE)]               # helpers of the tests are no part of a notebook's world
    import nbdev.test
    from nbdev.config import get_config
    nbdev.test.CaptureShell = partial(nbdev.test.CaptureShell, mpl_format='png')   # nobody sees the figures: not at twice the size
    ok, _ = nbdev.test.test_nb(Path(path), skip_flags=get_config().tst_flags.split(), force_flags=flags.split(), basepath=get_config().config_path)
    sys.exit(not ok)

def find(paths, root=ROOT): # Notebooks under `paths`, in the order of the book
    "The notebooks meant by `paths`; a path that means none is an error"
    book, out = notebooks(root), []
    for p in paths or ['nbs']:
        full = (root/p).resolve()
        mine = [b for b in book if b.resolve()==full or full in b.resolve().parents]
        if not mine: raise SystemExit(f'{p}: no notebook there')
        out += mine
    return sorted(set(out))

def longest_first(nbs, root):
    "By what each took the last time; without that, the tutorials first"
    took, rank = timings.read('notebooks'), {p:i for i,p in enumerate(nbs)}
    return sorted(nbs, key=lambda p: (-took.get(p.relative_to(root).as_posix(), 0), -rank[p]))

def run(path, timeout=600, flags='', root=ROOT): # (path, seconds, what went wrong or '')
    "Execute one notebook in a process group of its own"
    for k,v in ENV.items(): os.environ.setdefault(k, v)
    t = time.time()
    p = Fork(execute, str(path), flags, cwd=root)
    try: wrong = f'exit status {p.returncode}\n{p.said()[-8000:]}' if p.wait(timeout) else ''
    except TimeoutError as e: wrong = str(e)
    return path, time.time()-t, wrong

def main(argv=None, root=ROOT):
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('paths', nargs='*')
    a.add_argument('--workers', type=int, default=2, help='notebooks at a time')
    a.add_argument('--timeout', type=float, default=600, help='seconds for one notebook')
    a.add_argument('--flags', default='', help='cells to run that are left out otherwise: slow, gpu')
    a = a.parse_args(argv)
    nbs, failed, took = longest_first(find(a.paths, root), root), [], {}
    if len(nbs)>3: warm([*WARM, 'nbdev.test'])                           # for fewer it would not pay
    with ThreadPoolExecutor(a.workers) as pool:
        for path,s,wrong in pool.map(lambda p: run(p, a.timeout, a.flags, root), nbs):
            print(f"{'FAILED' if wrong else 'ok':6} {s:6.1f} s  {path.relative_to(root)}", flush=True)
            took[path.relative_to(root).as_posix()] = s
            if wrong: failed.append(path); print(wrong, flush=True)
    if root==ROOT: timings.write('notebooks', took)
    if failed: sys.exit(f'{len(failed)} of {len(nbs)} notebooks failed: '+', '.join(str(p.relative_to(root)) for p in failed))
    print(f'{len(nbs)} notebooks ran')

if __name__=='__main__': main()
