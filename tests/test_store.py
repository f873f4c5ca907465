"core.store: kills, full disks, two processes, old folders"
import errno, json, os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
import pytest
from sdlab.core.store import (FORMAT, Log, OldKeyword, claim, finish, finished, in_use, locked, once, only_writer,
    replacing, settings_difference, settings_in, with_old, write_json)

ROOT = Path(__file__).resolve().parents[1]
DIE = 'os.kill(os.getpid(), signal.SIGKILL)'
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def process(code, *args):
    "Python in a process of its own"
    head = 'import os, signal, sys, time\nfrom pathlib import Path\nfrom sdlab.core.store import *\nhere = Path(sys.argv[1])\n'
    return subprocess.Popen([sys.executable, '-c', head+code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True)

def killed(code, *args):
    p = process(code, *args)
    assert p.wait(60)==-signal.SIGKILL

def tree(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))

# whole or not at all
def test_a_file_or_a_folder_comes_whole(tmp_path):
    write_json(tmp_path/'a'/'b.json', dict(x=1))
    for text in ('one', 'two'):
        with replacing(tmp_path/'m') as part:
            part.mkdir()
            (part/text).write_text(text)
    assert tree(tmp_path)==['a', 'a/b.json', 'm', 'm/two']

@pytest.mark.parametrize('there', [None, 'file', 'folder'])
@pytest.mark.parametrize('error', [RuntimeError('no more ink'), KeyboardInterrupt(), FULL])
def test_what_was_there_stays(tmp_path, there, error):
    target = tmp_path/'m'
    if there=='file': target.write_text('before')
    if there=='folder': (target.mkdir(), (target/'before').write_text(''))
    before = tree(tmp_path)
    with pytest.raises(type(error)) as e:
        with replacing(target) as part:
            part.mkdir()
            (part/'half').write_text('')
            raise error
    assert tree(tmp_path)==before
    if error is FULL: assert 'No space left on device' in str(e.value) and 'what was there before is unchanged' in str(e.value) and e.value.errno==errno.ENOSPC

def test_a_disk_that_fills_up(tmp_path):
    "A real one: the process may write no file beyond 2,000 bytes"
    write_json(tmp_path/'x.json', dict(x=1))
    code = ("import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "try: write_json(here/'x.json', ['many']*999)\nexcept OSError as e: print(e)")
    said = process(code, tmp_path).communicate(timeout=60)[0]
    assert 'Cannot write to' in said and len(said.splitlines())==1
    assert json.loads((tmp_path/'x.json').read_text())==dict(x=1) and tree(tmp_path)==['x.json']

def test_too_little_room_is_seen_first(tmp_path):
    with pytest.raises(OSError, match='needs .* bytes, but only'):
        with replacing(tmp_path/'m', size=10**18): raise AssertionError('begun')
    assert not tree(tmp_path)

def test_killed_inside(tmp_path):
    "Nobody sees half of it, and the next writer sweeps up"
    write_json(tmp_path/'x.json', 1)
    killed(f"with replacing(here/'x.json') as part:\n  part.write_text('[1, ')\n  {DIE}", tmp_path)
    assert len(tree(tmp_path))==2 and json.loads((tmp_path/'x.json').read_text())==1
    write_json(tmp_path/'x.json', 2)
    assert tree(tmp_path)==['x.json']

def test_killed_between_the_two_renames(tmp_path):
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/'before').write_text('')
    killed(f"real, n = os.replace, []\ndef dies(*a):\n  n.append(a)\n  if len(n)==2: {DIE}\n  real(*a)\nos.replace = dies\n"
           "with replacing(here/'m') as part:\n  part.mkdir()\n  (part/'after').write_text('')", tmp_path)
    assert not (tmp_path/'m').exists()                                       # the one moment at which it is away
    with pytest.raises(RuntimeError):
        with replacing(tmp_path/'m'): raise RuntimeError
    assert tree(tmp_path)==['m', 'm/before']                                 # the next writer has put it back

