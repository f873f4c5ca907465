"""A what-if on a model of 500 M parameters: how long it takes, and what it adds to the memory in use.

The limit is on the view. Beside it, the usual way: a deep copy of the model, cut."""
import torch
from common import paired, peak_memory, random_llama, row
from sdlab.core.units import without
from sdlab.core.model import LM
from sdlab.core.plan import Plan

N, D, VOCAB = 24, 1280, 32_000
PLAN = Plan(N, (9, 10, 11, 12))

def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'<pad>': 0, 'a': 1}, unk_token='a')), pad_token='<pad>', unk_token='a')

def teacher():
    "Half a billion parameters in bfloat16, written to, so that they are really in memory"
    from accelerate import init_empty_weights
    with init_empty_weights(include_buffers=False): model = random_llama(N, D, VOCAB)
    model = model.to(torch.bfloat16).to_empty(device='cpu')
    for p in [*model.parameters(), *model.buffers()]: p.data.fill_(.01)
    return LM(model, tokenizer(), 'half a billion')

def usual(lm):
    "A model of one's own, cut by hand"
    import copy
    model = copy.deepcopy(lm.model)
    for i in reversed(PLAN.drop): del model.model.layers[i]
    return model

SETUP = '''
import torch; torch.set_grad_enabled(False)
import bench_without as b
lm = b.teacher()
views = []
'''

def rows():
    lm = teacher()
    size = f'{lm.n_params/1e6:.0f} M parameters, {N} blocks, {len(PLAN.drop)} dropped'
    t = paired(lambda: without(lm, PLAN), lambda: usual(lm), n=5)
    weights = sum(p.numel()*p.element_size() for p in lm.model.parameters())
    del lm
    ours, theirs = (peak_memory(f'views.append({f})', SETUP)['extra'] for f in ('b.without(lm, b.PLAN)', 'b.usual(lm)'))
    return [row('without: a view', t.ours*1000, None, unit='ms', limit='< 100', how=f'{size}; a deep copy, cut by hand, takes {t.against*1000:.0f} ms'),
            row('without: extra memory, as a share of the weights', ours/weights, None, unit='', limit='< 0.01', how=f'{size}, {weights/2**20:.0f} MiB in bfloat16: {ours/2**20:.1f} MiB more; a deep copy adds {theirs/2**20:.0f} MiB')]

if __name__=='__main__':
    for r in rows(): print(r)
