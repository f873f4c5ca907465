"Known faults: stuck after a kill or a full disk, two at once, damaged files, late checks, what is left behind"
import gc, inspect, json, os, re, shutil, signal, socket, subprocess, sys, tempfile, threading, time, weakref
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
from faults import changes, command, disk_full, fault, find, how, outcome, power_off, shell, small_lm
from sdlab.all import Plan, Task, load, prune, rewrite, study, tune

ROWS = [dict(prompt=a, completion=b) for a, b in zip('abcd', 'efgh')]
STOPPED = {'power off': power_off, 'disk full': disk_full}


def write_rows(path, n):
    path.write_text(''.join(json.dumps(dict(prompt=f'q{i}', completion=f'a{i}'))+'\n' for i in range(n)))
    return path


def train(out, steps=0, **loose):
    "A short run; without steps it is finished as soon as it is begun"
    stop = None if steps else lambda: True
    return tune(small_lm(), ROWS, epochs=1, batch_size=4, **how(tune, out=out, progress=False, stop=stop, **loose))


def moves(done, folder):
    "Which of some changes put something directly into a folder"
    near = lambda path: Path(folder) in (Path(path), Path(path).parent)
    return [i for i, (name, path) in enumerate(done) if name in ('replace', 'rename') and near(path)]


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    "A folder with a saved model, two plans, rows and a model that was pruned from the shell"
    folder = tmp_path_factory.mktemp('bench')
    small_lm().save(folder/'lm')
    for name, block in dict(p=2, q=3).items(): (folder/f'{name}.json').write_text(Plan(6, (block,)).to_json())
    write_rows(folder/'rows.jsonl', 4)
    write_rows(folder/'many.jsonl', 40)
    made = cut(folder, folder/'cut')
    if made.status: raise RuntimeError(made.said)
    return folder


def cut(bench, out, *more, plan='p'):
    "Prune from the shell"
    return shell('prune', bench/'lm', '--plan', bench/f'{plan}.json', '--out', out, *more)


def heal(bench, out, *more):
    "Tune from the shell"
    return shell('tune', bench/'cut', '--data', bench/'rows.jsonl', '--out', out, *more)


# Stuck after a kill or a full disk ----------------------------------------------------------------------------------
# The same call goes on or starts over, wherever it was stopped; no folder is refused for ever.
@pytest.mark.parametrize('how_stopped', STOPPED)
def test_training_goes_on(tmp_path, how_stopped):
    "A run that was stopped while it moved something in its folder is taken up by the same call"
    done = changes(train, tmp_path/'whole', stopped=STOPPED[how_stopped])
    stuck = []
    for i in moves(done, tmp_path/'whole')[::3]:
        with STOPPED[how_stopped](i): train(tmp_path/str(i))
        again = outcome(train, tmp_path/str(i))
        if again.error is not None: stuck.append((done[i], str(again)))
    assert stuck==[]


@pytest.mark.slow
def test_training_goes_on_from_everywhere(tmp_path):
    "The same for every single change that a run with a checkpoint makes on the disk"
    done = changes(train, tmp_path/'whole', 1)
    stuck = []
    for i in range(len(done)):
        with power_off(i): train(tmp_path/str(i), 1)
        again = outcome(train, tmp_path/str(i), 1)
        if again.error is not None: stuck.append((done[i], str(again)))
    assert stuck==[]


@pytest.mark.parametrize('more', [(), ('--fresh',)], ids=['again', 'fresh'])
@pytest.mark.parametrize('how_stopped', STOPPED)
def test_claim_of_a_stage(bench, tmp_path, how_stopped, more):
    "A command that was stopped before its settings were written can be typed again"
    with STOPPED[how_stopped](1): cut(bench, tmp_path/'cut')
    assert cut(bench, tmp_path/'cut', *more).status==0


def test_stage_stopped_while_it_is_thrown_away(bench, tmp_path):
    "--fresh that was stopped while it removed the old result can be typed again"
    again = lambda folder: cut(bench, folder, '--fresh', plan='q')
    done, stuck = changes(again, shutil.copytree(bench/'cut', tmp_path/'whole')), []
    for i in [i for i, (name, _) in enumerate(done) if name in ('unlink', 'remove')][2:7:2]:
        folder = shutil.copytree(bench/'cut', tmp_path/str(i))
        with power_off(i): again(folder)
        if again(folder).status: stuck.append(done[i])
    assert stuck==[]


