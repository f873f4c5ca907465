"Drafting gives nothing away: the text is the teacher's, its distribution too, whatever drafts, however many rows, wherever they end"
import copy, json
from dataclasses import replace
import pandas as pd, pytest, torch
import families
from families import tiny, tokenizer
from sdlab.core.data import context
from sdlab.core.model import LM, load
from sdlab.core.generate import generate
from sdlab.core.plan import Plan
from sdlab.compress.prune import prune
from sdlab.core.units import without
from sdlab.judge import draft as page
from sdlab.judge.draft import DRAFTING, Drafted, draft, self_draft

PROMPTS, NEW = ['a', 'hello there', 'abc def ghi jkl mno', 'q', 'zz top'], 12
NAMES = {'Llama': .05, 'Mistral': .05, 'Gemma3': .4, 'Qwen3-MoE': .05, 'GPT-2': .1, 'OPT': .1, 'BLOOM': .1, 'GPT-NeoX': .05, 'Cohere2': .1} # how much noise makes a student that is right here and there

def noisy(lm, much=.05, seed=1):
    "A student by accident: right here and there"
    new, g = LM(copy.deepcopy(lm.model), lm.tokenizer, f'noisy {lm.name}'), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.model.parameters(): p.add_(torch.randn(p.shape, generator=g)*much*p.std() if p.numel()>1 else 0)
    return new

def family(name, **kwargs): return LM(tiny(name, **kwargs), tokenizer(), name)

@pytest.fixture(scope='module')
def llama(): return family('Llama')

# ---- the teacher's text, token for token

@pytest.mark.parametrize('name', NAMES)
def test_greedy_is_the_teachers(name):
    lm = family(name)
    d = draft(noisy(lm, NAMES[name]), lm, PROMPTS, k=3, decoding=replace(DRAFTING, max_new_tokens=NEW, batch_size=5))
    assert d.texts == d.alone == tuple(generate(lm, PROMPTS, NEW)) and d.same == 1
    assert 0 < d.acceptance.value < 1                                             # rows went on at different paces
    s = self_draft(lm, Plan(6, (3,)), PROMPTS, k=3, timed=False, decoding=replace(DRAFTING, max_new_tokens=NEW))
    assert s.texts == d.texts and list(s.work.blocks) == [3, 2, 3]

@pytest.mark.parametrize('name', ['Llama', 'GPT-NeoX'])
def test_transformers_assisted_generation_says_the_same(name):
    lm = family(name)
    student = noisy(lm)
    d = draft(student, lm, PROMPTS[1:], k=3, timed=False, decoding=replace(DRAFTING, max_new_tokens=NEW, batch_size=1))
    student.model.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule='constant', assistant_confidence_threshold=0.)
    for p, ids in zip(PROMPTS[1:], d.ids):
        x = torch.tensor([lm.tokenizer(p).input_ids])
        out = lm.model.generate(x, assistant_model=student.model, do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=sorted(lm.stops))
        assert out[0, x.shape[1]:].tolist() == ids

@pytest.mark.parametrize('k', [1, 2, 40])
def test_any_length_of_draft(llama, k):
    d = draft(noisy(llama), llama, PROMPTS, k=k, decoding=replace(DRAFTING, max_new_tokens=NEW, batch_size=3))
    assert d.texts == d.alone and d.rounds.drafted.max() <= min(k, NEW-1)
    assert d.rounds.groupby('prompt').emitted.sum().tolist() == [len(o) for o in d.ids]

def test_one_token_needs_no_draft(llama):
    d = draft(noisy(llama), llama, PROMPTS, decoding=replace(DRAFTING, max_new_tokens=1))
    assert d.texts == d.alone and not d.rounds.drafted.any() and (d.rounds.emitted == 1).all() and d.acceptance.value != d.acceptance.value

