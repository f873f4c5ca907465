"""Exact quality by replay is the quality of the model that is really cut: every span, every family; and it leaves nothing behind"""
import pytest, torch
from families import FAMILIES, L, tiny, tokenizer
from sdlab.core.units import without
from sdlab.measure.exact import SuffixReplay, ExactLoss, quality, quality_steps, replayed, suffix
from sdlab.core.data import batches
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.measure.scan import Divergence, Likelihood, scan, forward_pass
from sdlab.core.hooks import watching

TEXTS = ['Ann has 12 pens.', 'Why?', 'One morning a very small dog', 'x = 1']


@pytest.fixture
def lm(): return LM(tiny('Qwen3'), tokenizer(), 'tiny')


def hooked(*models): return [o for m in models for o in m.modules() if o._forward_hooks or o._forward_pre_hooks]


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_a_replay_is_the_cut_model(name):
    "Logits of every span on texts padded on the left: those of the view without it"
    lm = LM(tiny(name), tokenizer(), name)
    b, hs = batches(lm, TEXTS, size=4)[0], []
    real = b['attention_mask'].bool()
    with watching(lm.blocks, lambda l, h: hs.append(h)): whole = forward_pass(lm.model, b, lm.device).logits
    spans = [(l, e) for e in range(1, L+1) for l in range(e) if e-l<L]
    for l, e in spans:
        plan = Plan(L, range(l, e))
        want, got = forward_pass(without(lm, plan).model, b, lm.device).logits, replayed(suffix(lm, plan), lm.path, hs[l], b, e==L)
        assert torch.allclose(got[real], want[real], atol=1e-5, rtol=1e-5), (l, e)
        assert not torch.allclose(got[real], whole[real], atol=1e-2), (l, e)    # the test could have failed


def test_batches_do_not_matter(lm):
    "Nor their size, nor the side of the padding, nor how many logits fit at once"
    one, all4 = (quality(lm, batches(lm, TEXTS, size=n))['kl'].values for n in (1, 4))
    assert torch.allclose(one.nan_to_num(), all4.nan_to_num(), atol=1e-5)
    m = SuffixReplay(lm)
    few, = scan(lm, batches(lm, TEXTS, size=4), m, max_logits=3000)
    assert torch.allclose(few.mean[1, 0, 1:L], one[0, :L-1], atol=1e-5)


def test_only_answers_count(lm):
    rows = [dict(prompt='2+2=', completion='4'), dict(prompt='a very long question, ', completion='yes and no')]
    b = batches(lm, rows, size=2)
    got, (said,) = quality(lm, b, sizes=(2,))['loss'], scan(without(lm, Plan(L, (1, 2))), b, Likelihood())
    assert abs(got.score(1, 2)[0]-(said['nll']/said['tokens']).mean().item())<1e-5


def test_the_model_is_left_as_it_was(lm):
    was, flags = lm.fingerprint, [m.training for m in lm.model.train().modules()]
    m = SuffixReplay(lm, sizes=(1,))
    def breaking():
        yield from batches(lm, TEXTS, size=2)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): scan(lm, breaking(), m)
    assert lm.fingerprint==was and [o.training for o in lm.model.modules()]==flags
    assert not hooked(lm.model, *m._tails.values()) and m._tails and m.tally.n==0 and not any(t.training for t in m._tails.values())


def test_dropout_stays_off():
    "A model that is being trained is measured as one that is not"
    gpt = LM(tiny('GPT-2', resid_pdrop=.5, embd_pdrop=.5), tokenizer(), 'gpt')
    bs = batches(gpt, TEXTS)
    calm = quality(gpt, bs, sizes=(1,))['loss'].values
    gpt.model.train()
    assert torch.equal(quality(gpt, bs, sizes=(1,))['loss'].values.nan_to_num(), calm.nan_to_num())


def test_one_size(lm):
    bs = batches(lm, TEXTS)
    assert torch.equal(quality(lm, bs, sizes=2)['kl'].values[:, 1].nan_to_num(), quality(lm, bs, sizes=(2,))['kl'].values[:, 1].nan_to_num())


def test_a_cut_model_that_overflows(lm, monkeypatch):
    "The whole model is sound, one without some blocks is not: which blocks, which text"
    def broken(tail, path, h, b, empty):
        out = replayed(tail, path, h, b, empty)
        return out.masked_fill(b['row'][:, None, None]==2, float('nan')) if empty else out
    monkeypatch.setattr('sdlab.measure.exact.replayed', broken)
    with pytest.raises(ValueError, match='Without blocks 4–5 the model gives NaN or infinite logits for text 2'): quality(lm, batches(lm, TEXTS, size=4), sizes=(2,))
    with pytest.raises(ValueError, match='Without block 5 the model'): ExactLoss(lm, batches(lm, TEXTS, size=2))(Plan(L, (5,)))


