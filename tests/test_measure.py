"The stream, what is measured on it, and what it costs: against other ways to the same number, on many families, and with bad input"
import copy, json, math, os, subprocess, sys
from pathlib import Path
import pytest, torch
import sharer
from families import FAMILIES, L, VOCAB, config, loud, tiny, tokenizer
from sdlab.core.data import batches
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.measure.cka import cka, centred_gram, hsic, kernels, linear_cka
from sdlab.measure.cost import by_depth, cost
from sdlab.measure.importance import Pairs, BlockInfluence, angular_distance, deepest, distances, importance, importance_steps, layer_products, pair_angles, pair_updates, random_spans
from sdlab.measure.scan import Divergence, Likelihood, Meter, DataFingerprint, RunningMean, scan
from sdlab.core.hooks import watching
from sdlab.measure.text import likelihood, likelihood_steps

TEXTS = ['Ann has 12 pens', 'the', 'One day a small dog', 'far away', 'x+y', 'who ran to the river?', 'a b', 'zebra']


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


@pytest.fixture(scope='module')
def tok(): return tokenizer()


@pytest.fixture(scope='module')
def lm(tok): return LM(tiny('Llama'), tok, 'tiny')


def close(a, b, eps=1e-5): assert torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=eps, atol=eps, equal_nan=True), (a, b)


class Keep(Meter):
    "All of the stream (a test may)"
    def start(self, lm, batch): self._h = {}
    def see(self, l, h, batch): self._h[l] = h.clone()
    def result(self): return self._h


# the stream ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FAMILIES)
def test_stream_is_what_the_family_says_it_is(name, tok):
    "Against Hugging Face's own hidden states (its last has been normed: left out), and each block given its own input"
    lm = LM(tiny(name), tok)
    b = batches(lm, TEXTS[:3], size=3)[0]
    hs, = scan(lm, [b], Keep())
    inputs = {k: v for k, v in b.items() if k in ('input_ids', 'attention_mask') or k=='position_ids' and name!='BLOOM'}
    theirs = lm.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert list(hs)==list(range(L+1))
    real = b['attention_mask'].bool()
    for l in range(L): close(hs[l][real], theirs[l][real])


@pytest.mark.parametrize('name', ['Llama', 'GPT-2', 'BLOOM', 'Gemma2', 'Cohere2', 'Granite', 'OPT', 'Falcon'])
def test_likelihood_is_the_models_own_loss(name, tok):
    "Soft caps, logit scales, positions: text by text, unpadded, through the model's `labels`"
    lm = LM(tiny(name), tok)
    got, = scan(lm, batches(lm, TEXTS, size=3), Likelihood(), max_logits=2000)
    for text, nll, n in zip(TEXTS, got['nll'], got['tokens']):
        ids = batches(lm, [text])[0]['input_ids']
        close(nll/n, lm.model(input_ids=ids, labels=ids).loss, 2e-4)
        assert n==ids.shape[1]-1


def test_only_the_completion_counts(lm):
    rows = [dict(prompt='2+2=', completion='4'), dict(prompt='a very long question, ', completion='yes and no')]
    b = batches(lm, rows, size=2)[0]
    got, = scan(lm, [b], Likelihood())
    assert got['tokens'].tolist()==b['completion_mask'].sum(-1).tolist()


@pytest.mark.parametrize('cut', [1, 3, 5])
def test_meters_of_two_shares_add_up(lm, cut):
    def all_of(texts):
        ms = [Pairs(pair_angles), Pairs(pair_updates, 'all'), BlockInfluence(), DataFingerprint(), Likelihood(), Divergence(lm)]
        scan(lm, batches(lm, texts, size=2), *ms)
        return ms
    for a, b, c in zip(all_of(TEXTS[:cut]), all_of(TEXTS[cut:]), all_of(TEXTS)):
        s, w = (a+b).result(), c.result()
        if isinstance(w, RunningMean): assert s.n==w.n; close(s.mean, w.mean, 1e-6); close(s.stderr, w.stderr, 1e-6)
        elif 'data' in w: assert s==w
        else: close(s['nll'], w['nll'], 1e-4); close(s['perplexity'], w['perplexity'], 1e-2)
    with pytest.raises(TypeError, match='same kind'): Pairs(pair_angles)+Pairs(pair_updates)