def test_what_a_prompt_gets_does_not_depend_on_its_neighbours(llama):
    a, b = (draft(noisy(llama), llama, PROMPTS, k=3, timed=False, decoding=replace(DRAFTING, temperature=2., max_new_tokens=NEW, seed=5, batch_size=n)) for n in (1, 5))
    assert a.ids == b.ids and a.rounds.equals(b.rounds)
    assert a.ids != draft(noisy(llama), llama, PROMPTS, k=3, timed=False, decoding=replace(DRAFTING, temperature=2., max_new_tokens=NEW, seed=6)).ids

@pytest.mark.parametrize('temperature', [0., 1.5])
def test_a_teacher_that_drafts_for_itself_is_never_refused(llama, temperature):
    d = draft(llama, llama, PROMPTS, k=3, decoding=replace(DRAFTING, temperature=temperature, max_new_tokens=NEW))
    assert d.texts == d.alone and d.acceptance == (1, 1, 1) and d.alpha.value == 1   # the very numbers that `generate` draws with
    assert (d.rounds.emitted <= 4).all() and d.cost_ratio == 1

def test_a_stop_inside_a_draft(llama):
    said = draft(llama, llama, PROMPTS, timed=False, decoding=replace(DRAFTING, max_new_tokens=NEW)).ids[1]
    end = next(t for i, t in enumerate(said) if i >= 4 and t not in said[:i])
    lm = LM(llama.model, llama.tokenizer)
    lm.model.generation_config, was = copy.deepcopy(lm.model.generation_config), lm.model.generation_config
    lm.model.generation_config.eos_token_id = [2, end]
    try:
        for student in (lm, noisy(lm)):
            for bonus in (draft, lambda *a, **kw: self_draft(lm, Plan(6, (4,)), *a[2:], **kw, bonus=False)):
                d = bonus(student, lm, PROMPTS, k=5, decoding=replace(DRAFTING, max_new_tokens=NEW))
                assert d.texts == d.alone and d.ids[1] == said[:said.index(end)+1]
                assert d.rounds.groupby('prompt').emitted.sum().tolist() == [len(o) for o in d.ids]
                assert not any(t in lm.stops for o in d.ids for t in o[:-1])
    finally: lm.model.generation_config = was

@pytest.mark.parametrize('name', ['GPT-2', 'Llama'])
def test_up_to_the_end_of_the_context(name):
    lm = family(name)
    long = [[5]*(context(lm)-n) for n in (1, 3, 7)]+[[6, 7]]
    d = draft(noisy(lm), lm, long, k=4, decoding=replace(DRAFTING, max_new_tokens=8))
    assert d.texts == d.alone and [len(o) for o in d.ids][:3] == [1, 3, 7]

def test_vocabularies_padded_to_different_sizes(llama):
    for wide, narrow in ((112, 100), (100, 112)):
        teacher, student = family('Llama', vocab_size=wide), family('Llama', vocab_size=narrow)
        d = draft(student, teacher, PROMPTS, k=2, decoding=replace(DRAFTING, max_new_tokens=NEW))
        assert d.texts == d.alone

def test_models_are_left_as_they_were(llama):
    student = noisy(llama)
    for o in (student, llama): o.model.train()
    dice, before = torch.get_rng_state(), {k: v.clone() for k, v in llama.model.state_dict().items()}
    draft(student, llama, PROMPTS, decoding=replace(DRAFTING, temperature=1., max_new_tokens=4))
    self_draft(llama, Plan(6, (4,)), PROMPTS, decoding=replace(DRAFTING, max_new_tokens=4))
    assert all(m.training for o in (student, llama) for m in o.model.modules()) and torch.equal(dice, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in llama.model.state_dict().items()) and not any(m._forward_hooks for m in llama.model.modules())
    llama.model.eval()

# ---- its distribution

@pytest.fixture(scope='module')
def dice():
    "A teacher of seven tokens, and the exact probabilities of every text of three that it may write"
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(families, 'VOCAB', 7)
        teacher = LM(tiny('Llama', vocab_size=7), tokenizer())
    stops, T, ids, truth = teacher.stops, 3., teacher.tokenizer('ab').input_ids, {}
    def walk(said, p):
        if len(said) == 3 or said and said[-1] in stops: truth[said] = p; return
        with torch.no_grad(): ps = (teacher.model(torch.tensor([ids+list(said)])).logits[0, -1].double()/T).softmax(-1)
        for t in range(7): walk(said+(t,), p*ps[t].item())
    walk((), 1.)
    assert sum(truth.values()) == pytest.approx(1) and len(truth) > 50
    return teacher, noisy(teacher, .5), T, truth

