"""CKA of all pairs of layers in the time of two forward passes; and the estimator alone against torch_cka and ckatorch.

The two libraries are not requirements. `pip install --no-deps --target .bench torch-cka ckatorch` puts them beside the project;
where one is missing or gives no answer, its line says so."""
import importlib, sys, warnings
import torch
from common import ROOT, paired, random_llama, row
from sdlab.core.model import LM
from sdlab.measure.cka import centred_gram, cka, hsic

N, T, VOCAB = 256, 64, 2048

def tokenizer():
    "Words w0, w1, ...: one token each"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({'<pad>': 0, '<unk>': 1, **{f'w{i}': i for i in range(2, VOCAB)}}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', unk_token='<unk>')

def bare(lms, texts, size=32):
    "The two passes, on the same texts in batches of the same size"
    with torch.no_grad():
        for lm in lms:
            for i in range(0, len(texts), size):
                b = lm.tokenizer(texts[i:i+size], return_tensors='pt', return_token_type_ids=False)
                lm.model.base_model(**b.to(lm.device), use_cache=False)

def ours(x, y): return hsic(centred_gram(x), centred_gram(y), x.shape[1]).cka

class Stored(torch.nn.Module):
    "A 'model' whose layers are activations that exist already: costs nothing to run"
    def __init__(self, hs):
        super().__init__()
        self.hs, self.layers = hs, torch.nn.ModuleList(torch.nn.Identity() for _ in hs)
    def forward(self, x):
        for h, f in zip(self.hs, self.layers): x = f(h)
        return x

def library(name):
    "A module from `.bench` or from the environment, or the sentence why there is none"
    if str(ROOT/'.bench') not in sys.path: sys.path.append(str(ROOT/'.bench'))
    try: return importlib.import_module(name)
    except Exception as e: return f'could not be imported: {type(e).__name__}: {e}'

def torch_cka(lib, x, y):
    a, b = Stored(x), Stored(y)
    names = [f'layers.{i}' for i in range(len(x))]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(x.shape[1], 1), torch.zeros(x.shape[1])), batch_size=x.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = lib.CKA(a, b, model1_layers=names, model2_layers=names, device='cpu')
        c.compare(loader)
    return c.export()['CKA']

def ckatorch(lib, x, y):                                     # one group of texts is one batch for it
    from ckatorch.core import cka_batch
    return torch.stack([torch.stack([cka_batch(a[None], b[None]) for b in y]) for a in x])

def against(name, how, x, y):
    "One line: their time for the same answer, or why there is none"
    what, lib = f'the estimator alone, against {name}', library(name)
    if isinstance(lib, str): return row(what, paired(lambda: ours(x, y), lambda: None, n=3).ours, None, how=f'{name} {lib}')
    try:
        with torch.no_grad(): theirs = torch.as_tensor(how(lib, x, y)).double()
    except Exception as e: return row(what, paired(lambda: ours(x, y), lambda: None, n=3).ours, None, how=f'{name} gives no answer: {type(e).__name__}: {str(e)[:150]}')
    with torch.no_grad(): t = paired(lambda: how(lib, x, y), lambda: ours(x, y), n=2, warmup=0)
    gap = (theirs-ours(x, y)).abs().max()
    return row(what, t.against, t.ours, limit='>= 10', ratio=t.ratio, how=f'{len(x)} x {len(y)} layers, {x.shape[1]} texts, width {x.shape[2]}; ratio is theirs/ours; largest difference {gap:.1e}')

def rows():
    lms = [LM(random_llama(seed=s), tokenizer(), f'random {s}') for s in (0, 1)]
    g = torch.Generator().manual_seed(0)
    texts = [' '.join(f'w{i}' for i in torch.randint(2, VOCAB, (T,), generator=g)) for _ in range(N)]
    t = paired(lambda: cka(*lms, texts), lambda: bare(lms, texts), n=5)
    x, y = (torch.randn(lms[0].n+1, N, lms[0].d, generator=g) for _ in range(2))
    e = paired(lambda: ours(x, y), lambda: bare(lms[:1], texts[:32]), n=5)
    return [
        row('CKA of all pairs of layers, against two bare passes', t.ours, t.against, limit='<= 1.15', ratio=t.ratio,
            how=f'two random Llamas, {lms[0].n} blocks, {lms[0].n_params/1e6:.0f} M parameters, {N} texts of {T} tokens in one group; texts tokenised on both sides; ratios {t.low:.3f} to {t.high:.3f}'),
        row('the estimator alone, 25 x 25 layers', e.ours, None, how=f'{N} texts, width {lms[0].d}, float32'),
        against('torch_cka', torch_cka, x, y), against('ckatorch', ckatorch, x, y)]
