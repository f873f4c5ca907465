"What would not teach about distilling, on fixed rows and on the student's own: heads of many families, a peer's kernel, resuming, seeds, refusals"
import copy
import pytest, torch
import families
from sdlab.core.data import encode, prompt_ids, rows
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.compress.prune import prune
from sdlab.core.store import OldKeyword
from sdlab.heal.distil import logits_after_blocks, output_of_blocks, summed_divergence, token_divergence
from sdlab.heal.distil import distil as real_distil
from sdlab.heal.on_policy import on_policy as real_on_policy
from sdlab.heal.on_policy import sampled_answers
from sdlab.heal.tune import training_log
from sdlab.heal.tune import tune as real_tune
from values import with_values

tune, distil, on_policy = map(with_values, (real_tune, real_distil, real_on_policy))
BETAS = dict(forward=0., reverse=1., mixed=.5)

def state(lm): return {k: v.clone() for k, v in lm.model.state_dict().items()}
def close(a, b, eps=1e-6): return max((a[k].float()-b[k].float()).abs().max().item() for k in a) < eps
def small(name='Llama', **kwargs): return LM(families.tiny(name, **kwargs), families.tokenizer(True), name)

@pytest.fixture(scope='module')
def teacher(): return small()
@pytest.fixture(scope='module')
def student(teacher): return prune(teacher, Plan(6, (2, 3), why='test'))
@pytest.fixture(scope='module')
def data(): return rows([dict(prompt=f'say {c}', completion=c*(2+i % 3), reference=f'{c}!') for i, c in enumerate('abcdefghijkl')])

how = dict(max_steps=4, batch_size=4, lr=1e-3, seed=1)
WAYS = dict(distil=distil, on_policy=lambda *args, **kw: on_policy(*args, rollout=6, **kw))

# ---- the mathematics

@pytest.mark.parametrize('name', families.FAMILIES)
def test_a_head_apart_from_its_blocks(name):
    "Every family's own logits, soft caps and scales included, a few tokens at a time"
    m = families.tiny(name)
    ids, keep = torch.randint(4, 90, (2, 7)), torch.rand(2, 7) > .4
    with torch.no_grad():
        out = output_of_blocks(m, dict(input_ids=ids))
        got, want = logits_after_blocks(m, out, out.last_hidden_state[keep]), m(input_ids=ids, use_cache=False).logits[keep]
    assert torch.equal(got, want) or (got-want).abs().max() < 1e-5
    assert type(m.base_model).__name__ != '_StreamInstead'

@pytest.mark.parametrize('beta', [0., .25, 1.])
def test_a_peer_agrees(beta):
    "TRL's chunked kernel: values and gradients"
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    g = torch.Generator().manual_seed(0)
    h, w, ht, wt = (torch.randn(*s, generator=g) for s in ((9, 8), (30, 8), (9, 12), (30, 12)))
    grads = []
    for ours in (True, False):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        y = token_divergence(ht@wt.T, a@b.T, beta, 1.5) if ours else ChunkedDivergenceFunction.apply(a, b, None, ht, wt, None, beta, 1.5)[0]
        (y*torch.arange(1., 10)).sum().backward()
        grads.append((y.detach(), a.grad, b.grad))
    for x, y in zip(*grads): assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)

def test_nothing_to_learn_is_zero():
    "Also for logits that are far apart, and in half precision"
    p = (40*torch.randn(6, 50)).requires_grad_()
    for beta in (0., .1, .5, .9, 1.):
        for dtype in (torch.float32, torch.bfloat16):
            q = p.detach().to(dtype).requires_grad_()
            y = token_divergence(q.detach(), q, beta)
            y.sum().backward()
            assert y.abs().max() == 0 and q.grad.abs().max() == 0
            far = token_divergence(-q.detach(), q, beta)
            far.sum().backward()
            assert far.isfinite().all() and q.grad.isfinite().all() and (far >= -1e-5).all()