def odds(d, truth):
    "Is it by chance that texts are as frequent as they are? p of a chi-square test; rare ones count as one"
    stats = pytest.importorskip('scipy.stats')
    n, seen = len(d.ids), pd.Series([tuple(o) for o in d.ids]).value_counts()
    assert set(seen.index) <= set(truth)
    rows = pd.DataFrame([(seen.get(k, 0), n*p) for k, p in truth.items()], columns=['seen', 'want'])
    rows = rows.groupby(rows.want.where(rows.want < 5).notna().map({True: 'rare'}).fillna(pd.Series(rows.index.astype(str)))).sum()
    return stats.chisquare(rows.seen, rows.want).pvalue

def many(dice, **kwargs):
    teacher, student, T, _ = dice
    return draft(student, teacher, ['ab']*2500, timed=False, **kwargs, decoding=replace(DRAFTING, temperature=T, max_new_tokens=3, batch_size=500))

def test_the_distribution_is_the_teachers(dice):
    d = many(dice, k=2)
    assert .2 < d.alpha.value < .95                                               # it is a test of both branches
    assert odds(d, dice[-1]) > .001
    teacher, _, T, truth = dice
    s = self_draft(teacher, Plan(6, (2, 4)), ['ab']*2500, k=2, bonus=False, timed=False, decoding=replace(DRAFTING, temperature=T, max_new_tokens=3, batch_size=500))
    assert s.alpha.value < .95 and odds(s, truth) > .001

@pytest.mark.parametrize('mistake', ['keep all', 'replace by p', 'never bonus'])
def test_that_the_check_of_the_distribution_can_fail(dice, monkeypatch, mistake):
    right = page._verify
    def wrong(p, q, d, n, u):
        if mistake == 'keep all': return right(p, q, d, n, u*torch.tensor([1., 0., 1.])[:, None, None])
        a, t = right(p, q, d, n, u)
        b = torch.arange(len(a))
        if mistake == 'never bonus': return a, torch.where(a == n, d[b, (a-1).clamp(min=0)] if d.shape[1] else t, t)
        return a, torch.where(a == n, t, page.pick_tokens(p[b, a].log(), u[2, b, a], 1.))
    monkeypatch.setattr(page, '_verify', wrong)
    assert odds(many(dice, k=2), dice[-1]) < 1e-6

# ---- the teacher's own first blocks

def test_shared_blocks_are_run_once(llama):
    plan = Plan(6, (3, 4))
    kw = dict(k=3, decoding=replace(DRAFTING, max_new_tokens=NEW, batch_size=1), timed=False)
    a, b, c = draft(without(llama, plan), llama, PROMPTS, **kw), self_draft(llama, plan, PROMPTS, **kw), self_draft(llama, plan, PROMPTS, bonus=False, **kw)
    assert a.ids == b.ids == c.ids and a.rounds.equals(b.rounds) and c.verify < 1 == b.verify
    wa, wb, wc = (o.work.set_index('part') for o in (a, b, c))
    assert wb.tokens['shared'] == wb.tokens['teacher'] == wa.tokens['teacher'] and wb.tokens['drafter'] == wa.tokens['drafter']
    block = sum(p.numel() for p in llama.blocks[0].parameters() if p.ndim == 2)
    assert wa.macs.sum()-wb.macs.sum() == 3*block*wa.tokens['drafter']            # what is saved: three blocks for every token that was drafted
    assert wb.block_calls.sum() == wa.block_calls.sum() and wc.calls['shared'] < wb.calls['shared']
    assert c.rounds.emitted.max() <= 3

