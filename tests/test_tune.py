"What would not teach about tuning: exact tokens, families, resuming, refusing, and that nothing is touched"
import copy, json, math, os, random, signal, time
from pathlib import Path
import pytest, torch
import families
from forks import Fork
from sdlab.core.data import encode, rows
from sdlab.core.generate import Decoding
from sdlab.core.history import short_record
from sdlab.core.model import LM, load
from sdlab.core.store import OldKeyword, locked
from sdlab.heal import trainer as guards
from sdlab.heal.train import Evaluation, Method, Run, Weights, train
from sdlab.heal.tune import Supervised, labelled, learning_curve, training_log
from sdlab.heal.tune import tune as real_tune
from values import with_values

tune = with_values(real_tune)

def state(lm): return {k: v.clone() for k, v in lm.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def close(a, b, eps=1e-6): return max((a[k]-b[k]).abs().max().item() for k in a) < eps

def echo(n=24, seed=0):
    "Rows of one letter said twice, with a longer reference"
    pick = random.Random(seed)
    return rows([dict(prompt=f'say {(c := pick.choice("abcdefgh"))}{i}', completion=f'{c}{c}', reference=f'{c} and {c}', source='teacher') for i in range(n)])

def small(name='Llama', chat=True, dropout=0., **kwargs):
    tok = families.tokenizer(chat)
    return LM(families.tiny(name, **kwargs), tok, name)

@pytest.fixture(scope='module')
def lm(): return small()

@pytest.fixture(scope='module')
def data(): return echo()

@pytest.fixture(scope='module')
def healed(lm, data): return tune(lm, data, epochs=2, lr=1e-3, batch_size=8)

# ---- what is learned

@pytest.mark.parametrize('chat', [True, False])
@pytest.mark.parametrize('on', ['completion', 'reference'])
def test_tokens_are_those_of_encode(chat, on, data):
    "The batches that reach the model hold exactly `encode`'s ids and its mask, BOS once, EOS learned once"
    lm, got = small(chat=chat), []
    hook = lm.model.register_forward_pre_hook(lambda m, a, k: got.append((k['input_ids'].clone(), k['labels'].clone(), k['input_ids'].ne(lm.tokenizer.pad_token_id))), with_kwargs=True)
    tune(lm, data, on=on, epochs=1, batch_size=8)
    hook.remove()
    seen = sorted((i[m.bool()].tolist(), l[m.bool()].tolist()) for ids, labels, mask in got for i, l, m in zip(ids, labels, mask))
    want = []
    for r in data:
        e = encode(lm.tokenizer, dict(prompt=r['prompt'], completion=r[on]))
        want.append((e['input_ids'], [t if m else -100 for t, m in zip(e['input_ids'], e['completion_mask'])]))
    assert seen == sorted(want)
    assert all(l[m == 0].eq(-100).all() for _, l, m in got)                              # padding is never learned
    eos = lm.tokenizer.eos_token_id
    assert all(l.count(eos) == 1 and [t for t in l if t >= 0][-1] == eos for _, l in seen)
    bos = lm.tokenizer.bos_token_id
    assert all(i.count(bos) <= 1 and bos not in l for i, l in seen)

def test_why_labels_and_not_a_mask(lm, data, tmp_path):
    "TRL 1.16 drops a `completion_mask` that comes without prompts and learns the questions too; if this fails, the lesson in the notebook is out of date"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    ds = Dataset.from_list([encode(lm.tokenizer, r) for r in data])
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none', max_length=None)
    T = type('Quiet', (SFTTrainer,), dict(_send_telemetry=lambda self: None))
    seen = T(model=copy.deepcopy(lm.model), args=args, train_dataset=ds, processing_class=copy.deepcopy(lm.tokenizer)).train_dataset
    assert all(r['labels'] == r['input_ids'] for r in seen)

def test_text_rows_are_learned_whole(lm):
    r = labelled(lm, ['abc'])[0]
    assert [i for i in r['labels'] if i >= 0] == [*lm.tokenizer('abc', add_special_tokens=False).input_ids, lm.tokenizer.eos_token_id]

def test_loss_is_the_mean_over_learned_tokens(lm, data):
    "lr=0: the logged loss equals the negative log-likelihood worked out row by row without padding"
    log = training_log(tune(lm, data, epochs=1, lr=0., batch_size=24))
    total = count = 0
    for r in labelled(lm, data):
        ids, lab = torch.tensor([r['input_ids']]), torch.tensor(r['labels'])
        with torch.no_grad(): lp = lm.model(ids).logits[0, :-1].log_softmax(-1)
        keep = lab[1:] >= 0
        total -= lp[torch.arange(len(lp))[keep], lab[1:][keep]].sum().item()
        count += keep.sum().item()
    assert log.loss.iloc[0] == pytest.approx(total/count, rel=1e-4)
    assert log.trained_tokens.iloc[-1] == count

def test_one_step_is_the_step_of_a_bare_loop(lm, data):
    "The first step of AdamW, with clipping, from a loop of five lines"
    ours = tune(lm, data, batch_size=24, max_steps=1, lr=1e-3, warmup_steps=0, lr_scheduler_type='constant')
    model, opt = copy.deepcopy(lm.model).train(), None
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.)
    total = count = 0
    for r in labelled(lm, data):
        ids, lab = torch.tensor([r['input_ids']]), torch.tensor([r['labels']])
        total = total+torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], lab[0, 1:], ignore_index=-100, reduction='sum')
        count += (lab[0, 1:] >= 0).sum()
    (total/count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    opt.step()
    moved = {k: (v-model.state_dict()[k]).abs() for k, v in state(ours).items()}
    assert sum(v.gt(1e-4).sum().item() for v in moved.values()) < .01*lm.n_params    # Adam divides tiny gradients by themselves: signs of a few may differ

def test_masks_are_left_out_only_where_they_do_nothing(data):
    "A causal model is trained without masks, to the same weights; one whose tokens look to their right keeps them"
    def masks(lm, **how):
        got = []
        hook = lm.model.register_forward_pre_hook(lambda m, a, k: got.append('attention_mask' in k), with_kwargs=True)
        new = tune(lm, data, epochs=2, lr=1e-3, batch_size=8, **how)
        hook.remove()
        return got, new
    lm = small()
    free, a = masks(lm)
    real = guards.padding_is_unseen
    guards.padding_is_unseen = lambda *args: False
    try: kept, b = masks(lm)
    finally: guards.padding_is_unseen = real
    assert not any(free) and any(kept) and close(state(a), state(b), 1e-4)
    batch = dict(input_ids=torch.randint(4, 90, (2, 6)), attention_mask=torch.tensor([[1]*6, [1]*4+[0]*2]))
    assert real(lm.model, batch)
    hook = lm.blocks[2].register_forward_pre_hook(lambda m, a: (a[0]+a[0].mean(1, keepdim=True), *a[1:]))   # now every token feels every other
    assert not real(lm.model, batch)

# ---- nothing else moves

@pytest.mark.parametrize('lora', [None, 4])
def test_student_is_left_as_it_was(lm, data, lora):
    import numpy as np
    before, cfg, gen = state(lm), lm.config.to_json_string(), lm.model.generation_config.to_json_string()
    flags = [p.requires_grad for p in lm.model.parameters()], [m.training for m in lm.model.modules()]
    tok = lm.tokenizer.get_vocab(), lm.tokenizer.pad_token, lm.tokenizer.chat_template
    dice = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad(): new = tune(lm, data, lora=lora, epochs=1, lr=1e-2, batch_size=8)
    assert same(state(lm), before) and lm.config.to_json_string() == cfg and lm.model.generation_config.to_json_string() == gen
    assert flags == ([p.requires_grad for p in lm.model.parameters()], [m.training for m in lm.model.modules()])
    assert tok == (lm.tokenizer.get_vocab(), lm.tokenizer.pad_token, lm.tokenizer.chat_template)
    assert torch.equal(dice[0], torch.get_rng_state()) and dice[1] == random.getstate() and (dice[2] == np.random.get_state()[1]).all()
    assert torch.is_grad_enabled() and all(p.grad is None for p in lm.model.parameters())
    assert not same(state(new), before)
    assert 'forward' not in vars(new.model) and type(new.model) is type(lm.model) and all(p.grad is None for p in new.model.parameters())
    a, b = lm.config.to_dict(), new.config.to_dict()
    b.pop('sdlab'); a.pop('sdlab', None)
    assert a == b
    assert not {p.data_ptr() for p in lm.model.parameters()} & {p.data_ptr() for p in new.model.parameters()}

def test_no_telemetry(lm, data, monkeypatch):
    import trl.trainer.base_trainer as base
    monkeypatch.setattr(base, 'send_telemetry', lambda **k: pytest.fail('telemetry was sent'))
    tune(lm, data, max_steps=1)

@pytest.mark.parametrize('name', ['Qwen2', 'Gemma2', 'GPT-2', 'Mixtral', 'Phi-3', 'OPT'])
def test_families(name, data, tmp_path):
    "Tied embeddings, soft caps, mixtures, fused projections: tuned, merged, saved and read again by plain transformers"
    from transformers import AutoModelForCausalLM
    lm = small(name)
    before = state(lm)
    for lora in (None, 2):
        new = tune(lm, data, lora=lora, max_steps=2, lr=1e-3, batch_size=4)
        assert same(state(lm), before) and not same(state(new), before)
        assert lm.config.tie_word_embeddings == (new.model.get_input_embeddings().weight is new.model.get_output_embeddings().weight) or name in ('Mixtral', 'Phi-3')
    new.model.save_pretrained(tmp_path/name)
    ids = torch.randint(4, 90, (2, 9))
    with torch.no_grad(): a, b = new.model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path/name).eval()(ids).logits
    assert (a-b).abs().max() < 1e-4

