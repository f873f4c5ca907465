"""Tiny random models of many families, made so that a wrong cut shows.

Six blocks that differ from one another (mixed kinds of attention, windows shorter than the text, dense blocks among
mixtures), weights large enough that the greedy token is never a near-tie, and a tokenizer of single characters."""
import json, re, string
import torch, transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

L, VOCAB, WINDOW = 6, 100, 5
SLIDE, FULL = 'sliding_attention', 'full_attention'
MIXED = [SLIDE, FULL, FULL, SLIDE, SLIDE, FULL]   # no two cuts of it look alike

BASE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEAD = dict(BASE, head_dim=8)
MOE = dict(num_experts_per_tok=2)
MLP_ONLY = dict(num_experts=4, moe_intermediate_size=24, norm_topk_prob=True, **MOE)

FAMILIES = {   # name in the table: (model type, fields of its config)
    'Llama':      ('llama', BASE),
    'Mistral':    ('mistral', dict(BASE, sliding_window=WINDOW)),
    'Mixtral':    ('mixtral', dict(BASE, num_local_experts=4, sliding_window=WINDOW, **MOE)),
    'Qwen2':      ('qwen2', dict(BASE, layer_types=MIXED, use_sliding_window=True, sliding_window=WINDOW, tie_word_embeddings=True)),
    'Qwen3':      ('qwen3', dict(HEAD, layer_types=MIXED, use_sliding_window=True, sliding_window=WINDOW)),
    'Qwen3-MoE':  ('qwen3_moe', dict(HEAD, mlp_only_layers=[1, 4], **MLP_ONLY)),
    'Gemma2':     ('gemma2', dict(HEAD, layer_types=MIXED, sliding_window=WINDOW, query_pre_attn_scalar=8)),
    'Gemma3':     ('gemma3_text', dict(HEAD, layer_types=MIXED, sliding_window=WINDOW, query_pre_attn_scalar=8)),
    'Phi-3':      ('phi3', dict(BASE, sliding_window=WINDOW)),
    'GPT-2':      ('gpt2', dict(n_embd=32, n_layer=L, n_head=4, n_positions=128, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)),
    'GPT-NeoX':   ('gpt_neox', BASE),
    'OPT':        ('opt', dict(BASE, ffn_dim=48, word_embed_proj_dim=32)),
    'Falcon':     ('falcon', dict(BASE, alibi=False, new_decoder_architecture=True, num_kv_heads=2)),
    'BLOOM':      ('bloom', dict(hidden_size=32, n_layer=L, n_head=4, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    'StarCoder2': ('starcoder2', dict(BASE, sliding_window=WINDOW)),
    'OLMo2':      ('olmo2', BASE),
    'OLMo3':      ('olmo3', dict(BASE, layer_types=MIXED, sliding_window=WINDOW)),
    'Granite':    ('granite', dict(BASE, residual_multiplier=.7, embedding_multiplier=2.)),
    'Cohere2':    ('cohere2', dict(HEAD, layer_types=MIXED, sliding_window=WINDOW, logit_scale=.5)),
    'SmolLM3':    ('smollm3', dict(BASE, no_rope_layers=[1, 1, 0, 1, 0, 0], layer_types=MIXED, use_sliding_window=True, sliding_window=WINDOW)),
    'StableLM':   ('stablelm', dict(BASE, partial_rotary_factor=.5)),
    'GLM-4':      ('glm4', dict(HEAD, partial_rotary_factor=.5)),
}


def config(name, **kwargs):
    "The config of a family, or of `(model type, fields)`"
    kind, fields = FAMILIES[name] if isinstance(name, str) else name
    return AutoConfig.for_model(kind, **{**fields, **kwargs})


def loud(model, seed=0):
    "Every tensor drawn again, so large that each block and each norm matters"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if p.dim() > 1: p.copy_(torch.randn(p.shape, generator=g)*2.5/p.shape[-1]**.5)
            else: p.copy_(p + .3*torch.randn(p.shape, generator=g))
    return model.eval()


def tiny(name, seed=0, **kwargs):
    "A random model of a family"
    torch.manual_seed(seed)
    return loud(AutoModelForCausalLM.from_config(config(name, **kwargs)), seed)


def plain(folder, n):
    "What programs other than transformers read of a checkpoint of `n` blocks: no code of its own, tensors numbered from 0 without a gap, lists as long as the model is deep"
    c = json.loads((folder/'config.json').read_text())
    assert 'auto_map' not in c and not list(folder.glob('*.py')) and hasattr(transformers, c['architectures'][0]), c
    assert n==next(c[k] for k in ('num_hidden_layers', 'n_layer') if k in c)
    with safe_open(folder/'model.safetensors', 'pt') as f: found = {int(m[1]) for k in f.keys() if (m := re.search(r'\.(?:layers|h)\.(\d+)\.', k))}
    assert found==set(range(n)), found
    for k, v in c.items():
        if not isinstance(v, list) or k=='architectures': continue
        assert all(i<n for i in v) if k=='mlp_only_layers' else len(v)==n, (k, v)    # numbers of blocks, or an entry for each


def tokenizer(chat=False, pad=True):
    "One token per character, `VOCAB` at most"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, Regex
    words = ['<pad>', '<bos>', '<eos>', '<unk>'] + list(dict.fromkeys(string.ascii_letters + string.digits + ' ' + string.punctuation + '\n'))
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words[:VOCAB])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tok.decoder = decoders.Fuse()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<bos>', eos_token='<eos>', unk_token='<unk>', **(dict(pad_token='<pad>') if pad else {}))
    if chat: tok.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role']=='assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    return tok


# Where the two halves of a block are, for tests that take them out from outside: the only place that knows names
HALVES = {'attention': ('self_attn', 'attn', 'attention', 'self_attention'), 'mlp': ('mlp', 'fc2', 'feed_forward')}


def half(block, part):
    "The module that gives what one half of `block` adds to the stream"
    return next(getattr(block, k) for k in HALVES[part] if hasattr(block, k))


def nothing(m, args, kwargs, out):
    "A forward hook: the half adds nothing (where it adds the stream it was given by itself, that alone comes out)"
    given = kwargs.get('residual', next((o for o in args[1:2] if type(m).__name__.startswith('Bloom')), None))
    zero = lambda o: torch.zeros_like(o) if given is None else given
    return (zero(out[0]), *out[1:]) if isinstance(out, tuple) else zero(out)


class deaf:
    "Inside, these halves of the blocks of `lm` add nothing, by hooks from outside"
    def __init__(self, lm, attn=(), mlp=()): self.mods = [half(lm.blocks[i], k) for k, idx in (('attention', attn), ('mlp', mlp)) for i in idx]
    def __enter__(self): self.hooks = [m.register_forward_hook(nothing, with_kwargs=True) for m in self.mods]
    def __exit__(self, *_):
        for h in self.hooks: h.remove()