def test_a_round_without_a_bonus(llama):
    kw = dict(k=3, decoding=replace(DRAFTING, max_new_tokens=NEW), timed=False)
    same = copy.deepcopy(llama.model)                                             # the last two blocks add nothing: a drafter without them is never wrong
    for b in same.model.layers[4:]: b.self_attn.o_proj.weight.data.zero_(), b.mlp.down_proj.weight.data.zero_()
    lm = LM(same, llama.tokenizer)
    a, b = (self_draft(lm, Plan(6, (4, 5)), PROMPTS, bonus=o, **kw) for o in (True, False))
    assert a.ids == b.ids and a.acceptance.value == b.acceptance.value == 1
    for o, n in ((a.rounds, 4), (b.rounds, 3)):                                   # three drafts and a bonus, or three drafts, until the text ends
        inside = o['round'] < o.groupby('prompt')['round'].transform('max')
        assert inside.sum() >= 5 and (o.emitted[inside] == n).all()

def test_a_student_whose_first_blocks_are_the_teachers(llama):
    healed = prune(llama, Plan(6, (3, 4)))
    with torch.no_grad(): healed.blocks[2].mlp.up_proj.weight.mul_(1.01)          # trained from block 2 on
    d = self_draft(llama, healed, PROMPTS, k=3, decoding=replace(DRAFTING, max_new_tokens=NEW))
    assert d.same == 1 and list(d.work.blocks) == [2, 2, 4] and d.rounds.equals(draft(healed, llama, PROMPTS, k=3, decoding=replace(DRAFTING, max_new_tokens=NEW)).rounds)
    with torch.no_grad(): healed.model.get_input_embeddings().weight[50] *= 1.01  # a single word's embedding
    with pytest.raises(ValueError, match='shares no first block'): self_draft(llama, healed, PROMPTS)

def test_one_block_is_left_to_the_student(llama):
    d = self_draft(llama, Plan(6, (4, 5)), PROMPTS, k=3, decoding=replace(DRAFTING, max_new_tokens=NEW))      # all that is left is shared
    assert d.same == 1 and list(d.work.blocks) == [3, 1, 3]

# ---- the numbers

def by_hand(rows, k=3, bonus=True, **kwargs):
    rounds = pd.DataFrame(rows, columns=['prompt', 'round', 'drafted', 'accepted', 'emitted'])
    return Drafted('d', 't', k, 0., ('',)*2, ([], []), rounds, pd.DataFrame(), .1, 2., **kwargs, bonus=bonus)

def test_numbers_by_hand():
    d = by_hand([(0, 0, 3, 3, 4), (0, 1, 3, 0, 1), (0, 2, 2, 1, 2), (1, 0, 3, 2, 3)], alone=('', 'x'), alone_seconds=3.)
    f = d.frame()
    assert f.drafted.tolist() == [4, 4, 3] and f.looked_at.tolist() == [4, 3, 2] and f.accepted.tolist() == [3, 2, 1]
    assert f.conditional.tolist() == pytest.approx([3/4, 2/3, 1/2]) and f.marginal.tolist() == pytest.approx([3/4, 2/4, 1/3])
    assert d.acceptance.value == pytest.approx(6/11) and d.alpha.value == pytest.approx(6/9)
    assert d.accepted_length['without bonus'].value == pytest.approx(6/4) and d.accepted_length['with bonus'].value == pytest.approx(10/4)
    a, s = 6/9, d.speedup
    assert s['leviathan'].value == pytest.approx((1-a**4)/(1-a)/1.3) and s['improvement'].value == pytest.approx(2.5/1.3) and s['measured'] == 1.5 and d.same == .5
    assert all(o.low <= o.value <= o.high for o in (d.acceptance, d.alpha, s['improvement'], s['leviathan']))
    row = d.totals().iloc[0]
    assert row.rounds == 4 and row.tokens == 10 and row.improvement == s['improvement'].value and row.acceptance_low == d.acceptance.low

def test_without_a_bonus_the_geometric_sum_has_one_term_less():
    d = by_hand([(0, 0, 3, 3, 3), (1, 0, 3, 1, 2)], bonus=False, verify=.5)
    a = d.alpha.value
    assert a == pytest.approx(4/5) and d.speedup['leviathan'].value == pytest.approx((1-a**3)/(1-a)/.8) and d.speedup['measured'] is None

