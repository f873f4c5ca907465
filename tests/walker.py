"A whole small study, to be killed in a stage and started again"
import os, random, signal, sys
from pathlib import Path
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import families
import sdlab.experiment.study as S
from sdlab.core.model import LM

STAGES = ['0 tasks', '1 spans', '2 pruned', '3 data', '4 SFT', '4 self-data', '5 verdicts/teacher', '5 verdicts/SFT', '6 maps/pruned', '6 maps/self-data']

def teacher(): return LM(families.tiny('Llama', max_position_embeddings=1024), families.tokenizer(chat=True), 'tiny')

def asked(n=60, seed=0):
    "Rows of one letter said twice"
    pick = random.Random(seed)
    return [dict(prompt=f'say {(c := pick.choice("abcdefgh"))}{i}', completion=f'{c}{c} #### {c}') for i in range(n)]

def walk(out, **kwargs): return S.study(teacher(), asked(), 2, out, **{**dict(epochs=1., batch_size=8, max_new_tokens=12, controls=False), **kwargs})

def killed_at(out, stage):
    "Have this process killed when `stage` has written everything but its mark"
    write = S._write
    def deadly(path, value):
        if path==Path(out)/stage/'done.json': os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)
    S._write = deadly

def die(out, stage):
    killed_at(out, stage)
    walk(out)
