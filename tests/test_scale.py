"""Which function takes a model that is quantised, or whose weights lie elsewhere, and which says no in a sentence; what a dry run says of them.

Quantised models need bitsandbytes or torchao, which are not installed with the package: these tests run where they are (both work on a CPU). Offloading needs nothing."""
import json, warnings
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
import families
from sdlab.compress.prune import prune
from sdlab.core.units import without
from sdlab.measure.exact import ExactLoss, quality
from sdlab.core.answers import Task
from sdlab.core.data import batches, rows
from sdlab.core.model import LM, load
from sdlab.core.units import find_units
from sdlab.core.plan import Plan
from sdlab.heal.rewrite import rewrite
from sdlab.judge.score import score
from sdlab.measure.scale import dry_run
from sdlab.measure.cka import cka
from sdlab.measure.importance import distances, influence
from sdlab.heal.tune import training_log
from sdlab.heal.tune import tune as real_tune
from values import with_values

tune = with_values(real_tune)

PLAN, TEXTS = Plan(6, (2, 3)), ['Ann has 12 pens', 'the quick', 'One day a small dog', 'far away']
ROWS = [dict(prompt=f'What is {i}?', completion=f'It is {i}.') for i in range(8)]
DISK = {'model.embed_tokens': 'cpu', 'model.norm': 'cpu', 'model.rotary_emb': 'cpu', 'lm_head': 'cpu', **{f'model.layers.{i}': 'disk' if i in (1, 2, 4) else 'cpu' for i in range(6)}}

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return LM(families.tiny('Llama', hidden_size=64, intermediate_size=128), families.tokenizer(), 'tiny').save(tmp_path_factory.mktemp('whole')/'tiny')

@pytest.fixture(scope='module')
def plain(folder): return load(folder)

@pytest.fixture(scope='module', params=['nf4', 'int8', 'disk', 'cpu'])
def lm(request, folder, tmp_path_factory):
    "The tiny model in four bits (bitsandbytes), in eight (torchao), with half of its blocks on disk, with all of its weights fetched from the CPU's memory"
    kind = request.param
    if kind=='nf4':
        if not find_spec('bitsandbytes'): pytest.skip('bitsandbytes is not installed')
        from transformers import BitsAndBytesConfig
        how = dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32), device_map='cpu')
    elif kind=='int8':
        if not find_spec('torchao'): pytest.skip('torchao is not installed')
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig
        how = dict(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map='cpu')
    elif kind=='disk': how = dict(device_map=DISK, offload_folder=tmp_path_factory.mktemp('offload'))
    else: how = {}
    new = load(folder, **how)
    if kind=='cpu':
        from accelerate import cpu_offload
        cpu_offload(new.model, execution_device='cpu')
        new = LM(new.model, new.tokenizer, 'tiny')
    new.kind, new.few = kind, kind in ('nf4', 'int8')
    assert new.few or any(p.is_meta for p in new.model.parameters())
    return new

def test_it_is_read_and_asked(lm, plain):
    "Spans, exact quality, trials, CKA, answers, rewriting, scores: of an offloaded model the very numbers of the whole one"
    bs = batches(lm, TEXTS, size=2)
    spans, exact, trial = distances(lm, bs), quality(lm, bs, sizes=2)['loss'], ExactLoss(lm, bs)(PLAN)
    answers, items = lm.reply(['hello', 'you'], 6), score(lm, Task('t', rows(ROWS), metric='perplexity'))
    data = rewrite(lm, ROWS, decoding=5, progress=False)
    near = cka(lm, plain, TEXTS, group=4).matrix.diagonal()
    assert influence(lm, bs).best(2).n==6 and len(data)==8 and len(lm.fingerprint)==16
    if lm.few: assert spans.values.shape==distances(plain, bs).values.shape and near.isfinite().all() and near[0]>.99; return  # the embedding is not quantised
    assert torch.equal(spans.values.nan_to_num(), distances(plain, bs).values.nan_to_num()) and trial==ExactLoss(plain, bs)(PLAN) and lm.fingerprint==plain.fingerprint
    assert torch.equal(exact.values.nan_to_num(), quality(plain, bs, sizes=2)['loss'].values.nan_to_num())
    assert answers==plain.reply(['hello', 'you'], 6) and items.equals(score(plain, Task('t', rows(ROWS), metric='perplexity')))
    assert data['written']==rewrite(plain, ROWS, decoding=5, progress=False)['written']

def test_it_is_cut(lm, plain, tmp_path):
    "A view, the cut for good, and what was saved give the same answers; an offloaded model's views fetch from where it fetches"
    was = lm.fingerprint
    view, cut = without(lm, PLAN), prune(lm, PLAN)
    said = view.reply('hello', 6)
    assert cut.reply('hello', 6)==said and lm.fingerprint==was
    if lm.kind!='cpu': assert load(cut.save(tmp_path/'cut')).reply('hello', 6)==said                 # accelerate's own offloading, behind transformers' back, cannot be saved
    if not lm.few: assert said==without(plain, PLAN).reply('hello', 6)
    hooked = [(a._hf_hook.weights_map, b._hf_hook.weights_map) for a, b in zip(lm.model.modules(), without(lm, Plan(6, (5,))).model.modules()) if getattr(getattr(a, '_hf_hook', None), 'weights_map', None) is not None and type(a) is type(b) and a is not b]
    assert lm.few or any(a is b for a, b in hooked)

