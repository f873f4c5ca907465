"Known faults: text of others that a page, a picture, a table or a terminal obeys, output that a terminal cannot show"
import csv, io, json, sys
import pandas as pd, pytest
from faults import command, fault, find, how, outcome, small_lm
from sdlab.all import LM, Plan, Task, cka, cost, load, prune, rewrite

Recovery = find('judge.recovery:Recovery')
Template, summary = (find(f'heal.rewrite:{k}', f'distill.rewrite:{k}') for k in ('Template', 'summary'))
TAG, PICTURE = '<svg onload=alert(1)>', '![seen](http://127.0.0.1:9/seen.gif)'
TEXTS = ['ab', 'cde', 'fghi', 'jk', 'lmn', 'opqr']
ROWS = [dict(prompt=a, completion=b) for a, b in zip('abcd', 'efgh')]
LETTERS = 'What others wrote is shown letter by letter, in every medium.'


def called(name): return LM(small_lm().model, small_lm().tokenizer, name)


def page_of(o): return o._repr_markdown_() if hasattr(o, '_repr_markdown_') else o._repr_html_()


TAGGED = {
    'map of two models': lambda: cka(called(TAG), small_lm(), TEXTS, group=6),
    'cost': lambda: cost(called(TAG)),
    'template': lambda: Template('{prompt}', f'```\n\n{TAG}'),
}


@fault(LETTERS)
@pytest.mark.parametrize('kind', TAGGED)
def test_tags_in_a_page(kind):
    "A name is no HTML"
    got = outcome(lambda: page_of(TAGGED[kind]()))
    if got.error is not None: raise got.error
    assert TAG not in got.value


PICTURED = {
    'model': lambda: page_of(called(PICTURE)),
    'plan': lambda: page_of(Plan(6, (2,), why=PICTURE)),
    'task': lambda: page_of(Task('quiz', [dict(prompt=PICTURE, completion='x')])),
}


@fault(LETTERS)
@pytest.mark.parametrize('kind', PICTURED)
def test_pictures_in_a_page(kind):
    "A name, a reason or a question loads nothing from the network"
    assert PICTURE not in PICTURED[kind]()


@fault(LETTERS)
def test_pictures_in_a_card(tmp_path):
    "The card of a model loads nothing from the network either"
    folder = prune(called(PICTURE), Plan(6, (2,), why=PICTURE)).save(tmp_path/'lm')
    card = (folder/'README.md').read_text(encoding='utf-8')
    assert PICTURE not in card.split('## Provenance')[0]


@fault(LETTERS)
def test_untrusted_checkpoint_in_a_page(tmp_path):
    "What a checkpoint of others calls its teacher is no HTML"
    folder = prune(small_lm(), Plan(6, (2,))).save(tmp_path/'lm')
    config = json.loads((folder/'config.json').read_text())
    config['sdlab']['teacher'] = TAG
    (folder/'config.json').write_text(json.dumps(config))
    assert TAG not in page_of(cost(prune(load(folder), Plan(5, (0,)))))


# Pictures -----------------------------------------------------------------------------------------------------------
FORMULA = 'x $y_{$'


def recovery(task='quiz', arm='SFT'):
    "A table of eight items, with these names in it"
    one = dict(task=task, metric='exact', item=range(8), score=[0., 1.]*4, reference='x')
    return Recovery(pd.concat([pd.DataFrame(dict(one, arm=o)) for o in ('teacher', arm)]), draws=20)


def rewritten():
    ds = rewrite(small_lm(), ROWS, **how(rewrite, max_new_tokens=2, progress=False))
    return ds.map(lambda o: dict(reason=FORMULA))


DRAWN = {
    'right answers': lambda: Task('maths', [dict(prompt='q', completion=f'#### {FORMULA}')]).plot(),
    'name of a task': lambda: Task(FORMULA, [dict(prompt='q', completion='#### 1')]).plot(),
    'recovery': lambda: recovery(task=FORMULA).plot(),
    'arms of a recovery': lambda: recovery(arm=FORMULA).plot(),
    'panels': lambda: recovery(task=FORMULA).panels()[0],
    'reasons': lambda: summary(rewritten()).plot(),
}


@fault('Names in pictures are drawn as they are, a $ included.')
@pytest.mark.parametrize('kind', DRAWN)
def test_formulas_in_pictures(kind):
    "A name with a $ ends no study in its last picture"
    import matplotlib.pyplot as plt
    got = outcome(lambda: DRAWN[kind]().figure.savefig(io.BytesIO()))
    plt.close('all')
    assert got.error is None, got


# Tables and terminals -----------------------------------------------------------------------------------------------
@fault('A cell of a table is no formula of a spreadsheet.')
@pytest.mark.parametrize('start', ['=', '@', '+'])
def test_formulas_in_tables(tmp_path, start):
    "An answer that begins as a formula is quoted"
    hostile = start+'HYPERLINK("http://127.0.0.1:9")'
    found = recovery(task=hostile)
    table = found.to_csv(tmp_path/'r.csv')
    cells = [o for p in tmp_path.glob('*.csv') for line in csv.reader(p.open()) for o in line]
    if not any('HYPERLINK' in o for o in cells): raise RuntimeError(f'{table} does not hold it')
    assert not any(o.startswith(start) for o in cells)


ESCAPES = {
    'model': lambda o: repr(called(o)),
    'plan': lambda o: str(Plan(6, (2,), why=o)),
    'recovery': lambda o: repr(recovery(arm=o)),
    'cost': lambda o: repr(cost(called(o))),
}


@fault('What is printed has no control characters of others in it.')
@pytest.mark.parametrize('kind', ESCAPES)
def test_escapes_in_a_terminal(kind):
    "A name cannot clear the screen"
    assert '\x1b' not in ESCAPES[kind]('\x1b[2J\x1b]0;owned\x07')


@fault('Output that a terminal cannot encode is replaced, and never fatal.')
@pytest.mark.parametrize('page', ['cp1252', 'ascii', 'cp437'])
def test_terminals_with_few_letters(tmp_path, monkeypatch, page):
    "A Windows code page or a plain pipe ends no command"
    lm = small_lm().save(tmp_path/'lm')
    (tmp_path/'p.json').write_text(Plan(6, (2,), why='— à peu près').to_json())
    out = io.TextIOWrapper(io.BytesIO(), encoding=page)
    monkeypatch.setattr(sys, 'stdout', out)
    got = outcome(command(), ['prune', str(lm), '--plan', str(tmp_path/'p.json'), '--out', str(tmp_path/'cut')])
    assert got.error is None and got.value==0, got
