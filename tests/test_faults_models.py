"Known faults: padding and wrappers that change a result, models that are refused or accepted wrongly"
import json, shutil, time
import pytest, torch
from faults import fault, find, how, lm_of, outcome, small_lm
from families import BASE, HEAD, MIXED, VOCAB, tiny, tokenizer
from sdlab.all import LM, Plan, Task, batches, distances, load, prune, prune_checkpoint, quality, score, tune, without

decode, prompt_ids = find('core.data:decode'), find('core.data:prompt_ids')
skeleton = find('core.disk:skeleton', 'core.disk:hollow')
TEXTS = ['ok', 'a river ran past the old mill and on', 'who was it?']
LINEAR, FULL, HYBRID = 'linear_attention', 'full_attention', 'hybrid'


def nll(lm, texts): return score(lm, Task('texts', texts, metric='perplexity')).score.tolist()
def close(a, b): return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-3)


def warned_or_same(f, texts=TEXTS):
    "Does `f` give of many texts what it gives of each alone, or does it say that it does not?"
    alone = [f([o])[0] for o in texts]
    got = outcome(f, texts)
    same = got.error is None and (got.value==alone if isinstance(alone[0], str) else close(got.value, alone))
    assert same or got.named('pad|mask|alone|batch'), f'{got.value} in a batch, {alone} alone'


# Padding and wrappers change the result -----------------------------------------------------------------------------
SIZES = 'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'bos_token_id', 'eos_token_id'
PLAIN = {k: BASE[k] for k in SIZES}
SWITCH = dict(original_max_position_embeddings=20)
LONG_ROPE = dict(SWITCH, rope_type='longrope', rope_theta=1e4, short_factor=[1.]*4, long_factor=[6., 12., 24., 48.])
UNMASKED = {   # models whose state or positions do not heed the mask
    'rwkv': ('rwkv', dict(PLAIN, attention_hidden_size=32, context_length=128)),
    'recurrent_gemma': ('recurrent_gemma', dict(HEAD, lru_width=32, attention_window_size=9)),
    'longrope': ('phi3', dict(BASE, **SWITCH, rope_parameters=dict(LONG_ROPE, partial_rotary_factor=1.))),
}
ALONE = 'A text is read and answered as it would be alone, or the batch is refused or spoken of.'


@fault(ALONE)
@pytest.mark.parametrize('kind', UNMASKED)
def test_perplexity_in_a_batch(kind):
    "The perplexity of a text does not depend on what stands beside it"
    lm = lm_of(UNMASKED[kind])
    warned_or_same(lambda texts: nll(lm, texts))


@fault(ALONE)
@pytest.mark.parametrize('kind', [*UNMASKED, 'minimax'])
def test_answers_in_a_batch(kind):
    "An answer does not depend on the other prompts"
    experts = dict(num_local_experts=4, num_experts_per_tok=2, block_size=4)
    lm = lm_of(UNMASKED.get(kind) or ('minimax', dict(HEAD, layer_types=[LINEAR, FULL]*3, **experts)))
    warned_or_same(lambda texts: lm.reply(texts, 4))


@fault(ALONE)
@pytest.mark.parametrize('kind', ['rwkv', 'recurrent_gemma'])
def test_distances_in_a_batch(kind):
    "A measure of texts does not depend on the size of the batches"
    lm = lm_of(UNMASKED[kind])
    one, all_ = (outcome(lambda: distances(lm, batches(lm, TEXTS, size=k)).values[2, 0].item()) for k in (1, 3))
    assert all_.named('pad|mask|alone|batch') or close(one.value, all_.value), f'{one} {all_}'


@pytest.fixture(scope='module')
def adapted():
    "GPT-2, which has learned positions, with an adapter around it that is not merged"
    rows = [dict(prompt='a', completion='bc')]*2
    loose = how(tune, lora=2, merge=False, progress=False)
    return tune(lm_of('GPT-2'), rows, epochs=1, batch_size=2, **loose)


