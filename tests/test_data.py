"core.data where it would not teach: every kind of tokenizer, every kind of file, the real sets"
import json, random, warnings
import pandas as pd, pytest, torch
from datasets import Dataset, DatasetDict
from sdlab.core.data import (batches, collate, completion_ids, context, decode, encode, encoded, fingerprint, overlap, prompt_ids, rows, split, stop_ids)
from toys import CHATML, HEADERS, INST, PLAIN, TEXT, toy

PLAINS = {'bytes': lambda: toy(), 'spaces': lambda: toy('spaces'), 'prepend': lambda: toy('prepend'), 'no bos': lambda: toy(bos=False), 'words': lambda: toy('words')}
CHATS = {'chatml': (lambda: toy(chat=CHATML, bos=False), '<|im_end|>'), 'headers': (lambda: toy(chat=HEADERS), '<|im_end|>'),
         'inst': (lambda: toy('prepend', chat=INST), '</s>'), 'no end': (lambda: toy(chat=PLAIN, bos=False), '</s>')}
ALL = {**PLAINS, **{k:v[0] for k,v in CHATS.items()}}
ROW = dict(prompt='Who has more?', completion='Ann has 12 pens.')

@pytest.mark.parametrize('kind', ALL)
def test_prompt_and_completion_make_the_row(kind):
    tok = ALL[kind]()
    e = encode(tok, ROW)
    p, c = prompt_ids(tok, ROW['prompt']), completion_ids(tok, ROW['completion'])
    assert e['input_ids']==p+c and e['completion_mask']==[0]*len(p)+[1]*len(c)
    assert e['input_ids'].count(c[-1])==(2 if kind in ('chatml', 'headers') else 1)   # these also close the user's turn
    if tok.bos_token_id is not None: assert e['input_ids'].count(tok.bos_token_id)==(1 if kind!='no bos' else 0)
    assert c[-1] in stop_ids(tok)
    assert encode(tok, {**ROW, 'completion': ROW['completion']+tok.convert_ids_to_tokens(c[-1])})==e
    assert encode(tok, ROW, end=False)['input_ids']==e['input_ids'][:-1]

@pytest.mark.parametrize('kind', CHATS)
def test_end_of_turn_is_the_templates_own(kind):
    make, end = CHATS[kind]
    tok = make()
    assert tok.convert_ids_to_tokens(completion_ids(tok, 'Ann.')[-1])==end
    text = tok.decode(encode(tok, ROW)['input_ids'])
    full = tok.apply_chat_template([dict(role='user', content=ROW['prompt']), dict(role='assistant', content=ROW['completion'])], tokenize=False)
    assert full.replace(' ', '').startswith(text.replace(' ', '')) or end not in full   # what is trained is what the template writes

def test_white_space_that_a_template_writes_before_an_answer_is_learned():
    tok = CHATS['inst'][0]()
    e = encode(tok, ROW)
    assert tok.decode(e['input_ids'], skip_special_tokens=True)=='[INST] Who has more? [/INST] Ann has 12 pens.'

@pytest.mark.parametrize('kind', ['bytes', 'spaces', 'prepend', 'no bos'])
def test_tokenised_apart_reads_as_one(kind):
    tok, r = ALL[kind](), random.Random(0)
    text = ' '.join(TEXT)
    for _ in range(50):
        i, j, k = sorted(r.sample(range(len(text)), 3))
        head, tail = text[i:j], text[j:k]
        if not head.strip() or not tail.strip() or head[0]==' ' or '\n' in head+tail and kind!='bytes': continue
        e = encode(tok, dict(prompt=head, completion=tail), end=False)
        assert tok.decode(e['input_ids'], skip_special_tokens=True)==head+tail
        assert decode(tok, completion_ids(tok, tail, end=False))==tail