def test_left_padding_changes_nothing(teacher, student):
    "Two questions of different length: each token's divergence is that of the row alone"
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    for lm in (student, small('GPT-2')):
        whole = 0.
        with torch.no_grad():
            for o in ids: whole += summed_divergence(lm.model, teacher.model, dict(input_ids=torch.tensor([o])), torch.tensor([[False]*(len(o)-3)+[True]*2]), 0., 1., 99)
            mask = torch.tensor([[1]*6, [0]*3+[1]*3])
            both = dict(input_ids=torch.tensor([ids[0], [0]*3+ids[1]]), attention_mask=mask, position_ids=(mask.cumsum(-1)-1).clamp(min=0))
            at = torch.tensor([[False]*3+[True]*2]*2)
            assert summed_divergence(lm.model, teacher.model, both, at, 0., 1., 3).item() == pytest.approx(whole.item(), rel=1e-4)

# ---- the runs

@pytest.mark.parametrize('way', WAYS)
def test_seeds(way, student, teacher, data):
    "One seed, one run; another seed, another; student and teacher as they were"
    before, mine = state(teacher), state(student)
    one, two, other = (WAYS[way](student, data, teacher, **{**how, 'seed': s}) for s in (1, 1, 2))
    assert close(state(one), state(two), 1e-12) and not close(state(one), state(other))
    assert close(before, state(teacher), 1e-12) and close(mine, state(student), 1e-12) and 'forward' not in vars(teacher.model)
    step = one.provenance['steps'][-1]
    assert step['op'] == way and step['teacher'] == teacher.fingerprint and step['steps'] == 4 and one.kept == student.kept
    assert training_log(one).loss.notna().all()

class Stop(Exception): pass
def stop_at(n):
    def show(row):
        if row['step'] == n: raise Stop
    return show

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('lora', [None, dict(rank=4, lora_dropout=.2)])
def test_interrupted_and_resumed_is_the_same_run(way, lora, student, teacher, data, tmp_path):
    "Five steps of four rows out of twelve: the second pass over the rows is reached, and it is the second one"
    kw = {**how, 'max_steps': 5, 'save_steps': 2, 'lora': lora} | (dict(share=.5) if way == 'on_policy' else {})
    whole = WAYS[way](student, data, teacher, **kw)
    with pytest.raises(Stop): WAYS[way](student, data, teacher, out=tmp_path/'run', progress=stop_at(5), **kw)
    seen = []
    again = WAYS[way](student, data, teacher, out=tmp_path/'run', progress=seen.append, **kw)
    assert seen[0]['step'] == 5 and close(state(again), state(whole))
    a, b = whole.provenance['steps'][-1], again.provenance['steps'][-1]
    assert all(a[k] == b[k] for k in ('steps', 'tokens', 'trained_tokens', 'rows', 'data', 'divergence'))
    with pytest.raises(ValueError, match='holds another run .*divergence'): WAYS[way](student, data, teacher, divergence='mixed', out=tmp_path/'run', **kw)

def test_last_and_accumulation(student, teacher, data):
    "Two halves of a step are the step; `last` moves the end and nothing else"
    a = distil(student, data, teacher, **how, chunk=3)
    b = distil(student, data, teacher, **{**how, 'batch_size': 2}, gradient_accumulation_steps=2)
    assert training_log(a).loss.tolist() == pytest.approx(training_log(b).loss.tolist(), rel=1e-3)
    for way in WAYS.values():
        new, was = state(way(student, data, teacher, last=1, **how)), state(student)
        moved = {k for k in was if not torch.equal(was[k], new[k])}
        assert moved and all(k.startswith(('model.layers.3.', 'model.norm', 'lm_head')) for k in moved)

def test_first_loss_of_a_rollout_by_hand(student, teacher, data):
    "lr=0 and one step: the answers drawn again from outside, the divergence at each of their tokens, no padding"
    got = on_policy(student, data.select(range(3)), teacher, rollout=5, divergence='forward', max_steps=1, batch_size=3, lr=0., seed=4)
    ids = sorted(prompt_ids(student.tokenizer, r['prompt']) for r in data.select(range(3)))
    total = count = 0
    for o, new in zip(ids, sampled_answers(student, ids, [5]*3, '4.0.0', 1.)):
        x = torch.tensor([o+new])
        with torch.no_grad(): p, q = (m.model(x).logits[0, len(o)-1:-1].double().log_softmax(-1) for m in (teacher, student))
        total, count = total+(p.exp()*(p-q)).sum().item(), count+len(new)
    log = training_log(got)
    assert log.loss[0] == pytest.approx(total/count, rel=1e-3) and log.trained_tokens[0] == count
    assert log.rollout[0] == pytest.approx(count/3, rel=1e-3)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('lora', [None, 4])
