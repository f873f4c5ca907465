"""Channels of an MLP: found by running, ablated, cut out and proved, against hooks that know the names."""
import dataclasses, json
import pytest, torch
from families import FAMILIES, L, VOCAB, config, loud, plain, tiny, tokenizer
from test_families import IDS, NEW, ODD, PROMPTS, alone, bare, greedy, logits, no_grad, own, pointers, state    # noqa: F401 (fixtures)
from sdlab.compress.prune import prove_reload, prune
from sdlab.core.generate import generate
from sdlab.core.history import past_plan, zero_masks, zero_names
from sdlab.core.model import LM, load
from sdlab.core.plan import KINDS, Plan
from sdlab.core.units import find_units, without

# The truth, known to this test alone: the output projection, the axis along which it reads a channel, and what feeds one
TRUTH = {
    'Llama': ('mlp.down_proj', 1, {'mlp.gate_proj.weight': 0, 'mlp.up_proj.weight': 0}, 'intermediate_size'),
    'Qwen3': ('mlp.down_proj', 1, {'mlp.gate_proj.weight': 0, 'mlp.up_proj.weight': 0}, 'intermediate_size'),
    'Gemma2': ('mlp.down_proj', 1, {'mlp.gate_proj.weight': 0, 'mlp.up_proj.weight': 0}, 'intermediate_size'),
    'Phi-3': ('mlp.down_proj', 1, {'mlp.gate_up_proj.weight': 0}, 'intermediate_size'),
    'GPT-2': ('mlp.c_proj', 0, {'mlp.c_fc.weight': 1, 'mlp.c_fc.bias': 0}, 'n_inner'),
    'GPT-NeoX': ('mlp.dense_4h_to_h', 1, {'mlp.dense_h_to_4h.weight': 0, 'mlp.dense_h_to_4h.bias': 0}, 'intermediate_size'),
    'OPT': ('fc2', 1, {'fc1.weight': 0, 'fc1.bias': 0}, 'ffn_dim'),
}


def a_model(name): return LM(tiny(name), tokenizer(), name)


def some(n, k, seed):
    return tuple(sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].tolist()))


def even(n, k=5, blocks=range(L), **kwargs):
    "Other channels in every block, as many in each"
    return Plan(L, units={'neuron': {i: some(n, k, i) for i in blocks}}, **kwargs)


class stopped:
    "Inside, these channels do not reach the output projection, by hooks from outside; `units` in the numbers of `lm`"
    def __init__(self, lm, name, units):
        self.todo = [(lm.blocks[i].get_submodule(TRUTH[name][0]), list(v)) for i, v in units.items()]

    def __enter__(self):
        def hook(channels):
            def put(m, args):
                x = args[0].clone()
                x[..., channels] = 0
                return (x,)
            return put
        self.hooks = [m.register_forward_pre_hook(hook(v)) for m, v in self.todo]

    def __exit__(self, *_):
        for h in self.hooks: h.remove()


@pytest.mark.parametrize('name', TRUTH)
def test_found(name):
    "The slices that the names say, found without them; in half precision, too; and nobody noticed"
    projection, axis, feeds, _ = TRUTH[name]
    lm = a_model(name)
    before = state(lm)
    for model in (lm, LM(tiny(name).to(torch.bfloat16), tokenizer(), 'half')):
        for i, where in find_units(model, 'neuron').items():
            assert where.projection==projection
            assert set(where.slices)=={(f'{projection}.weight', axis), *feeds.items()}
            for (k, a), index in where.slices.items():
                times = model.blocks[i].get_parameter(k).shape[a]//where.n
                assert times==(2 if 'gate_up' in k else 1) and index.tolist()==[*range(where.n)]*times
    assert state(lm)==before and find_units(lm, 'neuron', [2])[2] is find_units(lm, 'neuron', [1, 2])[2]


