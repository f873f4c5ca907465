"""Every family of causal language models: found, measured, cut, saved, reloaded in a process that has never seen sdlab."""
import copy, hashlib, json, subprocess, sys
import pytest, torch
from families import FAMILIES, HEAD, L, MLP_ONLY, SLIDE, VOCAB, WINDOW, config, deaf, half, loud, plain, tiny, tokenizer
from sdlab.compress.prune import prune
from sdlab.core.units import find_units, without
from sdlab.core.data import batches, decode
from sdlab.core.history import zero_names
from sdlab.core.model import LM, load
from sdlab.core.generate import Decoding, generate
from sdlab.core.plan import Plan
from sdlab.measure.cost import cost
from sdlab.measure.importance import angular_distance, distances, importance, importance_steps, influence, relative_update
from sdlab.measure.scan import forward_pass
from sdlab.core.hooks import watching

CUTS = {'middle': (2, 3), 'first': (0,), 'scattered': (1, 4)}
PROMPTS = ['Ann has 12 pens', 'the', 'One day a small dog']   # of different lengths, two of them longer than the window
IDS = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(1))
NEW = 7
STOPS = list(range(2, VOCAB, 7))   # so many that some rows end early

SERVER = '''
import json, sys, warnings; warnings.filterwarnings('ignore')
import torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); torch.set_grad_enabled(False)
print('ready', flush=True)
for line in sys.stdin:
    r = json.loads(line)
    model, info = AutoModelForCausalLM.from_pretrained(r['path'], output_loading_info=True)
    ids, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    print(json.dumps(dict(logits=model.eval()(torch.tensor(r['ids'])).logits.tolist(), tied=ids is out, odd=[*info['missing_keys'], *info['unexpected_keys']],
                          sdlab=[m for m in sys.modules if m.split('.')[0]=='sdlab'])), flush=True)
'''


@pytest.fixture(scope='session')
def bare(tmp_path_factory):
    "A process with transformers and nothing of ours: reloads a checkpoint and says what it computes"
    p = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp('elsewhere'))
    def ask(path):
        p.stdin.write(json.dumps(dict(path=str(path), ids=IDS.tolist())) + '\n')
        p.stdin.flush()
        for line in p.stdout:
            if line.startswith('{'): return json.loads(line)
        raise RuntimeError('the bare process ended')
    yield ask
    p.stdin.close()
    p.wait(120)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


def logits(lm): return lm.model(input_ids=IDS).logits


def state(lm):
    "Hash of config, weights, buffers and training flags"
    h = hashlib.sha256(lm.config.to_json_string().encode())
    for k, t in [*lm.model.named_parameters(), *lm.model.named_buffers()]: h.update(k.encode() + t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for k, m in lm.model.named_modules(): h.update(f'{k}{m.training}{len(m._forward_hooks)}{len(m._forward_pre_hooks)}'.encode())
    return h.hexdigest()


def tensors(lm): return {id(t): t for t in [*lm.model.parameters(), *lm.model.buffers()] if t.numel()}.values()


def own(view, lm):
    "Bytes that a view holds beyond the tensors of `lm`"
    theirs = {t.untyped_storage().data_ptr() for t in tensors(lm)}
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(view) if t.untyped_storage().data_ptr() not in theirs}.values())


def zeros(lm, plan):
    "Bytes that zeros may cost a view: a number for each weight, and for experts, whose kernels want rows, one matrix of each shape"
    mods = [lm.blocks[i].get_submodule(k) for part, idx in (('attention', plan.attn), ('mlp', plan.mlp)) if idx for i, names in find_units(lm, part, idx).items() for k in names]
    ps = [p for m in mods for p in m.parameters(recurse=False)]
    return sum(4 for p in ps if p.ndim<3) + sum({p.shape: p[0].numel()*4 for p in ps if p.ndim==3}.values())


def pointers(lm): return {t.data_ptr() for t in tensors(lm)}


def greedy(lm, cache):
    "What Hugging Face's own generate writes after a left-padded batch"
    enc = [lm.tokenizer(p).input_ids for p in PROMPTS]
    T = max(map(len, enc))
    ids, mask = (torch.tensor([[f]*(T-len(e)) + g for e, g in zip(enc, gs)]) for f, gs in ((0, enc), (0, [[1]*len(e) for e in enc])))
    return lm.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=cache, pad_token_id=0)[:, T:].tolist()