def test_run_stopped_while_it_is_thrown_away(tmp_path):
    "resume=False that was stopped while it removed the old run can be called again"
    train(tmp_path/'run')
    again = lambda folder: train(folder, resume=False, seed=1)
    done, stuck = changes(again, shutil.copytree(tmp_path/'run', tmp_path/'whole')), []
    for i in [i for i, (name, _) in enumerate(done) if name in ('unlink', 'remove')][1:8:3]:
        folder = shutil.copytree(tmp_path/'run', tmp_path/str(i))
        with power_off(i): again(folder)
        if (got := outcome(again, folder)).error is not None: stuck.append((done[i], str(got)))
    assert stuck==[]


def test_healing_stopped_while_it_tidies_up(bench, tmp_path):
    "A command whose work was done, and which was stopped while it removed its checkpoints, can be typed again"
    short = ('--epochs', 1, '--batch-size', 4)
    done = changes(heal, bench, tmp_path/'whole', *short)
    last = max(i for i, (name, _) in enumerate(done) if name in ('unlink', 'remove'))
    with power_off(last-2): heal(bench, tmp_path/'healed', *short)
    assert heal(bench, tmp_path/'healed', *short).status==0


@fault('A model that is saved over another is the old one or the new one, wherever it was stopped.')
def test_save_over_an_older_model(tmp_path):
    "No kill leaves a folder without weights"
    new = prune(small_lm(), Plan(6, (1,)))
    done, lost = changes(new.save, small_lm().save(tmp_path/'whole')), []
    for i in range(1, len(done)):
        folder = small_lm().save(tmp_path/str(i))
        with power_off(i): new.save(folder)
        if (got := outcome(lambda: load(folder).n)).value not in (5, 6): lost.append((done[i], str(got)))
    assert lost==[]


def test_litter_of_killed_saves(tmp_path):
    "Saves that were killed do not fill the disk"
    folder = small_lm().save(tmp_path/'lm')
    for i in (2, 4):
        with power_off(i): small_lm().save(folder)
    small_lm().save(folder)
    assert [p.name for p in folder.iterdir() if p.is_dir() or p.name.startswith('.')]==[]


@fault('An empty text is no folder: it is refused, or means the current one.')
def test_ledger_without_a_folder(tmp_path, monkeypatch):
    "rewrite(out='') does not write every row once more at every call"
    monkeypatch.chdir(tmp_path)
    say = lambda: rewrite(small_lm(), ROWS[:2], **how(rewrite, out='', max_new_tokens=2, progress=False))
    got = outcome(say)
    outcome(say)
    lines = sum(len(p.read_text().splitlines()) for p in tmp_path.rglob('*.jsonl'))
    assert got.refused('out') or lines==3


# Two at once, damaged files -----------------------------------------------------------------------------------------
def test_two_runs_in_one_folder(tmp_path):
    "Nobody begins to train in a folder in which a run is going on"
    threads, began = [], []
    second = lambda: outcome(train, tmp_path/'run', 1, probe=lambda lm: began.append(1) or {})

    def look(lm):
        if not threads:
            threads.append(threading.Thread(target=second, daemon=True))
            threads[0].start()
            end = time.monotonic()+6
            while threads[0].is_alive() and not began and time.monotonic() < end: time.sleep(.05)
        return {}
    outcome(train, tmp_path/'run', 1, probe=look)
    count = len(began)
    threads[0].join(20)
    assert count==0


def flip(m): return m[1]+bytes([m[2][0]^1])
def other(m): return dict(true=b'false', false=b'true')[m[0].decode()]


LEDGER = {   # what happens to a line of a ledger: bytes -> bytes
    'a letter of what was written': lambda line: re.sub(rb'("written": ?")(.)', flip, line),
    'has it ended?': lambda line: re.sub(rb'true|false', other, line),
    'the name of a field': lambda line: line.replace(b'"written"', b'"wristen"'),
    'no record, but JSON': lambda line: b'7',
    'an empty record': lambda line: b'{}',
}


@pytest.fixture(scope='module')
def ledger(tmp_path_factory):
    "A folder with a ledger, and the rows that belong to it"
    folder = tmp_path_factory.mktemp('ledger')
    return folder, list(say(folder))


def say(out): return rewrite(small_lm(), ROWS, **how(rewrite, out=out, max_new_tokens=5, progress=False))


