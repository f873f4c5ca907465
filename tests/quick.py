"""python tests/quick.py [--budget 150]: what a change most likely broke, in two and a half minutes.                (make quick)

First that notebooks, modules and README are in step and clean; then the notebooks of the modules that changed (since the last commit,
or in it where nothing has changed since), those of the modules that import them, and the tests that import any of these, as far as the
time goes. What was left out is said."""
import argparse, os, re, shlex, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
import house, timings

def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()

def changed_files(): # Paths from the root
    "What differs from the last commit; if nothing does, what that commit changed"
    now = {*git('diff', '--name-only', 'HEAD'), *git('ls-files', '-o', '--exclude-standard')}
    return now or {*git('diff', '--name-only', 'HEAD~1', 'HEAD')}

def changed_modules(files, pages): # Names
    at = {p.relative_to(ROOT).as_posix():k for k,(_,p) in pages.items()}
    at |= {f'sdlab/{k.replace(".", "/")}.py':k for k in pages}
    return {at[f] for f in files if f in at}

def affected(changed, modules): # Names, those that changed first
    "Modules that changed and those that import one of them directly"
    def reads(m): return {t for where,name in m.imports() for t in (where, f'{where}.{name}')}
    near = [k for k,m in modules.items() if k not in changed and k!='all' and reads(m) & changed]
    return [*sorted(changed), *near]

def tests_of(names, sources): # File names
    "Tests that import one of these modules"
    words = re.compile('|'.join(rf'sdlab\.{re.escape(k)}\b' for k in names) or r'\b\B')
    return [f for f,s in sources.items() if words.search(s)]

FIGURES = ['tests/test_golden.py -k "influence or update or prices"', 'tests/test_old.py']
def figures_of(changed): # What pytest is given
    "Tests that look names up as they run, and so import none of the modules whose figures they keep"
    return FIGURES if any(k.split('.')[0] in ('core', 'measure', 'judge') for k in changed) else []

def run_all(jobs, run, took, budget, workers=2): # (left out, failed)
    "Each of `jobs` that fits into what is left of `budget` seconds; `run(job, seconds)` gives what went wrong, or nothing"
    began, out, failed = time.time(), [], []
    def one(job):
        room = budget-(time.time()-began)
        if room<took.get(job, 5.): return out.append(job)
        if run(job, max(room, 10)): failed.append(job)
    with ThreadPoolExecutor(workers) as pool: list(pool.map(one, jobs))
    return out, failed

def execute(job, room): # '' or what went wrong
    "A notebook or a file of tests, in a process of its own with one thread"
    how = ['tests/run_notebooks.py', job, '--workers', '1'] if job.endswith('.ipynb') else ['-m', 'pytest', *shlex.split(job), '-q', '-x']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([sys.executable, *how], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    start = time.time()
    try: said = p.communicate(timeout=room)[0]
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, 9)
        print(f'cut off {time.time()-start:6.1f} s  {job}', flush=True)
        return ''
    print(f"{'FAILED ' if p.returncode else 'ok     '} {time.time()-start:6.1f} s  {job}", flush=True)
    if p.returncode: print(said[-4000:], flush=True)
    return said if p.returncode else ''

def main(argv=None):
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--budget', type=float, default=150, help='seconds')
    a = a.parse_args(argv)
    began = time.time()
    if subprocess.call([sys.executable, 'tests/sync.py', '--check'], cwd=ROOT): sys.exit(1)
    pages, files = house.pages(), changed_files()
    changed = changed_modules(files, pages)
    names = affected(changed, house.modules())
    sources = {f'tests/{p.name}':p.read_text(encoding='utf-8') for p in sorted(HERE.glob('test_*.py'))}
    own = [f for f in sources if f in files]
    tests = [f for f in tests_of(names, sources) if f not in own]
    books = [pages[k][1].relative_to(ROOT).as_posix() for k in names]
    jobs = ['tests/test_house.py', *own, *figures_of(changed), *(o for two in zip(books, tests) for o in two), *books[len(tests):], *tests[len(books):]]
    left, failed = run_all(list(dict.fromkeys(jobs)), execute, timings.of_files(), a.budget-(time.time()-began))
    if left: print(f'left out, no time: {", ".join(left)}')
    if failed: sys.exit(f'failed: {", ".join(failed)}')
    print(f'{len(jobs)-len(left)} of {len(jobs)} ran, {time.time()-began:.0f} s')

if __name__=='__main__': main()
