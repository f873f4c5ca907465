"""A random-weight model of the 8B shape on one GPU: peak memory, all spans against a bare pass, rewriting and tuning in tokens per second, and that the saved cut reloads.

    python tests/bench/run.py gpu              where there is a GPU; without one it says so and measures nothing
    python tests/bench/bench_gpu.py --toy      the same code at toy size on a CPU: a smoke test, its figures mean nothing"""
import gc, sys, tempfile
from pathlib import Path
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
from common import paired, row

FULL = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False)
TOY = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=600, max_position_embeddings=512, tie_word_embeddings=False)

def numbered(vocab):
    "A tokenizer of numbered words"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '<bos>', '<eos>', '<unk>']+[f'w{i}' for i in range(vocab-4)])}, unk_token='<unk>'))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token='<pad>', bos_token='<bos>', eos_token='<eos>', unk_token='<unk>')

def random_lm(shape, device, dtype, seed=0):
    "An LM of this shape, its weights drawn where they are to be"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from sdlab.core.model import LM
    torch.manual_seed(seed)
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device): model = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    finally: torch.set_default_dtype(was)
    model.config.dtype = dtype
    return LM(model.eval(), numbered(shape['vocab_size']), 'random')

class Peak:
    "Highest bytes on the device inside; nothing on a CPU"
    def __init__(self, device): self.gpu, self.bytes = device!='cpu', None
    def __enter__(self):
        import torch
        gc.collect()
        if self.gpu: torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        return self
    def __exit__(self, *_):
        import torch
        if self.gpu: self.bytes = torch.cuda.max_memory_allocated()

def rows(toy=False):
    import random, time, torch
    from sdlab.compress.prune import prune
    from sdlab.core.data import batches
    from sdlab.core.model import load
    from sdlab.core.plan import Plan
    from sdlab.core.generate import Decoding
    from sdlab.heal.rewrite import rewrite
    from sdlab.heal.train import Run, Weights
    from sdlab.measure.scale import dry_run
    from sdlab.measure.importance import distances
    from sdlab.measure.scan import forward
    from sdlab.heal.tune import training_log, tune
    if not toy and not torch.cuda.is_available(): raise SystemExit('bench_gpu measures a GPU, and there is none here; --toy runs its code on the CPU.')
    device, dtype, shape = ('cpu', torch.float32, TOY) if toy else ('cuda', torch.bfloat16, FULL)
    T, B, n = (16, 4, 8) if toy else (256, 4, 64)
    lm, pick, out = random_lm(shape, device, dtype), random.Random(0), []
    sync = torch.cuda.synchronize if device=='cuda' else None
    say = lambda k: ' '.join(f'w{pick.randrange(shape["vocab_size"]-4)}' for _ in range(k))
    data, drop = [dict(prompt=say(T), completion=say(T)) for _ in range(n)], Plan(lm.n, range(lm.n-lm.n//5-1, lm.n-1))
    said = dry_run(lm, drop, rows=n, prompt=T, answer=T, batch_size=B, calibration=n, answer_batch=n, arms=1, epochs=1)
    def memory(what, stage, peak, beside=None):
        "Against what the dry run says, and what else is on the card"
        other = beside.model.get_memory_footprint() if beside else 0
        return row(f'peak memory, {what}', peak.bytes/2**30, (said[stage].peak+other)/2**30, unit='GiB', limit='' if toy else '<= 1.10', how=f'dry_run{", and the model beside it" if beside else ""}') if peak.bytes else None
    bs = batches(lm, [dict(text=say(2*T)) for _ in range(n)], size=B)
    with torch.no_grad(), Peak(device) as peak: p = paired(lambda: distances(lm, bs), lambda: [forward(lm, b) for b in bs], n=3, sync=sync)
    out += [row('all spans', p.ours, p.against, limit='' if toy else '<= 1.10', ratio=p.ratio, how=f'a bare pass over the same {n} texts of {2*T} tokens'), memory('all spans', 'measure', peak)]
    with Peak(device) as peak, tempfile.TemporaryDirectory() as tmp:
        cut = prune(lm, drop)
        back = load(cut.save(tmp), dtype=dtype, device_map=device)
        ids = torch.arange(4, 20, device=device)[None]
        with torch.no_grad(): same = torch.equal(cut.model(ids).logits, back.model(ids).logits)
        out.append(row('saved cut reloads to the same logits', float(same), None, unit='1: yes', limit='>= 1', how=f'{lm.n} to {cut.n} blocks'))
        del back
    def clocked(f):
        if sync: sync()
        t = time.perf_counter(); got = f()
        if sync: sync()
        return got, time.perf_counter()-t
    with Peak(device) as peak: written, s = clocked(lambda: rewrite(lm, data, rule=None, template='{prompt}', decoding=Decoding(T, batch_size=n), progress=False))
    tokens = sum(len(lm.tokenizer(t).input_ids) for t in written['written'])
    out += [row('rewriting', tokens/s, None, unit='tokens/s', how=f'{n} rows at once, {T} tokens each, random weights'), memory('rewriting', 'rewrite', peak, cut)]
    for what, stage, how in (('adapters of rank 16', 'tune adapters (LoRA)', dict(learn=Weights(lora=16, merge=False))), ('all weights', 'tune all weights', {})):
        with Peak(device) as peak: healed, s = clocked(lambda: tune(cut, data, epochs=1, batch_size=B, run=Run(progress=False), **how))
        spent = healed.provenance['steps'][-1]
        out += [row(f'tuning, {what}', spent['tokens']/spent['seconds'], None, unit='tokens/s', how=f'{B} rows of {2*T} tokens a step; the teacher is on the card, too'), memory(f'tuning, {what}', stage, peak, lm)]
        del healed
    return [o for o in out if o]

if __name__=='__main__':
    for o in rows('--toy' in sys.argv): print(o)
