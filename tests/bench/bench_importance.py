"""All spans of a model of 24 blocks in the time of one forward pass, whatever the number of texts.

Against: the same batches through the blocks and nothing else (no head, no hooks); and, beside it, the usual way,
which asks for all hidden states of all texts, stores them, and then goes through the sizes one after another."""
import statistics
import torch
from common import paired, peak_memory, random_llama, row
from sdlab.core.model import LM
from sdlab.measure.importance import Pairs, angular_distance, distances, importance, pair_angles, pair_updates
from sdlab.measure.scan import scan

B, T = 8, 128

def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'<pad>': 0, 'a': 1}, unk_token='a')), pad_token='<pad>', unk_token='a')

def texts(n, vocab=2048, length=T, seed=0): # Batches of B texts, full length
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, length, dtype=torch.long)
    return [dict(input_ids=torch.randint(0, vocab, (B, length), generator=g), attention_mask=mask, position_ids=(mask.cumsum(-1)-1)) for _ in range(n//B)]

def bare(lm, batches):
    "The blocks and nothing else"
    with torch.no_grad():
        for b in batches: lm.model.base_model(**{k: b[k].to(lm.device) for k in ('input_ids', 'attention_mask', 'position_ids')}, use_cache=False)

def usual(lm, batches):
    "All hidden states at the last token of all texts, then one size after another"
    with torch.no_grad():
        hs = [torch.stack(lm.model(**b, output_hidden_states=True, use_cache=False).hidden_states, 1) for b in batches]
    hs = torch.cat(hs).float()[:, :, -1]
    L = hs.shape[1]-1
    return [[angular_distance(hs[:, l], hs[:, l+n]).mean() for l in range(L+1-n)] for n in range(1, L+1)]

SETUP = f'''
import torch; torch.set_num_threads({torch.get_num_threads()})
import bench_importance as b
from common import random_llama
lm = b.LM(random_llama(), b.tokenizer())
b.bare(lm, b.texts(8)); b.distances(lm, b.texts(8))
one = lambda n: (b.texts(b.B, seed=i)[0] for i in range(n//b.B))
'''

def memory(code, n=3): # the allocator alone moves it by 3 % from one process to the next
    return statistics.median(peak_memory(code, SETUP)['peak'] for _ in range(n))

def rows():
    lm, bs = LM(random_llama(), tokenizer()), texts(16)
    how = f'random Llama, {lm.n} blocks, {lm.n_params/1e6:.0f} M parameters, {B} x {T} tokens, {len(bs)} batches'
    t = paired(lambda: distances(lm, bs), lambda: bare(lm, bs), n=7)
    everywhere = paired(lambda: distances(lm, bs, tokens='all'), lambda: bare(lm, bs), n=3)
    three = paired(lambda: importance(lm, bs), lambda: bare(lm, bs), n=3)
    old = paired(lambda: distances(lm, bs), lambda: usual(lm, bs), n=3)
    few, many, plain = (memory(c) for c in ('b.distances(lm, one(64))', 'b.distances(lm, one(512))', 'b.bare(lm, one(64))'))
    stored = [memory(f'b.usual(lm, list(one({n})))') for n in (16, 64)]
    return [
        row('all spans at the last token, against a bare pass', t.ours, t.against, limit='<= 1.10', how=f'{how}; ratios {t.low:.3f} to {t.high:.3f}', ratio=t.ratio),
        row('peak memory of that, against the bare pass', few/2**20, plain/2**20, unit='MB', limit='<= 1.05', how='64 texts, whole process, median of 3'),
        row('peak memory, 512 texts against 64', many/2**20, few/2**20, unit='MB', limit='<= 1.02', how='whole process, median of 3'),
        row('all spans over all tokens, against a bare pass', everywhere.ours, everywhere.against, how=how, ratio=everywhere.ratio),
        row('distances, influence and relative update at once, against a bare pass', three.ours, three.against, how=how, ratio=three.ratio),
        row('all spans at the last token, against hidden states stored, one size at a time', old.ours, old.against, how=how, ratio=old.ratio),
        row('peak memory of the usual way, 64 texts against 16', stored[1]/2**20, stored[0]/2**20, unit='MB', how='it stores all hidden states of all texts, whole process, median of 3'),
    ]