@fault('A wrapper passes position_ids on: rows of a batch get the numbers that they get alone.')
def test_adapter_on_absolute_positions(adapted):
    "The padded rows of an unmerged adapter stand at their own positions"
    warned_or_same(lambda texts: nll(adapted, texts))


@fault('What is measured on an unmerged adapter is what is measured on the merged one.')
def test_measures_of_an_adapter(adapted):
    "Measures take a model with an adapter, or refuse it by name"
    got = outcome(lambda: distances(adapted, batches(adapted, TEXTS)).values[1, 0].item())
    assert got.refused('adapter|PEFT|merge') or isinstance(got.value, float), got


# Models refused wrongly ---------------------------------------------------------------------------------------------
@fault('A dict of the config that is keyed by block is renumbered as lists are.')
@pytest.mark.parametrize('drop', [(0,), (2,), (3, 4)])
def test_config_keyed_by_block(drop):
    "Gemma 4 can be cut"
    own = dict(layer_types=MIXED, sliding_window=5, num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    lm = lm_of(('gemma4_text', dict(HEAD, **own)))
    got = outcome(prune, lm, Plan(6, drop))
    assert got.error is None and got.value.n==6-len(drop), got


def filled():
    "A model whose pad token has no row in the embedding"
    tok = tokenizer(pad=False)
    tok.add_special_tokens(dict(pad_token='<filler>'))
    return LM(tiny('Llama'), tok, 'filled')


PAIR = [dict(prompt='ab', completion='c'), dict(prompt='d', completion='efg')]
FILLED = {
    'reply': lambda lm: lm.reply(['abc', 'd'], 3),
    'tune': lambda lm: tune(lm, PAIR, epochs=1, **how(tune, progress=False)),
    'distances': lambda lm: distances(lm, batches(lm, TEXTS)),
}


@fault('Padding is masked, so a pad token outside the vocabulary is replaced by another.')
@pytest.mark.parametrize('what', FILLED)
def test_pad_token_outside_the_vocabulary(what):
    "A tokenizer that pads with an id of its own can be used"
    assert (got := outcome(FILLED[what], filled())).error is None, got


@fault('A token that the embedding has no row for is refused, and named.')
def test_added_token_in_a_prompt():
    "A word that was added to the tokenizer alone is no index error"
    tok = tokenizer()
    tok.add_tokens(['<more>'])
    got = outcome(LM(tiny('Llama'), tok, 'added').reply, 'ab<more>c', 2)
    assert got.refused('<more>|vocabulary|100'), got


@fault('A shard that is missing is said to be missing.')
def test_missing_shard(tmp_path):
    "A download that lacks a file is not said to hold pickles"
    lm = small_lm()
    lm.model.save_pretrained(tmp_path, max_shard_size='60KB')
    lm.tokenizer.save_pretrained(tmp_path)
    gone = sorted(tmp_path.glob('*.safetensors'))[2]
    gone.unlink()
    got = outcome(load, tmp_path)
    assert got.refused('missing|lacks|not there|'+gone.name) and 'pickle' not in str(got.error), got


@pytest.fixture
def untied(tmp_path):
    "A folder whose config ties head and embedding, and whose weights do not"
    folder = small_lm().save(tmp_path/'untied')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config|dict(tie_word_embeddings=True)))
    return folder


@fault('A refusal gives the true reason: the head is tied in the config and another one in the file.')
def test_reload_that_differs_before_the_cut(untied):
    "No other span is advised where none can work"
    lm = load(untied)
    got = [outcome(prune, lm, Plan(6, (i,))) for i in (1, 4)]
    true = [o.error is None or o.refused('tie|head|embedding') and 'another span' not in str(o.error) for o in got]
    assert all(true), got[0]