@pytest.mark.parametrize('wrong', [ValueError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_leaves_meters_as_they_were(lm, wrong):
    "Two batches are read before it breaks off: nothing of them is kept, nothing of the pass before is lost"
    def breaking(bs):
        yield from bs[:2]
        raise wrong('in the middle')
    m, seen, bs = Pairs(pair_angles), DataFingerprint(), batches(lm, TEXTS, size=2)
    scan(lm, bs, m, seen)
    was, n = m.result().mean.clone(), seen.result()
    with pytest.raises(wrong): scan(lm, breaking(bs), m, seen)
    assert torch.equal(m.result().mean, was) and m.result().n==n['texts']==len(TEXTS) and seen.result()==n


def test_ranks_share_the_texts(tmp_path):
    "Two processes under `torchrun`, each with half of the batches, give the numbers of one; what goes wrong in one is raised in both"
    script = str(Path(__file__).parent/'sharer.py')
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, str(tmp_path)], capture_output=True, text=True, timeout=600, env=env)
    assert p.returncode==0, p.stderr[-3000:]
    got, wrong = zip(*(json.loads((tmp_path/f'{r}.json').read_text()) for r in (0, 1)))
    assert got[0]==got[1] and wrong[0]==wrong[1] and 'Text 5 has no tokens' in wrong[0]
    alone = sharer.measured()
    assert got[0]['read']==4 and alone['read']==8                    # texts that went through the model: each rank's share, and all
    for k in alone.keys()-{'read'}: close(got[0][k], alone[k], 1e-6) if k!='data' else None
    assert got[0]['data']==alone['data']


def test_no_state_of_a_text_survives(lm):
    "What a meter holds afterwards does not grow with the texts"
    def held(n):
        ms = [Pairs(pair_angles), Pairs(pair_updates, 'all'), BlockInfluence()]
        scan(lm, batches(lm, TEXTS*n, size=2), *ms)
        flat = [t for m in ms for v in vars(m).values() for t in ([v.mean, v.m2] if isinstance(v, RunningMean) else v if isinstance(v, list) else [v]) if torch.is_tensor(t)]
        return sum(t.numel() for t in flat if t.ndim)
    assert held(4)==held(1)


def test_a_scan_leaves_no_trace(lm):
    m = LM(copy.deepcopy(lm.model).train(), lm.tokenizer)
    m.blocks[2].eval()
    before = {k: v.clone() for k, v in m.model.state_dict().items()}
    modes = [o.training for o in m.model.modules()]
    class Dies(Meter):
        def see(self, l, h, batch):
            if l==3: raise RuntimeError('dead')
    with pytest.raises(RuntimeError, match='dead'): scan(m, batches(m, TEXTS), Dies())
    importance(m, batches(m, TEXTS))
    assert [o.training for o in m.model.modules()]==modes and not any(o._forward_hooks or o._forward_pre_hooks for o in m.model.modules())
    assert all(torch.equal(v, before[k]) for k, v in m.model.state_dict().items())


def test_bad_numbers_are_named(lm):
    sick = LM(copy.deepcopy(lm.model), lm.tokenizer)
    sick.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids('z')] = float('inf')
    with pytest.raises(ValueError, match='embedding gives NaN or infinite activations for text 7'): distances(sick, batches(sick, TEXTS, size=3))
    with pytest.raises(ValueError, match='for text 7'): cka(sick, lm, TEXTS, group=4)
    sick = LM(copy.deepcopy(lm.model), lm.tokenizer)
    sick.blocks[4].mlp.down_proj.weight[3] = float('nan')
    with pytest.raises(ValueError, match='Block 4 gives NaN .* text 0'): importance(sick, batches(sick, TEXTS))


