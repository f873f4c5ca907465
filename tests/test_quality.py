"""Exact quality by replay is the quality of the model that is really cut: every span, every family; and it leaves nothing behind"""
import pytest, torch
from families import FAMILIES, L, tiny, tokenizer
from sdlab.compress.depth import without
from sdlab.compress.quality import Replay, quality, _replay, _tail
from sdlab.core.data import batches
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.measure.stream import Likelihood, scan, watching, _call

TEXTS = ['Ann has 12 pens.', 'Why?', 'One morning a very small dog', 'x = 1']


@pytest.fixture
def lm(): return LM(tiny('Qwen3'), tokenizer(), 'tiny')


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_a_replay_is_the_cut_model(name):
    "Logits of every span on texts padded on the left: those of the view without it"
    lm = LM(tiny(name), tokenizer(), name)
    b, hs = batches(lm, TEXTS, size=4)[0], []
    real = b['attention_mask'].bool()
    with watching(lm.blocks, lambda l, h: hs.append(h)): whole = _call(lm.model, b, lm.device).logits
    spans = [(l, e) for e in range(1, L+1) for l in range(e) if e-l<L]
    for l, e in spans:
        want, got = _call(without(lm, Plan(L, range(l, e))).model, b, lm.device).logits, _replay(_tail(lm, e), lm.path, hs[l], b, e==L)
        assert torch.allclose(got[real], want[real], atol=1e-5, rtol=1e-5), (l, e)
        assert not torch.allclose(got[real], whole[real], atol=1e-2), (l, e)    # the test could have failed


def test_batches_do_not_matter(lm):
    "Nor their size, nor the side of the padding, nor how many logits fit at once"
    one, all4 = (quality(lm, batches(lm, TEXTS, size=n))['kl'].values for n in (1, 4))
    assert torch.allclose(one.nan_to_num(), all4.nan_to_num(), atol=1e-5)
    m = Replay(lm)
    few, = scan(lm, batches(lm, TEXTS, size=4), m, max_logits=3000)
    assert torch.allclose(few.mean[1, 0, 1:L], one[0, :L-1], atol=1e-5)


def test_only_answers_count(lm):
    rows = [dict(prompt='2+2=', completion='4'), dict(prompt='a very long question, ', completion='yes and no')]
    b = batches(lm, rows, size=2)
    got, (said,) = quality(lm, b, sizes=(2,))['loss'], scan(without(lm, Plan(L, (1, 2))), b, Likelihood())
    assert abs(got.score(1, 2)[0]-(said['nll']/said['tokens']).mean().item())<1e-5


def test_the_model_is_left_as_it_was(lm):
    was, flags = lm.fingerprint, [m.training for m in lm.model.train().modules()]
    m = Replay(lm, sizes=(1,))
    def breaking():
        yield from batches(lm, TEXTS, size=2)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): scan(lm, breaking(), m)
    assert lm.fingerprint==was and [o.training for o in lm.model.modules()]==flags
    hooked = [o for root in (lm.model, *m._tails.values()) for o in root.modules() if o._forward_hooks or o._forward_pre_hooks]
    assert not hooked and m.tally.n==0 and not any(t.training for t in m._tails.values())


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
        out = _replay(tail, path, h, b, empty)
        return out.masked_fill(b['row'][:, None, None]==2, float('nan')) if empty else out
    monkeypatch.setattr('sdlab.compress.quality._replay', broken)
    with pytest.raises(ValueError, match='Without blocks 4 to 5 the model gives NaN or infinite logits for text 2'): quality(lm, batches(lm, TEXTS, size=4), sizes=(2,))


def test_refusals(lm):
    bs = batches(lm, TEXTS)
    for bad in ((0,), (L,), (True,), (1, 2.)):
        with pytest.raises(ValueError, match='sizes go from 1 to 5'): quality(lm, bs, sizes=bad)
    with pytest.raises(ValueError, match='`sizes` is empty'): quality(lm, bs, sizes=())
    with pytest.raises(ValueError, match='sizes go from 1 to 5'): quality(lm, bs, sizes=6)
    with pytest.raises(ValueError, match='no texts'): quality(lm, [], sizes=(1,))
    with pytest.raises(ValueError, match='only for 2 blocks, not for 1'): quality(lm, bs, sizes=(2,))['kl'].best(1)
    list(lm.blocks[3].parameters())[0].data.view(-1)[0] = float('nan')
    with pytest.raises(ValueError, match='Block 3 gives NaN'): quality(lm, bs, sizes=(1,))
