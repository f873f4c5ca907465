"Known faults: costs that are counted wrongly, intervals that are too narrow, a training that changes nothing"
import numpy as np, pandas as pd, pytest, torch
from faults import fault, find, how, outcome, small_lm
from families import BASE, HEAD, MIXED, config
from sdlab.all import cost, tune

Recovery = find('judge.recovery:Recovery')
LINEAR, FULL, CHUNK = 'linear_attention', 'full_attention', 'chunked_attention'
FULL_ONCE = [LINEAR]*2+[FULL]+[LINEAR]*3
TWO_OF_FOUR = dict(num_experts_per_tok=2, num_local_experts=4)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MLA = {**BASE, **EXPERTS, **dict(hidden_size=48, num_hidden_layers=3, num_key_value_heads=4, n_routed_experts=4,
       q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14)}
DELTA = {**HEAD, **EXPERTS, **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
         linear_value_head_dim=8, num_experts=4, shared_expert_intermediate_size=16, layer_types=FULL_ONCE)}
LOCAL = dict(hidden_size=32, num_layers=6, num_heads=4, attention_types=[[['global', 'local'], 3]], window_size=24)
CHUNKED = dict(HEAD, attention_chunk_size=48, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48)
JAMBA = dict(BASE, num_experts=2, num_experts_per_tok=1, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=4,
             mamba_dt_rank=4, use_mamba_kernels=False)

GROWTH = {   # (model type, fields, MACs that every token of context adds: in the blocks that see all of it)
    'latent attention 2': ('deepseek_v2', MLA, 3*4*(10+6+14)),
    'latent attention 3': ('deepseek_v3', dict(MLA, n_group=1, topk_group=1), 3*4*(10+6+14)),
    'local blocks': ('gpt_neo', LOCAL, 3*2*32),
    'chunks': ('llama4_text', dict(CHUNKED, layer_types=[CHUNK, FULL, CHUNK, CHUNK, CHUNK, FULL]), 2*2*32),
    'delta rule': ('qwen3_next', DELTA, 2*32),
    'lightning attention': ('minimax', dict(HEAD, **TWO_OF_FOUR, layer_types=[LINEAR, LINEAR, FULL]*2), 2*2*32),
    'convolutions': ('lfm2', dict(BASE, layer_types=['conv', FULL, 'conv', 'conv', 'conv', FULL]), 2*2*32),
    'state spaces between': ('jamba', JAMBA, 2*2*32),
    'state spaces alone': ('mamba', dict(vocab_size=100, hidden_size=32, num_hidden_layers=4), 0),
    'no attention at all': ('rwkv', dict(vocab_size=100, hidden_size=32, num_hidden_layers=4), 0),
}


@fault('Attention costs what its blocks do: latent heads, chunks, windows and linear blocks as they are.')
@pytest.mark.parametrize('kind', GROWTH)
def test_growth_of_the_cost_of_attention(kind):
    "Twice the context costs as much more as the blocks that look at all of it"
    name, fields, each = GROWTH[kind]
    got = outcome(lambda: [cost(config((name, fields)), context=o).attention for o in (300, 600)])
    assert each==0 and got.refused('attention|state') or got.error is None and got.value[1]-got.value[0]==300*each, got


@fault('Biases of experts are added, not multiplied.')
def test_biases_of_experts():
    "What a token multiplies in GPT-OSS"
    c = config(('gpt_oss', dict(HEAD, **TWO_OF_FOUR, layer_types=MIXED, sliding_window=5)))
    queries, keys, router, experts = 2*32*32, 2*32*16, 32*4, 2*(32*2*48+48*32)
    assert cost(c).linear==6*(queries+keys+router+experts)


# Intervals ----------------------------------------------------------------------------------------------------------
def items(arm, score, task='quiz', run=0):
    "A table of items as `score_all` gives it"
    what = dict(task=task, metric='exact', arm=arm, run=run)
    return pd.DataFrame(dict(what, item=range(len(score)), score=score, reference='x'))


def drawn(rng, n, share): return (rng.random(n) < share).astype(float)


def row_of(parts, seed):
    "The line of the student"
    return Recovery(pd.concat(parts), draws=300, seed=seed).frame().set_index('arm').loc['student']


@fault('The interval of a recovery near 100 % covers it about as often as it says.')
def test_coverage_near_the_ceiling():
    "95 % intervals of two good models cover the truth at least nine times in ten"
    hit = []
    for seed in range(60):
        rng = np.random.default_rng([7, seed])
        o = row_of([items(k, drawn(rng, 36, p)) for k, p in (('teacher', .99), ('student', .96))], seed)
        hit.append(o.recovery_low <= 100*.96/.99 <= o.recovery_high)
    assert np.mean(hit) >= .9


@fault('Forty right of forty is no certainty.')
def test_interval_of_a_perfect_score():
    "The interval of the average of two perfect tasks has a width"
    perfect = [items(a, np.ones(40), t) for a in ('teacher', 'student') for t in ('algebra', 'botany')]
    f = Recovery(pd.concat(perfect), draws=200).frame()
    f = f[f.arm=='student']
    assert (f.high > f.low).all() and (f.recovery_high > f.recovery_low).all()


@fault('The interval over five trainings covers the mean of all trainings about as often as it says.')
def test_coverage_over_five_trainings():
    "95 % intervals of scores that vary from training to training cover their mean at least nine times in ten"
    spread, truth, hit = .25, .5, []
    for seed in range(60):
        rng = np.random.default_rng([8, seed])
        shares = rng.normal(truth, spread, 5)
        runs = [items('student', drawn(rng, 100, p), run=i) for i, p in enumerate(shares)]
        o = row_of([items('teacher', np.ones(100)), *runs], seed)
        hit.append(o.low <= truth <= o.high)
    assert np.mean(hit) >= .9


# Training -----------------------------------------------------------------------------------------------------------
@fault('A run of one step trains, or says that it does not.')
def test_run_of_one_step():
    "One step at a learning rate of 0 is no training"
    lm = small_lm()
    rows = [dict(prompt='a', completion='bc')]*2
    got = outcome(tune, lm, rows, epochs=1, batch_size=2, lr=1e-2, **how(tune, progress=False))
    same = all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), got.value.model.parameters()))
    assert got.named('step|warm') or not same
