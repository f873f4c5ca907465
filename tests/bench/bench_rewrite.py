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

def _read(lm, asks, out, size):
    "The least that must be computed: one forward pass over all prompts and answers, sorted by length, without logits"
    import torch
    from sdlab.core.data import collate, completion_ids, prompt_ids
    ids = sorted((prompt_ids(lm.tokenizer, a)+completion_ids(lm.tokenizer, t) for a, t in zip(asks, out)), key=len)
    with torch.inference_mode():
        for i in range(0, len(ids), size): lm.model.base_model(**collate(lm.tokenizer, ids[i:i+size]), use_cache=False)
    return out

def _compare(lm, some, what, single, size, new, turns):
    from sdlab.core.data import completion_ids
    from sdlab.core.generate import Decoding
    from sdlab.heal.rewrite import rewrite, template_of
    tpl = template_of(lm.tokenizer.init_kwargs.get('sdlab_rewrite') or lm.model.generation_config.sdlab_rewrite)
    asks = [tpl.ask(r['prompt'], r['completion']) for r in some]
    count = lambda texts: sum(len(completion_ids(lm.tokenizer, t, end=False)) for t in texts)
    written = lambda ds: count(ds['written'])
    ids = lambda out: sum(map(len, out))
    ours = lambda: rewrite(lm, some, decoding=Decoding(new, batch_size=size), progress=False)
    fixed = lambda: _usual(lm, asks, size, new)
    one = lambda: _usual(lm, asks[:single], 1, new)
    texts = ours()['written']                                                    # warm, too
    read = lambda: _read(lm, asks, texts, size)
    speeds = [(_speed(ours, written), _speed(one, ids), _speed(fixed, ids), _speed(read, count)) for _ in range(turns)]
    us, *them = (statistics.median(o) for o in zip(*speeds))
    ratios = [statistics.median(s[0]/s[k] for s in speeds) for k in (1, 2, 3)]
    how = f'{len(some)} rows of {what}, {size} at once, at most {new} tokens, {written(ours())/len(some):.0f} on average; median of {turns} turns'
    return [row(f'rewrite, {what}, row by row', us, them[0], unit='tokens/s', limit='>= 15', how=f"against the model's own generate on one row at a time (first {single} rows); {how}", ratio=ratios[0]),
            row(f'rewrite, {what}, fixed batches', us, them[1], unit='tokens/s', limit='>= 1.3', how=f"against the model's own generate on as many rows at once, as they come; {how}", ratio=ratios[1]),
            row(f'rewrite, {what}, against what no writer can beat', us, them[2], unit='tokens/s', how=f'one forward pass over the prompts and the finished answers; {how}', ratio=ratios[2])]

def rows(n=768, single=48, size=128, new=96, turns=3):
    from sdlab.core.model import load
    from sdlab.core.pocket import pocket_rows
    lm = load()
    return [*_compare(lm, _asked(n), 'four tasks, mixed', single, size, new, turns),
            *_compare(lm, pocket_rows('sums', n//2, voice=3), "the demo's word problems", single, size, new, turns)]
