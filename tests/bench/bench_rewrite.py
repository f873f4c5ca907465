"How much faster `rewrite` writes than row by row, and than fixed batches in the order of the rows (tokens per second, greedy, the pocket teacher)"
import random, statistics, time
from common import row

def _asked(n, seed=0):
    "Rows of four tasks in three voices, mixed: short and long answers side by side, as in a real set"
    from sdlab.core.pocket import pocket_rows
    some = [dict(prompt=r['prompt'], completion=r['completion']) for t in ('sums', 'facts', 'choice', 'order') for v in (1, 2, 3) for r in pocket_rows(t, n//12+1, voice=v, seed=seed+v)]
    random.Random(seed).shuffle(some)
    return list({r['prompt']:r for r in some}.values())[:n]

def _usual(lm, asks, size, n):
    "The usual way: the model's own `generate` on the rows as they come, `size` at a time; ids of the answers"
    import torch
    from sdlab.core.data import collate, prompt_ids
    out = []
    for i in range(0, len(asks), size):
        b = collate(lm.tokenizer, [prompt_ids(lm.tokenizer, a) for a in asks[i:i+size]])
        with torch.inference_mode():
            got = lm.model.generate(input_ids=b['input_ids'], attention_mask=b['attention_mask'], max_new_tokens=n, do_sample=False, eos_token_id=sorted(lm.stops), pad_token_id=lm.tokenizer.pad_token_id)
        for o in got[:, b['input_ids'].shape[1]:].tolist(): out.append(o[:next((j for j,t in enumerate(o) if t in lm.stops), len(o))])
    return out

def _speed(f, tokens):
    "Tokens per second of `f()`, whose answers `tokens` counts"
    t = time.perf_counter()
    out = f()
    return tokens(out)/(time.perf_counter()-t)

def rows(n=768, single=64, size=64, new=96, turns=3):
    from sdlab.core.data import completion_ids
    from sdlab.core.model import load
    from sdlab.distill.rewrite import _template, rewrite
    lm, some = load(), _asked(n)
    tpl = _template(None, lm, False)
    asks = [tpl.ask(r['prompt'], r['completion']) for r in some]
    written = lambda ds: sum(len(completion_ids(lm.tokenizer, t, end=False)) for t in ds['written'])
    ids = lambda out: sum(map(len, out))
    ours = lambda: rewrite(lm, some, batch_size=size, max_new_tokens=new, progress=False)
    fixed = lambda: _usual(lm, asks, size, new)
    one = lambda: _usual(lm, asks[:single], 1, new)
    _usual(lm, asks[:size], size, new)                                           # warm
    speeds = [(_speed(ours, written), _speed(fixed, ids), _speed(one, ids)) for _ in range(turns)]
    a, b, c = (statistics.median(o) for o in zip(*speeds))
    how = f'{n} rows of four pocket tasks in three voices, at most {new} tokens, median of {turns} turns'
    return [row('rewrite, row by row', a, c, unit='tokens/s', limit='>= 15', how=f"against the model's own generate on one row at a time (first {single} rows); {how}", ratio=statistics.median(x/z for x,_,z in speeds)),
            row(f'rewrite, fixed batches of {size}', a, b, unit='tokens/s', limit='>= 1.3', how=f"against the model's own generate on the same batch size, rows as they come; {how}", ratio=statistics.median(x/y for x,y,_ in speeds))]
