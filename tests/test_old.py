"""What version 0.1 wrote: plans and checkpoints load and show themselves, run folders are refused in one sentence.

tests/old holds two plans; a random Llama of eight blocks that was cut, tuned for two steps and cut again; and what
marks the folder of a study (the demo's), of a `tune` and of a `rewrite`, without their models and most rows."""
import shutil
from pathlib import Path
import pytest
import torch
from golden import call, find, logits, plan_of, public

OLD = Path(__file__).resolve().with_name('old')
ROWS = [dict(prompt='Ann has 3 pens', completion='3 pens .'), dict(prompt='Ben buys 4 coins', completion='4 coins .')]
STRIP = '▁▄▁▁█░▄█'   # of the checkpoint: blocks 0, 2 and 3 are gone, 5 lost both sub-layers, 1 and 6 their MLP


def plan(name):
    "A plan that was kept"
    return find('Plan').from_json((OLD/f'{name}.json').read_text(encoding='utf-8'))


@pytest.fixture
def student():
    "The checkpoint that was kept"
    return call('load', OLD/'checkpoint')


def zeros(lm):
    "The matrices that hold nothing but zeros"
    return {k for k, p in lm.model.named_parameters() if p.ndim>1 and not p.any()}


# Plans ---------------------------------------------------------------------------------------------------------

def test_plan_of_blocks():
    p = plan('plan_blocks')
    assert (p.n, p.drop, p.keep, p.strip)==(8, (5, 6, 7), (0, 1, 2, 3, 4), '█████▁▁▁')
    assert p.strip in str(p) and 'angular distance 0.164' in str(p)
    assert p.evidence['texts']==8 and len(p.evidence['scores'])==6


def test_plan_of_parts():
    p = plan('plan_parts')
    assert (p.n, p.drop, p.strip)==(8, (2,), '██▁██░▄█')
    assert 'halves of three others' in str(p) and p.evidence==dict(seed=0)


@pytest.mark.parametrize('name', ['plan_blocks', 'plan_parts'])
def test_plan_shows_itself_and_is_written_again(name):
    p = plan(name)
    assert p.strip in p._repr_markdown_() and len(p.frame())==8 and p.plot() is not None
    again = find('Plan').from_json(p.to_json())
    assert again==p and hash(again)==hash(p)


# Checkpoints ---------------------------------------------------------------------------------------------------

def test_checkpoint_shows_itself(student):
    assert (student.n, student.teacher_n, student.kept, student.strip)==(5, 8, (1, 4, 5, 6, 7), STRIP)
    assert STRIP in repr(student) and STRIP in student._repr_markdown_()
    record = student.provenance
    assert record['teacher']=='tiny' and [s['op'] for s in record['steps']]==['prune', 'tune', 'prune']


def test_checkpoint_computes_what_it_did(student):
    last = logits(student, torch.tensor([[1, 4, 6, 19, 10, 14, 5, 7]]))[0, -1, 1:4]
    torch.testing.assert_close(last, torch.tensor([.911405444, -4.267618656, -1.232244730]), rtol=1e-4, atol=1e-5)


def test_checkpoint_knows_how_it_was_trained(student):
    log = call('training_log', student)
    assert log.step.tolist()==[1, 2] and log.loss.tolist()==[4.7999, 5.692] and log.trained_tokens.tolist()==[8, 14]


def test_what_was_zeroed_stays_zero(student):
    was = zeros(student)
    assert len(was)==4      # the output projections of one attention and of three MLPs
    tuned = call('tune', student, ROWS, epochs=2, batch_size=1, lr=1e-2, progress=False)
    assert zeros(tuned)==was and tuned.strip==STRIP
    assert [s['op'] for s in tuned.provenance['steps']]==['prune', 'tune', 'prune', 'tune']


def test_checkpoint_is_cut_further_and_saved(student, tmp_path):
    cut = call('prune', student, plan_of(n=5, block=[1], attention=[4]))
    cut.save(tmp_path/'cut')
    back = call('load', tmp_path/'cut')
    for lm in (cut, back):
        assert (lm.teacher_n, lm.kept, lm.strip)==(8, (1, 5, 6, 7), '▁▄▁▁▁░▄▀')
    card = (tmp_path/'cut'/'README.md').read_text(encoding='utf-8')
    assert back.strip in card and 'tiny' in card and 'once more' in card


# Run folders ---------------------------------------------------------------------------------------------------

def files(folder):
    "What lies in a folder"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def refused(kind, tmp_path, run):
    "Assert that `run` refuses a copy of an old folder in one sentence that names it, and leaves it alone"
    folder = shutil.copytree(OLD/kind, tmp_path/'an old run')
    with pytest.raises(ValueError) as e:
        run(folder)
    said = str(e.value)
    assert folder.name in said and '\n' not in said, said
    now = files(folder)
    assert {k: now.get(k) for k in files(OLD/kind)}==files(OLD/kind)


def test_run_of_tune_is_refused(student, tmp_path):
    refused('tune', tmp_path, lambda out: call('tune', student, ROWS, epochs=1, batch_size=2, progress=False, out=out))


def test_ledger_of_rewrite_is_refused(student, tmp_path):
    how = dict(template='continue', rule=None, max_new_tokens=5, progress=False)
    refused('rewrite', tmp_path, lambda out: call('rewrite', student, ROWS, out=out, **how))


def test_study_is_refused(student, tmp_path):
    if not (step := public('step')):
        pytest.skip('this version of the library has no steps, and its own studies go on')
    tasks, arms = dict(short=find('Task')('short', ROWS, rule='exact')), dict(pruned=[step('best', n=1), step('prune')])
    refused('study', tmp_path, lambda out: call('study', student, ROWS, tasks, arms, out))