def test_any_unicode_survives():
    tok, r = toy(), random.Random(1)
    for _ in range(100):
        s = ''.join(chr(r.choice([r.randrange(32, 127), r.randrange(160, 0x2fff), r.randrange(0x1f300, 0x1f600)])) for _ in range(r.randrange(1, 30)))
        assert decode(tok, completion_ids(tok, s, end=False))==s

@pytest.mark.parametrize('kind', CHATS)
def test_control_tokens_in_text_are_text(kind):
    tok = CHATS[kind][0]()
    special = set(tok.all_special_ids)
    sly = 'a<|im_end|>b</s>c<|im_start|>d'
    plain, bad = encode(tok, dict(prompt='a', completion='b')), encode(tok, dict(prompt=sly, completion=sly+'e'))
    n = lambda e: sorted(i for i in e['input_ids'] if i in special and i!=tok.unk_token_id)
    assert n(bad)==n(plain)

def test_without_pad_and_without_end():
    tok = toy(eos=False, bos=False)
    b = collate(tok, [[5, 6, 7], [8]])
    assert b['attention_mask'].tolist()==[[1, 1, 1], [0, 0, 1]] and b['position_ids'].tolist()==[[0, 1, 2], [0, 0, 0]]
    assert encode(tok, ROW)['input_ids']==prompt_ids(tok, ROW['prompt'])+completion_ids(tok, ROW['completion']) and stop_ids(tok)==set()

@pytest.mark.parametrize('side', ['left', 'right'])
def test_batches_do_not_depend_on_padding(side):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    tok = toy()
    torch.manual_seed(0)
    for m in (GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=.3)),
              LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=.2))):
        m.eval()
        with torch.no_grad():
            alone = [m(torch.tensor([encode(tok, t, end=False)['input_ids']])).logits[0] for t in TEXT[:4]]
            b, = batches(tok, TEXT[:4], size=4, side=side)
            b.pop('completion_mask')
            for x, y, k in zip(alone, m(**b).logits, b['attention_mask'].bool()): torch.testing.assert_close(y[k], x, atol=1e-5, rtol=0)

# rows
def test_sources(tmp_path):
    want = [dict(prompt='a', completion='b'), dict(prompt='c', completion='d')]
    assert list(rows(want))==want==list(rows(Dataset.from_list(want)))==list(rows(DatasetDict(train=Dataset.from_list(want))))==list(rows(pd.DataFrame(want)))
    assert list(rows(['x', 'y'])['text'])==['x', 'y']
    (tmp_path/'one.json').write_text('\n'.join(map(json.dumps, want)))            # JSON lines under the wrong name
    assert list(rows(tmp_path/'one.json'))==want==list(rows(str(tmp_path/'one.json')))
    (tmp_path/'bad.jsonl').write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match='Line 2'): rows(tmp_path/'bad.jsonl')
    with pytest.raises(FileNotFoundError, match='gone.csv'): rows(tmp_path/'gone.csv')
    with pytest.raises(ValueError, match='not a file of rows'): rows(tmp_path)
    for s in ('two words', 3): 
        with pytest.raises(TypeError): rows(s)

def test_columns_and_empty_rows():
    got = rows([dict(prompt='q', completion=[dict(role='assistant', content='a')], text='q a', level=3)])
    assert got.column_names==['prompt', 'completion', 'level']                      # a text beside them would take the end from the answer
    talk = [dict(role='user', content='q'), dict(role='assistant', content='a'), dict(role='user', content='q2')]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        assert len(rows([dict(messages=talk), dict(messages=talk[:2])]))==1         # nobody answered the first
    assert '1 of 2 rows' in str(w[0].message)
    with pytest.raises(ValueError, match='columns a, b'): rows([dict(a=1, b=2)])
    with pytest.raises(ValueError, match='all of them are empty'): rows(['', ' '])
    assert rows([dict(text='a', n=1), dict(text='b', n='two', more=[1])])['n'][1]=='two'   # mixed columns and rows without some are no reason to fail
    assert len(rows(map(str, range(9)), limit=4))==4

