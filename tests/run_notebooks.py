"""python tests/run_notebooks.py [PATH ...] [--workers 2] [--timeout 600] [--flags slow]

Execute notebooks (all of nbs/ by default; paths may be notebooks or folders), each in a process of its own that is ended when its time is up.
Cells marked `#| slow` or `#| gpu` are left out unless asked for. Nothing is written. A path that holds no notebook is an error."""
import argparse, os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sync import ROOT, notebooks

_child = '''
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), force_flags=sys.argv[2].split(), basepath=get_config().config_path)
sys.exit(not ok)
'''

def find(paths, root=ROOT): # Notebooks under `paths`, in the order of the book
    "The notebooks meant by `paths`; a path that means none is an error"
    book, out = notebooks(root), []
    for p in paths or ['nbs']:
        full = (root/p).resolve()
        mine = [b for b in book if b.resolve()==full or full in b.resolve().parents]
        if not mine: raise SystemExit(f'{p}: no notebook there')
        out += mine
    return sorted(set(out))

def end(p):
    "End a process and all that it started"
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    return p.communicate()

def run(path, timeout=600, flags='', root=ROOT): # (path, seconds, what went wrong or '')
    "Execute one notebook in a process group of its own"
    env = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': '1', **os.environ}
    t = time.time()
    p = subprocess.Popen([sys.executable, '-c', _child, str(path), flags], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired: return path, time.time()-t, f'not finished after {timeout:.0f} s\n{(end(p)[0] or "")[-4000:]}'
    return path, time.time()-t, f'exit status {p.returncode}\n{out[-8000:]}' if p.returncode else ''

def main(argv=None, root=ROOT):
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('paths', nargs='*')
    a.add_argument('--workers', type=int, default=2, help='notebooks at a time')
    a.add_argument('--timeout', type=float, default=600, help='seconds for one notebook')
    a.add_argument('--flags', default='', help='cells to run that are left out otherwise: slow, gpu')
    a = a.parse_args(argv)
    nbs, failed = find(a.paths, root), []
    with ThreadPoolExecutor(a.workers) as pool:
        for path,s,wrong in pool.map(lambda p: run(p, a.timeout, a.flags, root), nbs[::-1]): # the tutorials, which take longest, first
            print(f"{'FAILED' if wrong else 'ok':6} {s:6.1f} s  {path.relative_to(root)}", flush=True)
            if wrong: failed.append(path); print(wrong, flush=True)
    if failed: sys.exit(f'{len(failed)} of {len(nbs)} notebooks failed: '+', '.join(str(p.relative_to(root)) for p in failed))
    print(f'{len(nbs)} notebooks ran')

if __name__=='__main__': main()
