"""Choosing: iterative cutting on a model with a secret, tables that line up, and what is refused before anything is measured"""
import numpy as np, pandas as pd, pytest, torch
from families import L, tiny, tokenizer
from sdlab.core.stats import Rank, rank_correlation
from sdlab.measure.agree import block_study, deal, exact, rank_agreement, iterative, one_shot_or_iterative, picks, span_table
from sdlab.compress.prune import prune
from sdlab.core.units import without
from sdlab.measure.exact import quality
from sdlab.core.data import batches
from sdlab.core.model import LM
from sdlab.core.plan import Plan
from sdlab.measure.scores import Scores
from sdlab.measure.importance import deepest, influence, random_spans

TEXTS = [f'{a} {b}' for a in ('Ann has', 'Ben sees', 'x = 1;', 'One dog:') for b in ('12 pens.', 'why?', 'far away')]


@pytest.fixture(scope='module')
def lm(): return LM(tiny('Qwen3'), tokenizer(), 'tiny')


@pytest.fixture(scope='module')
def draws(lm): return [batches(lm, o, size=4) for o in deal(TEXTS, 3)]


@pytest.mark.parametrize('n', range(2, 33))
def test_deepest_but_last(n):
    "Blocks L-1-n..L-2, whatever is asked; the span with the last block is spared longest"
    s = deepest(n)
    for k in range(1, n):
        assert s.best(k).drop==tuple(range(n-1-k, n-1))==s.spans().best(k).drop
        assert s.spans().values[:n+1-k, k-1].argmax()==n-k


def test_iterative_sees_what_is_left(lm):
    "Blocks 1 and 2 can each be spared as long as the other is there: one-shot takes both, iterative one of them and then 4"
    def measure(m):
        v = [dict(zip(range(L), (9, 1, 2, 8, 3, 7)))[i]+(20 if i in (1, 2) and not {1, 2}<=set(m.kept) else 0) for i in m.kept]
        return Scores('secret', torch.tensor(v, dtype=torch.float64), kept=m.kept)
    assert measure(lm).best(2).drop==(1, 2) and iterative(lm, 2, measure, step=2).drop==(1, 2)
    plan = iterative(lm, 3, measure)
    assert plan.drop==(1, 4, 5) and [o['drop'] for o in plan.evidence['rounds']]==[[1], [4], [5]] and plan.n==L
    assert iterative(lm, 3, measure, step=2).drop==(1, 2, 4)
    t = one_shot_or_iterative(lm, {'secret': measure}, batches(lm, TEXTS[:4], size=4), sizes=(1, 2)).set_index(['how', 'n'])
    assert t['drop'].to_dict()=={('one-shot', 1): '(1,)', ('one-shot', 2): '(1, 2)', ('iterative', 1): '(1,)', ('iterative', 2): '(1, 4)'}
    assert t.kl['iterative', 1]==t.kl['one-shot', 1]


@torch.no_grad()
def test_exact_keeps_the_whole_model_as_the_reference(lm, draws):
    "In the second round the divergence of block i is that of both cuts from the whole model; of a model cut before, in its own numbers"
    m, kl = exact(lm, draws[0]), quality(lm, draws[0])['kl']
    second = m(without(lm, Plan(L, (2,))))
    assert second.L==L-1 and second.kept==(0, 1, 3, 4, 5)
    assert abs(second.values[1]-kl.score(1, 2)[0])<1e-5 and abs(second.values[2]-kl.score(2, 2)[0])<1e-5
    cut = prune(lm, Plan(L, (0,)))
    again, want = exact(cut, draws[0], 'loss')(without(cut, Plan(L-1, (1,)))), quality(cut, draws[0])['loss']
    assert again.kept==(1, 3, 4, 5) and abs(again.values[0]-want.score(0, 2)[0])<1e-5
    assert iterative(cut, 2, exact(cut, draws[0])).n==L-1


