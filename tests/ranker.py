"""The same tuning by one process or by several: torchrun ranker.py OUT [fsdp] [lora] [again]

FSDP needs nothing of a GPU but accelerate's permission: where it finds only CPUs it falls back to whole models in silence. `permitted`
gives that permission, so that what `tune` does with weights in parts is tested on two CPUs."""
import json, os, sys
from pathlib import Path
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import families
import torch
from sdlab.core.model import LM
import sdlab.heal.train as T
from sdlab.heal.train import Evaluation, Run, Weights
from sdlab.heal.tune import training_log, tune

ROWS = [dict(prompt=f'What is {i}?', completion=f'It is {i}.') for i in range(16)]

def permitted():
    "Let accelerate cut models into parts on CPUs"
    import accelerate.state as S
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP', FSDP_RESHARD_AFTER_FORWARD='true')
    was = S.AcceleratorState.__init__
    def init(self, *args, fsdp_plugin=None, **kwargs):
        was(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type==DistributedType.MULTI_CPU: self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin or FullyShardedDataParallelPlugin()
    S.AcceleratorState.__init__ = init

def tuned(world=1, out=None, lora=None, **how):
    "Losses and gradient norms, the weights after it, how many of them this process held"
    lm, held = LM(families.tiny('Llama'), families.tokenizer(), 'tiny'), []
    before, gathered = lm.fingerprint, T.gathered
    def noted(model):
        from torch.distributed.tensor import DTensor
        held.extend((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        return gathered(model)
    T.gathered = noted
    try: new = tune(lm, ROWS, epochs=1, batch_size=4//world, lr=1e-3, learn=Weights(lora=lora), run=Run(out=out, progress=False), **how)
    finally: T.gathered = gathered
    assert lm.fingerprint==before
    log = training_log(new)
    return dict(loss=log.loss.tolist(), norm=log.grad_norm.tolist(), tokens=log.tokens.tolist(), held=sum(held), all=new.n_params, fingerprint=new.fingerprint,
                weights=[round(p.double().sum().item(), 4) for p in new.model.parameters()], plain=all(type(p) is torch.nn.Parameter for p in new.model.parameters()))

if __name__=='__main__':
    out, flags = Path(sys.argv[1]), sys.argv[2:]
    if 'fsdp' in flags: permitted()
    got = tuned(int(os.environ['WORLD_SIZE']), None if 'fsdp' in flags else out/'run', 4 if 'lora' in flags else None, **(dict(gradient_checkpointing=True) if 'again' in flags else {}))
    if 'fsdp' in flags:
        try: tune(LM(families.tiny('Llama'), families.tokenizer(), 'tiny'), ROWS, run=Run(progress=False), evaluation=Evaluation(rows=ROWS))
        except ValueError as e: got['refused'] = str(e)
    (out/f"{os.environ['RANK']}.json").write_text(json.dumps(got))
