"Intervals against truths that are not the code: enumeration, SciPy, closed forms"
import itertools, math
import numpy as np, pytest
from sdlab.core.stats import INCONCLUSIVE, central95, comparison_verdict, draw_counts, draw_places, rank_correlation, resampled_ratio, wilson

@pytest.mark.parametrize('k, n', [(0, 20), (3, 7), (37, 40), (100, 100)])
def test_wilson_solves_its_equation(k, n):
    from scipy.stats import binomtest
    low, high = wilson(k, n)
    for p in (low, high): assert p in (0., 1.) or abs((k/n-p)**2-1.96**2*p*(1-p)/n)<1e-12
    peer = binomtest(k, n).proportion_ci(method='wilson')
    assert (low, high)==pytest.approx((peer.low, peer.high), abs=2e-5)

def test_counts_and_places_draw_alike():
    rng = np.random.default_rng(0)
    counts, places = draw_counts(rng, 7, 4000), draw_places(rng, 7, 4000)
    assert (counts.sum(1)==7).all() and counts.shape==places.shape==(4000, 7)
    twice = np.stack([np.bincount(p, minlength=7) for p in places])
    assert counts.mean(0)==pytest.approx(np.ones(7), abs=.05) and counts.var(0)==pytest.approx(twice.var(0), rel=.12)

def test_a_ratio_of_sums_by_enumeration():
    value, weight = np.array([[[1., 4., 2.]]]), np.array([[[1., 2., 5.]]])
    every = [value[0,0,list(i)].sum()/weight[0,0,list(i)].sum() for i in itertools.product(range(3), repeat=3)]
    got = resampled_ratio(value, weight, 60_000, [3])[0]
    assert np.quantile(got, (.1, .5, .9))==pytest.approx(np.quantile(every, (.1, .5, .9)), abs=.03)
    assert got.mean()==pytest.approx(np.mean(every), abs=.01)

def test_arms_share_their_draws_and_tasks_their_trainings():
    same = np.random.default_rng(0).random((1, 3, 20)).repeat(2, 0)
    a, b = resampled_ratio(same, np.ones_like(same), 500, [0, 1])
    assert (a==b).all()
    runs = np.repeat([[[1.], [0.], [1.]]], 9, 2)
    first, second = (resampled_ratio(runs, np.ones_like(runs), 500, [0, k])[0] for k in (1, 2))
    assert (first==second).all()

def test_pieces_do_not_change_the_runs():
    many = np.random.default_rng(1).random((2, 2, 2**21))[:, :, :2**21]
    assert resampled_ratio(many, np.ones_like(many), 5, [0]).shape==(2, 5)

def test_the_middle_of_nothing_is_nothing():
    assert all(map(math.isnan, central95(np.array([math.nan, math.inf]))))
    assert central95(np.array([math.nan, *range(1001)]))==pytest.approx((25, 975))

def test_verdicts():
    assert comparison_verdict(0, 1, True, 'a', 'b')==INCONCLUSIVE and comparison_verdict(-2, -1, True, 'a', 'b')=='b is better'

def test_ranks_within_groups_and_refusals():
    from scipy.stats import spearmanr
    g = np.random.default_rng(5)
    x, y = g.normal(size=(2, 30))
    assert rank_correlation(x, y).rho==pytest.approx(spearmanr(x, y)[0])
    groups = np.repeat([0, 1, 2], 10)
    assert rank_correlation(groups*100+x, groups*-100+x, within=groups, draws=50).rho==pytest.approx(1)
    three = rank_correlation(np.stack([x, x, x]), y, draws=50)
    assert three.n==30 and three.rho==pytest.approx(spearmanr(x, y)[0])
    for a, b in ((np.ones((2, 5)), np.ones((3, 5))), ([1, 2, 3, 4], [1, 2, 3])):
        with pytest.raises(ValueError, match='must be pairs'): rank_correlation(a, b)