def test_the_model_is_left_as_it_was(lm, draws):
    was = lm.fingerprint
    iterative(lm, 2, lambda m: influence(m, draws[0]))
    block_study(lm, draws[:2], sizes=(2,), samples=20)
    assert lm.fingerprint==was and not [o for o in lm.model.modules() if o._forward_hooks or o._forward_pre_hooks]


def test_rank_correlation_against_scipy():
    "With ties, with several draws, within groups; and an interval that holds the truth about as often as it says"
    from scipy.stats import spearmanr
    g = np.random.default_rng(0)
    x, y = g.integers(0, 5, 30), g.integers(0, 5, 30)
    assert abs(rank_correlation(x, y).rho-spearmanr(x, y)[0])<1e-12
    both = rank_correlation(np.stack([x, y]), y)
    assert abs(both.rho-(spearmanr(x, y)[0]+1)/2)<1e-12 and both.n==30
    assert rank_correlation(x, y)==rank_correlation(x, y) and isinstance(rank_correlation(x, y), Rank)
    z = np.array([1., 2, 3, 1, 2, 3])
    assert rank_correlation(z+[0, 0, 0, 9, 9, 9], z-[0, 0, 0, 9, 9, 9], within=[0]*3+[1]*3, draws=50).rho==pytest.approx(1)
    hits = 0
    for s in range(60):
        u = np.random.default_rng(s).normal(size=(2, 40))
        r = rank_correlation(u[0], u[0]+u[1], draws=200, seed=s)
        hits += r.low<=.69<=r.high                                   # Spearman's of two normals with Pearson's .707: 6/pi asin(.707/2)
    assert hits>=50
    for bad in (([1, 2], [1, 2]), ([1, np.nan, 2, 3], [1, 2, np.nan, 4])):
        with pytest.raises(ValueError, match='at least 3 pairs of numbers, and there are 2'): rank_correlation(*bad)
    with pytest.raises(ValueError, match='must be pairs'): rank_correlation(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match='3 pairs, but 2 names'): rank_correlation([1, 2, 3], [1, 2, 3], within=[0, 1])


def test_tables_line_up(lm):
    "A table in any order, with seeds, with spans left out, gives the correlation of its spans"
    s = random_spans(6, 3)
    t = span_table({'random': s}, sizes=(1, 2, 3))
    assert len(t)==6+5+4 and all(t.value==[s.score(l, n)[0] for l, n in zip(t['first'], t['size'])])
    seeds = pd.concat([t.assign(loss=t.value+e) for e in (-.1, .1)]).sample(frac=1, random_state=0)
    told = rank_agreement({'random': s}, seeds, 'loss', draws=20)
    assert told.rho.tolist()==pytest.approx([1]*4) and told.spans.tolist()==[6, 5, 4, 15] and told.n.tolist()==[1, 2, 3, 0]
    with pytest.raises(ValueError, match="no column 'first'"): rank_agreement({'random': s}, t.drop(columns='first'))
    with pytest.raises(ValueError, match='span of 3 blocks from 5, which is outside a model of 6'): rank_agreement({'random': s}, pd.DataFrame(dict(first=[5], size=[3], value=[0.])))
    with pytest.raises(TypeError, match="'x' is not `Scores`"): rank_agreement({'x': [1.]}, t)
    with pytest.raises(ValueError, match='at least 3 pairs'): rank_agreement({'random': s}, t.iloc[:2])


def test_a_study_shows_itself(lm, draws):
    from matplotlib.axes import Axes
    s = block_study(lm, draws, measures={'first': lambda m, bs: Scores('place', torch.arange(m.n, dtype=torch.float64))}, samples=50)
    assert s.sizes==(1, 2, 3) and s.texts==(4, 4, 4) and list(s.scores)[-1]=='first' and all(len(v)==3 for v in s.scores.values())
    assert isinstance(s.plot(), Axes) and isinstance(s.plot(target='loss'), Axes) and 'first' in s._repr_markdown_() and '3 draws of 4 texts' in repr(s)
    assert len(s.frame())==8*2*4 and len(s.picks)==8*3*3 and len(s.costs())==8*3 and len(s.spans())==8*3*(6+5+4)
    assert s.costs().set_index(['measure', 'n']).kinds['deepest', 3]==1 and s.picks.place.between(1, 7).all()
    best = s.picks.groupby(['draw', 'n']).kl.min()
    assert (best>=0).all() and not s.picks.isna().any().any()
    for bad, what in (([], '0 draw'), (draws[:1], 'two at least'), ([draws[0], draws[1], draws[0]], 'Draws 0 and 2 share a text')):
        with pytest.raises(ValueError, match=what): block_study(lm, bad)
    with pytest.raises(ValueError, match='a number from 1 to 5'): block_study(lm, draws, sizes=(6,))