def test_zeros_stay_zero(way, lora, student, teacher, data):
    "A sparse matrix and a zeroed MLP, by the one rule of `train`"
    cut, name = prune(student, Plan(4, (), mlp=(2,))), 'model.layers.1.self_attn.q_proj.weight'
    model = copy.deepcopy(cut.model)
    model.get_parameter(name).data[:, ::2] = 0
    sparse = cut.after('halve', model, zeros=[name])
    new = WAYS[way](sparse, data, teacher, lora=lora, **how)
    w = new.model.get_parameter(name)
    assert not w[:, ::2].any() and not torch.equal(w, model.get_parameter(name)) and not new.model.get_parameter('model.layers.2.mlp.down_proj.weight').any()
    assert new.zeroed == sparse.zeroed and new.provenance['zeros'] == sparse.provenance['zeros']

@pytest.mark.parametrize('f', [real_distil, real_on_policy])
def test_old_keywords_warn_and_work(f, student, teacher, data):
    with pytest.warns(OldKeyword, match='run=Run'): new = f(student, data, teacher, max_steps=1, batch_size=4, progress=False, seed=1)
    assert close(state(new), state(with_values(f)(student, data, teacher, max_steps=1, batch_size=4, seed=1)), 1e-12)

def test_share_none_is_distil_on_prompts(student, teacher, data):
    "share=0 learns the fixed answers: the first loss is distil's over the same rows"
    a = on_policy(student, data, teacher, share=0., divergence='forward', max_steps=1, batch_size=12, lr=0.)
    b = distil(student, data, teacher, divergence='forward', max_steps=1, batch_size=12, lr=0.)
    assert training_log(a).loss[0] == pytest.approx(training_log(b).loss[0], rel=1e-4)
    assert training_log(a).trained_tokens[0] == training_log(b).trained_tokens[0] and training_log(a).tokens[0] == training_log(b).tokens[0]

def test_raw_text(student, data):
    "Plain texts are learned by tune and distil; a piece that was cut out of a longer text need not end"
    texts = rows([dict(text='abc abc abc', ended=False), dict(text='xyz', ended=True)])
    assert encode(student.tokenizer, texts[0])['input_ids'][-1] != student.tokenizer.eos_token_id == encode(student.tokenizer, texts[1])['input_ids'][-1]
    assert tune(student, texts, max_steps=1).provenance['steps'][-1]['trained_tokens'] == len('abc abc abc')-1+len('xyz')+1-1   # this tokenizer has no BOS, so nothing asks for a first token

def test_last_is_refused_where_it_means_nothing(student, data):
    for bad in (-1, 5, True, 1.5):
        with pytest.raises(ValueError, match='last is a number of blocks from 0'): tune(student, data, last=bad)
    with pytest.raises(ValueError, match='give one of the two'): tune(student, data, last=1, lora=4)
    with pytest.warns(UserWarning, match='shares its weights with the embeddings'): tune(small('Qwen2'), data, last=1, max_steps=1)

def test_refusals(student, teacher, data):
    other = small(vocab_size=120)
    for way in WAYS.values():
        with pytest.raises(ValueError, match='different vocabularies'): way(student, data, other)
        with pytest.raises(TypeError, match='teacher is an LM'): way(student, data, teacher.model)
        with pytest.raises(ValueError, match="'forward', 'reverse', 'mixed'"): way(student, data, teacher, divergence='kl')
    for k, bad, words in (('rollout', 0, 'at least 1'), ('share', 2, 'from 0 to 1'), ('temperature', 0, 'above 0')):
        with pytest.raises(ValueError, match=words): on_policy(student, data, teacher, **{k: bad})
    with pytest.raises(ValueError, match='needs questions'): on_policy(student, ['abc'], teacher)
    with pytest.raises(TypeError, match='called rollout here'): on_policy(student, data, teacher, max_completion_length=3)
    with pytest.raises(TypeError, match='no argument of on_policy'): on_policy(student, data, teacher, use_vllm=True)
    with pytest.raises(ValueError, match='left no room'): on_policy(student, data, teacher, max_length=2)
