"""Exact loss and divergence without every span: by replay, against cutting each span and reading the texts again"""
import torch
from bench_importance import B, T, texts, tokenizer
from common import paired, random_llama, row
from sdlab.core.units import without
from sdlab.measure.exact import quality
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.measure.scan import Divergence, Likelihood, scan

def usual(lm, batches):
    "Every span: a view without it, read from the first token on"
    for n in range(1, lm.n):
        for l in range(lm.n+1-n): scan(without(lm, Plan(lm.n, range(l, l+n))), batches, Likelihood(), Divergence(lm))

def reads(lm, batches):
    "One pass of the whole model, head included: the unit. The limit of replay is L(L+1)/2 heads and L(L²-1)/6 blocks"
    with torch.no_grad():
        for b in batches: lm.model(**{k: b[k] for k in ('input_ids', 'attention_mask', 'position_ids')}, use_cache=False)

def rows():
    lm, bs = LM(random_llama(n=12, d=256), tokenizer()), texts(16)
    how = f'random Llama, {lm.n} blocks, {lm.n_params/1e6:.0f} M parameters, vocabulary {lm.vocab}, {len(bs)} batches of {B} x {T} tokens, all {lm.n*(lm.n+1)//2-1} spans'
    t = paired(lambda: quality(lm, bs), lambda: usual(lm, bs), n=3)
    one = paired(lambda: quality(lm, bs), lambda: reads(lm, bs), n=3)
    return [row('loss and divergence without every span, against a cut and a pass for each', t.ours, t.against, ratio=t.ratio, how=how),
            row('the same, in passes of the whole model', one.ours, one.against, ratio=one.ratio, how=how)]
