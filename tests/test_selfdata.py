"A paper's comparison where it is stopped, shared, asked wrongly; and on rows that no pocket world knows"
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import pandas as pd, pytest
import forks, walker
import sdlab.experiment.study as S
from sdlab.heal.rewrite import rewrite
from sdlab.experiment.comparison import QUESTIONS, Cell, Comparison, rows_of_run, own_world, train_all
from sdlab.experiment.selfdata import self_data_distillation, student_tables
from sdlab.experiment.study import claim
from sdlab.experiment.cli import main

HOW = dict(data=walker.asked(), rule='final', n=6, seeds=1, steps=1, batch_size=8, rates=(1e-3,), max_new_tokens=8, drafts=(2,))
def compared(out, teacher=None, **kwargs): return self_data_distillation(out, teacher or walker.teacher(), **{**HOW, 'ask':('headline',), **kwargs})

def die(out):
    "Killed when the third cell has written everything but its mark"
    write,seen = S._write,[]
    def deadly(path, value):
        if path.name=='done.json' and path.parent.parent.name=='cells': seen.append(path)
        if len(seen)==3: os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)
    S._write = deadly
    compared(out)

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return compared(tmp_path_factory.mktemp('whole')/'c')

def answers(found): return found.items('headline').sort_values(['arm','task','item']).reset_index(drop=True)

def test_rows_of_ones_own(whole):
    "Everything of the headline, on a model and rows that are nobody's world: judged where no row was learned"
    assert set(whole.recovery().arms)=={'teacher','pruned','SFT','self-data','SFT control','self-data control'}
    tables = {p.stem for p in (whole.out/'tables').glob('*.csv')}
    assert {'cells','differences','health','rates','cutting','blocks_foretold','shift','maps','drafts'} <= tables
    cells = pd.read_csv(whole.out/'tables'/'cells.csv')
    want = whole.recovery().frame()
    assert cells[cells.question=='headline'].score.tolist()==pytest.approx(want.score.tolist())
    learned = {r for r in (whole.out/'data').glob('*/selected.jsonl')}
    read = set(pd.concat([pd.read_json(p, lines=True) for p in learned]).prompt)
    world = own_world(walker.teacher(), HOW['data'], rule='final', n=6, max_new_tokens=8)
    for side in ('evaluation','calibration'): assert not read & set(world.tasks(side)['in domain'].rows['prompt'])
    maps = pd.read_csv(whole.out/'tables'/'maps.csv')
    assert maps[maps.arm=='pruned'].shape[0]>0

def test_killed_and_gone_on_with(tmp_path, whole):
    "kill -9 in a cell: what was finished is not done again, and the end is the same"
    p = forks.Fork(die, tmp_path/'c')
    assert p.wait()==-signal.SIGKILL, p.said()
    marks = {m:m.stat().st_mtime_ns for m in (tmp_path/'c').rglob('done.json')}
    assert 2 <= sum('cells' in m.parts for m in marks) < 6
    found = compared(tmp_path/'c')
    assert {m:m.stat().st_mtime_ns for m in marks}==marks
    pd.testing.assert_frame_equal(answers(found), answers(whole), check_exact=False, rtol=1e-5)

def test_two_workers_share(tmp_path, whole):
    "Two processes, one folder: every cell once, and the same answers"
    model = walker.teacher().save(tmp_path/'model')
    (tmp_path/'rows.jsonl').write_text(pd.DataFrame(HOW['data']).to_json(orient='records', lines=True))
    found = compared(tmp_path/'c', str(model), data=str(tmp_path/'rows.jsonl'), workers=2)
    assert len(list((found.out/'cells').glob('*/done.json')))==len(list((whole.out/'cells').glob('*/done.json')))
    got = answers(found)
    assert got.score.tolist()==pytest.approx(answers(whole).score.tolist())

