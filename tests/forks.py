"""Processes that begin where the libraries are already loaded, so that their seconds of imports are paid once.

They are forked from a process that has imported libraries of others, none of sdlab, and has run nothing: one Python thread, no model,
nothing of what another fork did. Each is a process of its own with a group of its own, to be killed, waited for and ended like any.
For programs whose end matters, or whose imports do, `subprocess` stays the way: a fork leaves without taking its interpreter down."""
import atexit, multiprocessing, os, signal, tempfile
from pathlib import Path

WARM = 'torch transformers transformers.models.llama.modeling_llama transformers.generation datasets pandas sklearn.metrics scipy.stats peft trl.trainer.sft_trainer ipywidgets'.split()
_fork = multiprocessing.get_context('forkserver')

def warm(modules): # before the first `Fork` of this process
    "What the process that is forked from shall have imported"
    _fork.set_forkserver_preload(list(modules))

def _begin(f, args, log, env, cwd):
    os.setsid()
    with open(log, 'ab') as out: os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    os.environ.update(env)
    os.chdir(cwd)
    try: f(*args)
    finally: atexit._run_exitfuncs()                                    # which a fork would leave out

class Fork:
    "`f(*args)` in a process of its own; `f` must be importable. All that it says is in `said()`"
    def __init__(self, f, *args, env=(), cwd='.'):
        self._log = tempfile.NamedTemporaryFile()
        self._p = _fork.Process(target=_begin, args=(f, args, self._log.name, dict(env), os.path.abspath(cwd)))
        self._p.start()
        self.pid = self._p.pid

    @property
    def returncode(self): return self._p.exitcode                       # None while it runs, -9 if it was killed

    def said(self): return Path(self._log.name).read_text(errors='replace')

    def wait(self, timeout=600):
        "Its exit status; ended, with all that it started, and a TimeoutError if it is not done in time"
        self._p.join(timeout)
        if self._p.is_alive():
            self.kill()
            raise TimeoutError(f'not finished after {timeout:.0f} s\n{self.said()[-4000:]}')
        return self.returncode

    def kill(self):
        try: os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError: self._p.kill()                       # not yet a group, or gone
        self._p.join()
