"""CKA of tokens and with a Gaussian kernel: what must not matter does not, what cannot be compared is refused (several processes: `sharer.py`)"""
import copy
import pytest, torch
from families import L, tiny, tokenizer
from sdlab.compress.prune import prune
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.measure.cka import cka, centred_rbf, hsic, kernels, median_distance, rbf_cka

TEXTS = [f'{t} {i}' for i, t in enumerate(['Ann has 12 pens', 'the', 'One day a small dog', 'far away', 'x+y', 'who ran to the river?', 'a b', 'zebra']*3)]
TOKENS = dict(examples='tokens', tokens_per_text=3)
KINDS = [TOKENS, dict(kernel='rbf', sigma=.7), dict(kernel='rbf', pool='mean', unbiased=False), TOKENS|dict(kernel='rbf')]


@pytest.fixture(scope='module')
def tok(): return tokenizer()


@pytest.fixture(scope='module')
def lm(tok): return LM(tiny('Qwen3'), tok, 'tiny')


def close(a, b, eps=1e-5): assert torch.allclose(torch.as_tensor(a).double().nan_to_num(9), torch.as_tensor(b).double().nan_to_num(9), atol=eps, rtol=0), (a, b)


@pytest.mark.parametrize('how', KINDS)
@torch.no_grad()
def test_it_does_not_see_how_it_was_run(lm, tok, how):
    "Nor how many texts ran at once, nor which model came first, nor whether one was kept as kernels; groups add up"
    other, how = LM(tiny('GPT-2', seed=3), tok, 'other'), dict(how, group=8)
    m = cka(lm, other, TEXTS, **how)
    assert m.groups==(8,)*(9 if how.get('examples') else 3) and m.matrix.shape==(L+1, L+1) and m.matrix.isfinite().all()
    close(cka(lm, other, TEXTS, batch_size=3, **how).matrix, m.matrix)
    close(cka(other, lm, TEXTS, **how).matrix, m.matrix.T)
    a, b = kernels(lm, TEXTS, **how), kernels(other, TEXTS, **how)
    close(cka(a, b, TEXTS, **how).matrix, m.matrix, 1e-7)
    parts = [hsic(x.rows, y.rows, n, how.get('unbiased', True)) for x, y, n in zip(a.parts, b.parts, a.groups)]
    close(sum(parts[1:], parts[0]).cka, m.matrix, 1e-7)
    with pytest.raises(ValueError, match='other texts or settings'): cka(a, lm, TEXTS, **{**how, 'seed': 1})
    with pytest.raises(ValueError, match='other texts or settings'): cka(a, lm, TEXTS, group=8)


@pytest.mark.parametrize('how', KINDS)
@torch.no_grad()
def test_before_the_cut_an_unhealed_student_is_its_teacher(lm, how):
    m = cka(prune(lm, Plan(L, (2, 3))), lm, TEXTS, **how)
    close(m.diagonal[:2], [1, 1])
    close(m.matrix[2, 2], 1)                    # what enters the teacher's block 4 left block 1
    assert (m.diagonal[2:]<.999).all() and m.dropped==(2, 3)


@torch.no_grad()
def test_a_token_is_where_its_text_alone_has_it(lm):
    "One token of each text, drawn again and again, are all of its tokens but the first; their states are those without padding"
    k = kernels(lm, TEXTS[:5], points=True, examples='tokens', tokens_per_text=60)
    for i, x in enumerate(k.points.view(L+1, 5, 60, -1).unbind(1)):
        ids = torch.tensor([lm.tokenizer(TEXTS[i]).input_ids])
        want = torch.stack(lm.model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
        gaps = (x[:-1].mT[..., None]-want[:, 1:].mT[..., None, :]).abs().amax((0, 1))       # each drawn state against each token
        assert (gaps.min(1).values<1e-4).all() and (gaps.min(0).values<1e-4).all()


@torch.no_grad()
def test_seeds_and_draws(lm):
    other = LM(tiny('Qwen3', seed=5), lm.tokenizer, 'other')
    a, b = (cka(lm, other, TEXTS, seed=s, **TOKENS).matrix for s in (0, 1))
    assert torch.equal(a, cka(lm, other, TEXTS, **TOKENS).matrix) and not torch.allclose(a, b, atol=1e-3)


@torch.no_grad()
def test_tokens_of_two_tokenizers_are_refused_before_anything_runs(lm, tok, monkeypatch):
    words = copy.deepcopy(tok)
    words.add_tokens(['pens'])
    other = LM(tiny('Qwen3'), words, 'other')
    monkeypatch.setattr(type(lm.model), 'forward', lambda *a, **k: pytest.fail('a model ran'))
    with pytest.raises(ValueError, match=r"tiny and other read these texts as different tokens.*examples='texts'"): cka(lm, other, TEXTS, **TOKENS)
    for bad, what in ((dict(examples='rows'), "'texts' or 'tokens'"), (dict(kernel='poly'), "'linear' or 'rbf'"), (dict(kernel='rbf', sigma=-1), 'above 0'),
                      (TOKENS|dict(pool='mean'), 'a point of its own'), (TOKENS|dict(tokens_per_text=2.5), 'at least 1')):
        with pytest.raises(ValueError, match=what): cka(lm, lm, TEXTS, **bad)
        with pytest.raises(ValueError, match=what): kernels(lm, TEXTS, **bad)
    with pytest.raises(ValueError, match='at least 4 texts, and there are only 3'): cka(lm, lm, TEXTS[:3], **TOKENS)


@torch.no_grad()
def test_it_says_what_it_is(lm):
    m = cka(lm, lm, TEXTS, kernel='rbf', sigma=.4, **TOKENS)
    assert m.n==3*len(TEXTS) and f'{m!r}'.endswith('72 tokens in 3 groups, RBF 0.4 kernel') and 'RBF 0.4' in m._repr_markdown_()
    assert 'RBF 0.4, unbiased, 72 tokens' in m.plot().figure.axes[1].get_ylabel() and repr(kernels(lm, TEXTS, **TOKENS)).endswith('72 tokens in 3 groups')


def test_the_bandwidth():
    "The median of the distances of different points; a common part as large as in real streams does not round it away"
    x = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(0))
    close(median_distance(x), [torch.pdist(o.double()).quantile(.5) for o in x], 1e-6)
    close(median_distance(x+1000), median_distance(x), 1e-3)
    close(centred_rbf(5*x.double(), 5*median_distance(x)), centred_rbf(x.double(), median_distance(x)), 1e-5)
    assert abs(rbf_cka(x[0], x[1]))<.3


def test_a_bandwidth_that_sees_nobody_is_said():
    "Too narrow a kernel leaves 0/0: blank, with the reason"
    from families import tiny, tokenizer
    lm = LM(tiny('Llama'), tokenizer(), 'tiny')
    texts = [f'{a} {b} {c}' for a in ('Ann has', 'Ben sees', 'One dog:') for b in ('12 pens.', 'why?') for c in 'abcd']
    m = cka(lm, lm, texts, kernel='rbf', sigma=1e-4)
    blank = [f'Layer {l} of tiny is blank' for l in range(1, 7)]
    assert m.matrix[1:, 1:].isnan().all() and all(sum(o.startswith(b) and 'raise `sigma`' in o for o in m.blank)==2 for b in blank)
    assert not [o for o in cka(lm, lm, texts, kernel='rbf').blank if 'raise' in o]
