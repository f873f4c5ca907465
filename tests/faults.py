"""What the tests of known faults share.

A fault is a test that says what is right and fails until it is put right. Only a failed assertion counts as the
fault: a wrong import or a slip in the test is an error like any other. Names are public, and looked up where rooms
may move."""
import contextlib, functools, inspect, io, os, re, traceback, warnings
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
import pytest
import sdlab
from families import tiny, tokenizer

HOUSE = Path(sdlab.__file__).resolve().parent
INNER = (r"object (is|has|does|cannot|of type)|NoneType|__\w+__|\w+Error\b|subscriptable|out of (range|bounds)"
         r"|unexpected keyword")


def fault(right):
    "The mark of a known fault; `right` says what is right"
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=right)


def find(*places):
    "The first of some public names, each 'room:name', that this library has"
    for place in places:
        room, name = place.split(':')
        try: return getattr(import_module(f'sdlab.{room}'), name)
        except (ImportError, AttributeError): continue
    raise LookupError(f'none of {", ".join(places)} is there')


VALUES = dict(decoding='core.generate:Decoding', learn='heal.train:Weights',
              run='heal.train:Run', evaluation='heal.train:Evaluation')


def how(f, **loose):
    "Loose keywords as `f` takes them: gathered into values where it has an argument for these"
    for k, place in VALUES.items():
        if k not in inspect.signature(f).parameters: continue
        kind = find(place)
        mine = {o: loose.pop(o) for o in [*loose] if o in kind.__dataclass_fields__}
        if mine: loose[k] = kind(**mine)
    return loose


# What came of a call ------------------------------------------------------------------------------------------------
def is_sentence(e):
    "Was it raised by a `raise` of this project, in one line that a user can read?"
    if not isinstance(e, (ValueError, TypeError, OSError)): return False
    last = traceback.extract_tb(e.__traceback__)[-1]
    ours = HOUSE in Path(last.filename).resolve().parents and 'raise' in (last.line or '')
    text = str(e)
    return ours and '\n' not in text and len(text) < 500 and not re.search(INNER, text)


@dataclass
class Outcome:
    "What a call gave back, what it raised, and what it warned of"
    value: object = None
    error: Exception = None
    warned: list = field(default_factory=list)

    def refused(self, pattern):
        "Was it refused in one sentence in which `pattern` occurs?"
        return is_sentence(self.error) and bool(re.search(pattern, str(self.error), re.I))

    def named(self, pattern):
        "Does the refusal or a warning name `pattern`?"
        return self.refused(pattern) or any(re.search(pattern, o, re.I) for o in self.warned)

    def __str__(self):
        what = self.value if self.error is None else f'{type(self.error).__name__}: {self.error}'
        return f'{str(what)[:300]} {self.warned or ""}'


def outcome(f, *args, **kwargs):
    "Call `f` and keep whatever comes of it"
    got = Outcome()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try: got.value = f(*args, **kwargs)
        except Exception as e: got.error = e
    got.warned = [str(o.message) for o in seen if o.category.__name__!='OldKeyword']
    return got


@dataclass
class Typed:
    "What a command said, and its exit status"
    status: int
    said: str
    error: Exception = None

    def refused(self, pattern):
        "Status 2, and one sentence in which `pattern` occurs?"
        last = (self.said.strip().splitlines() or [''])[-1]
        named = re.search(pattern, last, re.I) and not re.search(INNER, last)
        return self.error is None and self.status == 2 and bool(named)


def command(): return find('experiment.cli:main', 'lab.cli:main')


def shell(*argv):
    "Type `sdlab ...` without a new process"
    out = io.StringIO()
    got = Typed(None, '')
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: got.status = command()([str(o) for o in argv])
        except SystemExit as e: raise RuntimeError(f'no such command line: {argv}\n{out.getvalue()}') from e
        except Exception as e: got.error = e
    got.said = out.getvalue()
    return got


# Small models -------------------------------------------------------------------------------------------------------
@functools.cache
def small_lm():
    "A random model of six blocks that reads characters; no test may change it"
    from sdlab.core.model import LM
    return LM(tiny('Llama'), tokenizer(), 'small')


def lm_of(name, *args, tok=None, **kwargs):
    "A random model of a family, or of (model type, fields)"
    from sdlab.core.model import LM
    return LM(tiny(name, *args, **kwargs), tok or tokenizer(), 'odd')


# Power failures and full disks --------------------------------------------------------------------------------------
class PowerFailure(BaseException):
    "The machine stopped here"


NOBODY = 2**22+1             # a process that cannot be alive
MAKES, REMOVES = ['replace', 'rename', 'mkdir', 'link', 'symlink'], ['unlink', 'remove', 'rmdir']


class FilesFirst:
    "A listing that names files before folders, whatever the file system does: what lies on top is removed first"
    def __init__(self, listing):
        with listing: self.entries = sorted(listing, key=lambda o: (o.is_dir(follow_symlinks=False), o.name))
    def __iter__(self): return iter(self.entries)
    def __enter__(self): return iter(self.entries)
    def __exit__(self, *_): pass
    def close(self): pass


@contextlib.contextmanager
def broken_disk(after, error, names):
    "Inside, every change of these names after the first `after` ones raises `error()`; gives the list of changes"
    was = {k: getattr(os, k) for k in [*names, 'scandir']}
    done = []

    def stop_or(name):
        def change(*args, **kwargs):
            if len(done) >= after: raise error()
            done.append((name, str(args[0])))
            return was[name](*args, **kwargs)
        return change
    try:
        for k in names: setattr(os, k, stop_or(k))
        os.scandir = lambda *args: FilesFirst(was['scandir'](*args))
        yield done
    finally:
        for k, f in was.items(): setattr(os, k, f)


@contextlib.contextmanager
def power_off(after):
    """The machine stops before change number `after` to the names on its disk, and all later ones fail as well.

    Nothing tidies up after a power failure: a `finally` that tries meets the same end, and who wrote is gone."""
    was, os.getpid = os.getpid, lambda: NOBODY
    try:
        with contextlib.suppress(PowerFailure), broken_disk(after, PowerFailure, MAKES+REMOVES) as done: yield done
    finally: os.getpid = was


@contextlib.contextmanager
def disk_full(after):
    "Nothing new fits on the disk after `after` changes; removing goes on"
    full = lambda: OSError(28, 'No space left on device')
    with contextlib.suppress(OSError), broken_disk(after, full, MAKES) as done: yield done


def changes(f, *args, stopped=power_off):
    "All changes that a call makes to names on the disk, of those that `stopped` stops"
    with stopped(10**9) as done: f(*args)
    return done