@pytest.mark.parametrize('name', TRUTH)
def test_ablated(name, tmp_path, bare):
    "Uneven, beside a block and sub-layers that go: what hooks from outside say, on no memory of its own; and it saves as what it is"
    lm = a_model(name)
    n = find_units(lm, 'neuron', [0])[0].n
    plan = Plan(L, (1,), attn=(3,), mlp=(4,), units={'neuron': {0: (0, 7), 3: some(n, 9, 3), 5: (n-1,)}})
    before, was, view = state(lm), logits(lm), without(lm, plan)
    rest = without(lm, dataclasses.replace(plan, units={}))
    with stopped(rest, name, {plan.keep.index(i): v for i, v in plan.units['neuron'].items()}):
        want, said, padded = logits(rest), alone(rest), greedy(rest, True)
    torch.testing.assert_close(logits(view), want, rtol=0, atol=1e-5)
    assert (logits(view)-logits(rest)).abs().max()>1e-3 and alone(view)==said and greedy(view, True)==padded
    assert own(view, lm)==own(rest, lm)
    assert state(lm)==before and torch.equal(logits(lm), was)
    got = bare(view.save(tmp_path/'view'))
    assert not got['odd']
    torch.testing.assert_close(torch.tensor(got['logits']), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', TRUTH)
def test_pruned(name, tmp_path, bare):
    "One width for all: smaller, the ablated model to rounding, and a plain checkpoint that answers with cache and padding"
    lm = a_model(name)
    n = find_units(lm, 'neuron', [0])[0].n
    plan = even(n, n//4, (0, 2, 3, 4, 5), drop=(1,))
    before, was, view, cut = state(lm), logits(lm), without(lm, plan), prune(lm, plan)
    torch.testing.assert_close(logits(cut), logits(view), rtol=0, atol=1e-4)
    assert find_units(cut, 'neuron', [3])[3].n==n-n//4==getattr(cut.config, TRUTH[name][3]) and cut.n_params<without(lm, Plan(L, (1,))).n_params
    assert not pointers(cut) & pointers(lm) and zero_names(cut)==[] and cut.strip[1]=='▁'
    assert greedy(cut, True)==greedy(cut, False)==greedy(view, True)==alone(cut)
    assert generate(cut, PROMPTS, NEW)==generate(view, PROMPTS, NEW)
    got = bare(cut.save(tmp_path/'cut'))
    plain(tmp_path/'cut', L-1)
    assert not got['odd'] and not got['sdlab']
    torch.testing.assert_close(torch.tensor(got['logits']), logits(cut), rtol=0, atol=1e-5)
    assert state(lm)==before and torch.equal(logits(lm), was)


@pytest.mark.parametrize('name', ['Llama', 'Phi-3', 'GPT-2'])
def test_cut_after_cut(name, tmp_path):
    "In between a block goes and a file is written: the numbers compose to the teacher's, and so do the models"
    lm = a_model(name)
    n = find_units(lm, 'neuron', [0])[0].n
    steps = even(n, 5), Plan(L, (2,)), Plan(L-1, units={'neuron': {i: some(n-5, 7, 10+i) for i in range(L-1)}})
    part = lm
    for k, plan in enumerate(steps): part = load(prune(part, plan).save(tmp_path/str(k)))
    total = steps[0].then(steps[1]).then(steps[2])
    assert total.drop==(2,) and {len(v) for v in total.units['neuron'].values()}=={12}
    torch.testing.assert_close(logits(part), logits(without(lm, total)), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(part), logits(prune(lm, total)), rtol=0, atol=1e-4)
    assert [Plan.from_json(s['plan']) for s in part.provenance['steps']]==list(steps) and past_plan(part.record)==total
    assert part.kept==total.keep and part.strip==total.strip=='▆▆▁▆▆▆'


@pytest.mark.parametrize('uneven', [False, True])
def test_what_is_zero_in_its_place_is_not_counted_again(uneven):
    "Masked, or kept as zeros: other parts go as ever, and neurons are named in one plan for the whole model"
    lm, plan = a_model('Llama'), Plan(L, (2,), units={'neuron': {1: (0, 7)}})
    part = prune(lm, plan, uneven='zeros') if uneven else without(lm, plan)
    assert past_plan(part.record)==plan and part.strip=='█▆▁███' and part.name=='Llama without 2 and 2 neurons of 1'
    for act in (without, prune):
        with pytest.raises(ValueError, match='zeros in their old places: name all'): act(part, Plan(L-1, units={'neuron': {1: (3,)}}))
        less = act(part, Plan(L-1, (2,), attn=(0,)))
        assert past_plan(less.record)==Plan(L, (2, 3), attn=(0,), units=plan.units)
        torch.testing.assert_close(logits(less), logits(without(lm, past_plan(less.record))), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['Llama', 'GPT-2', 'BLOOM'])
def test_kept_as_zeros(name, tmp_path, bare):
    "Uneven, or without a word in the config (BLOOM): refused, or zeros that the history names"
    lm = a_model(name)
    n = find_units(lm, 'neuron', [0])[0].n
    plan = even(n) if name=='BLOOM' else Plan(L, units={'neuron': {1: (0, 7), 4: some(n, 5, 4)}})
    with pytest.raises(ValueError, match='one word for all; drop as many in every block' if name!='BLOOM' else 'no word for another width') as e: prune(lm, plan)
    assert '\n' not in str(e.value) and "uneven='zeros'" in str(e.value).replace('"', "'")
    kept = prune(lm, plan, uneven='zeros')
    assert torch.equal(logits(kept), logits(without(lm, plan))) and not pointers(kept) & pointers(lm)
    back = load(kept.save(tmp_path/'kept'))
    assert zero_names(back)==zero_names(kept) and len(zero_names(back))==len(plan.units['neuron'])
    for k, mask in zero_masks(back).items():
        i = int(k.split('.')[2])
        assert mask.sum()==len(plan.units['neuron'][i])*lm.d
    got = bare(tmp_path/'kept')
    torch.testing.assert_close(torch.tensor(got['logits']), logits(kept), rtol=0, atol=1e-5)
    masked = prune(without(lm, plan), Plan(L, (0,)))          # a view with masks, cut for good
    torch.testing.assert_close(logits(masked), logits(without(kept, Plan(L, (0,)))), rtol=0, atol=1e-5)
    assert len(zero_names(masked))==len(set(plan.units['neuron'])-{0})


def test_dead_channels():
    "A ReLU that no text would turn on is found all the same"
    lm = a_model('OPT')
    lm.blocks[3].fc1.bias[[4, 11]] = -1e4
    assert find_units(lm, 'neuron', [3])[3].slices['fc1.weight', 0].tolist()==[*range(48)]


@pytest.mark.parametrize('where', ['up_proj', 'down_proj', 'gate_proj'])
def test_the_proof_can_fail(where):
    "One channel in place of its neighbour"
    lm, plan = a_model('Llama'), even(48)
    bad = prune(lm, plan)
    w, stay = bad.blocks[2].mlp.get_submodule(where).weight, [c for c in range(48) if c not in plan.units['neuron'][2]]
    axis = 1 if where=='down_proj' else 0
    w.select(axis, 6).copy_(lm.blocks[2].mlp.get_submodule(where).weight.select(axis, stay[7]))
    with pytest.raises(ValueError, match=r'cannot be cut like this: block 2 \(at place 2 after the cut\) would'): prove_reload(lm, bad, plan)


def test_half_precision(tmp_path):
    "Where one channel more or less is below a rounding"
    lm = load(a_model('Llama').save(tmp_path/'half'), dtype='bfloat16')
    plan = even(48, 1)
    want = logits(without(lm, plan))
    torch.testing.assert_close(logits(prune(lm, plan)), want, rtol=0, atol=.05*want.abs().max().item())


def test_refused():
    "In one sentence, before anything is built, and the model as it was"
    def says(what, lm, plan, act=without):
        before = state(lm)
        with pytest.raises(ValueError, match=what) as e: act(lm, plan)
        assert '\n' not in str(e.value) and len(str(e.value))<400 and state(lm)==before
    lm = a_model('Llama')
    one = Plan(L, units={'neuron': {2: (0,)}})
    for act in (without, prune):
        says(r'Block 2 of Llama has 48 neurons, 0 to 47: \[48\]', lm, Plan(L, units={'neuron': {2: (3, 48)}}), act)
        says('would lose all its 48 neurons: drop its MLP instead', lm, Plan(L, units={'neuron': {2: range(48)}}), act)
        says('mlp.experts holds many experts', a_model('Mixtral'), one, act)
        says('an earlier cut has zeroed it', without(lm, Plan(L, mlp=(2,))), one, act)
    with pytest.raises(ValueError, match="'refuse' or 'zeros'"): prune(lm, one, uneven='pad')
    shared = a_model('Llama')
    shared.blocks[4].mlp.up_proj.weight = shared.blocks[2].mlp.up_proj.weight
    says('Block 2 of shared shares mlp.up_proj with other parts', LM(shared.model, tokenizer(), 'shared'), one)
    says('has no MLP to tell apart', LM(tiny(ODD['Mamba']), tokenizer(), 'ssm'), one)
    lm.model.is_quantized = True
    says('is quantised', lm, one)


def test_a_plan_of_units():
    "Frozen, hashable, and the same after JSON; what an older version wrote is read"
    plan = Plan(L, (1,), 'why', attn=(0,), units={'neuron': {3: torch.tensor([7, 0]), 5: range(2), 4: ()}})
    assert plan.units=={'neuron': {3: (0, 7), 5: (0, 1)}} and Plan.from_json(plan.to_json())==plan
    assert json.loads(plan.to_json())['drop']=={'block': [1], 'attention': [0], 'neuron': {'3': [0, 7], '5': [0, 1]}}
    assert hash(plan)==hash(Plan.from_json(plan.to_json())) and len({plan, dataclasses.replace(plan, units={})})==2
    assert Plan.from_json('{"n": 6, "drop": {"block": [1]}}')==Plan(6, (1,))
    assert str(plan)=='▀▁█▆█▆ drops 1/6 (blocks 1) and the attention of 0 and 4 neurons of 3, 5: why'
    assert plan.frame().neuron.tolist()==[0, 0, 0, 2, 0, 2] and len(plan.plot().patches)==2*L+2
    with pytest.raises(TypeError, match='frozen'): plan.units['neuron'][3] = (1,)


def test_every_row_of_the_table():
    "A kind is a row and its functions, and nothing outside of them asks which kind it is"
    import inspect, sdlab.compress.prune, sdlab.core.plan, sdlab.core.units
    for k, row in KINDS.items():
        assert all(callable(row.act(v)) for v in ('find', 'ablate', 'cut')) and (row.act('prove') is None or callable(row.act('prove')))
        assert list(find_units(a_model('Llama'), k, [3, 1]))==[1, 3]
    for m in (sdlab.core.plan, sdlab.core.units, sdlab.compress.prune):
        assert not any("=='neuron'" in line.replace(' ', '') for line in inspect.getsource(m).splitlines())
    with pytest.raises(ValueError, match='one of block, attention, mlp, neuron'): find_units(a_model('Llama'), 'head')