def test_refusals(lm):
    bs = batches(lm, TEXTS)
    for bad in ((0,), (L,), (True,), (1, 2.)):
        with pytest.raises(ValueError, match='a number from 1 to 5'): quality(lm, bs, sizes=bad)
    with pytest.raises(ValueError, match='`sizes` is empty'): quality(lm, bs, sizes=())
    with pytest.raises(ValueError, match='a number from 1 to 5'): quality(lm, bs, sizes=6)
    with pytest.raises(ValueError, match='no texts'): quality(lm, [], sizes=(1,))
    with pytest.raises(ValueError, match='only for 2 blocks, not for 1'): quality(lm, bs, sizes=(2,))['kl'].best(1)
    list(lm.blocks[3].parameters())[0].data.view(-1)[0] = float('nan')
    with pytest.raises(ValueError, match='Block 3 gives NaN'): quality(lm, bs, sizes=(1,))


PLANS = (Plan(L, (0,)), Plan(L, (1, 4)), Plan(L, (0, 2, 5)), Plan(L, (3, 4, 5)), Plan(L, range(5)), Plan(L, range(1, L)),
         Plan(L, attn=(0,)), Plan(L, mlp=(5,)), Plan(L, attn=(2, 3), mlp=(3, 4)), Plan(L, (1, 5), attn=(2,), mlp=(4,)), Plan(L, (4, 5), attn=(1,)))


@pytest.mark.parametrize('name', ('Qwen3', 'Gemma3', 'Mixtral', 'GPT-2', 'BLOOM', 'Cohere2'))
def test_a_trial_is_the_cut_model(name):
    "Any plan, with gaps and with silent parts: the numbers of the view that `without` gives, whatever the batches"
    lm = LM(tiny(name), tokenizer(), name)
    bs = batches(lm, TEXTS, size=2)
    trial, was = ExactLoss(lm, batches(lm, TEXTS, size=3)), lm.fingerprint
    for plan in PLANS:
        cut, got = without(lm, plan), trial(plan)
        said, kl = scan(cut, bs, Likelihood(), Divergence(lm))
        assert got['loss']==pytest.approx((said['nll']/said['tokens']).mean().item(), abs=2e-4), plan
        assert got['perplexity']==pytest.approx(said['perplexity'], rel=2e-4), plan
        assert got['kl']==pytest.approx(kl.mean.item(), abs=2e-4) and got['kl_stderr']==pytest.approx(kl.stderr.item(), abs=2e-4), plan
        assert got['kl']>1e-3 and (got['n'], got['texts'])==(said['tokens'].sum(), 4)       # the test could have failed
    assert got['whole']==pytest.approx(scan(lm, bs, Likelihood())[0]['perplexity'], rel=1e-5)
    assert lm.fingerprint==was and not hooked(lm.model)


def test_a_trial_counts_answers_only(lm):
    rows = [dict(prompt='2+2=', completion='4'), dict(prompt='a very long question, ', completion='yes and no')]
    b = batches(lm, rows, size=2)
    said, = scan(without(lm, Plan(L, (1, 3))), b, Likelihood())
    got = ExactLoss(lm, b)(Plan(L, (1, 3)))
    assert got['n']==said['tokens'].sum()==11 and got['perplexity']==pytest.approx(said['perplexity'], rel=1e-4)


def cut_off(lm, size):
    "Four rows, among four whose questions alone fill the context: of those no token counts"
    rows = [dict(prompt=t, completion=' so it is') for t in TEXTS]
    long = [dict(prompt=t*20, completion=' never read') for t in TEXTS]
    both = [o for p in zip(long, rows) for o in p]
    return batches(lm, rows, size=size, max_length=60), batches(lm, both, size=size, max_length=60)


@pytest.mark.parametrize('size', (1, 3, 8))
def test_texts_without_an_answer_are_no_evidence(lm, size):
    "Left out of every mean and every count; they are not right about nothing"
    few, bs = cut_off(lm, size)
    plan = Plan(L, (2, 3))
    want, got = ExactLoss(lm, few)(plan), ExactLoss(lm, bs)(plan)
    assert got==pytest.approx(want, rel=1e-5, abs=1e-5) and got['texts']==4
    assert got['kl']==pytest.approx(scan(without(lm, plan), bs, Divergence(lm))[0].mean.item(), abs=1e-4)
    *_, (_, _, walked) = quality_steps(lm, bs, sizes=(2,))
    for s in (quality(lm, bs, sizes=(2,)), walked):
        for k in ('loss', 'kl'): assert s[k].texts==4 and s[k].score(2, 2)==pytest.approx((want[k], want[k+'_stderr']), abs=1e-4)
        assert s['loss'].evidence['whole']==pytest.approx(ExactLoss(lm, few)(Plan(L))['loss'], abs=1e-4)


def test_no_answer_at_all_is_refused(lm):
    bs = batches(lm, [dict(prompt=t*20, completion=' never read') for t in TEXTS], max_length=60)
    for measure in (lambda: ExactLoss(lm, bs), lambda: quality(lm, bs, sizes=(1,)), lambda: next(quality_steps(lm, bs)), lambda: scan(lm, bs, Divergence(lm))):
        with pytest.raises(ValueError, match='No token counts in these texts'): measure()


