"How long `import sdlab` takes, in a fresh interpreter"
import statistics, subprocess, sys
from common import row

_code = 'import time; t=time.perf_counter(); import sdlab; print(time.perf_counter()-t)'

def rows():
    ts = [float(subprocess.run([sys.executable, '-c', _code], capture_output=True, text=True, check=True).stdout) for _ in range(7)]
    return [row('import sdlab', statistics.median(ts), None, limit='< 0.05', how='median of 7 fresh interpreters')]