def test_a_part_of_a_living_writer_is_left(tmp_path):
    with replacing(tmp_path/'x.json') as part:
        part.write_text('1')
        p = process("write_json(here/'x.json', 2)", tmp_path)
        assert p.wait(60)==0 and part.exists()
    assert json.loads((tmp_path/'x.json').read_text())==1                    # the last one wins, whole

# claims
def test_differences_are_named_down_to_the_field():
    was = dict(lr=.1, learn=dict(lora=8, last=None), on='text')
    assert settings_difference(was, dict(was))==''==settings_difference(dict(a=None), {})
    assert settings_difference(was, dict(was, learn=dict(lora=4, last=None)))=='learn.lora was 8 and is now 4'
    assert settings_difference(was, {}, n=2)=="lr was 0.1 and is now None, learn.lora was 8 and is now None, 1 more"
    assert len(settings_difference(dict(x=list(range(999))), dict(x=[])))<100

def test_a_claim_is_kept(tmp_path):
    folder = claim(tmp_path/'a'/'b', dict(lr=.1, path=Path('x'), units=(1, 2)), 'run')
    assert json.loads((folder/'run.json').read_text())==dict(format=FORMAT, settings=dict(lr=.1, path='x', units=[1, 2]))
    (folder/'work').write_text('')
    assert claim(folder, dict(lr=.1, path='x', units=[1, 2]), 'run')==folder and (folder/'work').exists()
    with pytest.raises(ValueError, match='holds another run .*lr was 0.1 and is now 0.2.*resume=False'): claim(folder, dict(lr=.2, path='x', units=[1, 2]), 'run', again='resume=False')
    with pytest.raises(ValueError, match='exists and is no study'): claim(folder, {}, 'study')
    with pytest.raises(ValueError, match='exists and is no study'): claim(folder, {}, 'study', fresh=True)
    assert settings_in(claim(folder, dict(lr=.2), 'run', fresh=True), 'run')==dict(lr=.2) and tree(folder)==['run.json']
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='exists and is no run'): claim(tmp_path/'file', {}, 'run')
    with pytest.raises(OSError, match='Cannot write to'): claim(tmp_path/'file'/'x', {}, 'run')

@pytest.mark.parametrize('name', ['study', 'comparison', 'stage', 'tune', 'watch'])
def test_folders_of_version_01_are_refused_in_a_sentence(tmp_path, name):
    (tmp_path/f'{name}.json').write_text(json.dumps(dict(format=1, seed=0) if name=='watch' else dict(seed=0)))
    (tmp_path/'model').mkdir()
    for kind in ('run', 'study'):
        with pytest.raises(ValueError, match=f'holds a {name} as another version of sdlab kept it') as e: claim(tmp_path, dict(seed=0), kind)
        assert str(e.value).count('. ')==0
    assert tree(tmp_path)==sorted([f'{name}.json', 'model'])

@pytest.mark.parametrize('at', [f'Path.mkdir_ = Path.mkdir\ndef dies(self, *a, **k):\n  Path.mkdir_(self, *a, **k)\n  {DIE}\nPath.mkdir = dies', f'Path.write_text = lambda *a, **k: {DIE}',
                                f'os.link = lambda *a: {DIE}'], ids=['after mkdir', 'before the mark', 'beside the mark'])
def test_a_claim_that_was_killed_goes_on(tmp_path, at):
    folder = tmp_path/'run'
    killed(f'{at}\nclaim(here, dict(lr=.1), "run")', folder)
    assert folder.is_dir() and not (folder/'run.json').exists()
    assert settings_in(claim(folder, dict(lr=.2), 'run'), 'run')==dict(lr=.2)

def test_starting_over_that_was_killed_goes_on(tmp_path):
    folder = claim(tmp_path/'run', dict(lr=.1), 'run')
    (folder/'work').write_text('')
    killed(f'import shutil\nshutil.rmtree = lambda *a, **k: {DIE}\nclaim(here, dict(lr=.2), "run", fresh=True)', folder)
    assert claim(folder, dict(lr=.3), 'run')==folder and tree(folder)==['run.json']

