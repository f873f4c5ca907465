"Recipes: what they may say, what they refuse, and that the paper's has every arm of the table that is kept"
import json, re
from pathlib import Path
import pandas as pd, pytest
import walker
from sdlab.experiment.cli import main
from sdlab.experiment.forecast import forecast
from sdlab.experiment.recipes import packaged_recipes, read_design, read_yaml, recipe, recipe_page, run_recipe
from sdlab.experiment.study import Running

PAGE = """
rows: {pocket: sums, n: 8}
tasks: {pocket: [sums], n: 4}
steps:
  pick: {best: {measure: angular, n: 2}}
  cut: {prune: {}}
  heal: {tune: {steps: 2, lr: 1e-4}}
arms: {pruned: [pick, cut], SFT: [pick, cut, {heal: {learn: reference}}]}
"""

def test_scalars_are_those_of_yaml_1_2():
    got = read_yaml('on: yes\noff: no\nlr: 1e-4\nx: 1.5E+3\nn: 010\nb: true\ny: y\nnone: null\nempty:\ntime: 12:30:00\ndate: 2024-01-01')
    assert got=={'on': 'yes', 'off': 'no', 'lr': 1e-4, 'x': 1500., 'n': 10, 'b': True, 'y': 'y', 'none': None, 'empty': None, 'time': '12:30:00', 'date': '2024-01-01'}
    assert read_yaml('a: &x [1, 2]\nb: *x')=={'a': [1, 2], 'b': [1, 2]}

@pytest.mark.parametrize('text, says', [
    ('a: 1\na: 2', "'a' is given twice"), ('a: {b: 1, b: 2}', "'b' is given twice"), ('a: !!python/object/apply:os.system [ls]', 'has no tags'), ('a: !mine 3', 'has no tags'), ('a: [1', 'not YAML'),
    (PAGE.replace('heal:', 'heel:', 1), "There is no step 'heal'"), (PAGE+'seds: 3', "did you mean 'seeds'"), (PAGE.replace('tune', 'tun'), "did you mean 'tune'"),
    (PAGE.replace('measure', 'mesure'), "did you mean 'measure'"), (PAGE.replace('steps: 2', 'stps: 2'), "'stps'"), (PAGE.replace('prune: {}', 'os:system: {}'), 'does not say what it gives'),
    (PAGE+'questions: {q: {compare: [SFTT]}}', "did you mean 'SFT'"), (PAGE+'questions: {q: {vary: {pik.n: [1]}}}', "did you mean 'pick'"), (PAGE+'questions: {q: {arms: [SFT]}}', "'arms'"),
    (PAGE+'seeds: 0', 'at least 1'), (PAGE.replace('pocket: [sums]', 'pocket: [sum]'), "did you mean 'sums'"), ('- a list', 'is a mapping'), (PAGE.replace('arms:', 'armes:'), "'armes'")])
def test_refusals(text, says):
    with pytest.raises(ValueError, match=re.escape(says)): forecast(read_design(read_yaml(text)))

def test_a_recipe_says_what_python_says():
    d = read_design(read_yaml(PAGE))
    assert d.arms['SFT'][-1].settings==dict(max_steps=2, lr=1e-4, on='reference') and d.rows.settings==dict(n=8)
    page = recipe_page('quick', ('pick.n=3', 'seeds=2', 'rows.n=20', 'heal.lr=1e-3'))
    d = read_design(page)
    assert (d.arms['pruned'][0].settings['n'], d.seeds, d.rows.settings['n'], d.arms['SFT'][-1].settings['lr'])==(3, 2, 20, 1e-3)
    with pytest.raises(ValueError, match="did you mean 'pick'"): recipe('quick', ('pik.n=3',))
    with pytest.raises(ValueError, match='did you mean'): recipe('quik')

def test_the_shell_lists_and_foresees(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['run', '--list'])==0
    said = capsys.readouterr().out
    assert all(k in said for k in packaged_recipes())
    assert main(['run', 'quick', '--dry-run', '--set', 'pick.n=4'])==0
    said = capsys.readouterr().out
    assert 'headline' in said and 'steps, 0 of them done' in said and not list(tmp_path.iterdir())
    assert main(['run', 'quick', '--ask', 'nothing'])==2 and 'There is no question' in capsys.readouterr().err

def test_rows_of_ones_own(tmp_path, capsys):
    "Judged where nothing was learned; a file is split by its questions"
    data = tmp_path/'rows.jsonl'
    data.write_text(''.join(json.dumps(r)+'\n' for r in walker.asked(80)))
    walker.teacher().save(tmp_path/'tiny')
    page = recipe_page('quick')|dict(teacher=str(tmp_path/'tiny'), rows=dict(file=str(data)), tasks=dict(n=4, max_new_tokens=4, rule='final'), texts=None)
    page['steps']['heal'] = {'tune': {'steps': 1, 'lr': 1e-3}}
    page['steps']['write'] = {'rewrite': {'max_new_tokens': 8}}
    found = run_recipe(read_design(page), tmp_path/'s', Running(('headline',), say=lambda s: None))
    assert set(found.arms())=={'teacher', 'pruned', 'SFT', 'self-data', 'both'}
    assert not set(found.data['prompt']) & set(found.tasks['in domain'].rows['prompt'])

def test_the_papers_recipe_has_what_the_kept_table_has(root):
    "Every cell of the table that version 0.1 computed is an arm of the recipe, by settings"
    said = forecast(recipe('self-data-distillation'))
    kept = pd.read_csv(root/'nbs'/'papers'/'self_data_distillation'/'cells.csv')
    arms = set(zip(said.arms.question, said.arms.arm))
    for q in ('headline', 'greedy', 'voices', 'sizes', 'depth', 'chosen', 'spans', 'words'):
        want = set(kept[kept.question==q].arm)-{'SFT', 'pruned', 'free, selected, facts'}
        assert not {a for a in want if (q, a) not in arms}, q
    assert said.steps.set_index('step').runs['texts']==1                       # measured once, whatever the seed
