"Small tokenizers of the kinds that are met in the wild, made on the spot"
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ['Once upon a time there was a river.', 'Ann has 12 pens. Ben has 3 pens.', 'Who has more? Ann has more. The answer is 9.', '2+3 = 5\n#### 5'] * 3
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HEADERS = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|sep|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n\n{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role=='user' %}[INST] {{ m.content }} [/INST]{% elif m.role=='assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
MARKS = ['<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|sep|>']

def toy(kind='bytes', chat=None, bos=True, eos=True):
    "kind: 'bytes' (GPT-2), 'spaces' (a space in front of each text), 'prepend' (one more space in front, as Llama-2), 'words'"
    t = Tokenizer(models.WordLevel(unk_token='<unk>') if kind=='words' else models.BPE(unk_token='<unk>', byte_fallback=False))
    if kind=='bytes': t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind=='spaces': t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind=='prepend':
        t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    else: t.pre_tokenizer = pre_tokenizers.Whitespace()
    make = trainers.WordLevelTrainer if kind=='words' else trainers.BpeTrainer
    more = {} if kind=='words' else dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(TEXT+['[INST] Who [/INST]', 'user: assistant: system: '], make(vocab_size=500, special_tokens=MARKS, show_progress=False, **more))
    if bos: t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', t.token_to_id('<s>'))])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>', bos_token='<s>' if bos else None, eos_token='</s>' if eos else None,
                                  extra_special_tokens=MARKS[3:], clean_up_tokenization_spaces=False)
    tok.chat_template = chat
    return tok
