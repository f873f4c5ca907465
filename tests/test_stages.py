"The six commands of the road, typed one after the other: each reads what the last one wrote, and refuses what it must not do"
import json, os, shlex, subprocess, sys
from pathlib import Path
import pandas as pd, pytest
from sdlab.core.data import batches, rows
from sdlab.core.model import load
from sdlab.core.plan import Plan
from sdlab.core.pocket import pocket_calibration, pocket_rows, pocket_tasks
from sdlab.compress.prune import prune
from sdlab.heal.rewrite import rewrite
from sdlab.judge.recovery import Recovery
from sdlab.judge.score import score_all
from sdlab.experiment.cli import main
from sdlab.measure.cka import cka
from sdlab.measure.importance import distances

SMALL = {'rewrite': '--n 12 --max-new-tokens 64', 'tune': '--epochs 1 --batch-size 4 --lr 5e-4', 'recovery': '--n 6 --tasks facts stories', 'cka': ''}

def type_in(line):
    "What a shell would do with this line: its exit status"
    return main(shlex.split(line)[1:])

@pytest.fixture(scope='module')
def road(tmp_path_factory):
    "The folder after all six, and what each of them printed"
    at, was, said = tmp_path_factory.mktemp('road'), Path.cwd(), {}
    os.chdir(at)
    try:
        from contextlib import redirect_stdout
        from io import StringIO
        line = 'sdlab distances'
        while line:
            name = line.split()[1]
            with redirect_stdout(StringIO()) as out: assert type_in(f'{line} {SMALL.get(name, "")}')==0, name
            said[name] = out.getvalue()
            last = said[name].strip().splitlines()[-1]
            line = last.removeprefix('next: ') if last.startswith('next: ') else ''         # type what it says comes next
        yield at, said
    finally: os.chdir(was)

@pytest.fixture
def inside(road, monkeypatch):
    monkeypatch.chdir(road[0])
    return road[0]

def test_each_command_names_the_next(road):
    at, said = road
    assert list(said)==['distances', 'prune', 'rewrite', 'tune', 'recovery', 'cka']
    for name, text in said.items():
        wrote = next(l for l in text.splitlines() if l.startswith('wrote ')).removeprefix('wrote ').split(', ')
        assert all((at/p).exists() for p in wrote), (name, wrote)
        assert text.index('wrote ')>len(text)-500                                    # it is the last thing said, with what comes next

def test_the_same_plan_rows_items_and_map_as_in_python(inside):
    teacher, calib = load(), pocket_calibration()
    plan = distances(teacher, batches(teacher, calib, size=32)).best(2)
    assert Plan.from_json(Path('runs/spans/plan.json').read_text())==plan
    cut = load('runs/cut')
    assert cut.fingerprint==prune(teacher, plan).fingerprint and cut.kept==plan.keep
    data = rewrite(teacher, pocket_rows('sums', 12, voice=3), decoding=64, progress=False)
    assert list(rows('runs/data/data.jsonl'))==list(data)
    tasks = {k:t for k,t in pocket_tasks(6).items() if k in ('facts', 'stories')}
    arms = {'teacher': teacher, 'pruned': cut, 'self-data': load('runs/healed')}
    asked, order = score_all(arms, tasks), lambda o: o.sort_values([k for k in ('task', 'arm', 'item') if k in o]).reset_index(drop=True)
    def same(have, want, cols): pd.testing.assert_frame_equal(order(have)[cols], order(want)[cols], check_exact=False, rtol=1e-5)
    same(pd.read_parquet('runs/recovery/items.parquet'), asked, ['task', 'arm', 'item', 'score'])
    same(pd.read_csv('runs/recovery/recovery.csv'), Recovery(asked).frame(), ['task', 'arm', 'score', 'recovery', 'gap_closed'])
    found = cka(arms['self-data'], teacher, calib, group=256).frame()
    pd.testing.assert_frame_equal(pd.read_parquet('runs/map/table.parquet'), found, check_exact=False, rtol=1e-4, atol=1e-6)

def test_provenance_tells_the_whole_road(inside):
    steps = load('runs/healed').provenance['steps']
    assert [s['op'] for s in steps]==['prune', 'tune'] and steps[1]['rows']==12 and steps[1]['on']=='completion'
    from transformers import AutoModelForCausalLM
    assert AutoModelForCausalLM.from_pretrained('runs/healed').config.num_hidden_layers==10

def test_what_is_done_is_not_done_again(inside, road, capsys):
    files = lambda: {p: p.stat().st_mtime_ns for p in Path('runs').rglob('*') if p.is_file() and p.parent.name!='recovery'}
    before = files()
    for name in ('prune', 'rewrite', 'tune', 'recovery', 'cka'):
        assert type_in(f'sdlab {name} {SMALL.get(name, "")}')==0
        assert capsys.readouterr().out.strip().splitlines()[-1]==road[1][name].strip().splitlines()[-1]      # and it says the same
    assert files()==before

