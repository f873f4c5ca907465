"""What every benchmark shares: paired timing, peak memory, and what machine it was.

A benchmark is a script `tests/bench/bench_NAME.py` with a function `rows()` that gives a list of `row(...)`;
`python tests/bench/run.py` runs each in a fresh process and writes them all to `nbs/bench.csv`.
Ratios are taken within one run, the two sides in turn, so that a busy machine slows both."""
import gc, json, os, platform, statistics, subprocess, sys, textwrap, threading, time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

def follow(
    every=1., # Seconds between looks
):
    "End this process when the one that started it has gone, so that a killed run leaves nobody on the cores"
    parent = os.getppid()
    def watch():
        while os.getppid()==parent: time.sleep(every)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

@dataclass(frozen=True)
class Paired:
    "Two ways timed in turn"
    ours: float     # Median time of `f`, in seconds
    against: float  # Median time of `g`, in seconds
    ratio: float    # Median over the pairs of f/g: below 1, `f` is the faster
    low: float      # Smallest ratio of a pair
    high: float     # Largest ratio of a pair
    n: int          # Pairs

def paired(
    f,          # Our way, called without arguments
    g,          # The way it is compared with
    n=5,        # Pairs counted
    warmup=1,   # Pairs run before and not counted
    sync=None,  # Called before each reading of the clock, such as `torch.cuda.synchronize`
)->Paired:      # Medians in seconds; the ratio is the median of the pairs' own ratios
    "Time `f` and `g` in turn, first one first and then the other"
    def clock(h):
        gc.collect()
        if sync: sync()
        t = time.perf_counter()
        h()
        if sync: sync()
        return time.perf_counter()-t
    for _ in range(warmup): f(), g()
    ts = [(clock(f), clock(g)) if i%2==0 else (clock(g), clock(f))[::-1] for i in range(n)]
    ratios = [a/b for a,b in ts]
    return Paired(*(statistics.median(o) for o in (*zip(*ts), ratios)), min(ratios), max(ratios), n)

_watch = '''
import ctypes, gc, json
def _status(k): return int(next(l for l in open('/proc/self/status') if l.startswith(k)).split()[1])*1024
def _trim():
    gc.collect()
    try: ctypes.CDLL('libc.so.6').malloc_trim(0)
    except OSError: pass
_trim()
try: open('/proc/self/clear_refs', 'w').write('5')          # the high-water mark starts again from here
except OSError: pass
_base = _status('VmRSS:')
'''

def peak_memory(
    code,       # Python source of what is measured
    setup='',   # Source run before: models and data, not counted
    timeout=1800, # Seconds until it is given up
)->dict:        # Bytes: `base` before `code`, `peak` the highest while it ran, `extra` their difference; `seconds`
    "Highest resident memory of `code` in a process of its own (Linux)"
    dd = textwrap.dedent
    src = '\n'.join(['import common; common.follow()', dd(setup), _watch, 'import time; _t = time.perf_counter()', dd(code), '_t = time.perf_counter()-_t',
        "_peak = _status('VmHWM:')", "print('\\n@@'+json.dumps(dict(base=_base, peak=_peak, extra=max(0, _peak-_base), seconds=_t)))"])
    p = subprocess.run([sys.executable, '-c', src], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                       env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(Path(__file__).parent)])})
    if p.returncode: raise RuntimeError(f'The measured code failed:\n{p.stderr[-3000:]}')
    return json.loads(p.stdout.rsplit('\n@@', 1)[1])

def row(
    what,          # What is done, in words: 'all spans, 24 blocks, last token'
    ours,          # Our figure
    against,       # The figure compared with, in the same unit; None where there is none
    unit='s',      # Unit of both
    limit='',      # What was promised, in words: '<= 1.10'
    how='',        # What it was compared with, sizes, seeds
    ratio=None,    # Given by `paired`; else ours/against
)->dict:           # One line of the table
    "One line of the table of benchmarks"
    if ratio is None: ratio = ours/against if against else None
    return dict(what=what, ours=ours, against=against, ratio=ratio, limit=limit, unit=unit, met=met(ratio if against is not None else ours, limit), how=how)

def met(
    value,  # The ratio, or the figure itself where nothing is compared
    limit,  # '<= 1.10', '>= 15', '< 0.05' or ''
)->str:     # 'yes', 'no', or '' without a limit
    "Whether a limit was kept"
    if not limit: return ''
    op, bound = limit.split()[:2]
    return 'yes' if {'<=': value<=float(bound), '<': value<float(bound), '>=': value>=float(bound), '>': value>float(bound)}[op] else 'no'

def machine()->dict: # Cores, memory, versions
    "What the figures were measured on"
    import torch, transformers
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.machine()) if Path('/proc/cpuinfo').exists() else platform.machine()
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(), threads=torch.get_num_threads(),
                load=round(os.getloadavg()[0], 1), gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else '',
                python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)

def random_llama(
    n=24,          # Blocks
    d=448,         # Width
    vocab=2048,    # Vocabulary
    seed=0,        # Of the weights
    **config
):                 # A LlamaForCausalLM in float32, in evaluation mode
    "A random Llama; the default has 24 blocks and about 60 M parameters"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**dict(hidden_size=d, intermediate_size=int(d*2.75), num_hidden_layers=n, num_attention_heads=d//64,
        num_key_value_heads=d//64, vocab_size=vocab, max_position_embeddings=2048, tie_word_embeddings=True), **config})).eval()