@fault('A damaged line of a ledger is noticed, left out and made again.')
@pytest.mark.parametrize('damage', LEDGER)
def test_damaged_ledger(ledger, tmp_path, damage):
    "A flipped bit is not taken for the teacher's words"
    folder = shutil.copytree(ledger[0], tmp_path/'ledger')
    file = next(folder.rglob('*.jsonl'))
    lines = file.read_bytes().split(b'\n')
    changed = LEDGER[damage](lines[2])
    if changed==lines[2]: raise RuntimeError(f'nothing was damaged in {lines[2]}')
    file.write_bytes(b'\n'.join([*lines[:2], changed, *lines[3:]]))
    got = outcome(say, folder)
    assert got.error is None and list(got.value)==ledger[1], got


# Late or missing checks ---------------------------------------------------------------------------------------------
def walk(bench, out, *more):
    "A small study from the shell"
    size = ('--drop', 1, '--n', 2, '--max-new-tokens', 2, '--no-controls')
    return shell('study', '--teacher', bench/'lm', '--data', bench/'many.jsonl', '--out', out, *size, *more)


@pytest.fixture
def unread():
    "Whoever reads several texts at once, and so has begun to measure, is stopped"
    def stop(module, args, out):
        if isinstance(module, torch.nn.Embedding) and len(args[0]) >= 4: raise RuntimeError('texts were read')
    hook = torch.nn.modules.module.register_module_forward_hook(stop)
    yield
    hook.remove()


LATE = dict(epochs='nan', batch_size=0, max_new_tokens=0, lr='nan', lora=-3, tokens='lst')


@fault('All settings of all stages are checked before the first of them.')
@pytest.mark.parametrize('setting', LATE)
def test_settings_of_a_study(bench, tmp_path, unread, setting):
    "A setting that a late stage refuses is refused before anything is made"
    option = setting.replace('_', '-')
    got = walk(bench, tmp_path/'study', f'--{option}', LATE[setting])
    made = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert got.refused(f'{setting}|{option}') and made==[], f'{got.said[-300:]} {len(made)} files'


BEFORE = {'no blocks': ('--drop', 0), 'a place without files': ('--out', '/proc/none')}


EARLY = fault('What cannot be done is refused before anything is measured.')
@pytest.mark.parametrize('kind', [pytest.param('no blocks', marks=EARLY), 'a place without files'])
def test_distances_are_checked_first(bench, tmp_path, unread, kind):
    "No text is read for nothing"
    if '/proc/' in str(BEFORE[kind]) and not Path('/proc').is_dir(): pytest.skip('no /proc here')
    usual = ('--n', 8, '--out', tmp_path/'spans')
    got = shell('distances', bench/'lm', '--texts', bench/'many.jsonl', *usual, *BEFORE[kind])   # the last one counts
    assert got.status==2 and 'texts were read' not in got.said, got


def test_results_over_one_another(bench):
    "A measure does not replace a model, nor a table: each result has a folder of its own"
    for place in (bench/'cut', bench/'many.jsonl'):
        got = shell('distances', bench/'lm', '--texts', bench/'many.jsonl', '--n', 4, '--out', place)
        assert got.refused(place.name), got.said


@fault('A stage refuses what it cannot do in one sentence, before it is marked as done.')
@pytest.mark.parametrize('option, value', [('batch-size', 0), ('epochs', 0), ('epochs', -1)])
def test_settings_of_a_stage(bench, tmp_path, option, value):
    "The shell answers a bad number with one sentence, and leaves no untrained model"
    got = heal(bench, tmp_path/'healed', f'--{option}', value)
    assert got.refused(option.replace('-', '.')) and not (tmp_path/'healed').exists(), got


def start_study(tasks, out):
    "A study of one cut, judged on these tasks, in the words of this version"
    if 'arms' in inspect.signature(study).parameters: return study(small_lm(), ROWS, tasks, dict(teacher=[]), out)
    small = dict(epochs=1, max_new_tokens=2, calibration=[*'abcdef'], controls=False)
    return study(small_lm(), ROWS, 1, out, tasks=tasks, **small)


@fault('Names that become files are checked before the first stage.')
@pytest.mark.parametrize('name', ['maths/law', '../../outside'])
def test_task_names_are_no_paths(tmp_path, unread, name):
    "A name with a slash is refused, and nothing is written outside of the folder"
    got = outcome(start_study, {name: Task(name, ROWS, max_new_tokens=1)}, tmp_path/'a'/'study')
    outside = [p for p in tmp_path.rglob('*') if p.is_file() and tmp_path/'a'/'study' not in p.parents]
    assert got.refused(re.escape(name)) and outside==[], f'{got} {outside}'