@fault('A model on disk and the same model in memory have one fingerprint.')
def test_fingerprint_of_an_untied_folder(untied):
    "What is on disk is what is opened"
    assert skeleton(untied).fingerprint==load(untied).fingerprint


@fault('What cannot be cut in memory cannot be cut on disk.')
def test_untied_folder_on_disk(untied, tmp_path):
    "Both ways of pruning say the same"
    on_disk = outcome(prune_checkpoint, untied, Plan(6, (1,)), tmp_path/'cut')
    assert (on_disk.error is None)==(outcome(prune, load(untied), Plan(6, (1,))).error is None), on_disk


# Models accepted wrongly --------------------------------------------------------------------------------------------
@fault('A model in which a word sees what comes after it is refused.')
@pytest.mark.parametrize('kind', ['bert', 'roberta', 'electra'])
def test_bidirectional_models(kind):
    "An encoder is no language model"
    got = outcome(lm_of, (kind, dict(BASE, is_decoder=False, max_position_embeddings=130)))
    assert got.refused('direction|causal|decoder|after|later|future'), got


@fault('A list of one module is no stack of blocks.')
def test_list_of_one_module():
    "Gemma 3n with two streams is not taken for a model of one block"
    own = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4, altup_num_inputs=2,
               num_kv_shared_layers=2)
    shape = dict(intermediate_size=[48]*6, activation_sparsity_pattern=[0.]*6, layer_types=MIXED, sliding_window=5)
    got = outcome(lambda: lm_of(('gemma3n_text', {**HEAD, **own, **shape})).n)
    assert got.refused('block|stack|stream') or got.value==6, got


MAMBA = dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_expand=2, mamba_n_groups=1)
NO_EXPERTS = dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48)
GRANITE = dict(MAMBA, **NO_EXPERTS, layer_types=['mamba', 'mamba', 'attention', 'mamba', 'attention', 'mamba'])
HYBRIDS = {   # models in which the last block with attention can be cut away: (model, what goes)
    'granite': (('granitemoehybrid', {**BASE, **GRANITE}), (2, 4)),
    'lfm2': (('lfm2', dict(BASE, layer_types=['conv', FULL, 'conv', 'conv', FULL, 'conv'])), (1, 4)),
    'zamba': (('zamba', dict(BASE, mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, use_mamba_kernels=False,
              layers_block_type=['mamba', HYBRID, 'mamba', 'mamba', HYBRID, 'mamba'])), (1, 4)),
}


@fault('A cut is refused where the model could not generate afterwards, or it generates without a cache.')
@pytest.mark.parametrize('kind', HYBRIDS)
def test_last_attention_cut_away(kind):
    "A hybrid without its last attention answers, or is not made"
    model, drop = HYBRIDS[kind]
    cut = outcome(prune, lm_of(model), Plan(6, drop))
    if cut.error is None: cut = outcome(cut.value.reply, 'ab', 2)
    assert cut.error is None or cut.refused('attention|block'), cut


@fault('A view runs, or is refused when it is made.')
def test_view_of_shared_blocks():
    "A view of Zamba 2 is not accepted and then fails in its first pass"
    kinds = dict(layers_block_type=['mamba', 'mamba', HYBRID, 'mamba', HYBRID, 'mamba'], num_mem_blocks=1,
                 adapter_rank=4, use_mem_rope=False, use_shared_attention_adapter=False, attention_head_dim=16)
    mamba = dict(mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16, use_mamba_kernels=False)
    view = outcome(without, lm_of(('zamba2', {**BASE, **kinds, **mamba})), Plan(6, (3,)))
    if view.error is None: view = outcome(view.value.reply, 'ab', 2)
    assert view.error is None or view.refused('block'), view