def test_picks_of_one_and_of_many():
    t = picks({'deepest': deepest(8), 'random': [random_spans(8, s) for s in range(2)]})
    assert t.columns.tolist()==['measure', 'draw', 'n', 'drop'] and sorted(set(t.n))==[1, 2, 3, 4] and len(t)==4*3
    assert t[(t.measure=='deepest')&(t.n==1)]['drop'].tolist()==['(6,)']
    with pytest.raises(ValueError, match='models of 6, 8 blocks'): picks({'a': deepest(8), 'b': deepest(6)})


def test_refused_before_anything_is_measured(lm, draws, monkeypatch):
    "Halves, names that are taken, sizes and measures that cannot be: said at once, not after the dear part, and never taken for something else"
    from sdlab.measure import agree
    def dear(*args, **kwargs): raise AssertionError('too late')
    half = influence(lm, draws[0], part='attention')
    for f in (lambda: picks({'half': half}), lambda: span_table({'half': half}), lambda: rank_agreement({'half': half}, pd.DataFrame(dict(first=[0], size=[1], value=[0.])))):
        with pytest.raises(ValueError, match="'half' scores attentions, and these tables are about whole blocks"): f()
    monkeypatch.setattr(agree, 'measured', dear), monkeypatch.setattr(agree, 'ExactLoss', dear)
    for sizes in ((0, 2), (3, 6), (2., 3)):
        with pytest.raises(ValueError, match='a number from 1 to 5'): block_study(lm, draws, sizes=sizes)
        with pytest.raises(ValueError, match='a number from 1 to 5'): one_shot_or_iterative(lm, {'deepest': dear}, draws[0], sizes=sizes)
        with pytest.raises(ValueError, match='a number from 1 to 5'): picks({'deepest': deepest(6)}, sizes=sizes)
    with pytest.raises(ValueError, match='`sizes` is empty'): block_study(lm, draws, sizes=())
    for name in ('exact KL', 'random', 'block influence'):
        with pytest.raises(ValueError, match=f'called {name!r} is there already'): block_study(lm, draws, measures={name: dear})
    for f, what in ((lambda m, bs: 3, 'is not `Scores`'), (lambda m, bs: half, 'scores attentions'), (lambda m, bs: deepest(5), 'models of 5, 6 blocks')):
        with pytest.raises((TypeError, ValueError), match=what): block_study(lm, draws, measures={'mine': f})


def test_pairs_are_pairs(lm, draws):
    "One number is nobody's partner but one's, a column is no row; sizes that a measure did not measure are left out, an iterator of sizes is read once for all"
    for a, b in (([1.], [1, 2, 3, 4.]), (np.arange(5.)[:, None], np.arange(5.))):
        with pytest.raises(ValueError, match='must be pairs'): rank_correlation(a, b)
    some = quality(lm, draws[0], sizes=(1, 2))['kl']
    world = span_table({'random': random_spans(6, 1)}, sizes=(1, 2, 3))
    told = rank_agreement({'some': some, 'deepest': deepest(6)}, world, draws=20).set_index(['measure', 'n']).spans
    assert told.to_dict()=={('some', 1): 6, ('some', 2): 5, ('some', 0): 11, ('deepest', 1): 6, ('deepest', 2): 5, ('deepest', 3): 4, ('deepest', 0): 15}
    assert len(picks({'a': deepest(6), 'b': deepest(6)}, sizes=(n for n in (1, 2))))==4