# ---- adapters

def test_adapters(lm, data, tmp_path):
    "Only the targets move; merged and unmerged agree; a finished run with adapters is found again"
    how = dict(lora=dict(rank=4, alpha=4, targets=['v_proj']), epochs=2, lr=1e-2, batch_size=8)
    merged, apart = tune(lm, data, **how), tune(lm, data, merge=False, out=tmp_path/'run', **how)
    moved = {k.split('.')[-2] for k, v in state(merged).items() if not torch.equal(v, lm.model.state_dict()[k])}
    assert moved == {'v_proj'}
    ids = torch.randint(4, 90, (2, 9))
    with torch.no_grad(): assert (merged.model(ids).logits-apart.model(ids).logits).abs().max() < 1e-3
    again = tune(lm, data, merge=False, out=tmp_path/'run', **how)
    with torch.no_grad(): assert (again.model(ids).logits-apart.model(ids).logits).abs().max() < 1e-5
    assert again.provenance == apart.provenance and apart.provenance['steps'][-1]['lora']['r'] == 4
    from peft import LoraConfig
    tune(lm, data, lora=LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM'), max_steps=1)

@pytest.mark.parametrize('learn', [{}, dict(lora=4), dict(lora=dict(rank=4, exclude_modules=['q_proj'])), dict(last=2)])
def test_zeroed_sublayers_stay_zero(lm, data, learn):
    "An attention and an MLP were cut in place: neither training nor an adapter fills them, in the child or in one of its own"
    from sdlab.core.history import zero_masks
    from sdlab.core.plan import Plan
    from sdlab.compress.prune import prune
    cut = prune(lm, Plan(lm.n, (1,), attn=(2,), mlp=(5,)))
    zeros = {k for k, m in zero_masks(cut).items() if m.all()}
    new = tune(tune(cut, data, epochs=1, lr=1e-2, batch_size=8, **learn), data, epochs=1, lr=1e-2, batch_size=8, **learn)
    assert len(zeros) == 2 and {k for k, m in zero_masks(new).items() if m.all()} == zeros and new.zeroed == cut.zeroed
    assert all(not new.model.get_parameter(k).any() for k in zeros) and not same(state(new), state(cut))

def half_zero(lm, name='model.layers.1.mlp.up_proj.weight'):
    "`lm` with half of the entries of one matrix zero, and its record says so"
    model = copy.deepcopy(lm.model)
    w = model.get_parameter(name)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < .5
    w.data[mask] = 0
    return lm.after('halve', model, 'half of it', zeros=[name]), name, mask

@pytest.mark.parametrize('learn', [{}, dict(lora=4), dict(lora=dict(rank=4, lora_dropout=.3))])
def test_sparse_matrices_keep_their_zeros(lm, data, learn):
    "Their other half learns; what the adapters add is masked in training already, so that merging changes nothing"
    student, name, mask = half_zero(lm)
    taken = []
    def probe(m):
        with torch.no_grad(): taken.append(m.model(torch.arange(4, 20)[None]).logits)
        return {}
    new = tune(student, data, epochs=2, lr=1e-2, batch_size=8, weight_decay=.1, probe=probe, **learn)
    w, was = new.model.get_parameter(name), student.model.get_parameter(name)
    assert not w[mask].any() and (w[~mask] != was[~mask]).all() and not w._backward_hooks
    with torch.no_grad(): assert (new.model(torch.arange(4, 20)[None]).logits-taken[-1]).abs().max() < 1e-4
    other = 'model.layers.2.mlp.up_proj.weight'
    assert not torch.equal(new.model.get_parameter(other), student.model.get_parameter(other))
    with pytest.raises(ValueError, match='has sparse matrices'): tune(student, data, lora=4, merge=False)

# ---- the same again

def test_seeds(lm, data, healed):
    how = dict(epochs=2, lr=1e-3, batch_size=8)
    assert same(state(tune(lm, data, **how)), state(healed))
    assert not same(state(tune(lm, data, seed=1, **how)), state(healed))

def test_a_probe_changes_nothing(lm, data, healed):
    "Even one that draws random numbers and samples text"
    calls = []
    def probe(m):
        torch.manual_seed(5); random.random(); m.reply('say a', Decoding(3, temperature=1.))
        assert not m.model.training and m.n == lm.n
        calls.append(1)
        return dict(score=len(calls))
    new = tune(lm, data, epochs=2, lr=1e-3, batch_size=8, probe=probe, every=2, rows=data)
    assert same(state(new), state(healed))
    log = training_log(new)
    assert log.score.dropna().tolist() == [1, 2, 3, 4] and log.step[log.score.notna()].tolist() == [0, 2, 4, 6]
    assert log.valid_loss.notna().sum() == 4
    assert learning_curve(new).get_xlabel() == 'step'
    with pytest.raises(ValueError, match='may not call its numbers loss'): tune(lm, data, probe=lambda m: dict(loss=1))
    with pytest.raises(TypeError, match='dict of numbers'): tune(lm, data, probe=lambda m: 3)

def test_live_log(lm, data):
    seen = []
    tune(lm, data, epochs=1, batch_size=8, progress=seen.append)
    assert [o['step'] for o in seen if 'loss' in o] == [1, 2, 3] and all(o['steps'] == 3 for o in seen)

def test_early_stop_gives_back_the_best(lm, data):
    "A probe that is best at step 2: the weights are those of step 2, and the run ends two evaluations later"
    taken = []
    def probe(m):
        taken.append(state(m))
        return dict(score=[0., 1., .5, .5, .5, .5][min(len(taken)-1, 5)])
    new = tune(lm, data, epochs=4, lr=1e-3, batch_size=8, probe=probe, every=2, patience=2, watch='score', higher=True)
    info = new.provenance['steps'][-1]
    assert info['steps'] == 6 and info['weights_of_step'] == 2
    assert same(state(new), taken[1])
    with pytest.raises(ValueError, match="no 'valid_loss' to watch"): tune(lm, data, probe=lambda m: dict(score=1), patience=1)

# ---- stopping and going on

class Stop(Exception): pass

def stop_at(n):
    def show(row):
        if row['step'] == n: raise Stop
    return show

@pytest.mark.parametrize('lora', [None, 4])
def test_interrupted_and_resumed_is_the_same_run(lm, data, tmp_path, lora):
    "Bit for bit, optimiser, order and dropout included; the counts as well"
    how = dict(epochs=3, lr=1e-3, batch_size=8, lora=dict(rank=lora, lora_dropout=.2) if lora else None, save_steps=2)
    whole = tune(lm, data, **how)
    with pytest.raises(Stop): tune(lm, data, out=tmp_path/'run', progress=stop_at(5), **how)
    assert [p.name for p in (tmp_path/'run').glob('checkpoint-*')] == ['checkpoint-4']
    seen = []
    again = tune(lm, data, out=tmp_path/'run', progress=seen.append, **how)
    assert seen[0]['step'] == 5
    assert close(state(again), state(whole))
    a, b = whole.provenance['steps'][-1], again.provenance['steps'][-1]
    assert all(a[k] == b[k] for k in ('steps', 'tokens', 'trained_tokens', 'rows', 'data', 'lora'))
    assert training_log(again).loss.tolist() == pytest.approx(training_log(whole).loss.tolist(), rel=1e-4)
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['done.json', 'lock', 'model', 'run.json']

def test_finished_run_is_not_redone(lm, data, tmp_path):
    how = dict(epochs=1, batch_size=8, out=tmp_path/'run')
    one = tune(lm, data, **how)
    two = tune(lm, data, **how, progress=lambda row: pytest.fail('it trained again'))
    assert close(state(one), state(two)) and one.provenance == two.provenance and one.name == two.name and two.kept == one.kept
    with pytest.raises(ValueError, match='holds another run .*lr was 0.0002 and is now 0.1.*resume=False'): tune(lm, data, lr=.1, **how)
    with pytest.raises(ValueError, match='holds another run .*data was'): tune(lm, data.select(range(9)), **how)
    three = tune(lm, data, lr=.1, resume=False, **how)
    assert three.provenance['steps'][-1]['lr'] == .1

def countdown(n):
    "A `stop` that says yes from the n-th question on (0: at the start)"
    seen = iter(range(10**6))
    return lambda: next(seen) >= n

@pytest.mark.parametrize('lora', [None, 4])
def test_stopped_by_hand(lm, data, tmp_path, lora):
    "The weights are those that an undisturbed run has at that step; a last evaluation was taken; the folder holds a finished model that the same call gives back"
    how = dict(epochs=3, lr=1e-3, batch_size=8, lora=lora, every=3, save_steps=2)
    at = {}
    def probe(m):
        at[len(at)] = state(m)
        return dict(score=len(at))
    whole = tune(lm, data, probe=probe, **(how | dict(every=1)))
    kept, at = at, {}
    new = tune(lm, data, probe=probe, stop=countdown(6), out=tmp_path/'run', **how)       # asked: start, 1, 2, 3, after the evaluation, 4, 5
    info, log = new.provenance['steps'][-1], training_log(new)
    assert info['stopped'] == f'at step {info["steps"]} of 9' and 3 < info['steps'] < 9 and 'stopped' not in whole.provenance['steps'][-1]
    assert info['weights_of_step'] == info['steps'] == log.step.iloc[-1] and log[['loss', 'score']].notna().all(axis=1).iloc[-1]
    last = at[max(at)]
    assert close(last, kept[info['steps']], 1e-5) and (lora or close(last, state(new)))
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['done.json', 'lock', 'model', 'run.json']
    assert load(tmp_path/'run'/'model').provenance == new.provenance
    again = tune(lm, data, out=tmp_path/'run', **how, progress=lambda row: pytest.fail('it trained again'))
    assert close(state(again), state(new)) and again.provenance == new.provenance
    assert 'stopped at step' in (tmp_path/'run'/'model'/'README.md').read_text()
    anew = tune(lm, data, out=tmp_path/'run', resume=False, **how)
    assert anew.provenance['steps'][-1]['steps'] == 9 and close(state(anew), state(whole), 1e-5)

def test_stopped_before_the_first_step(lm, data):
    "With and without something to evaluate; one evaluation, not two"
    bare = tune(lm, data, stop=lambda: True)
    assert same(state(bare), state(lm)) and bare.provenance['steps'][-1]['steps'] == 0 and len(training_log(bare)) == 0
    evaluations = []
    def probe(m): evaluations.append(1); return dict(score=1.)
    seen = tune(lm, data, stop=lambda: True, probe=probe)
    assert evaluations == [1] and training_log(seen).score.tolist() == [1.]
    assert learning_curve(seen).get_xlabel() == 'step' and learning_curve(bare).get_xlabel() == 'step'

def test_stopped_where_a_killed_run_would_go_on(lm, data, tmp_path):
    "Interrupted at step 5, gone on with from step 4 and stopped at once: the weights of step 4, evaluated"
    how = dict(epochs=3, lr=1e-3, batch_size=8, save_steps=2, every=9, out=tmp_path/'run', probe=lambda m: dict(score=1.))
    with pytest.raises(Stop): tune(lm, data, progress=stop_at(5), **how)
    new = tune(lm, data, stop=lambda: True, **how)
    assert new.provenance['steps'][-1]['stopped'] == 'at step 4 of 9'
    assert training_log(new).score.dropna().index.tolist() and training_log(new).step.iloc[-1] == 4
    four = tune(lm, data, stop=countdown(4), **{k: v for k, v in how.items() if k != 'out'})   # start, steps 1 to 4
    assert four.provenance['steps'][-1]['steps'] == 4 and close(state(four), state(new), 1e-5)

def test_asked_to_stop_with_the_last_step(lm, data):
    "A run that is over anyway was not stopped; with patience the best weights so far come back"
    info = tune(lm, data, epochs=1, batch_size=8, stop=countdown(3)).provenance['steps'][-1]
    assert info['steps'] == 3 and 'stopped' not in info
    scores = iter([0., 1., .5, .5, .5])
    info = tune(lm, data, epochs=4, batch_size=8, probe=lambda m: dict(score=next(scores)), every=2, patience=9, watch='score', higher=True, stop=countdown(8)).provenance['steps'][-1]
    assert info['weights_of_step'] == 2 and info['stopped'].endswith('of 12')

def test_off_the_main_thread(lm, data, healed):
    "Trained in a thread of its own, with the main one drawing random numbers meanwhile and gradients off: the same student, and grad mode untouched"
    import threading
    got = []
    def work():
        try: got.append(tune(lm, data, epochs=2, lr=1e-3, batch_size=8))
        except BaseException as e: got.append(e)
    t = threading.Thread(target=work)
    with torch.no_grad():
        t.start()
        while t.is_alive(): torch.rand(3); random.random(); t.join(.01)
        assert not torch.is_grad_enabled()
    assert not isinstance(got[0], BaseException), got
    assert same(state(got[0]), state(healed))

def test_the_order_of_the_rows_is_its_own(lm, data, healed, monkeypatch):
    "Whoever sets the seed of the process before the first batch changes nothing"
    run = guards.GuardedTrainer.run
    def shaken(trainer): torch.manual_seed(99); random.seed(99); return run(trainer)
    monkeypatch.setattr(guards.GuardedTrainer, 'run', shaken)
    new = tune(lm, data, epochs=2, lr=1e-3, batch_size=8)
    assert training_log(new).loss.equals(training_log(healed).loss) and same(state(new), state(healed))

def test_a_thread_takes_nothing_back(lm, data):
    "What a cell changed while another thread trained stays: random numbers, filters of warnings, verbosity"
    import threading, warnings
    import numpy as np
    from transformers.utils import logging
    began, go, was = threading.Event(), threading.Event(), logging.get_verbosity()
    def held(): began.set(); go.wait(60); return True
    dice = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    t = threading.Thread(target=lambda: tune(lm, data, batch_size=8, stop=held))
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = dice()
    try:
        t.start()
        assert began.wait(60)
        drawn = torch.rand(3), random.random(), np.random.rand()
        warnings.filterwarnings('ignore', message='set by a cell')
        logging.set_verbosity_info()
        go.set(), t.join(60)
        assert all(a != b for a, b in zip(dice(), before)) and not t.is_alive()
        assert any('set by a cell' in str(o[1]) for o in warnings.filters) and logging.get_verbosity() == logging.INFO
        assert not any('transformers|trl|peft' in str(o[3]) for o in warnings.filters)
    finally: go.set(); logging.set_verbosity(was)

def test_half_a_checkpoint_is_none(lm, data, tmp_path):
    "What a kill leaves between two files is not taken for a checkpoint"
    how = dict(epochs=2, batch_size=8, save_steps=2, out=tmp_path/'run')
    with pytest.raises(Stop): tune(lm, data, progress=stop_at(3), **how)
    (tmp_path/'run'/'partial'/'checkpoint-4').mkdir(parents=True)
    (tmp_path/'run'/'checkpoint-5').mkdir()
    assert tune(lm, data, **how).provenance['steps'][-1]['steps'] == 6

def killed(out):
    def show(row):
        if row['step'] == 5: os.kill(os.getpid(), signal.SIGKILL)
    tune(small(), echo(), epochs=2, lr=1e-3, batch_size=8, save_steps=2, out=out, progress=show)

def test_kill_9(tmp_path, data):
    "Killed by the system in the middle, run again: the same model as an undisturbed run"
    p = Fork(killed, str(tmp_path/'run'))
    assert p.wait() == -signal.SIGKILL, p.said()[-2000:]
    assert (tmp_path/'run'/'checkpoint-4').is_dir() and not (tmp_path/'run'/'model').exists()
    again = tune(small(), data, epochs=2, lr=1e-3, batch_size=8, save_steps=2, out=tmp_path/'run')
    assert close(state(again), state(tune(small(), data, epochs=2, lr=1e-3, batch_size=8, save_steps=2)), 1e-5)

# ---- one folder, one run, one writer

def waiting(out, started, go):
    "Trains in `out`, and holds on before the first step until `go` is there"
    def stop():
        Path(started).touch()
        while not Path(go).exists(): time.sleep(.02)
        return False
    tune(small(), echo(), epochs=1, batch_size=8, out=out, stop=stop)

def test_two_processes_in_one_folder(data, tmp_path):
    "The second is refused in one sentence while the first is at work; afterwards it is given the finished student"
    p = Fork(waiting, str(tmp_path/'run'), str(tmp_path/'started'), str(tmp_path/'go'))
    try:
        while not (tmp_path/'started').exists(): assert p.returncode is None, p.said()[-2000:]; time.sleep(.05)
        with pytest.raises(ValueError, match='being written to by another run'): tune(small(), data, epochs=1, batch_size=8, out=tmp_path/'run')
        with pytest.raises(ValueError, match='being written to by another run'): tune(small(), data, epochs=1, batch_size=8, out=tmp_path/'run', resume=False)
        (tmp_path/'go').touch()
        assert p.wait() == 0, p.said()[-2000:]
    finally: p.kill() if p.returncode is None else None
    new = tune(small(), data, epochs=1, batch_size=8, out=tmp_path/'run', progress=lambda row: pytest.fail('it trained again'))
    assert new.provenance['steps'][-1]['steps'] == 3

def test_a_folder_of_version_0_1_is_refused(lm, data, tmp_path):
    (tmp_path/'tune.json').write_text(json.dumps(dict(student=lm.fingerprint, data='x', lr=2e-4)))
    for resume in (True, False):
        with pytest.raises(ValueError, match='another version of sdlab kept it'): tune(lm, data, out=tmp_path, resume=resume)
    assert (tmp_path/'tune.json').exists()

# ---- methods of one's own, and words of old

class Halved(Supervised):
    "Learns every second row"
    op, done = 'halved', 'taught half'
    def examples(self, student, rows): return super().examples(student, rows.select(range(0, len(rows), 2)))
    def check(self, student, rows):
        if len(rows) < 2: raise ValueError('half of nothing')

def test_a_method_of_ones_own(lm, data, tmp_path):
    run = Run(out=tmp_path/'run', progress=False)
    new = train(Halved(epochs=2, lr=1e-3, batch_size=4), lm, data, run=run, evaluation=Evaluation(rows=data))
    step = new.provenance['steps'][-1]
    assert step['op'] == 'halved' and step['rows'] == 12 and step['steps'] == 6 and new.name == 'Llama taught half'
    assert training_log(new).valid_loss.notna().sum() > 1 and not same(state(new), state(lm))
    other = tune(lm, data.select(range(0, 24, 2)), epochs=2, lr=1e-3, batch_size=4)
    assert same(state(other), state(new))
    assert close(state(train(Halved(epochs=2, lr=1e-3, batch_size=4), lm, data, run=run, evaluation=Evaluation(rows=data))), state(new))
    with pytest.raises(ValueError, match='half of nothing'): train(Halved(), lm, data.select([0]))
    with pytest.raises(ValueError, match='holds another run .op was'): train(Supervised(epochs=2, lr=1e-3, batch_size=4), lm, data, run=run)
    with pytest.raises(NotImplementedError): train(Method(), lm, data)

def test_old_keywords_warn_and_work(lm, data, tmp_path):
    with pytest.warns(OldKeyword, match=r'tune\(lora=...\) is learn=Weights\(lora=...\).*progress') as w:
        old = real_tune(lm, data, lora=4, epochs=1, batch_size=8, probe=lambda m: dict(score=1.), probe_every=2, valid=data, progress=False, seed=3, out=tmp_path/'run')
    assert [o.filename for o in w if o.category is OldKeyword] == [__file__]
    new = tune(lm, data, lora=4, epochs=1, batch_size=8, probe=lambda m: dict(score=1.), every=2, rows=data, seed=3)
    assert same(state(old), state(new)) and (tmp_path/'run'/'done.json').exists()

# ---- what is written down

def test_provenance(lm, data, healed, tmp_path):
    prov = healed.provenance
    assert prov['teacher'] == lm.name and prov['teacher_fingerprint'] == lm.fingerprint and prov['kept'] == list(range(lm.n)) and prov['teacher_n'] == lm.n
    info = prov['steps'][-1]
    want = sum(sum(l >= 0 for l in r['labels'][1:]) for r in labelled(lm, data))
    assert info['trained_tokens'] == 2*want and info['steps'] == 6 and info['rows'] == 24 and info['on'] == 'completion' and info['op'] == 'tune'
    assert info['tokens'] == 2*sum(len(r['input_ids']) for r in labelled(lm, data))
    json.dumps(prov)
    healed.model.save_pretrained(tmp_path/'m'); healed.tokenizer.save_pretrained(tmp_path/'m')
    assert load(tmp_path/'m').provenance == short_record(prov)                           # the log is too long for a config
    healed.save(tmp_path/'whole')
    assert load(tmp_path/'whole').provenance == prov
    twice = tune(healed, data, on='reference', epochs=1)
    assert [s['on'] for s in twice.provenance['steps']] == ['completion', 'reference'] and twice.provenance['teacher_fingerprint'] == lm.fingerprint

def test_after_a_cut(lm, data):
    from sdlab.core.plan import Plan
    from sdlab.compress.prune import prune
    from sdlab.core.units import without
    cut = prune(lm, Plan(lm.n, (2, 3)))
    new = tune(cut, data, epochs=1)
    assert new.kept == cut.kept and new.teacher_n == lm.n and [s['op'] for s in new.provenance['steps']] == ['prune', 'tune']
    before = state(lm)
    tune(without(lm, Plan(lm.n, (2, 3))), data, epochs=1, lr=1e-2)              # a view shares its tensors with the teacher
    assert same(state(lm), before)

# ---- what is refused

def test_refusals(lm, data, tmp_path):
    with pytest.raises(ValueError, match='No rows'): tune(lm, [])
    with pytest.raises(ValueError, match="no column 'reference'.*prompt, completion"): tune(lm, data.remove_columns('reference'), on='reference')
    with pytest.raises(ValueError, match="no column 'reference'"): tune(lm, ['abc'], on='reference')
    with pytest.raises(ValueError, match='vocabulary of'): tune(LM(families.tiny('Llama', vocab_size=20), lm.tokenizer), data)
    with pytest.raises(TypeError, match='did you mean weight_decay'): tune(lm, data, weight_decey=1.)
    with pytest.raises(TypeError, match='called batch_size here'): tune(lm, data, per_device_train_batch_size=1)
    (tmp_path/'other').mkdir(); (tmp_path/'other'/'thesis.txt').write_text('x')
    with pytest.raises(ValueError, match='is no run'): tune(lm, data, out=tmp_path/'other')
    with pytest.raises(ValueError, match='is no run'): tune(lm, data, out=tmp_path/'other', resume=False)
    assert (tmp_path/'other'/'thesis.txt').exists()
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError, match='Cannot write to'): tune(lm, data, out=tmp_path/'file'/'run')