def test_it_shows_itself(llama):
    d = draft(noisy(llama), llama, PROMPTS, k=2, decoding=replace(DRAFTING, max_new_tokens=4))
    evil = Drafted(**{**{f: getattr(d, f) for f in d.__dataclass_fields__}, 'drafter': '<script>'})
    assert '<script>' not in evil._repr_html_() and 'bootstrap over 5 prompts' in evil._repr_html_() and 'drafts 2 for' in repr(d)
    ax = d.plot(title='mine')
    assert ax.get_title() == 'mine' and len(ax.lines) == 2
    import matplotlib.pyplot as plt; plt.close('all')

# ---- what is refused

def test_refusals(llama):
    student = noisy(llama)
    for kw, what in ((dict(k=0), '`k` is a whole number of at least 1, not 0'), (dict(k=1.5), '`k` is'), (dict(decoding=replace(DRAFTING, batch_size=0)), '`batch_size`'), (dict(decoding=replace(DRAFTING, temperature=-1)), '`temperature` is 0'), (dict(decoding=replace(DRAFTING, max_new_tokens=0)), 'max_new_tokens')):
        with pytest.raises(ValueError, match=what): draft(student, llama, PROMPTS, **kw)
    with pytest.raises(ValueError, match='no prompts'): draft(student, llama, [])
    with pytest.raises(TypeError, match='must be a list'): draft(student, llama, 'one prompt')
    with pytest.raises(TypeError, match='are LMs, not LlamaForCausalLM'): draft(student.model, llama, PROMPTS)
    with pytest.raises(ValueError, match='different vocabularies'): draft(load(), llama, PROMPTS)
    with pytest.raises(ValueError, match='reads no more than 16'): draft(family('Llama', max_position_embeddings=16), llama, PROMPTS)
    with pytest.raises(ValueError, match='shares no first block'): self_draft(llama, Plan(6, (0,)), PROMPTS)
    with pytest.raises(ValueError, match='This plan is for a model of 5'): self_draft(llama, Plan(5, (2,)), PROMPTS)

def test_a_recurrent_state_is_refused():
    lm = LM(tiny(('mamba2', dict(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2))), tokenizer(), 'mamba2')
    with pytest.raises(ValueError, match='cannot take a drafted token back'): draft(lm, lm, PROMPTS)

# ---- a real model on real prompts

def test_spec_bench(data):
    folder, file = data/'models'/'stories-260k', data/'spec-bench'/'question.jsonl'
    if not folder.is_dir() or not file.is_file(): pytest.skip('no stories-260k, or no Spec-Bench')
    teacher = load(folder)
    asked = [json.loads(o)['turns'][0] for o in file.read_text(encoding='utf-8').splitlines()]
    short = [o for o in asked if len(teacher.tokenizer(o).input_ids) < 120][::20][:6]
    d = draft(without(teacher, Plan(teacher.n, (teacher.n-2,))), teacher, short, k=3, decoding=replace(DRAFTING, max_new_tokens=24, batch_size=3))
    assert d.same == 1 and len(short) == 6 and 0 < d.alpha.value < 1

def test_prompts_from_an_iterator_and_odd_temperatures(llama):
    "They are read once and asked of both; the alternative was an empty text of the teacher alone, and nothing said"
    student = noisy(llama)
    for run in (lambda p: draft(student, llama, p, decoding=replace(DRAFTING, max_new_tokens=4)), lambda p: self_draft(llama, Plan(6, (3,)), p, decoding=replace(DRAFTING, max_new_tokens=4))):
        d = run(o for o in PROMPTS)
        assert d.same == 1 and len(d.alone) == len(PROMPTS)
        with pytest.raises(ValueError, match='There are no prompts'): run(o for o in ())
        with pytest.raises(TypeError, match='must be a list of prompts'): run('a')
    for t in (float('nan'), float('inf'), None, '1'):
        with pytest.raises(ValueError, match='`temperature` is 0'): draft(student, llama, PROMPTS, decoding=replace(DRAFTING, temperature=t))
