"""Tuning on a model of the pocket teacher's size against a bare loop on the very same batches, with the very same optimiser.

Both sides see the same batches, padded by the same collator, in the same order, take AdamW steps with clipping and a cosine schedule, and leave out the set-up
(making the trainer; making the optimiser). The bare loop has no progress, no log, no checkpoints; `tune` has what it has by default, except the bar.
`tune` leaves out masks that were proved to do nothing; the loop passes what the collator gives it. TRL's trainer left to itself is reported beside."""
import copy, random, time
from common import paired, row, random_llama

ROWS, BATCH, LR = 256, 16, 2e-4

def pocket_like(seed=0):
    "12 blocks of width 128 and a vocabulary of 768 numbered words (2.6 M parameters)"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from sdlab.core.model import LM
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '<bos>', '<eos>', '<unk>']+[f'w{i}' for i in range(764)])}, unk_token='<unk>'))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, pad_token='<pad>', bos_token='<bos>', eos_token='<eos>', unk_token='<unk>')
    model = random_llama(n=12, d=128, vocab=768, seed=seed, intermediate_size=344, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LM(model, tok, 'pocket-like')

def made_up(n=ROWS, seed=0):
    "Rows of about 100 tokens, half of them answer"
    pick = random.Random(seed)
    say = lambda k: ' '.join(f'w{pick.randrange(764)}' for _ in range(k))
    return [dict(prompt=say(pick.randrange(35, 66)), completion=say(pick.randrange(35, 66))) for _ in range(n)]

def trainer(lm, ds, place, plain=False):
    "The trainer of `tune`, or TRL's own with TRL's defaults"
    from sdlab.heal.train import Evaluation, Run, Training, Weights
    from sdlab.heal.tune import Supervised
    how = dict(train_sampling_strategy='sequential')
    if not plain:
        method = Supervised(epochs=1, lr=LR, batch_size=BATCH, **how)
        return Training(method, lm, None, Weights(), Run(progress=False), Evaluation(), ds, None, {}).trainer(place)
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer
    args = SFTConfig(output_dir=str(place), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR, report_to='none', save_strategy='no',
                     bf16=False, use_cpu=lm.device.type == 'cpu', disable_tqdm=True, max_length=None, lr_scheduler_type='cosine', warmup_steps=.05, **how)
    new = SFTTrainer(model=copy.deepcopy(lm.model), args=args, train_dataset=ds, processing_class=copy.deepcopy(lm.tokenizer))
    new.remove_callback(PrinterCallback)
    return new

def batches(lm, ds):
    "The batches of that trainer, in its order, by its collator"
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    collate = DataCollatorForLanguageModeling(pad_token_id=lm.tokenizer.pad_token_id)
    return [collate([ds[j] for j in range(i, min(i+BATCH, len(ds)))]) for i in range(0, len(ds), BATCH)]

def bare(model, bs):
    "A training loop with nothing in it"
    import torch
    from transformers import get_cosine_schedule_with_warmup
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0., fused=True)
    plan = get_cosine_schedule_with_warmup(opt, 1, len(bs))
    for b in bs:
        model(**b, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); plan.step(); opt.zero_grad()

def rows(pairs=5):
    import tempfile
    from pathlib import Path
    import torch
    from sdlab.heal.trainer import quiet_training
    from sdlab.heal.tune import labelled
    lm = pocket_like()
    ds = labelled(lm, made_up())
    bs, out = batches(lm, ds), []
    tokens = sum(b['attention_mask'].sum().item() for b in bs)
    with tempfile.TemporaryDirectory() as tmp, quiet_training():
        def once(plain):
            "One run on a fresh copy; only the training is timed"
            new = trainer(lm, ds, Path(tmp), plain)
            t = time.perf_counter(); new.train(); return time.perf_counter()-t
        def loop():
            model = copy.deepcopy(lm.model)
            t = time.perf_counter(); bare(model, bs); return time.perf_counter()-t
        for what, plain, limit in (('tune, 12 blocks of width 128', False, '>= 0.95'), ("TRL's SFTTrainer by default, same model", True, '')):
            once(plain), loop()
            ts = [(once(plain), loop()) if i % 2 == 0 else (loop(), once(plain))[::-1] for i in range(pairs)]
            ours, theirs = (tokens/sorted(o)[len(o)//2] for o in zip(*ts))
            ratio = sorted(b/a for a, b in ts)[pairs//2]
            out.append(row(what, ours, theirs, unit='tokens/s', limit=limit, ratio=ratio,
                           how=f'bare loop on the same batches, {len(bs)} of {BATCH} rows, {torch.get_num_threads()} threads, {pairs} pairs, ratio is the median of pairs'))
    return out

if __name__ == '__main__':
    for o in rows(): print(o)
