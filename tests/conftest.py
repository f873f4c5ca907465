"What all tests share: no network, few threads, the pocket teacher once per process, real data where it lies beside the checkout"
import os, sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))                       # tests may import sync, run_notebooks and each other's helpers
from forks import WARM, warm
warm(WARM)                                          # loaded when the first of them is forked

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests that take minutes too')
    parser.addoption('--screenshots', action='store_true', help='have the browser tests write the pictures of the docs to images/')

def pytest_xdist_make_scheduler(config, log):
    "Test by test to whoever is free, but a file that sets up something dear stays with one worker, and begins first"
    from xdist.scheduler import LoadScopeScheduling
    class Whole(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split('::')[0]
            return path if path.endswith(('test_browser.py', 'test_wheel.py')) else nodeid
    return Whole(config, log)

def pytest_configure(config):
    "Here and not in pytest.ini, which would import numpy before its threads are counted above"
    config.addinivalue_line('filterwarnings', 'error::sdlab.core.store.OldKeyword')

def pytest_collection_modifyitems(config, items):
    for o in items:
        if 'slow' in o.keywords and not config.getoption('--slow'): o.add_marker(pytest.mark.skip(reason='slow: asked for with --slow'))
        if 'gpu' in o.keywords:
            import torch
            if not torch.cuda.is_available(): o.add_marker(pytest.mark.skip(reason='no CUDA device'))

_took = {}
def pytest_runtest_logreport(report):
    if report.when in ('setup', 'call', 'teardown'): _took[report.nodeid] = _took.get(report.nodeid, 0)+report.duration

def pytest_terminal_summary(terminalreporter, config):
    "The slowest notebooks and tests, before pytest's own last line"
    if hasattr(config, 'workerinput') or len(_took)<200: return
    import timings
    timings.write('tests', _took)
    terminalreporter.section('the 20 slowest, kept in .timings/slowest.txt')
    for line in timings.slowest(): terminalreporter.write_line(line)

@pytest.fixture(scope='session')
def root(): return HERE.parent

@pytest.fixture(scope='session')
def data(root):
    "The folder of real models and data sets; skips where it is absent"
    p = root.parent/'shared'/'data'
    if not p.is_dir(): pytest.skip('no shared/data beside the checkout')
    return p

@pytest.fixture(scope='session')
def teacher():
    "The pocket teacher; no test may change it"
    from sdlab.core.model import load
    return load()
