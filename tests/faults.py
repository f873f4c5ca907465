"""What the tests of known faults share.

A fault is a test that says what is right and fails until it is put right. Only a failed assertion counts as the fault: a
wrong import or a slip in the test is an error like any other. Names are public, and looked up where rooms may move."""
import contextlib, functools, io, os, re, traceback, warnings
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
import pytest
import sdlab
from families import tiny, tokenizer

HOUSE = Path(sdlab.__file__).resolve().parent
INNER = r"object (is|has|does|cannot|of type)|NoneType|__\w+__|\w+Error\b|subscriptable|out of (range|bounds)|unexpected keyword"


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


# What came of a call ---------------------------------------------------------------------------------------------------
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
    got.warned = [str(o.message) for o in seen]
    return got


@dataclass
class Typed:
    "What a command said, and its exit status"
    status: int
    said: str
    error: Exception = None

    def refused(self, pattern):
        "Status 2, and one sentence in which `pattern` occurs?"
        last = self.said.strip().splitlines()[-1:] or ['']
        return self.error is None and self.status == 2 and bool(re.search(pattern, last[0], re.I)) and not re.search(INNER, last[0])


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


# Small models ----------------------------------------------------------------------------------------------------------
@functools.cache
def small_lm():
    "A random model of six blocks that reads characters; no test may change it"
    from sdlab.core.model import LM
    return LM(tiny('Llama'), tokenizer(), 'small')


def lm_of(name, *args, tok=None, **kwargs):
    "A random model of a family, or of (model type, fields)"
    from sdlab.core.model import LM
    return LM(tiny(name, *args, **kwargs), tok or tokenizer(), 'odd')


# Power failures --------------------------------------------------------------------------------------------------------
class PowerFailure(BaseException):
    "The machine stopped here"


CHANGES = 'replace rename unlink remove rmdir mkdir link symlink'.split()


@contextlib.contextmanager
def power_off(after, counted=None):
    """Inside, the machine stops before change number `after` to the names on the disk: this change and all later ones fail.

    Nothing tidies up after a power failure: a `finally` that tries meets the same end. `counted` gets the changes."""
    was = {k: getattr(os, k) for k in CHANGES}
    done = [] if counted is None else counted

    def stop_or(name):
        def change(*args, **kwargs):
            if len(done) >= after: raise PowerFailure(f'{name} {args[0]}')
            done.append((name, str(args[0])))
            return was[name](*args, **kwargs)
        return change
    try:
        for k in CHANGES: setattr(os, k, stop_or(k))
        yield done
    except PowerFailure: pass
    finally:
        for k, f in was.items(): setattr(os, k, f)