def test_two_that_claim_at_once(tmp_path):
    "One makes the folder, and the other is held to it"
    for i in range(5):
        code = 'time.sleep(max(0, float(sys.argv[3])-time.time()))\ntry: claim(here, dict(lr=sys.argv[2]), "run"); print("mine")\nexcept ValueError as e: print(e)'
        both = [process(code, tmp_path/f'run{i}', k, time.time()+.7) for k in 'ab']
        said = [p.communicate(timeout=60)[0].strip() for p in both]
        assert sorted(s=='mine' for s in said)==[False, True] and any('holds another run' in s for s in said)

# locks
def test_one_writer_in_two_processes(tmp_path):
    claim(tmp_path, {}, 'run')
    p = process('with locked(here): print("held", flush=True); time.sleep(60)', tmp_path)
    assert p.stdout.readline()=='held\n' and in_use(tmp_path)
    with pytest.raises(ValueError, match='being written to by another run'): claim(tmp_path, dict(lr=.2), 'run', fresh=True)
    with locked(tmp_path, wait=False) as held: assert held is False
    with pytest.raises(ValueError, match='being written to by another run'):
        with only_writer(tmp_path, wait=.2): raise AssertionError('two writers')
    p.kill()
    p.wait()
    assert not in_use(tmp_path)                                              # the lock went with its process
    with only_writer(tmp_path): assert in_use(tmp_path)
    assert not in_use(tmp_path/'nowhere') and not (tmp_path/'nowhere').exists()

def test_a_lock_of_a_folder_that_was_thrown_away(tmp_path):
    "Who waited for the old one must not hold a lock that nobody else can see"
    folder = claim(tmp_path/'run', {}, 'run')
    with locked(folder):
        p = process('with locked(here): print(os.stat(here/"lock").st_ino, flush=True); time.sleep(60)', folder)
        time.sleep(1)
        os.replace(folder, tmp_path/'aside')
    ino = int(p.stdout.readline())
    assert (folder/'lock').stat().st_ino==ino and in_use(folder)
    p.kill()
    p.wait()

def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    with locked(tmp_path, wait=False) as a, locked(tmp_path, wait=False) as b: assert a and b
    assert once(tmp_path/'x', lambda f: None, lambda s: None)

# once
def test_once(tmp_path):
    said, ran = [], []
    for _ in range(2): assert once(tmp_path/'x', ran.append, said.append)==tmp_path/'x'
    assert ran==[tmp_path/'x'] and said==['x ...', 'x: 0 s'] and set(finished(tmp_path/'x'))=={'seconds'}
    def fails(folder): (folder/'half').write_text(''); raise RuntimeError('no more ink')
    with pytest.raises(RuntimeError): once(tmp_path/'y', fails, said.append)
    assert finished(tmp_path/'y') is None and not in_use(tmp_path/'y')
    assert once(tmp_path/'y', lambda f: (f/'half').unlink(), said.append) and finished(tmp_path/'y')
    finish(tmp_path/'z', name='cut', n=3)
    assert finished(tmp_path/'z')==dict(name='cut', n=3)

def test_once_in_three_processes_of_which_one_is_killed(tmp_path):
    work = 'def work(f):\n  open(f/"begun", "a").write("x")\n  time.sleep(float(sys.argv[2]))\nprint(once(here, work, lambda s: None), flush=True)'
    first = process(work, tmp_path/'x', 60)
    while not (tmp_path/'x'/'begun').exists(): time.sleep(.02)
    assert once(tmp_path/'x', lambda f: None, lambda s: None, wait=False) is None
    others = [process(work, tmp_path/'x', .2) for _ in range(2)]
    time.sleep(.5)
    first.kill()
    assert [p.wait(60) for p in others]==[0, 0] and first.wait()==-signal.SIGKILL
    assert (tmp_path/'x'/'begun').read_text()=='xx' and finished(tmp_path/'x')   # the killed one, and one of the others