def alone(lm):
    "The same one prompt at a time, so without padding"
    return [lm.model.generate(torch.tensor([lm.tokenizer(p).input_ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, -NEW:].tolist() for p in PROMPTS]


def until_stop(lm):
    out = []
    for p in PROMPTS:
        ids = torch.tensor([lm.tokenizer(p).input_ids])
        new = lm.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=sorted(lm.stops))[0, ids.shape[1]:].tolist()
        out.append(new[:next((i for i, t in enumerate(new) if t in lm.stops), NEW)])
    return out


def check(lm, plan, folder, bare):
    "All that a cut has to keep"
    before, was = state(lm), logits(lm)
    view, cut = without(lm, plan), prune(lm, plan)
    assert torch.equal(logits(view), logits(cut))                       # bit for bit
    assert own(view, lm)==zeros(lm, plan)                               # no memory of its own
    assert not pointers(cut) & pointers(lm)                             # all of it its own
    assert all(t.untyped_storage().nbytes()==t.numel()*t.element_size() for t in tensors(cut))
    assert (lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight) == (cut.model.get_input_embeddings().weight is cut.model.get_output_embeddings().weight)
    assert cut.kept==view.kept==plan.keep and cut.n==len(plan.keep)==cut.config.get_text_config().num_hidden_layers
    one = alone(cut)
    assert greedy(cut, True) == greedy(cut, False) == greedy(view, True) == one
    cut.model.generation_config.eos_token_id = STOPS
    written = [decode(cut.tokenizer, o) for o in until_stop(cut)]
    assert all(generate(cut, PROMPTS, Decoding(NEW, batch_size=n))==written for n in (2, 8))   # our own loop: padded, rows leave and join
    with torch.no_grad():
        for p in cut.model.parameters(): p.add_(0.)                     # it may be written to
    got = bare(cut.save(folder))
    plain(folder, cut.n)
    assert not got['odd'] and not got['sdlab']
    assert got['tied'] == (cut.model.get_input_embeddings().weight is cut.model.get_output_embeddings().weight)
    torch.testing.assert_close(torch.tensor(got['logits']), logits(cut), rtol=0, atol=1e-5)
    assert state(lm)==before and torch.equal(logits(lm), was)           # the teacher did not notice


@pytest.mark.parametrize('name', FAMILIES)
def test_family(name, tmp_path, bare):
    lm = LM(tiny(name), tokenizer(), name)
    assert lm.n==L and lm.d==32 and lm.vocab==VOCAB
    before = state(lm)
    sc = distances(lm, batches(lm, PROMPTS, size=3))                    # every span
    assert len(sc.frame())==L*(L+1)//2 and sc.frame()['value'].between(0, 1).all()
    assert state(lm)==before
    none = prune(lm, Plan(L, ()))
    assert torch.equal(logits(none), logits(lm)) and torch.equal(logits(without(lm, Plan(L, ()))), logits(lm))
    for cut, drop in CUTS.items():
        assert (logits(without(lm, Plan(L, drop)))-logits(lm)).abs().max() > .1    # the cut can be seen at all
        check(lm, Plan(L, drop), tmp_path/cut, bare)


# Halves of blocks ---------------------------------------------------------------------------------------------------
HALF = Plan(L, (1, 5), attn=(0, 3), mlp=(3, 4))   # beside whole blocks, one of them losing both


@pytest.mark.parametrize('name', FAMILIES)
def test_half_a_block(name, tmp_path, bare):
    "Zeros in the output projection are what hooks that take the sub-layer away say: logits, cached and padded answers; and all that a cut has to keep"
    lm = LM(tiny(name), tokenizer(), name)
    view, live = without(lm, HALF), without(lm, Plan(L, HALF.drop))
    with deaf(live, *([HALF.keep.index(i) for i in v] for v in (HALF.attn, HALF.mlp))): want, said, padded = logits(live), alone(live), greedy(live, True)
    torch.testing.assert_close(logits(view), want, rtol=0, atol=1e-5)
    assert alone(view)==said and greedy(view, True)==padded
    said, saved = cost(lm, HALF), cost(lm, Plan(L, HALF.drop))
    assert (said.params, said.macs, said.attn, said.mlp)==(saved.params, saved.macs, 2, 2) and 'saves neither memory nor time' in repr(said) and 'zeroed' in repr(cost(view))
    assert view.zeroed=={'attention': HALF.attn, 'mlp': HALF.mlp} and view.strip=='▀▁█░▄▁'
    check(lm, HALF, tmp_path/'cut', bare)


SHARED = dict(MLP_ONLY, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, shared_expert_intermediate_size=24)
MORE = {   # experts that every token shares, attention in chunks
    'Qwen2-MoE': ('qwen2_moe', dict(HEAD, **SHARED)),
    'DeepSeek-V3': ('deepseek_v3', dict(HEAD, **SHARED) | dict(num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)),
    'Llama-4': ('llama4_text', dict(HEAD, **SHARED, num_local_experts=4, interleave_moe_layer_step=2, attention_chunk_size=WINDOW)),
}


@pytest.mark.parametrize('name', [*FAMILIES, *MORE])
def test_every_half_of_every_block(name):
    lm = LM(tiny(MORE.get(name, name)), tokenizer(), name)
    before = state(lm)
    for i in range(L):
        for kw in (dict(attn=[i]), dict(mlp=[i]), dict(attn=[i], mlp=[i])):
            with deaf(lm, **kw): want = logits(lm)
            got = logits(without(lm, Plan(L, **kw)))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            assert (got-logits(lm)).abs().max() > 1e-3
    assert state(lm)==before


def output(lm, b, i, **kw):
    "What block `i` gives with its half taken away by hooks, in float64"
    out = []
    with deaf(lm, **kw), watching(lm.blocks, lambda l, h: out.append(h)): forward_pass(lm.model, b, lm.device)
    return out[i+1].double()


@pytest.mark.parametrize('name', FAMILIES)
def test_importance_of_halves(name):
    "From what a block gives with and without its half, by the definition; texts of different lengths, padded"
    lm = LM(tiny(name), tokenizer(), name)
    b, before = batches(lm, PROMPTS, size=3)[0], state(lm)
    real = b['attention_mask'].bool()
    mean = lambda v: torch.stack([o[m].mean() for o, m in zip(v, real)]).mean().item()
    for part, field in (('attention', 'attn'), ('mlp', 'mlp')):
        got = importance(lm, batches(lm, PROMPTS, size=2), part=part)
        assert all(s.part==part and not s.of_spans and s.values.shape==(L,) and s.texts==3 for s in got.values())
        for i in (1, 4):
            h, x, y = output(lm, b, i-1), output(lm, b, i), output(lm, b, i, **{field: [i]})
            assert got['distances'].values[i].item()==pytest.approx(angular_distance(x[:, -1], y[:, -1]).mean().item(), abs=1e-5)
            assert got['influence'].values[i].item()==pytest.approx(mean(1-torch.cosine_similarity(x, y, dim=-1)), abs=1e-5)
            assert got['relative_update'].values[i].item()==pytest.approx(mean((x-y).norm(dim=-1)/h.norm(dim=-1)), rel=1e-4)
        assert getattr(got['influence'].best(2), field)==tuple(sorted(got['influence'].values.argsort()[:2].tolist()))
    assert state(lm)==before


def test_importance_of_halves_leaves_nothing_behind():
    lm = LM(tiny('Llama'), tokenizer(), 'tiny')
    before, bs = state(lm), batches(lm, PROMPTS, size=1)
    steps = importance_steps(lm, bs, part='mlp')
    assert next(steps)[:2]==(1, 3) and state(lm)==before                     # not between two steps
    next(steps), steps.close()
    assert state(lm)==before
    def breaking():
        yield bs[0]
        raise KeyboardInterrupt
    for f in (distances, influence, relative_update):
        with pytest.raises(KeyboardInterrupt): f(lm, breaking(), part='attention')
        assert state(lm)==before
    last, whole = list(importance_steps(lm, bs, part='mlp'))[-1][2], importance(lm, bs, part='mlp')
    assert all(torch.allclose(last[k].values, whole[k].values, atol=1e-12) and last[k].evidence==whole[k].evidence for k in whole)
    cut = prune(lm, Plan(L, (0,), attn=(3,)))
    gone = influence(cut, batches(cut, PROMPTS), part='attention')
    assert gone.values.argmin()==2 and gone.values[2]==0 and gone.kept==cut.kept   # zeroed already: nothing is left to lose
    with pytest.raises(ValueError, match="'block', 'attention' or 'mlp', not 'head'"): distances(lm, bs, part='head')
    ssm = LM(tiny(ODD['Mamba']), tokenizer(), 'ssm')
    with pytest.raises(ValueError, match='has no MLP to tell apart'): influence(ssm, batches(ssm, PROMPTS), part='mlp')


@pytest.mark.parametrize('name', ['Llama', 'Gemma3', 'Mixtral', 'GPT-NeoX', 'BLOOM', 'Qwen3-MoE'])
def test_halves_compose(name, tmp_path):
    "Cut after cut, saved and reloaded in between, is one cut, in the teacher's numbers"
    lm = LM(tiny(name), tokenizer(), name)
    once = prune(lm, Plan(L, (1,), attn=(3, 4), mlp=(4, 5)))
    steps = (Plan(L, attn=(1, 3)), Plan(L, (1,)), Plan(5, mlp=(3, 4)), Plan(5, attn=(3,)))
    part = lm
    for k, plan in enumerate(steps): part = load(prune(part, plan).save(tmp_path/str(k)))
    assert part.kept==once.kept==(0, 2, 3, 4, 5) and part.zeroed==once.zeroed=={'attention': (3, 4), 'mlp': (4, 5)}
    assert part.strip==once.strip=='█▁█▀░▄' and part.provenance['zeroed']=={'attention': [3, 4], 'mlp': [4, 5]}
    torch.testing.assert_close(logits(part), logits(once), rtol=0, atol=1e-5)
    assert torch.equal(logits(prune(part, Plan(5, attn=(3,), mlp=(3,)))), logits(part))       # zeroed already
    assert [s['plan']['drop'] for s in part.provenance['steps']]==[json.loads(p.to_json())['drop'] for p in steps]
    gone = prune(part, Plan(5, (2, 3)))
    assert gone.zeroed=={'attention': (), 'mlp': (5,)} and gone.strip=='█▁█▁▁▄'
    none = prune(gone, Plan(3, (2,)))
    assert not any(none.zeroed.values()) and none.provenance['zeros']==[] and torch.equal(logits(none), logits(prune(lm, Plan(L, (1, 3, 4, 5)))))
    card = (tmp_path/'3'/'README.md').read_text()
    assert 'without the attention of 3–4' in card and 'dropped blocks 1 of 6' in card and '`█▁█▀░▄`' in card


@pytest.mark.parametrize('name', ['Llama', 'Mixtral', 'GPT-2'])
def test_a_view_of_halves_can_be_saved(name, tmp_path, bare):
    lm = LM(tiny(name), tokenizer(), name)
    view = without(lm, Plan(L, (2,), attn=(0, 3), mlp=(3, 4)))
    got = bare(view.save(tmp_path/'view'))
    assert not got['odd']
    torch.testing.assert_close(torch.tensor(got['logits']), logits(view), rtol=0, atol=1e-5)


def test_zeros_are_frozen_and_found_again(tmp_path):
    "Training would bring back what was zeroed: its weights are frozen, and a reload can name them"
    lm = LM(tiny('Qwen3-MoE'), tokenizer(), 'tiny')
    cut = prune(lm, Plan(L, (0,), attn=(2,), mlp=(1, 2)))
    frozen = {n for n, p in cut.model.named_parameters() if not p.requires_grad}
    back = load(cut.save(tmp_path/'cut'))
    assert {n for n, p in back.model.named_parameters() if not p.requires_grad}==frozen==set(zero_names(back))==set(zero_names(cut))
    mods = {k.rpartition('.')[0] for k in frozen}
    assert mods=={'model.layers.0.mlp.down_proj', 'model.layers.1.mlp.experts', 'model.layers.1.self_attn.o_proj'}
    assert frozen=={f'{k}.{p}' for k in mods for p, _ in cut.model.get_submodule(k).named_parameters(recurse=False)}
    assert all(p.requires_grad for p in lm.model.parameters()) and zero_names(lm)==[]


def test_tied_and_half_precision():
    "A tie stays a tie, and what is found in float32 is found in bfloat16"
    lm = LM(tiny('Gemma2'), tokenizer(), 'tied')
    cut = prune(lm, Plan(L, attn=(2,), mlp=(3,)))
    assert cut.model.lm_head.weight is cut.model.model.embed_tokens.weight
    for name in ('Llama', 'Mixtral', 'Gemma3', 'GPT-NeoX', 'BLOOM'):
        lm = LM(tiny(name), tokenizer(), name)
        two = LM(copy.deepcopy(lm.model).to(torch.bfloat16), tokenizer(), name)
        for part in ('attention', 'mlp'): assert find_units(two, part)==find_units(lm, part)


def test_weak_attention_in_half_precision(data, tmp_path):
    "A real model whose first attention moves the stream by 0.4 %, no more than a rounding of bfloat16"
    lm = load(data/'models'/'babyllama-1m')
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        two = LM(copy.deepcopy(lm.model).to(dtype), tokenizer(), str(dtype))
        for part, name in (('attention', 'self_attn.o_proj'), ('mlp', 'mlp.down_proj')): assert find_units(two, part)=={i: (name,) for i in range(lm.n)}
    moe = load(LM(tiny('Mixtral'), tokenizer(), 'moe').save(tmp_path/'moe'), dtype='bfloat16')   # zeroed, then the other half of the same block
    assert prune(prune(moe, Plan(L, attn=(2,))), Plan(L, mlp=(2,))).strip=='██░███'


def test_halves_refused():
    "In one sentence, before anything is built, and the model as it was"
    from transformers import AutoModelForCausalLM
    lm = LM(tiny('Llama'), tokenizer(), 'tiny')
    def says(what, lm, plan, act=without):
        before = state(lm)
        with pytest.raises(ValueError, match=what) as e: act(lm, plan)
        assert '\n' not in str(e.value) and state(lm)==before
    behind = LM(tiny('OPT', do_layer_norm_before=False), tokenizer(), 'behind')
    for act in (without, prune):
        says('Block 3 of behind cannot be taken apart: .* a norm with a bias', behind, Plan(L, attn=(3,)), act)
        says('Block 3 of behind cannot be taken apart', behind, Plan(L, mlp=(3,)), act)
    ssm = LM(tiny(ODD['Mamba']), tokenizer(), 'ssm')
    says('Block 2 of ssm has no MLP to tell apart', ssm, Plan(ssm.n, attn=(2,)))
    shared = LM(tiny('Llama'), tokenizer(), 'shared')
    shared.blocks[4].mlp.down_proj.weight = shared.blocks[1].mlp.down_proj.weight
    says('Block 1 of shared shares mlp.down_proj with other parts', shared, Plan(L, mlp=(1,)))
    lm.model.is_quantized = True
    says('is quantised, .* cut parts of blocks first', lm, Plan(L, mlp=(1,)))
    del lm.model.is_quantized
    says('for a model of 7 blocks, but tiny has 6', lm, Plan(7, attn=(1,)))
    from accelerate import cpu_offload, dispatch_model
    away = LM(tiny('Llama'), tokenizer(), 'away')
    cpu_offload(away.model, 'cpu')
    with pytest.raises(ValueError, match='not in memory'): without(away, Plan(L, attn=(1,)))
    spread = LM(tiny('Llama'), tokenizer(), 'spread')                       # the hooks of several devices, on one
    want = logits(prune(spread, Plan(L, (2,), attn=(1,))))
    dispatch_model(spread.model, {'model': 'cpu', 'lm_head': 'cpu'}, main_device='cpu', force_hooks=True)
    assert torch.equal(logits(prune(spread, Plan(L, (2,), attn=(1,)))), want)


def test_plans_of_halves():
    for bad, what in ((dict(drop=(1,), attn=(1,)), r'Blocks \[1\] would go whole and lose the attention'), (dict(drop=(1,), mlp=(0, 1)), r'Blocks \[1\] would go whole and lose the MLP'),
                      (dict(attn=(L,)), 'outside a model of 6'), (dict(mlp=(-1,)), 'outside a model of 6'), (dict(attn=(2, 2)), 'more than once'),
                      (dict(attn=range(L), mlp=range(L)), 'Nothing would be left'), (dict(drop=(0, 1), attn=range(2, L), mlp=range(2, L)), 'Nothing would be left')):
        with pytest.raises(ValueError, match=what): Plan(L, **bad)
    for bad in (dict(attn=3), dict(mlp='12'), dict(attn=[True]), dict(mlp=[1.5])):
        with pytest.raises(TypeError, match='must be a sequence of block indices'): Plan(L, **bad)
    old = Plan.from_json('{"n": 6, "drop": {"block": [2, 3]}, "why": "angular", "evidence": null}')
    assert old==Plan(6, (2, 3), 'angular') and '"attention"' not in old.to_json()
    for part, field in (('block', 'drop'), ('attention', 'attn'), ('mlp', 'mlp')): assert getattr(Plan.span(L, 1, 3, part), field)==(1, 2, 3)
    with pytest.raises(ValueError, match='knows block, attention, mlp'): Plan.from_json(dict(n=6, drop=dict(head=[1])))


@pytest.mark.parametrize('name', ['Llama', 'Qwen3', 'Gemma3', 'SmolLM3', 'Qwen3-MoE'])
def test_two_cuts_are_one(name):
    lm = LM(tiny(name), tokenizer(), name)
    twice, once = prune(prune(lm, Plan(6, (1,))), Plan(5, (2, 3))), prune(lm, Plan(6, (1, 3, 4)))
    assert twice.kept==once.kept==(0, 2, 5) and twice.teacher_n==6
    assert torch.equal(logits(twice), logits(once))
    assert [s['plan']['drop']['block'] for s in twice.provenance['steps']]==[[1], [2, 3]]
    assert twice.provenance['teacher_fingerprint']==lm.fingerprint and twice.name==f'{name} without 1, 3–4'


def test_an_empty_plan_is_no_cut(tmp_path):
    "A view or a copy without any cut keeps name and history: a second handle is not a step"
    lm = LM(tiny('Llama'), tokenizer(), name='my tuned')
    for make in (without, prune):
        same = make(lm, Plan(L))
        assert (same.name, same.provenance, same.fingerprint, same.kept)==(lm.name, lm.provenance, lm.fingerprint, lm.kept) and same.model is not lm.model
        assert torch.equal(logits(same), logits(lm)) and not hasattr(same.config, 'sdlab')
    assert not pointers(prune(lm, Plan(L))) & pointers(lm)
    cut = LM(prune(lm, Plan(L, (1,), attn=(3,))).model, tokenizer(), name='my cut')
    for make in (without, prune):
        again = make(cut, Plan(L-1))
        assert (again.name, again.provenance, again.zeroed, again.kept)==('my cut', cut.provenance, cut.zeroed, cut.kept)
    assert [s['plan']['drop']['block'] for s in prune(again, Plan(L-1, (0,))).provenance['steps']]==[[1], [0]]
    prune(lm, Plan(L)).save(tmp_path/'same')
    assert load(tmp_path/'same').n==L


# Rules on the index of a block, which no list in the config shows -----------------------------------------------------
RULES = {
    'every second block a mixture': (('qwen3_moe', dict(HEAD, decoder_sparse_step=2, **MLP_ONLY)), (2, 3), {(0,): 'block 1 ', (1, 4): 'block 2 '}),
    'attention scaled by the index': (('gpt2', FAMILIES['GPT-2'][1] | dict(scale_attn_by_inverse_layer_idx=True)), (5,), {(0,): 'block 1 ', (2, 3): 'block 4 '}),
}


@pytest.mark.parametrize('rule', RULES)
def test_rule_on_the_index(rule, tmp_path, bare):
    "What the config can still say is cut; what it cannot is refused, and the block is named"
    family, fits, refused = RULES[rule]
    lm = LM(tiny(family), tokenizer(), 'tiny')
    before = state(lm)
    check(lm, Plan(L, fits), tmp_path/'cut', bare)
    for drop, block in refused.items():
        with pytest.raises(ValueError, match=f'tiny cannot be cut like this: {block}'): prune(lm, Plan(L, drop))
    assert state(lm)==before


# Not a plain stack of attention blocks --------------------------------------------------------------------------------
SSM = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=L, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MAMBAS = ['linear_attention', 'linear_attention', 'hybrid', 'linear_attention', 'hybrid', 'linear_attention']
ODD = {
    'Jamba': ('jamba', dict(SSM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                            num_experts=2, mamba_d_state=4)),
    'Mamba': ('mamba', dict(SSM, state_size=4)),
    'Mamba2': ('mamba2', dict(SSM, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)),
    'Bamba': ('bamba', dict(SSM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, attn_layer_indices=[1, 4], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2, mamba_chunk_size=8)),
    'Falcon-H1': ('falcon_h1', dict(SSM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2, mamba_chunk_size=8)),
    'Zamba': ('zamba', dict(SSM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, n_mamba_heads=2, mamba_d_state=4, layers_block_type=MAMBAS)),
    'Zamba2': ('zamba2', dict(SSM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, mamba_d_state=4, mamba_ngroups=1, mamba_headdim=8, n_mamba_heads=8, layers_block_type=MAMBAS, chunk_size=8, num_mem_blocks=1, use_shared_attention_adapter=False)),
    'RecurrentGemma': ('recurrent_gemma', dict(SSM, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, lru_width=32, attention_window_size=WINDOW)),
    'LFM2': ('lfm2', dict(SSM, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, layer_types=['conv', 'full_attention', 'conv', 'conv', 'full_attention', 'conv'])),
    'Qwen3-Next': ('qwen3_next', dict(HEAD, layer_types=['linear_attention', 'linear_attention', 'full_attention']*2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
                                      shared_expert_intermediate_size=24, **MLP_ONLY)),
    'Granite-4': ('granitemoehybrid', dict(SSM, intermediate_size=48, shared_intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_local_experts=0, num_experts_per_tok=0, layer_types=['mamba', 'attention', 'mamba']*2,
                                           mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=8)),
    'GPT-OSS': ('gpt_oss', dict(HEAD, layer_types=[SLIDE, 'full_attention']*3, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    'RWKV': ('rwkv', dict(SSM, attention_hidden_size=32)),
}


@pytest.mark.parametrize('name', ODD)
def test_odd_stack(name, tmp_path, bare):
    "A hybrid works, cut and saved and reloaded, or says in one sentence why not"
    for drop in ((2, 3), (0,)):
        try:
            lm = LM(tiny(ODD[name]), tokenizer(), name)
            plan = Plan(lm.n, drop)
            cut = prune(lm, plan)
        except ValueError as e:
            assert '\n' not in str(e) and len(str(e)) < 500
            print(f'{name} {drop}: {e}')
            continue
        assert torch.equal(logits(cut), logits(without(lm, plan)))
        got = bare(cut.save(tmp_path/str(drop[0])))
        assert not got['odd']
        torch.testing.assert_close(torch.tensor(got['logits']), logits(cut), rtol=0, atol=1e-4)
        assert len(generate(cut, PROMPTS, NEW))==3


@pytest.mark.parametrize('name', ODD)
def test_odd_half(name, tmp_path, bare):
    "Half a block of a hybrid: zeroed in view, checkpoint and reload alike, or one sentence why not"
    for kw in (dict(attn=(1,)), dict(mlp=(2,)), dict(drop=(0,), attn=(2,), mlp=(1,))):
        lm = LM(tiny(ODD[name]), tokenizer(), name)
        before = state(lm)
        try: cut = prune(lm, Plan(lm.n, **kw))
        except ValueError as e:
            assert '\n' not in str(e) and len(str(e)) < 500 and state(lm)==before
            print(f'{name} {kw}: {e}')
            continue
        assert torch.equal(logits(cut), logits(without(lm, Plan(lm.n, **kw)))) and (logits(cut)-logits(without(lm, Plan(lm.n, kw.get('drop', ()))))).abs().max() > 1e-3
        got = bare(cut.save(tmp_path/'-'.join(kw)))
        assert not got['odd'] and state(lm)==before
        torch.testing.assert_close(torch.tensor(got['logits']), logits(cut), rtol=0, atol=1e-4)


def test_two_stacks_are_refused():
    from transformers import AutoModelForSeq2SeqLM
    kinds = dict(t5=dict(d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2), bart=dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16))
    for kind, kw in kinds.items():
        model = AutoModelForSeq2SeqLM.from_config(config((kind, dict(vocab_size=VOCAB, **kw))))
        with pytest.raises(ValueError, match='is an encoder-decoder with two stacks'): LM(model, tokenizer())