def test_bad_numbers_are_named_as_the_rows_are(lm):
    "Whatever order and whatever batches the rows are read in"
    sick = LM(copy.deepcopy(lm.model), lm.tokenizer)
    sick.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids('z')] = float('inf')
    texts = ['A short one', 'One that is a good deal longer', 'A z', 'Between the two in length']
    for measure in (lambda: likelihood(sick, texts, batch_size=2), lambda: list(likelihood_steps(sick, texts, batch_size=2)), lambda: list(importance_steps(sick, batches(sick, texts, size=1)))):
        with pytest.raises(ValueError, match='activations for text 2'): measure()
    b = batches(sick, texts, size=1)[2]|dict(row=torch.tensor([7]))
    with pytest.raises(ValueError, match='for text 7'): list(importance_steps(sick, [b]))
    with pytest.raises(TypeError, match='make batches with'): list(importance_steps(lm, texts))


@pytest.mark.parametrize('part', ('block', 'attention'))
def test_importance_without_doubles_on_the_device(lm, part, monkeypatch):
    "Apple's MPS has no float64: nothing is made double but by `as_double`, which goes to the CPU there"
    bs = batches(lm, TEXTS, size=3)
    want = importance(lm, bs, part=part)
    def refused(self): raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    monkeypatch.setattr(torch.Tensor, 'double', refused)
    for room in ('importance', 'scan'): monkeypatch.setattr(f'sdlab.measure.{room}.as_double', lambda x: x.cpu().to(torch.float64))
    got = importance(lm, bs, part=part)
    monkeypatch.undo()
    for k in want: assert torch.equal(got[k].values.nan_to_num(), want[k].values.nan_to_num())


def test_bad_batches_are_refused(lm, tok):
    with pytest.raises(ValueError, match='no texts'): distances(lm, [])
    with pytest.raises(TypeError, match='make batches with'): distances(lm, TEXTS)
    with pytest.raises(ValueError, match='another tokenizer'): distances(lm, [dict(input_ids=torch.tensor([[VOCAB]]))])
    other = LM(tiny('Llama', vocab_size=VOCAB+9), tok)
    with pytest.raises(ValueError, match=f'different vocabularies .{VOCAB+9} and {VOCAB}'): scan(other, batches(other, TEXTS), Divergence(lm))


# importance ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['Llama', 'GPT-2', 'Falcon', 'BLOOM', 'Gemma3', 'Mixtral'])
def test_all_spans_against_the_definition(name, tok):
    "One text at a time, no padding, one span at a time, the atan2 form"
    lm = LM(tiny(name), tok)
    got = distances(lm, batches(lm, TEXTS, size=3))
    each = [scan(lm, batches(lm, [t]), Keep())[0] for t in TEXTS]
    for l in range(L):
        for n in range(1, L+1-l):
            want = torch.stack([angular_distance(h[l][0,-1].double(), h[l+n][0,-1].double()) for h in each])
            close(got.values[l,n-1], want.mean(), 1e-5)
            close(got.stderr[l,n-1], want.std()/len(TEXTS)**.5, 1e-5)
    assert got.values.isnan().sum()==L*(L-1)//2


def test_small_turns_are_exact():
    "Turns down to a billionth of a half circle, with lengths that differ by six orders"
    for a in (1e-8, 1e-6, 1e-3, .1, .5, .999):
        u = torch.zeros(2, 300, dtype=torch.float64)
        u[0,0], u[1,0], u[1,7] = 3e3, math.cos(a*math.pi)*2e-3, math.sin(a*math.pi)*2e-3
        close(pair_angles(layer_products(u))[0,1], a, 2e-8)


def test_plans_of_scores(lm):
    s = distances(lm, batches(lm, TEXTS))
    for n in range(1, L):
        plan = s.best(n)
        assert plan.n==L and plan.drop==tuple(range(plan.drop[0], plan.drop[0]+n)) and len(plan.evidence['scores'])==L+1-n
        assert min(plan.evidence['scores'])==pytest.approx(s.score(plan.drop[0], n)[0])
        assert Plan.from_json(plan.to_json())==plan
    assert deepest(lm).best(2).drop==(L-3, L-2) and random_spans(lm, 1).best(2)==random_spans(lm, 1).best(2)
    for n in (0, L, 1.5, None):
        with pytest.raises(ValueError, match=f'a number from 1 to {L-1}'): s.best(n)
    with pytest.raises(ValueError, match='outside a model'): s.score(L-1, 2)


