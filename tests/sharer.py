"The same measurements by one process or by several: torchrun sharer.py OUT; then once more with a text that is at fault"
import json, os, sys
from pathlib import Path
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import torch
import families
from sdlab.core.data import batches
from sdlab.core.model import LM
from sdlab.measure.cka import cka
from sdlab.measure.importance import Pairs, BlockInfluence, pair_angles
from sdlab.measure.scan import Likelihood, DataFingerprint, scan

TEXTS = ['Ann has 12 pens', 'the', 'One day a small dog', 'far away', 'x+y', 'who ran to the river?', 'a b', 'zebra']

def measured(fault=False):
    "Everything as lists; `read` counts the texts that this process put through the model"
    lm, other = (LM(families.tiny('Llama', seed=s), families.tokenizer(), 'tiny') for s in (0, 1))
    read = []
    lm.model.register_forward_pre_hook(lambda m, a, k: read.append(len(k['input_ids'])), with_kwargs=True)
    bs = batches(lm, TEXTS, size=1)
    if fault: bs[5]['attention_mask'].zero_()
    angles, steps, seen, lik = scan(lm, bs, Pairs(pair_angles), BlockInfluence(), DataFingerprint(), Likelihood())
    here = sum(read)
    return dict(read=here, angles=angles.mean.tolist(), error=angles.stderr.tolist(), steps=steps.mean.tolist(), nll=lik['nll'].tolist(), data=seen['data'],
                cka=cka(lm, other, TEXTS, batch_size=2).matrix.nan_to_num(-1).tolist(),
                tokens=cka(lm, other, TEXTS, batch_size=2, group=4, examples='tokens', tokens_per_text=3, kernel='rbf').matrix.nan_to_num(-1).tolist())

if __name__=='__main__':
    torch.distributed.init_process_group('gloo')
    got = [measured()]
    try: got.append(measured(fault=True))
    except ValueError as e: got.append(str(e))
    (Path(sys.argv[1])/f'{torch.distributed.get_rank()}.json').write_text(json.dumps(got))
    torch.distributed.destroy_process_group()