def test_choices_pass_through():
    r = dict(prompt='?', choices=['a', 'b'], answer=1)
    assert rows([r])[0]==r
    with pytest.raises(ValueError, match='no completion'): encode(toy(), r)

def test_long_rows_are_counted():
    tok = toy()
    tok.model_max_length = 8
    assert context(tok)==8
    with pytest.warns(UserWarning, match='2 of 3 rows were longer than 8 tokens and were cut'): assert [len(r['input_ids']) for r in encoded(tok, ['a b c', *TEXT[:2]])][1:]==[8, 8]
    with pytest.warns(UserWarning, match='dropped'): assert len(encoded(tok, ['a b c', *TEXT[:2]], long='drop'))==1
    with pytest.raises(ValueError, match='2 of 3 rows are longer'): encoded(tok, ['a b c', *TEXT[:2]], long='raise')

# sides
def test_no_row_ever_changes_side():
    r = random.Random(0)
    texts = [f'row {i} {r.random()}' for i in range(1500)]
    side = lambda ts: {t:k for k,d in split(ts).items() for t in d['text']}
    first = side(texts[:500])
    r.shuffle(texts)
    later = side(texts)
    assert all(later[t]==k for t,k in first.items())
    sizes = {k:len(d) for k,d in split(texts).items()}
    assert sum(sizes.values())==1500 and abs(sizes['calibration']-150)<45 and abs(sizes['evaluation']-150)<45
    one, two = split([dict(prompt='A  b', completion='x')]), split([dict(prompt='a B', completion='y')])
    assert {k:len(d) for k,d in one.items()}=={k:len(d) for k,d in two.items()}
    assert len(split(texts, calibration=0, train=.5, evaluation=.5)['calibration'])==0
    for bad in (dict(train=2), dict(train=-.1)):
        with pytest.raises(ValueError, match='at most 1'): split(texts, **bad)

def test_fingerprint_sees_everything():
    a = [dict(prompt='p', completion='c')]
    prints = {fingerprint(o) for o in (a, [dict(prompt='p', completion='d')], a*2, [dict(a[0], x=1)], ['p'])}
    assert len(prints)==5 and fingerprint(a)==fingerprint(rows(a))

# the real sets
REAL = {'gsm8k/train.jsonl':7473, 'gsm8k/test.jsonl':1319, 'dolly/dolly_train.json':2000, 'llm-adapters/ARC-Easy/train.json':2251, 'llm-adapters/ARC-Challenge/test.json':1172, 'bbh/word_sorting.json':250}

@pytest.mark.parametrize('name', REAL)
def test_real_sets(data, name):
    from transformers import AutoTokenizer
    ds = rows(data/name)
    assert len(ds)==REAL[name] and {'prompt', 'completion'} <= set(ds.column_names)
    tok = AutoTokenizer.from_pretrained(data/'models'/'stories-260k')
    for e,r in zip(encoded(tok, ds.select(range(60)), max_length=10**6), ds):
        assert e['input_ids'][0]==tok.bos_token_id and e['input_ids'][-1]==tok.eos_token_id and e['input_ids'].count(tok.eos_token_id)==1
        tail = [i for i,m in zip(e['input_ids'], e['completion_mask']) if m]
        assert decode(tok, tail)==r['completion']

def test_real_overlaps(data):
    assert len(overlap(data/'gsm8k/train.jsonl', data/'gsm8k/test.jsonl'))==0
    assert len(overlap(data/'llm-adapters/ARC-Easy/train.json', data/'llm-adapters/ARC-Easy/test.json'))==2   # ARC repeats two questions
    ds = rows(data/'truthfulqa/TruthfulQA.csv', columns=dict(prompt='Question', completion='Best Answer'))
    assert len(ds)==817
    with pytest.raises(ValueError, match='columns question_id, category, turns'): rows(data/'spec-bench/question.jsonl')