# logs
def test_a_torn_last_line(tmp_path):
    path = tmp_path/'deep'/'log.jsonl'
    with Log(path, dict(seed=0)) as log: log.append([dict(i=0), dict(i=1)])
    whole = path.read_bytes()
    for cut in (1, 5, 12):
        path.write_bytes(whole[:-cut])
        n = whole[:-cut].count(b'\n')-1
        assert len(Log(path).records())==n
        with Log(path, dict(seed=0)) as log: log.append([dict(i=9)])
        assert len(Log(path).records())==n+1 and path.read_bytes().endswith(b'\n')
    path.write_bytes(b'{"log": 2, "sett')                                    # not even the head was finished
    with Log(path, dict(seed=1)) as log: log.append([dict(i=0)])
    assert Log(path, dict(seed=1)).records()==[dict(i=0)]

def test_logs_of_others(tmp_path):
    path = tmp_path/'log.jsonl'
    with Log(path, dict(seed=0)) as log: log.append([dict(i=0)])
    before = path.read_bytes()
    for read in (lambda l: l.records(), lambda l: l.__enter__()):
        with pytest.raises(ValueError, match='other settings .*seed was 0 and is now 1'): read(Log(path, dict(seed=1)))
    path.write_text('{"text": "my thesis"}\n')
    for read in (lambda l: l.records(), lambda l: l.__enter__()):
        with pytest.raises(ValueError, match='not a ledger'): read(Log(path, {}))
    path.write_text('{"ledger": 1, "settings": {}}\n')
    with pytest.raises(ValueError, match='another version of sdlab'): Log(path, {}).records()
    path.write_bytes(before+b'\0'*9+b'\n')
    with pytest.warns(UserWarning, match='1 lines of .* are damaged'): assert Log(path).records()==[dict(i=0)]

def test_one_writer_of_a_log(tmp_path):
    path = tmp_path/'log.jsonl'
    p = process('log = Log(here, {}).__enter__(); log.append([1]); print("held", flush=True); time.sleep(60)', path)
    assert p.stdout.readline()=='held\n'
    with pytest.raises(ValueError, match='Another process is writing'): Log(path, {}).__enter__()
    assert Log(path, {}).records()==[1]                                      # reading needs no lock
    p.kill()
    p.wait()
    with Log(path, {}) as log: log.append([2])
    assert Log(path).records()==[1, 2]

def test_a_log_on_a_disk_that_fills_up(tmp_path):
    code = ("import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
            "with Log(here, {}) as log:\n  try:\n    for i in range(99): log.append([dict(i=i, text='x'*20)])\n  except OSError as e: print(e)")
    said = process(code, tmp_path/'log.jsonl').communicate(timeout=60)[0]
    assert 'Cannot write to' in said and 'what is done is kept' in said
    raw = (tmp_path/'log.jsonl').read_bytes()
    kept = Log(tmp_path/'log.jsonl').records()
    assert raw.endswith(b'\n') and [r['i'] for r in kept]==list(range(len(kept))) and 5<len(kept)<99

# old keywords
@dataclass(frozen=True)
class Weights:
    lora:int = None
    last:int = None
@dataclass(frozen=True)
class Run:
    out:str = None

def test_old_keywords():
    def tune(learn=Weights(), run=Run(), **old): return with_old(dict(learn=learn, run=run), old, dict(lora='learn.lora', last='learn.last', folder='run.out'), 'tune')
    assert tune()==(Weights(), Run())
    with pytest.warns(OldKeyword) as seen: assert tune(Weights(last=2), lora=8, folder='x')==(Weights(8, 2), Run('x'))
    assert len(seen)==1 and str(seen[0].message)=='tune(lora=...) is learn=Weights(lora=...), tune(folder=...) is run=Run(out=...) since 0.2'
    assert seen[0].filename==__file__
    with pytest.raises(TypeError, match=r"tune\(\) got an unexpected keyword argument 'loar': did you mean learn=Weights\(lora=...\)\?"): tune(loar=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing_like_it'$"): tune(nothing_like_it=8)
    with pytest.warns(OldKeyword, match=r'go\(last=...\) is learn=Weights\(last=...\) since 0.2'): assert with_old(dict(learn=Weights()), dict(last=3), dict(lora='learn.lora', last='learn.last'), 'go')==(Weights(last=3),)
