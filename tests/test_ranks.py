"""One process or several: the same spans, the same ledger, the same losses, the same verdicts.

`test_measure` has the measurements under `torchrun` and `test_rewrite` the ledgers; here are the tuning, with weights whole and in parts (FSDP), and the whole study as a script."""
import json, os, re, subprocess, sys
from importlib.resources import files
from pathlib import Path
import pandas as pd
import pytest
import ranker

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent/'examples'/'self_data_8b.py'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
LAUNCH = ['-m', 'accelerate.commands.launch', '--config_file', HERE.parent/'examples'/'fsdp.yaml', '--num_processes', '2', '--mixed_precision', 'no'] # on CPUs accelerate leaves the models whole

def started(args): return subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE.parent)})

def ended(p):
    said = p.communicate(timeout=600)[0]
    assert p.returncode==0, said[-4000:]
    return said

def close(a, b, eps=1e-4): assert len(a)==len(b) and max(abs(x-y)/max(1, abs(x)) for x, y in zip(a, b))<eps, (a, b)

def test_two_ranks_tune_as_one_with_half_of_the_weights_each(tmp_path):
    "FSDP: half of the weights and of the rows of each step in each of two processes; the losses, gradient norms and weights of one. What no process can do without a whole model is refused"
    p = started([*TORCHRUN, HERE/'ranker.py', tmp_path, 'fsdp', 'again'])
    alone = ranker.tuned()
    ended(p)
    a, b = (json.loads((tmp_path/f'{r}.json').read_text()) for r in (0, 1))
    assert {**a, 'held': 0}=={**b, 'held': 0} and a['plain'] and a['held']+b['held']==a['all'] and a['held']<.6*a['all']
    for k in ('loss', 'norm', 'tokens'): close(a[k], alone[k])
    close(a['weights'], alone['weights'], 1e-3)
    assert 'no process has a whole model' in a['refused']

@pytest.fixture(scope='module')
def studies(tmp_path_factory):
    "The script with the pocket teacher, by one process and by two; its 24 training rows are six whole steps (where rows do not divide, two processes read a few twice in the last one)"
    from sdlab.core.pocket import pocket_rows
    at = tmp_path_factory.mktemp('studies')
    pocket_rows('sums', 48, 3).to_json(at/'rows.jsonl')
    args = ['--teacher', files('sdlab.core')/'assets'/'pocket', '--data', at/'rows.jsonl', '--rule', 'final', '--drop', 2, '--limit', 48, '--epochs', 1, '--lr', '1e-3', '--max-new-tokens', 72,
            '--items', 8, '--dtype', 'float32', '--cpu']
    ps = [started([SCRIPT, *args, '--out', at/'one', '--batch-size', 4]), started([*LAUNCH, SCRIPT, *args, '--out', at/'two', '--batch-size', 2])]
    return at, args, [ended(p) for p in ps]

def test_the_script_by_two_ranks(studies):
    "Spans, plan, ledger, losses and verdicts are those of one process"
    at, _, _ = studies
    one, two = at/'one', at/'two'
    a, b = (pd.read_csv(o/'1 spans'/'spans.csv') for o in (one, two))
    pd.testing.assert_frame_equal(a, b, rtol=1e-5)
    assert (one/'1 spans'/'plan.json').read_text()==(two/'1 spans'/'plan.json').read_text()
    ledgers = [sorted((json.loads(l) for f in (o/'3 data'/'ledger').glob('*.jsonl') for l in f.read_text().splitlines() if '"key"' in l), key=lambda r: r['key']) for o in (one, two)]
    assert ledgers[0]==ledgers[1] and len(list((two/'3 data'/'ledger').glob('*.jsonl')))==2
    assert (one/'3 data'/'data.jsonl').read_text()==(two/'3 data'/'data.jsonl').read_text()
    assert {json.loads(l)['source'] for l in (one/'3 data'/'data.jsonl').read_text().splitlines()}>={'teacher'}
    for arm in ('SFT', 'self-data'):
        logs = [json.loads((o/f'4 {arm}'/'run'/'done.json').read_text())['facts']['log'] for o in (one, two)]
        close(logs[0]['loss'], logs[1]['loss'], 1e-3)
        assert sorted(p.name for p in (two/f'4 {arm}'/'run').iterdir())==['done.json', 'lock', 'model', 'run.json']   # one of them wrote it
    assert (one/'recovery.csv').read_text()==(two/'recovery.csv').read_text()

def test_the_script_goes_on(studies):
    "A stage that was lost is made again, alone, from those before it; nothing else is touched"
    import shutil
    at, args, _ = studies
    one = at/'one'
    was, times = (one/'recovery.csv').read_text(), {p: p.stat().st_mtime for p in one.glob('[1-4]*/done')}
    shutil.rmtree(one/'5 verdicts'); (one/'recovery.csv').unlink()
    said = ended(started([SCRIPT, *args, '--out', one, '--batch-size', 4]))
    assert re.findall(r'^(\d .*) \.\.\.', said, re.M)==['5 verdicts'] and (one/'recovery.csv').read_text()==was and times=={p: p.stat().st_mtime for p in times}

def test_the_script_says_what_it_takes(studies, capsys):
    import importlib.util
    at, args, _ = studies
    spec = importlib.util.spec_from_file_location('self_data_8b', SCRIPT)
    script = importlib.util.module_from_spec(spec); spec.loader.exec_module(script)
    script.main([*map(str, args), '--out', str(at/'none'), '--dry-run', '--cards', '8'])
    said = capsys.readouterr().out
    assert 'tune all weights, FSDP' in said and '12 to 10 blocks' in said and not (at/'none').exists()
    with pytest.raises(SystemExit): script.main([*map(str, args), '--out', 'x', '--four-bit'])
    assert '--four-bit needs --lora' in capsys.readouterr().err