def test_halves_are_refused(lm):
    with pytest.raises(ValueError, match='quantised' if lm.few else 'offloaded'): find_units(lm, "mlp")
    with pytest.raises(ValueError, match='quantised' if lm.few else 'offloaded'): without(lm, Plan(6, (), mlp=(1,)))

def test_tuning_it(lm, folder, plain, tmp_path):
    "Adapters on quantised weights (QLoRA), kept apart, resumed, and merged into the same cut of the whole model; the rest in one sentence"
    how, cut = dict(epochs=1, batch_size=2, progress=False), prune(lm, PLAN)
    if not lm.few:
        for more in ({}, dict(lora=4), dict(lora=4, merge=False)):
            with pytest.raises(ValueError, match='offloaded, and a gradient needs them'): tune(lm, ROWS, **how, **more)
        return
    with pytest.raises(ValueError, match='give lora= and merge=False'): tune(cut, ROWS, **how)
    with pytest.raises(ValueError, match='would be rounded away: give merge=False'): tune(cut, ROWS, lora=4, **how)
    was, said = cut.fingerprint, cut.reply('hello', 6)
    healed = tune(cut, ROWS, lora=8, merge=False, out=tmp_path/'run', **{**how, 'epochs': 12, 'lr': 1e-2})
    loss = training_log(healed).loss
    assert loss.iloc[-1]<.6*loss.iloc[0] and cut.fingerprint==was and cut.reply('hello', 6)==said!=healed.reply('hello', 6)
    again = tune(cut, ROWS, lora=8, merge=False, out=tmp_path/'run', **{**how, 'epochs': 12, 'lr': 1e-2})
    assert again.reply(['hello', 'What is 3?'], 8)==healed.reply(['hello', 'What is 3?'], 8)
    from peft import PeftModel
    whole = prune(plain, PLAN)
    merged = whole._with(PeftModel.from_pretrained(whole._with(prune(plain, PLAN).model).model, tmp_path/'run'/'model').merge_and_unload())
    task = Task('t', rows(ROWS), metric='perplexity')
    before, after, kept = (score(o, task).nll.sum() for o in (whole, merged, healed))
    assert after<.75*before and kept<.75*before

def test_silent_halves_are_not_woken(plain, tmp_path):
    "What was silenced before it was quantised cannot be told from other weights"
    if not find_spec('bitsandbytes'): pytest.skip('bitsandbytes is not installed')
    from transformers import BitsAndBytesConfig
    few = load(prune(plain, Plan(6, (2,), mlp=(4,))).save(tmp_path/'half'), quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map='cpu')
    with pytest.raises(ValueError, match='zeroed sub-layers, which adapters would fill'): tune(few, ROWS, lora=4, merge=False, progress=False)

def test_what_four_bits_hold(folder, plain):
    "0.5625 bytes for each weight of a linear map of the blocks, as bitsandbytes stores them"
    if not find_spec('bitsandbytes'): pytest.skip('bitsandbytes is not installed')
    from transformers import BitsAndBytesConfig
    few = load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'), device_map='cpu').model
    held = sum(t.nbytes for k, t in few.state_dict().items() if not k.endswith(('quant_map', 'bitsandbytes__nf4')))
    s = dry_run(plain, Plan(6, ()), lora=1)
    n = s['tune adapters (QLoRA)'].states/4
    assert held==s['tune adapters (QLoRA)'].weights-2*n

def test_adapters_only_read_the_student(plain):
    "No copy of the weights while adapters are trained; whatever is trained beside them, and what is merged, is a copy"
    from sdlab.heal.train import own_tensors, training_copy
    own = {p.data_ptr() for p in plain.model.parameters()}
    work = training_copy(plain, 8)
    assert {p.data_ptr() for p in work.parameters()}==own and not {id(p) for p in work.parameters()} & {id(p) for p in plain.model.parameters()}
    work.requires_grad_(False); work.lm_head.requires_grad_(True)
    assert {k for k, p in own_tensors(work, plain.model).named_parameters() if p.data_ptr() not in own}=={'lm_head.weight'}
    was = plain.fingerprint
    for more in (dict(lora=dict(rank=2, bias='all')), dict(lora=dict(rank=2, modules_to_save=['lm_head'])), dict(lora=2)):
        new = tune(plain, ROWS, epochs=1, lr=1e-2, batch_size=4, progress=False, **more)
        assert plain.fingerprint==was!=new.fingerprint and all(p.requires_grad for p in plain.model.parameters())
        assert not {p.data_ptr() for p in new.model.parameters()} & own
