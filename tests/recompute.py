"""A tenth of the paper's kept cells, chosen by a hash, computed again by today's library:  python tests/recompute.py [--out DIR] [--cells N] [--list]

The table beside the paper's notebook was computed by version 0.1. Here each chosen row of it is an arm of the packaged recipe at the rate
that was chosen then, so that a row costs its own training only. Shares must agree within three standard errors of what version 0.1 found."""
import argparse, hashlib, math, sys
from pathlib import Path
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT/'nbs'/'papers'/'self_data_distillation'/'cells.csv'
WORDS = {'SFT': (), 'self-data': ('write',), 'unselected': ('keep all',), 'free': ('write freely',), 'free, selected': ('choose freely',)}
METHODS = dict(tune='heal', distil='logits', on_policy='roll out')

def kept_cells():
    "One row per student of the table; those of one training or none, since a mean over five seeds costs five"
    table = pd.read_csv(KEPT)
    cells = table[table.runs==1].drop_duplicates(['question', 'arm'])
    same = ['blocks', 'method', 'words', 'source', 'voice', 'size', 'how', 'lr', 'steps']
    return table, cells.drop_duplicates(same)

def chosen(cells, share=.1):
    "Those whose names hash lowest: nobody chose them"
    rank = [hashlib.sha256(f'{r.question}/{r.arm}'.encode()).hexdigest() for r in cells.itertuples()]
    return cells.assign(rank=rank).sort_values('rank').head(math.ceil(share*len(cells)))

def arm_of(cell):
    "Its steps, by the names of the recipe, with the settings of then"
    from sdlab.experiment.steps import step
    from sdlab.experiment.recipes import read_step, recipe_page
    named = {k: read_step(k, v) for k,v in recipe_page('self-data-distillation')['steps'].items()}
    blocks = [] if pd.isna(cell.blocks) else [int(b) for b in str(cell.blocks).split()]
    arm = [step('sdlab.experiment.steps:drop', blocks, name='pick'), named['cut']] if blocks else []
    if cell.method=='none': return arm
    if cell.words=='raw text': first = [step('pocket', 'stories', int(cell['size']))]
    else: first = [step('pocket', cell.source, 800, int(cell.voice)), *(named[k] for k in WORDS[cell.words]), named['few'](n=int(cell['size']))]
    how = dict(o.split('=', 1) for o in cell.how.split('; ')) if isinstance(cell.how, str) else {}
    how = {k: (v if k=='divergence' else eval(v, {})) for k,v in how.items()}
    heal = named[METHODS[cell.method]](lr=cell.lr, steps=int(cell.steps), **how)
    return [*first, *arm, heal(learn='reference') if cell.words=='SFT' else heal]

def compare(table, cell, found, arm):
    "Rows of both tables beside each other"
    was = table[(table.question==cell.question)&(table.arm==cell.arm)].set_index('task')
    now = found.recovery().frame()
    now = now[now.arm==arm].set_index('task')
    both = was[['metric', 'score', 'n']].join(now.score, rsuffix='_now')
    def agrees(r):
        if r.metric=='perplexity': return abs(math.log(r.score_now/r.score))<.05
        return abs(r.score_now-r.score)<=3*math.sqrt(max(r.score*(1-r.score), .02)/r.n)
    return both.assign(question=cell.question, arm=cell.arm, agrees=both.apply(agrees, axis=1))

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='runs/recompute')
    parser.add_argument('--cells', type=int, default=0, help='only so many, the cheapest (default: all that were chosen)')
    parser.add_argument('--list', action='store_true')
    args = parser.parse_args()
    table, cells = kept_cells()
    todo = chosen(cells)
    if args.cells: todo = todo.sort_values('wall').head(args.cells)
    if args.list: return print(todo[['question', 'arm', 'method', 'words', 'steps', 'wall']].to_string(index=False))
    from sdlab.core.pocket import pocket_rows, pocket_tasks
    from sdlab.experiment.study import study
    arms = {f'{c.question}: {c.arm}': arm_of(c) for _,c in todo.iterrows()}
    found = study(None, pocket_rows('sums', 8), pocket_tasks(100, sums=200), arms, args.out)
    told = pd.concat([compare(table, c, found, f'{c.question}: {c.arm}') for _,c in todo.iterrows()]).reset_index()
    print(told.round(4).to_string(index=False))
    sys.exit(0 if told[told.task!='average'].agrees.all() else 1)

if __name__=='__main__': main()