def test_steps_fill_from_the_first_text_that_counts(lm):
    bs = cut_off(lm, 1)[1]
    n = [s['kl'].values.isfinite().sum().item() for *_, s in quality_steps(lm, bs, sizes=(1,))]
    assert n[:2*L]==[0]*L+list(range(1, L+1)) and set(n[2*L:])=={L}


def test_an_overflow_names_its_text(lm, monkeypatch):
    "Also where texts before it have no answer, and in another batch"
    def broken(tail, path, h, b, empty):
        out = replayed(tail, path, h, b, empty)
        return out.masked_fill(b['row'][:, None, None]==5, float('nan'))
    monkeypatch.setattr('sdlab.measure.exact.replayed', broken)
    bs = cut_off(lm, 3)[1]
    for measure in (lambda: quality(lm, bs, sizes=(1,)), lambda: list(quality_steps(lm, bs, sizes=(1,))), lambda: ExactLoss(lm, bs)(Plan(L, (1,)))):
        with pytest.raises(ValueError, match='logits for text 5'): measure()


@torch.no_grad()
def test_a_trial_keeps_streams_and_no_logits(lm):
    "Layers x tokens x width, and what the batches are made of; the logits of the whole model come back from the last stream, to the bit"
    bs = batches(lm, TEXTS, size=3)
    trial = ExactLoss(lm, bs)
    trial(Plan(L, (2,)))
    for whole, b in zip(trial._read, bs):
        held = [t for v in vars(whole).values() for t in (v if isinstance(v, list) else v.values() if isinstance(v, dict) else [v]) if torch.is_tensor(t)]
        B, T = b['input_ids'].shape
        assert sum(t.numel() for t in held if t.is_floating_point())==(L+1)*B*T*lm.d and not any(t.shape[-1]==lm.vocab for t in held)
        assert torch.equal(trial._reference(whole), whole.rows(forward_pass(lm.model, b, lm.device).logits))


def test_a_trial_refuses(lm):
    with pytest.raises(ValueError, match='no texts'): ExactLoss(lm, [])
    with pytest.raises(ValueError, match='No token counts'): ExactLoss(lm, batches(lm, ['a']))
    trial = ExactLoss(lm, batches(lm, TEXTS))
    with pytest.raises(ValueError, match='for a model of 5 blocks, but tiny has 6'): trial(Plan(5, (1,)))
    with pytest.raises(TypeError, match='Surgery takes a Plan'): trial((1, 2))
    assert trial(Plan(L))['kl']==0


@pytest.mark.parametrize('part', ('block', 'attention', 'mlp'))
def test_steps_are_quality(lm, part):
    "Walked to the end, `quality`; on the way, a map that only grows, and after the first batch only gets surer"
    bs, seen = batches(lm, TEXTS, size=3), []
    for done, total, s in quality_steps(lm, bs, part, sizes=(1, 3)): seen.append((done, total, s['kl'].values.isfinite().sum().item(), s['kl'].texts))
    n, want = L+L-2, quality(lm, bs, sizes=(1, 3), part=part)
    assert [o[0] for o in seen]==list(range(1, 2*n+1)) and {o[1] for o in seen}=={2*n}
    assert [o[2] for o in seen]==[*range(1, n+1), *[n]*n] and [o[3] for o in seen]==[3]*(2*n-1)+[4]
    for k in want:
        assert torch.equal(s[k].values.nan_to_num(), want[k].values.nan_to_num()) and torch.equal(s[k].stderr.nan_to_num(), want[k].stderr.nan_to_num())
        assert s[k].part==want[k].part==part and s[k].evidence==want[k].evidence and s[k].metric==want[k].metric
    assert s['kl'].best(3).parts[part]


def test_steps_can_be_left(lm):
    "Closed, broken off or dropped: nothing is hooked, no switch of torch is left turned, nobody else's pass is disturbed"
    was, bs = lm.fingerprint, batches(lm, TEXTS, size=2)
    for k in (1, 7, 30):
        steps = quality_steps(lm, bs)
        for _ in range(k):
            next(steps)
            assert torch.is_grad_enabled() and not hooked(lm.model)
        steps.close()
    lm.model.train()
    steps = quality_steps(lm, bs)
    next(steps)
    assert lm.model.training and lm.model(input_ids=bs[0]['input_ids']).logits.requires_grad
    del steps
    assert lm.model.train(False) and lm.fingerprint==was and not hooked(lm.model)


def test_steps_refuse(lm):
    with pytest.raises(ValueError, match='no texts'): next(quality_steps(lm, []))
    with pytest.raises(ValueError, match="'block', 'attention' or 'mlp'"): next(quality_steps(lm, batches(lm, TEXTS), part='head'))
    with pytest.raises(ValueError, match='a number from 1 to 5'): next(quality_steps(lm, batches(lm, TEXTS), sizes=6))