@pytest.fixture
def jamba():
    "Two attentions, four state spaces, experts in every other block; the kinds follow from a period and an offset"
    experts = dict(num_experts=2, num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1)
    mamba = dict(mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
    return lm_of(('jamba', dict(BASE, attn_layer_period=3, attn_layer_offset=2, **mamba, **experts)))


@fault('The kinds of the blocks that are left stay theirs, also where a config computes them.')
@pytest.mark.parametrize('block', [0, 2])
def test_view_with_a_mask(jamba, block):
    "A view of Jamba takes a padded batch as the model does"
    b = batches(jamba, TEXTS)[0]
    run = lambda lm: lm.model(input_ids=b['input_ids'], attention_mask=b['attention_mask'], use_cache=False).logits
    assert run(jamba).isfinite().all()
    got = outcome(lambda: run(without(jamba, Plan(6, (block,)))))
    assert got.refused('block') or got.error is None, got


@fault('Exact quality gives numbers for padded batches, or one sentence.')
def test_exact_quality_of_jamba(jamba):
    "A foreign error does not end the measure"
    got = outcome(lambda: quality(jamba, batches(jamba, TEXTS), sizes=[1])['kl'].values)
    assert got.refused('jamba|mask|block|pad') or got.error is None, got


@fault('Decoding settings that a checkpoint carries are followed or named.')
def test_decoding_settings_of_a_checkpoint():
    "A checkpoint that wants no repetition gets what transformers would do, or a word"
    lm = lm_of('Llama', seed=3)
    before, ids = lm.reply('what', 12), torch.tensor([prompt_ids(lm.tokenizer, 'what')])
    lm.model.generation_config.repetition_penalty = 6.
    theirs = lm.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=sorted(lm.stops))[0, ids.shape[1]:]
    if decode(lm.tokenizer, theirs.tolist())==before: raise RuntimeError('this penalty changes nothing')
    got = outcome(lm.reply, 'what', 12)
    assert got.named('repetition_penalty') or got.value==decode(lm.tokenizer, theirs.tolist()), got


# What an untrusted checkpoint says of itself ------------------------------------------------------------------------
STORY = dict(teacher='t', teacher_fingerprint='x', teacher_n=6, kept=[*range(6)], steps=[])
STORIES = {
    'a text': 'made by hand',
    'a list': ['prune'],
    'a number': 7,
    'nothing kept': dict(kept=None),
    'no teacher': dict(kept=[*range(6)]),
    'letters kept': STORY|dict(kept=[*'abcdef']),
    'a block kept twice': dict(kept=[1]*6),
    'steps as a text': STORY|dict(steps='none'),
    'silent as a text': STORY|dict(silent='both'),
    'blocks as a text': STORY|dict(teacher=7, teacher_n='6', steps=[{}]),
}


def opened(folder, story):
    "A folder that says this of its past"
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config|dict(sdlab=story)))
    return load(folder)


@pytest.fixture(scope='module')
def saved(tmp_path_factory): return small_lm().save(tmp_path_factory.mktemp('past')/'lm')


@pytest.mark.parametrize('kind', STORIES)
def test_untrusted_past(saved, tmp_path, kind):
    "What a config claims of its past breaks nothing later"
    folder = shutil.copytree(saved, tmp_path/'lm')
    got = outcome(lambda: prune(opened(folder, STORIES[kind]), Plan(6, (2,))).save(tmp_path/'cut'))
    assert got.error is None or got.refused('sdlab|past|provenance|history'), got


def test_untrusted_past_of_a_million_blocks(saved, tmp_path):
    "A checkpoint cannot have a million marks printed"
    folder = shutil.copytree(saved, tmp_path/'lm')
    got = outcome(lambda: len(repr(opened(folder, STORY|dict(teacher_n=10**6)))))
    assert got.refused('sdlab|past|provenance|history|blocks') or got.value < 5000, got


def test_plan_of_many_blocks():
    "The time to show a plan does not grow with the square of its blocks"
    start = time.perf_counter()
    got = outcome(lambda: str(Plan(12000, (3,))))
    assert got.refused('block') or time.perf_counter()-start < .2
