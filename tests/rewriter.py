"A rewriting with a teacher that costs nothing, to be killed and started again: python rewriter.py OUT [seconds per row] [rows]"
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import sdlab.heal.rewrite as R
from sdlab.core.data import Text, fingerprint
from toys import toy

class Teacher: # all of an LM that rewrite needs when `generate` is replaced
    def __init__(self, name='a', chat=None, length=512):
        self.tokenizer, self.fingerprint, self.model, self.config = toy(chat=chat), name, None, None
        self.tokenizer.model_max_length = length

_said, _prompt_ids = {}, R.prompt_ids
def noted(tok, prompt):
    "`prompt_ids`, remembered, so that the ids which `generate` is given can be read"
    ids = _prompt_ids(tok, prompt)
    _said[tuple(ids)] = prompt
    return ids

def answers(say, wait=0, asked=None):
    "A `generate` that answers at once with `say(prompt)`, and notes what it was asked; goes with `noted`"
    def generate(lm, prompts, decoding, prefill='', on_batch=None):
        for i,p in enumerate(_said[tuple(o)] for o in prompts):
            if asked: asked(p)
            time.sleep(wait)
            t = say(p)
            on_batch([(i, t if isinstance(t, Text) else Text(t, 5))])
    return generate

def numbered(n): return [dict(prompt=f'What is {i}+1?', completion=f'It is #### {i+1}') for i in range(n)]
def right(p): return f'So #### {int(p.split()[2][:-3])+1}'

def main(out, wait, n):
    rank = os.environ.get('RANK', '0')
    log = open(Path(out).parent/f'asked-{rank}.txt', 'a', buffering=1)
    R.prompt_ids, R.generate = noted, answers(right, wait, lambda p: log.write(p+'\n'))
    ds = R.rewrite(Teacher(), numbered(n), template='{prompt} is {reference}', out=out, progress=False, patience=60)
    print(json.dumps(dict(rank=rank, rows=len(ds), fingerprint=fingerprint(ds), kept=ds['source'].count('teacher'))))

if __name__=='__main__': main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