def test_every_question_can_be_asked(tmp_path):
    "All of them on the smallest model there is; a question that this world cannot answer is left out"
    found = compared(tmp_path/'c', ask=('capacity','rivals','words'), n=2)
    assert set(found.finished)=={'capacity','rivals','words'}
    assert {'tune SFT lora','tune own words last','distil own words','on_policy own words'} <= set(found.best)
    with pytest.raises(ValueError, match="no question 'voices'"): found.items('voices')
    assert 'in domain' in str(found) and '<table>' in found._repr_html_()                       # the headline was not asked
    assert set(QUESTIONS)>=set(found.questions)

def test_a_world_of_ones_own(tmp_path):
    "Texts to choose by and to judge the choice on are different ones; answers are compared as was asked; another rule is another comparison"
    one,two = (own_world(walker.teacher(), HOW['data'], rule=r, n=6, max_new_tokens=8) for r in ('final','exact'))
    assert len(one.texts(0)) and not set(one.texts(0)['prompt']) & set(one.texts(1)['prompt']) and one.prints!=two.prints
    for world,name in ((one,'final'), (two,'exact')):
        found = Comparison(claim(tmp_path/name, dict(max_new_tokens=8), kind='comparison'), {}, lambda *_: None)
        cell = Cell((2,), words='self-data', source='in domain', size=world.sizes[-1])
        got = rows_of_run(found, walker.teacher(), world, cell).to_pandas()
        want = rewrite(walker.teacher(), world.rows('in domain', cell.size, 0, 0), rule=name, max_new_tokens=8, progress=False).to_pandas()
        assert got[['prompt','completion','reason']].equals(want[['prompt','completion','reason']])

def test_plain_rows(tmp_path):
    "Rows without answers to check are judged by perplexity alone, and every table is there"
    found = compared(tmp_path/'c', data=[dict(prompt=f'say {i}', completion=f'it is {i}') for i in range(40)], rule='auto', ask=('headline','spans'))
    assert set(found.recovery('spans').tasks.values())=={'perplexity'} and (found.out/'tables'/'blocks_healed.csv').exists()

def test_merging_needs_no_headline(tmp_path):
    "Three sources, of which only the words were asked"
    world = replace(own_world(walker.teacher(), HOW['data'], rule='final', n=2, max_new_tokens=4), sources=('in domain','b','both'))
    settings = dict(drop=1, seeds=1, steps=1, batch_size=8, rates=[1e-3], max_new_tokens=4, drafts=[2], seed=0)
    found = train_all(Comparison(claim(tmp_path/'c', settings, kind='comparison'), {}, lambda *_: None), walker.teacher(), world, ask=('words',))
    assert set(student_tables(found, walker.teacher(), world))=={'merges'}
    got = pd.read_csv(next(found.out.glob('students/*/merges.csv')))
    assert {'pruned','SLERP, t 0.5','linear, t 0.5'} < set(got.arm)

def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, whole, capsys):
    for kwargs,said in ((dict(ask=('everything',)), "no question 'everything'"), (dict(workers=2), 'folder or hub id'), (dict(workers=0), 'at least 1'), (dict(drop=6), 'from 1 to 5'),
                        (dict(data=[dict(prompt='a', completion='b')]), 'after the split'), (dict(data=None), '`also` and `rule`'), (dict(rates=()), '`rates` are numbers above 0'), (dict(rates=('x',)), '`rates`'),
                        (dict(drafts=(2, 0)), '`drafts`'), (dict(seeds=0), '`seeds`'), (dict(steps=0), '`steps`'), (dict(n=-1), '`n`')):
        with pytest.raises(ValueError, match=said): compared(tmp_path/'c', **kwargs)
        assert not (tmp_path/'c').exists()
    with pytest.raises(ValueError, match='steps is 1 there and 2 here'): compared(whole.out, steps=2)
    assert main(['study', '--preset', 'self-data-distillation', '--ask', 'everything', '--out', str(tmp_path/'d')])==2
    assert 'choose among headline' in capsys.readouterr().err and not (tmp_path/'d').exists()