def test_everything_shows_itself(lm):
    import matplotlib; matplotlib.use('Agg')
    from matplotlib.axes import Axes
    bs = batches(lm, TEXTS)
    for o in (*importance(lm, bs).values(), deepest(lm), random_spans(lm), cka(lm, lm, TEXTS), cost(lm, Plan(L, (1,2)))):
        ax = o.plot()
        assert isinstance(ax, Axes) and len(o.frame()) and repr(o) and o._repr_markdown_()
        matplotlib.pyplot.close(ax.figure)


# CKA ----------------------------------------------------------------------------------------------------------------

def song(x, y):
    "Equation 5 of Song et al. 2012 with its traces and sums"
    n, k, l = len(x), (x@x.T).fill_diagonal_(0), (y@y.T).fill_diagonal_(0)
    return (k.mul(l).sum() + k.sum()*l.sum()/((n-1)*(n-2)) - 2*(k.sum(0)@l.sum(0))/(n-2))/(n*(n-3))


@pytest.mark.parametrize('shift', [0., 100.])
def test_linear_cka_against_float64(shift):
    "A large common part must not eat the differences"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 300, generator=g)
    y = x[:, :50]@torch.randn(50, 80, generator=g) + torch.randn(40, 80, generator=g)
    a, b = (x+shift).double(), (y-shift).double()
    close(linear_cka(x+shift, y-shift), song(a, b)/(song(a, a)*song(b, b)).sqrt(), 1e-5)
    q = torch.linalg.qr(torch.randn(300, 300, generator=g))[0]
    close(linear_cka(x@q*7-2, y), linear_cka(x, y), 1e-5)


@pytest.mark.parametrize('pool', ['last', 'mean'])
@pytest.mark.parametrize('unbiased', [True, False])
def test_cka_does_not_see_how_it_was_run(lm, tok, pool, unbiased):
    other, texts = LM(tiny('GPT-2', seed=3), tok, 'other'), [f'{t} {i}' for i, t in enumerate(TEXTS*5)]
    how = dict(pool=pool, unbiased=unbiased, group=10)
    m = cka(lm, other, texts, **how)
    assert m.groups==(10,)*4 and m.matrix.shape==(L+1, L+1)
    close(cka(lm, other, texts, batch_size=3, **how).matrix, m.matrix)
    close(cka(other, lm, texts, **how).matrix, m.matrix.T)
    ka, kb = kernels(lm, texts, **how), kernels(other, texts, **how)
    close(cka(ka, kb, texts, **how).matrix, m.matrix, 1e-7)
    parts = [hsic(a.rows, b.rows, n, unbiased) for a, b, n in zip(ka.parts, kb.parts, ka.groups)]
    close(((parts[0]+parts[1])+(parts[2]+parts[3])).cka, m.matrix, 1e-7)
    with pytest.raises(ValueError, match='other texts or settings'): cka(ka, lm, texts, **{**how, 'seed': 1})


def test_a_rotated_model_is_the_same_model(lm, tok):
    "Permuting the width of the whole network changes every coordinate of its stream and nothing else"
    net, p = copy.deepcopy(lm.model), torch.randperm(lm.d, generator=torch.Generator().manual_seed(0))
    for name, w in net.named_parameters():
        if 'norm' in name: w.copy_(w[p])
        elif any(o in name for o in ('o_proj', 'down_proj')): w.copy_(w[p])
        else: w.copy_(w[:, p])
    m = cka(LM(net, tok), lm, TEXTS)
    close(m.diagonal, torch.ones(L+1), 1e-5)


def test_before_the_cut_an_unhealed_student_is_its_teacher(lm):
    from sdlab.compress.prune import prune
    student = prune(lm, Plan(L, (2, 3)))
    m = cka(student, lm, [f'{t} {i}' for i, t in enumerate(TEXTS*4)], group=16)
    assert m.student_layers==(0, 1, 4, 5, 6) and m.dropped==(2, 3)
    close(m.diagonal[:2], [1, 1], 1e-6)
    close(m.matrix[2,2], 1, 1e-6)               # what enters the teacher's block 4 left block 1
    assert (m.diagonal[2:]<.999).all()