def test_long_rows_are_counted(lm):
    long = [dict(prompt='q'*200, completion='a'), dict(prompt='q', completion='a')]
    with pytest.warns(UserWarning, match='1 of 2 rows were longer') as w: ds = labelled(lm, long)
    assert any('1 of 2 rows had no token to learn' in str(o.message) for o in w) and len(ds) == 1

def test_nan_stops_before_the_weights(lm, data, tmp_path):
    "The gradient of step 3 is spoilt: the checkpoint of step 2 is there and whole, and the sentence names both"
    real, n = guards.BareTrainer.compute_loss, []
    def spoil(self, *args, **kwargs):
        n.append(1)
        return real(self, *args, **kwargs)*(math.nan if len(n) == 3 else 1.)
    guards.BareTrainer.compute_loss = spoil
    try:
        with pytest.raises(ValueError, match='NaN or infinite at step 3.*checkpoint of step 2 is kept'): tune(lm, data, batch_size=8, save_steps=2, out=tmp_path/'run')
    finally: guards.BareTrainer.compute_loss = real
    from safetensors.torch import load_file
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path/'run'/'checkpoint-2'/'model.safetensors').values())
    tune(lm, data, batch_size=8, save_steps=2, out=tmp_path/'run')

def test_full_disk(lm, data, tmp_path, monkeypatch):
    "While a checkpoint is written: one sentence, the one before it is kept, and the run can go on. Before: refused at once"
    real, n = torch.save, []
    def full(*args, **kwargs):
        n.append(1)
        if len(n) > 4: raise OSError(28, 'No space left on device')
        return real(*args, **kwargs)
    how = dict(epochs=3, batch_size=8, save_steps=2, out=tmp_path/'run')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='checkpoint of step 4 could not be written .*No space left.*from step 2'): tune(lm, data, **how)
    monkeypatch.setattr(torch, 'save', real)
    assert not (tmp_path/'run'/'partial').exists()
    assert close(state(tune(lm, data, **how)), state(tune(lm, data, epochs=3, batch_size=8)))
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match='needs .* bytes, but only 0 are free there'): tune(lm, data, out=tmp_path/'new')

def test_half_precision_on_the_cpu(data):
    "bfloat16 weights are trained in float32 and given back as they came"
    lm = small()
    lm.model.bfloat16()
    new = tune(lm, data, max_steps=2, lr=1e-2)
    assert new.dtype == torch.bfloat16 == lm.dtype and not same(state(new), state(lm))

@pytest.mark.gpu
def test_on_a_gpu(data):
    lm = small()
    lm.model.cuda()
    new = tune(lm, data, epochs=1)
    assert new.device.type == 'cuda'
