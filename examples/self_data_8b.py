"""Self-data distillation of a real 8B model, on one GPU or several: spans, cut, data, students, verdicts (arXiv 2410.09982).

    python examples/self_data_8b.py --teacher meta-llama/Llama-3.1-8B-Instruct --data gsm8k.jsonl --rule final --drop 6 --out runs/8b --dry-run
    python examples/self_data_8b.py ...                                                           one GPU
    torchrun --nproc_per_node 4 examples/self_data_8b.py ... --lora 16                            several, each with the whole student
    accelerate launch --config_file examples/fsdp.yaml examples/self_data_8b.py ...               several, all weights tuned, cut into parts
    python examples/self_data_8b.py ... --four-bit --lora 16                                      one card of 24 GB: QLoRA

`--dry-run` says what it takes and loads no weights. Every stage has a folder in --out and is not done twice: after a crash, the same
command goes on, whether with as many processes as before or not. Processes share the texts of the measurement, the rows of the
rewriting (a ledger each), the steps of the tuning and the arms of the judging; what one must do alone (cut, write), the first does."""
import argparse, gc, json, os
from datetime import timedelta
from pathlib import Path

ARMS = {'SFT': 'reference', 'self-data': 'completion'} # arm -> column that is learned

def asked(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = p.add_argument
    add('--teacher', required=True, help='hub id or folder')
    add('--data', required=True, help='rows: .json, .jsonl, .csv, .parquet or a hub id')
    add('--out', required=True, type=Path)
    add('--drop', type=int, default=6)
    add('--rule', default='auto', help='how answers are compared: final, integer, choice, exact, auto')
    add('--limit', type=int, default=0, help='use so many rows at most')
    add('--epochs', type=float, default=2.)
    add('--lr', type=float, default=1e-4)
    add('--batch-size', type=int, default=4, help='rows per step and process')
    add('--lora', type=int, default=0, help='rank of adapters; 0: all weights')
    add('--four-bit', action='store_true', help='load in four bits (needs bitsandbytes, and --lora)')
    add('--max-new-tokens', type=int, default=256)
    add('--items', type=int, default=200, help='items to judge on')
    add('--dtype', default='bfloat16')
    add('--cpu', action='store_true', help='no GPU: for a toy')
    add('--card', type=float, default=80., help='for --dry-run: GiB of a card')
    add('--cards', type=int, default=1, help='for --dry-run: how many')
    add('--dry-run', action='store_true')
    a = p.parse_args(argv)
    if a.four_bit and not a.lora: p.error('--four-bit needs --lora: whole weights of four bits cannot be tuned')
    return a

def written(path, text): # whole or not there
    tmp = path.with_name(path.name+'.part')
    tmp.write_text(text)
    os.replace(tmp, path)

def stage(state, folder, run, alone=False):
    "`run(folder)` once, by all processes or by the first alone; nobody goes on before it is done"
    if (folder/'done').exists(): return folder
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        print(folder.name, '...', flush=True)
    state.wait_for_everyone()
    if state.is_main_process or not alone: run(folder)
    state.wait_for_everyone()
    if state.is_main_process: (folder/'done').touch()
    state.wait_for_everyone()
    return folder

def freed():
    import torch
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()

def study(a):
    import pandas as pd
    from accelerate import PartialState
    from sdlab.compress.shards import prune_checkpoint
    from sdlab.core.answers import Task
    from sdlab.core.data import batches, rows, split
    from sdlab.core.model import LM, load
    from sdlab.core.plan import Plan
    from sdlab.heal.rewrite import rewrite
    from sdlab.judge.recovery import Recovery
    from sdlab.judge.score import score
    from sdlab.measure.importance import distances
    from sdlab.heal.train import Run, Weights
    from sdlab.heal.tune import tune
    state = PartialState(cpu=a.cpu, timeout=timedelta(days=1))                 # a barrier may wait for hours
    rank, world, main = state.process_index, state.num_processes, state.is_main_process
    fsdp = world>1 and os.environ.get('ACCELERATE_USE_FSDP', '').lower()=='true' and not a.cpu
    few = {}
    if a.four_bit:
        import torch
        from transformers import BitsAndBytesConfig
        few = dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=getattr(torch, a.dtype)))
    here = dict(dtype=a.dtype, device_map={'': state.device}, **few)
    teacher = a.teacher
    if not Path(teacher).is_dir():
        from huggingface_hub import snapshot_download
        with state.main_process_first(): teacher = snapshot_download(teacher, allow_patterns=['*.safetensors', '*.json', 'tokenizer*'])
    sides = split(rows(a.data, limit=a.limit or None), calibration=.2, train=.5, evaluation=.3)
    rule = None if a.rule=='none' else a.rule
    task = Task('in domain', sides['evaluation'], rule=rule, max_new_tokens=a.max_new_tokens).sample(a.items)
    held = {}
    def whole():                                                               # the teacher, loaded when it is first needed
        if 'lm' not in held: held['lm'] = load(teacher, **here)
        return held['lm']

    def spans(f):
        found = distances(whole(), batches(whole(), sides['calibration'], size=8))
        if main:
            found.frame().to_csv(f/'spans.csv', index=False)
            written(f/'plan.json', found.best(a.drop).to_json())
    stage(state, a.out/'1 spans', spans)
    plan = Plan.from_json((a.out/'1 spans'/'plan.json').read_text())
    cut = stage(state, a.out/'2 cut', lambda f: prune_checkpoint(teacher, plan, f/'model'), alone=True)/'model'

    def data(f):
        ds = rewrite(whole(), sides['train'], rule=rule, decoding=a.max_new_tokens, out=f/'ledger', progress=main)
        if main: ds.to_json(f/'data.jsonl')
    stage(state, a.out/'3 data', data)
    learned = rows(a.out/'3 data'/'data.jsonl')
    held.clear(); freed()

    def heal(f, on):
        student = load(cut, dtype=a.dtype) if fsdp else load(cut, **here)      # under FSDP from the CPU's memory, each process its part
        learn, run = Weights(lora=a.lora or None, merge=not a.four_bit), Run(f/'run', progress=main)
        more = dict(use_cpu=False) if fsdp else {}
        tune(student, learned, on=on, epochs=a.epochs, lr=a.lr, batch_size=a.batch_size, learn=learn, run=run, **more)
    for k, on in ARMS.items(): stage(state, a.out/f'4 {k}', lambda f: heal(f, on)); freed()

    def model(k):
        if k=='teacher': return load(teacher, **here)
        if k=='pruned': return load(cut, **here)
        made = a.out/f'4 {k}'/'run'/'model'
        if not a.four_bit: return load(made, **here)
        from peft import PeftModel
        base = load(cut, **here)
        return LM(PeftModel.from_pretrained(base.model, made).eval(), base.tokenizer, k)
    def judge(f):
        for k in ['teacher', 'pruned', *ARMS][rank::world]:
            if (f/f'{k}.parquet').exists(): continue
            items = score(model(k), task)
            for i, (c, v) in enumerate(dict(task=task.name, metric=task.metric, arm=k).items()): items.insert(i, c, v)
            items.to_parquet(f/f'{k}.part'); os.replace(f/f'{k}.part', f/f'{k}.parquet'); freed()
    verdicts = stage(state, a.out/'5 verdicts', judge)
    if main:
        table = Recovery(pd.concat([pd.read_parquet(verdicts/f'{k}.parquet') for k in ('teacher', 'pruned', *ARMS)], ignore_index=True))
        table.frame().to_csv(a.out/'recovery.csv', index=False)
        print(table, flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()

def main(argv=None):
    a = asked(argv)
    if not a.dry_run: return study(a)
    from sdlab.core.data import rows, split
    from sdlab.measure.scale import Cards, dry_run
    train = split(rows(a.data, limit=a.limit or None), calibration=.2, train=.5, evaluation=.3)['train']
    print(dry_run(a.teacher, a.drop, rows=train, epochs=a.epochs, batch_size=a.batch_size, lora=a.lora or 16, arms=len(ARMS), items=a.items, dtype=a.dtype, cards=Cards(a.cards, memory=a.card)))

if __name__=='__main__': main()