def test_cka_of_too_little(lm):
    for n in (1, 3):
        with pytest.raises(ValueError, match=f'there are only {n}'): cka(lm, lm, TEXTS[:n])
    with pytest.raises(ValueError, match='too small'): cka(lm, lm, TEXTS, group=3)
    m = cka(lm, lm, [t+'!' for t in TEXTS])     # all end alike: at the last token the embedding says nothing
    assert m.matrix[0].isnan().all() and m.matrix[:,0].isnan().all() and m.matrix[1:,1:].isfinite().all() and 'Layer 0' in m.blank[0]


@pytest.mark.gpu
def test_cka_across_devices(lm, tok):
    there = LM(copy.deepcopy(lm.model).cuda(), tok)
    close(cka(there, lm, TEXTS).matrix, cka(lm, lm, TEXTS).matrix, 1e-4)


# cost ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FAMILIES)
def test_cost_without_weights_is_the_cost_with_them(name, tok):
    c, lm = cost(config(name)), LM(tiny(name), tok)
    assert c.params==lm.n_params and c.macs==cost(lm).macs and c.n==L
    from sdlab.compress.prune import prune
    if name=='Llama': assert cost(lm, Plan(L, (1, 4))).params==prune(lm, Plan(L, (1, 4))).n_params


@pytest.mark.parametrize('name', ['Llama', 'GPT-2', 'Gemma2', 'Phi-3', 'OPT', 'Cohere2'])
def test_macs_against_the_counter_of_torch(name):
    "At a context within the window, where the counter's full scores are what is really looked at"
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM
    net = AutoModelForCausalLM.from_config(config(name), attn_implementation='eager').eval()
    with FlopCounterMode(display=False) as f: net(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=False)
    assert f.get_total_flops()==2*5*cost(config(name), context=5).macs


def test_cost_refuses(lm):
    with pytest.raises(ValueError, match=f'for 12 blocks, the model has {L}'): cost(lm, Plan(12, (4,)))
    with pytest.raises(TypeError, match='LM or a config'): cost('some/model')
    assert by_depth(lm, (1, 2)).frame().left.tolist()==[L-1, L-2]


# real models --------------------------------------------------------------------------------------------------------

def test_on_a_real_model(data):
    from sdlab.core.model import load
    lm = load(data/'models'/'babyllama-1m')
    texts = ['Once upon a time there was a little girl.', 'The dog ran to the park and', 'Tom was sad', 'One day, a big bird', 'They played all day.']
    all3 = importance(lm, batches(lm, texts, size=2))
    again = {k: s.values for k, s in importance(lm, batches(lm, texts, size=5, side='right')).items()}
    for k, s in all3.items(): close(s.values, again[k], 1e-4)
    assert all3['distances'].best(1).n==lm.n==5
    close(cka(lm, lm, texts).diagonal[1:], torch.ones(lm.n), 1e-5)


def test_the_clock_refuses_before_it_runs():
    "Texts beyond the context, no rounds; and an iterator of sizes gives all of them"
    from sdlab.core.units import without
    from sdlab.measure.cost import latency, seconds_per_token
    gpt = LM(tiny('GPT-2'), tokenizer(), 'gpt')
    n = gpt.config.n_positions
    with pytest.raises(ValueError, match=f'gpt reads no more than {n} tokens, and the clock would have it read {n+1}'): seconds_per_token(gpt, n+1)
    with pytest.raises(ValueError, match='lower `context`'): by_depth(gpt, (2,), context=2*n, cut=without)
    with pytest.raises(ValueError, match='lower `context`'): latency({'gpt': gpt}, context=n-2, repeats=4, step=True)
    with pytest.raises(ValueError, match='at least 1, not 0'): latency({'gpt': gpt}, context=4, repeats=0)
    assert len(latency({'gpt': gpt}, context=n-3, repeats=2, step=True))==1 and seconds_per_token(gpt, n)>0
    assert by_depth(gpt, (k for k in (1, 2))).frame().dropped.tolist()==[1, 2]