INTERRUPTED = """
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name=='torch': raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from {module} import main
sys.exit(main(['distances', 'pocket', '--n', '1']))
"""


@fault('Ctrl-C ends a command with one line, also while libraries are still being imported.')
def test_interrupted_import(tmp_path):
    "No traceback in the first seconds either"
    program = INTERRUPTED.format(module=command().__module__)
    p = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if 'KeyboardInterrupt' not in p.stderr and p.returncode!=130: raise RuntimeError(p.stderr)
    assert 'Traceback' not in p.stderr


# Left behind --------------------------------------------------------------------------------------------------------
class Page:
    "Stands for the process that serves the page: a socket that listens"
    def __init__(self, port): self.port = port
    def __call__(self, command, **kwargs):
        self.socket = socket.create_server(('127.0.0.1', self.port))
        return self
    def __enter__(self): return self
    def __exit__(self, *_): self.socket.close()
    def poll(self): return None
    def wait(self, timeout=None): return 0
    def terminate(self): self.socket.close()
    kill = terminate


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]


@fault('The token of the page stands in no command line, which every user of the machine can read.')
def test_token_of_the_page(tmp_path, monkeypatch):
    "The browser is shown a file that only its owner can read"
    if find_spec('voila') is None: pytest.skip('voila is not installed')
    import webbrowser
    port, opened = free_port(), []
    monkeypatch.setattr(subprocess, 'Popen', Page(port))
    monkeypatch.setattr(webbrowser, 'open', lambda address, *args, **kwargs: opened.append(address))
    got = shell('lab', '--port', port, '--out', tmp_path/'lab')
    if not opened: raise RuntimeError(f'no browser was opened: {got}')
    assert not any('token=' in o for o in opened)


def listening(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port))==0


@pytest.mark.slow
@fault('The page ends with the command that opened it, however that ends.')
def test_page_that_outlives_its_command(tmp_path):
    "kill -9 of `sdlab lab` leaves no server and no kernel behind"
    if find_spec('voila') is None: pytest.skip('voila is not installed')
    port = free_port()
    program = f"import sys; from {command().__module__} import main; sys.exit(main(sys.argv[1:]))"
    argv = ['lab', '--no-browser', '--port', str(port), '--out', str(tmp_path/'lab')]
    pipe = dict(stdout=subprocess.PIPE, text=True, start_new_session=True)
    p = subprocess.Popen([sys.executable, '-c', program, *argv], **pipe)
    try:
        if not any('token=' in line for line in p.stdout): raise RuntimeError('the page did not open')
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        end = time.monotonic()+5
        while listening(port) and time.monotonic() < end: time.sleep(.1)
        assert not listening(port)
    finally: os.killpg(p.pid, signal.SIGKILL)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    "A way to open an instrument without a folder, and where its temporary folders lie"
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    Watch = find('lab.watch:Watch')
    return lambda: Watch({'SFT': (small_lm(), 'completion')}, ROWS, epochs=1), tmp_path


@fault('An instrument that is closed removes the folder that it made for itself.')
def test_folder_of_a_closed_instrument(watched):
    "Closed instruments leave no checkpoints behind"
    open_one, folder = watched
    one = open_one()
    one.close()
    assert [*folder.iterdir()]==[]


@fault('An instrument that is closed is forgotten.')
@pytest.mark.parametrize('room, name', [('reader', 'Reader'), ('compare', 'Compare')])
def test_closed_instruments_are_forgotten(room, name):
    "Nothing keeps a closed instrument, or its widgets, alive"
    from ipywidgets import Widget
    known = lambda: len(Widget.get_manager_state()['state'])
    same = dict(source='teacher', reason='same answer', ended=True)
    rows = [dict(o, **same, reference=o['completion'], written=o['completion']) for o in ROWS]
    given = (rows,) if name=='Reader' else ({'teacher': small_lm()}, {'quiz': Task('quiz', ROWS, max_new_tokens=1)})
    before, one = known(), find(f'lab.{room}:{name}')(*given)
    one.widget
    one.close()
    seen = weakref.ref(one)
    del one
    gc.collect()
    assert seen() is None and known()==before