def refused(capsys, line, *says):
    "Exit status 2 and one sentence"
    assert type_in(line)==2, line
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(o in err for o in says) and 'Traceback' not in err and err.startswith('sdlab: '), err

def test_missing_files_and_models(tmp_path, monkeypatch, capsys):
    "Each says what makes the missing thing, and leaves nothing"
    monkeypatch.chdir(tmp_path)
    refused(capsys, 'sdlab distances --texts none.jsonl', 'none.jsonl')
    refused(capsys, 'sdlab distances ./none --texts pocket', 'no directory none')
    refused(capsys, 'sdlab prune', 'runs/spans/plan.json', '`sdlab distances`')
    refused(capsys, 'sdlab rewrite --data none.csv', 'none.csv')
    refused(capsys, 'sdlab tune', 'runs/cut', '`sdlab prune`')
    refused(capsys, 'sdlab recovery', 'runs/cut', '`sdlab prune`')
    refused(capsys, 'sdlab cka', 'runs/healed', '`sdlab tune`')
    assert [p for p in tmp_path.rglob('*') if p.is_file()]==[]

def test_bad_values(inside, tmp_path, capsys):
    refused(capsys, 'sdlab distances --drop 12 --out a', 'keep at least one')
    refused(capsys, 'sdlab distances --measure luck --out a', "no measure 'luck'", 'angular')
    refused(capsys, 'sdlab distances --measure influence --tokens all --out a', 'leave tokens out')
    refused(capsys, 'sdlab distances --n -1 --out a', '0 for all')
    refused(capsys, 'sdlab rewrite --rule luck --n 4 --out d', "no rule 'luck'")
    refused(capsys, 'sdlab tune --on translation --out h', "no column 'translation'")
    refused(capsys, 'sdlab tune --lora -1 --out h', 'at least 1')
    refused(capsys, 'sdlab recovery --arms runs/cut', 'name=folder')
    refused(capsys, 'sdlab recovery --arms a=runs/cut a=runs/healed', 'a name of its own')
    refused(capsys, 'sdlab recovery --arms ../up=runs/cut', 'name=folder')
    refused(capsys, 'sdlab recovery --teacher runs/cut --arms a=runs/healed', 'Give --tasks')
    refused(capsys, 'sdlab distances runs/cut --out a', 'Give --texts')
    refused(capsys, 'sdlab cka --pool middle --out m', "'last' (token) or 'mean'")
    assert not any((inside/p).exists() for p in ('a', 'd', 'h', 'm'))        # a mended command finds its place free

@pytest.mark.parametrize('measure, part, what', [('influence', 'block', 'block'), ('update', 'mlp', 'mlp'), ('angular', 'attention', 'attention'), ('kl', 'block', 'block'), ('loss', 'attention', 'attention')])
def test_measures_and_parts(inside, measure, part, what):
    "Every measure gives a plan that prune takes, of whole blocks or of halves"
    assert type_in(f'sdlab distances --measure {measure} --part {part} --drop 1 --n 8 --out {measure}')==0
    plan = Plan.from_json(Path(f'{measure}/plan.json').read_text())
    assert json.loads(plan.to_json())['drop'][what] and len(pd.read_csv(f'{measure}/run/spans.csv'))>=12
    assert type_in(f'sdlab prune --plan {measure}/plan.json --out cut-{measure}')==0
    assert load(f'cut-{measure}').n==(11 if part=='block' else 12)

def test_a_plan_of_another_model(inside, capsys):
    refused(capsys, 'sdlab prune runs/cut --out x', 'for a model of 12 blocks', 'has 10')
    plan = json.loads(Path('runs/spans/plan.json').read_text())
    plan['evidence'].update(model='stranger', model_fingerprint='0'*16)
    Path('strange.json').write_text(json.dumps(plan))
    refused(capsys, 'sdlab prune --plan strange.json --out x', 'measured on another model (stranger', '--anyway')
    assert type_in('sdlab prune --plan strange.json --out anyway --anyway')==0 and load('anyway').n==10
    Path('broken.json').write_text('{"n": 12')
    refused(capsys, 'sdlab prune --plan broken.json --out x', 'broken.json', 'Not a plan')
    assert not Path('x').exists()

