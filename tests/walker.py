"A whole small study, to be killed at a step and started again, alone or beside others"
import os, random, signal, sys
from pathlib import Path
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import families
import sdlab.core.store as store
from sdlab.core.answers import Task
from sdlab.core.model import LM
from sdlab.experiment.steps import step, tried
from sdlab.experiment.study import Running, study

def teacher(): return LM(families.tiny('Llama', max_position_embeddings=1024), families.tokenizer(chat=True), 'tiny')

def asked(n=60, seed=0):
    "Rows of one letter said twice"
    pick = random.Random(seed)
    return [dict(prompt=f'say {(c := pick.choice("abcdefgh"))}{i}', completion=f'{c}{c} #### {c}') for i in range(n)]

def task(seed, n=6): return {'letters': Task('letters', asked(n, seed), max_new_tokens=8)}

def arms(n=2, rule='auto', **how):
    front = [step('best', n=n), step('prune')]
    heal = step('tune', steps=1, batch_size=8, lr=tried(1e-3, 1e-4), **how)
    write = step('rewrite', rule=rule, max_new_tokens=8)
    return {'pruned': front, 'SFT': [*front, heal(learn='reference')], 'self-data': [*front, write, heal],
            'both': [step('merge', 'SFT', 'self-data', t=.4)]}

def walk(out, n=2, rule='auto', seed=1, questions=None, **running):
    return study(teacher(), asked(16), task(seed), arms(n, rule), out, questions=questions, validation=task(99, 4),
                 running=Running(**{'say': lambda s: None, 'pause': .1, **running}))

def die(out, k):
    "Killed when the k-th step of this process has written everything but its mark"
    finish, seen = store.finish, []
    def deadly(folder, **facts):
        if Path(folder).parent.name=='steps': seen.append(folder)          # a training finishes a folder of its own
        if len(seen)==k: os.kill(os.getpid(), signal.SIGKILL)
        finish(folder, **facts)
    store.finish = deadly
    walk(out)

def beside(out, log):
    "A walk that says which steps it took"
    finish = store.finish
    def noted(folder, **facts):
        if Path(folder).parent.name=='steps':
            with open(log, 'a') as f: f.write(f'{os.getpid()} {Path(folder).name}\n')
        finish(folder, **facts)
    store.finish = noted
    walk(out)