def test_nothing_is_written_over(inside, capsys):
    marks = {p: p.stat().st_mtime_ns for p in Path('runs').rglob('*') if p.is_file()}
    refused(capsys, 'sdlab distances --n 8', 'holds another stage', '--fresh')
    Path('two.json').write_text('{"n": 12, "drop": {"block": [1]}}')
    refused(capsys, 'sdlab prune --plan two.json', 'holds another stage', '--fresh')
    refused(capsys, 'sdlab rewrite --n 13', 'holds another stage')
    refused(capsys, 'sdlab tune --lr 1', 'lr was 0.0005 and is now 1')
    refused(capsys, 'sdlab tune --out runs/cut', 'is what this stage reads')
    refused(capsys, 'sdlab cka --out runs/healed', 'is what this stage reads')
    refused(capsys, 'sdlab recovery --n 7 --tasks facts', 'holds another stage')
    refused(capsys, 'sdlab cka --seed 1', 'seed was 0 and is now 1')
    Path('mine').mkdir(exist_ok=True), Path('mine/thesis.txt').write_text('all of it')
    for line in ('distances', 'prune', 'rewrite --n 4', 'tune', 'cka'): refused(capsys, f'sdlab {line} --out mine --fresh', 'is no stage')
    assert {p: p.stat().st_mtime_ns for p in marks}==marks and Path('mine/thesis.txt').read_text()=='all of it'

def test_fresh_throws_away_one_stage_only(inside, capsys):
    assert type_in('sdlab prune --out again')==0 and load('again').n==10
    Path('two.json').write_text('{"n": 12, "drop": {"block": [4, 5, 6]}}')
    assert type_in('sdlab prune --plan two.json --out again --fresh')==0 and load('again').n==9
    assert load('runs/cut').n==10

def test_an_interrupted_rewriting_goes_on(tmp_path, monkeypatch, capsys, road):
    "Ctrl-C after the first answers: 130, what is done is kept, and the end is as if nothing had happened"
    from sdlab.core.store import Log
    monkeypatch.chdir(tmp_path)
    real, calls = Log.append, []
    def deadly(log, recs):
        real(log, recs), calls.append(recs)
        if len(calls)==4: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Log, 'append', deadly)
        assert type_in('sdlab rewrite --n 12 --max-new-tokens 64 --batch-size 2')==130
    assert 'goes on from there' in capsys.readouterr().err and not Path('runs/data/data.jsonl').exists() and list(Path('runs/data/run').glob('*.jsonl'))
    assert type_in('sdlab rewrite --n 12 --max-new-tokens 64 --batch-size 2')==0
    assert list(rows('runs/data/data.jsonl'))==list(rows(road[0]/'runs'/'data'/'data.jsonl'))

def test_a_model_that_somebody_trained(data, tmp_path, monkeypatch, capsys):
    "Plain stories: every command with a file, and the student is the teacher up to the cut"
    monkeypatch.chdir(tmp_path)
    model, texts = data/'models'/'stories-260k', data/'tinystories'/'stories.json'
    for line in (f'distances {model} --texts {texts} --n 32 --drop 1', f'prune {model}', f'rewrite {model} --data {texts} --n 12 --max-new-tokens 32', 'tune --epochs 1', f'recovery --teacher {model} --tasks {texts} --n 8', f'cka runs/cut {model} --texts {texts} --n 32'):
        assert type_in(f'sdlab {line}')==0, capsys.readouterr().err
    cut, same = load('runs/cut'), pd.read_parquet('runs/map/table.parquet').query('student==teacher').set_index('student').cka
    first = next(i for i in range(6) if i not in cut.kept)
    assert cut.n==4 and (same[same.index<=first]>.9999).all()
    score = pd.read_csv('runs/recovery/recovery.csv').set_index('arm').score
    assert score['teacher']<score['pruned']

def test_in_a_real_shell(road):
    "The installed command: help without torch, a stage, and a mistake"
    exe = str(Path(sys.executable).parent/'sdlab')
    if not Path(exe).exists(): pytest.skip('the package is not installed beside this Python')
    run = lambda *a: subprocess.run([exe, *a], capture_output=True, text=True, cwd=road[0], timeout=300)
    said = run('--help')
    assert said.returncode==0 and all(k in said.stdout for k in ('distances', 'prune', 'rewrite', 'tune', 'recovery', 'cka', 'study', 'demo', 'run'))
    said = run('prune', 'pocket', '--plan', 'runs/spans/plan.json', '--out', 'by shell')
    assert said.returncode==0 and "next: sdlab rewrite pocket" in said.stdout and load(road[0]/'by shell').n==10, said.stderr
    said = run('prune', '--plan', 'none.json')
    assert said.returncode==2 and 'none.json' in said.stderr and 'Traceback' not in said.stderr

def test_help_comes_from_the_functions_and_imports_nothing_heavy():
    code = "import sys\nfrom sdlab.experiment.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sorted({m.split('.')[0] for m in sys.modules}))"
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode==0 and not {'torch', 'transformers', 'datasets', 'pandas', 'matplotlib'} & set(p.stdout.splitlines()[-1].split()), p.stderr
