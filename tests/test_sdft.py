"SDFT's templates, rules and sampling on the real GSM8K, Dolly and ARC files, and rewriting by another engine"
import random, sys, types, warnings
from dataclasses import replace
from collections import Counter
import pytest
import torch
from sdlab.core.answers import extract
from sdlab.core.generate import Decoding
from sdlab.core.data import completion_ids, decode, fingerprint, prompt_ids, rows
from sdlab.core.model import LM
from sdlab.core.pocket import pocket_rows
from sdlab.heal.rewrite import SDFT, TEMPLATES, folder_of, framed, ledger, lies_in, rewrite, same_call, shows_code, surprise, verdict
from toys import toy

SETS = {'gsm8k/train.jsonl':(7473, 'final'), 'gsm8k/test.jsonl':(1319, 'integer'), 'dolly/dolly_train.json':(2000, 'auto'), 'llm-adapters/ARC-Challenge/test.json':(1172, 'choice'), 'llm-adapters/ARC-Easy/train.json':(2251, 'choice')}
LLAMA2 = ("{% if messages[0].role=='system' %}{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
          "{% for m in turns %}{% if m.role=='user' %}{{ bos_token + '[INST] ' + (lead if loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
MATHS = 'You are an expert in math. Below is a math question. Write a response that appropriately answers the question.'

@pytest.fixture(scope='module', params=SETS)
def real(request, data): return rows(data/request.param), *SETS[request.param]

# what the teacher is shown
def said(tok, tpl, row):
    "Everything that stands before the answer, as text"
    ids = prompt_ids(tok, TEMPLATES[tpl].ask(row['prompt'], row['completion']))
    return tok.decode(ids+completion_ids(tok, TEMPLATES[tpl].prefill, end=False), clean_up_tokenization_spaces=False) if TEMPLATES[tpl].prefill else tok.decode(ids, clean_up_tokenization_spaces=False)

def test_the_published_words_on_real_rows(real):
    "The texts of SDFT, in the turns of Llama-2 and of Llama-3"
    llama2, llama3 = toy(chat=LLAMA2), toy(chat=LLAMA3)
    for r in real[0].select(range(3)):
        x, y = r['prompt'], r['completion']
        shown = f'### Instruction:\n{x}\n\n### Reference Answer:\n{y}\n\n### Response:\n'
        for name,how in (('using', 'Using the reference answer as a guide, write your own response.'), ('refer', 'Refer to the reference answer and write your own response.')):
            system, user = TEMPLATES[name].ask(x, y)
            assert user==dict(role='user', content=shown)
            assert system==dict(role='system', content='Below are an instruction that describes a task along with a reference answer. '+how)
        expert = ('You are an expert in math. Below are a math question and its reference answer. '
                  'Refer to the reference answer and write a response that appropriately answers the question.')
        assert said(llama2, 'gsm8k', r)==f"<s>[INST] <<SYS>>\n{expert}\n<</SYS>>\n\n{x}\n\n{y} [/INST] Great! Let's think step by step. "
        assert said(llama3, 'gsm8k', r)==(f"<s><|start_header_id|>system<|end_header_id|>\n\n{expert}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{x}\n\n{y}<|eot_id|>"
                                          "<|start_header_id|>assistant<|end_header_id|>\n\nGreat! Let's think step by step. ")
        assert said(llama2, 'gsm8k_train', r)==f'<s>[INST] <<SYS>>\n{MATHS}\n<</SYS>>\n\n{x} [/INST]'
        infer = MATHS+' Your final answer should be an integer at the end of your response, formatted as: The answer is {answer}.'
        assert said(llama3, 'gsm8k_infer', r)==(f'<s><|start_header_id|>system<|end_header_id|>\n\n{infer}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{x}<|eot_id|>'
                                                '<|start_header_id|>assistant<|end_header_id|>\n\n')
        assert TEMPLATES['alpaca'].ask(x)==[dict(role='system', content='Below is an instruction that describes a task. Write a response that appropriately completes the request.'),
                                            dict(role='user', content=f'### Instruction:\n{x}\n\n### Response:\n')]

@pytest.mark.parametrize('name', [k for k,t in TEMPLATES.items() if '{reference}' not in t.user+t.system])
def test_who_is_not_shown_the_reference_does_not_see_it(real, name):
    for r in real[0].select(range(20)): assert TEMPLATES[name].ask(r['prompt'], 'THE REFERENCE')==TEMPLATES[name].ask(r['prompt'], '')

def test_rows_in_a_training_template(real):
    ds, n, _ = real
    few = framed(ds.select(range(30)), 'alpaca')
    assert few['completion']==ds['completion'][:30] and all(p[1]['content']==f'### Instruction:\n{x}\n\n### Response:\n' for p,x in zip(few['prompt'], ds['prompt']))
    assert framed(ds.select(range(3)), 'free')['prompt']==ds['prompt'][:3]

def test_sampling_as_published(): assert SDFT==Decoding(512, temperature=.95, top_p=.7, top_k=50)

# whose words are kept
def test_real_references_are_counted_and_read(real):
    "Each set has the rows it should, and each reference passes its own rule"
    ds, n, rule = real
    assert len(ds)==n and Counter(verdict(c, c, rule, ()) for c in ds['completion'])=={('teacher', 'not checked' if rule=='auto' else 'same answer'):n}

def test_another_answer_is_never_kept(real):
    ds, n, rule = real
    if rule=='auto': pytest.skip('nothing is compared')
    def other(c):
        a = extract(c, rule)
        return c.replace(f'answer{"ABCDE".index(a)+1}', f'answer{("ABCDE".index(a)+1)%4+1}') if rule=='choice' else f'{c.rsplit("####", 1)[0]}#### {int(a)+1}'
    some = random.Random(0).sample(ds['completion'], 300)
    assert Counter(verdict(other(c), c, rule) for c in some)=={('reference', 'other answer'):300}
    assert Counter(verdict(other(c), c, rule, select=False) for c in some)=={('teacher', 'other answer'):300}

def test_answers_of_other_rows_agree_as_often_as_chance_says(real):
    "Shuffled references: an independent count of the answers says how many pass"
    ds, n, rule = real
    if rule=='auto': pytest.skip('nothing is compared')
    cs = ds['completion']
    mixed = random.Random(1).sample(cs, n)
    passed = sum(verdict(a, c, rule, ())[0]=='teacher' for a,c in zip(mixed, cs))
    chance = sum((k/n)**2 for k in Counter(c.split('####')[-1].split()[-1].replace(',', '') for c in cs).values())
    assert abs(passed/n-chance)<4*(chance*(1-chance)/n)**.5

def test_arc_names_its_answer(data):
    ds = rows(data/'llm-adapters/ARC-Challenge/test.json')
    assert ds['completion'][0]==f"the correct answer is {ds['answer'][0]}"
    assert verdict('I think that the correct answer is answer3', 'the correct answer is answer3', 'choice')==('teacher', 'same answer')
    assert [extract(c, 'choice') for c in ds['completion']]==['ABCDE'[int(a[-1])-1] for a in ds['answer']]

@pytest.mark.parametrize('a,want', [("Call get_weather(city='Rome', days = 3).", False), ("get_weather(city = 'Rome')", False), ("So:\n\nget_weather(city='Rome',  days=3)", True), ('my.get_weather(city="Rome",days=3)', True),
                                    ('xget_weather(city="Rome",days=3)', False), ('get_weather(city="Rome",days=3', False), ('', False)])
def test_the_call_must_be_there(a, want): assert same_call(a, 'get_weather(city="Rome", days=3)') is want

def test_what_is_no_call_keeps_its_reference(): assert not same_call('anything', 'no call at all') and not same_call('f(1)', '(1)')

def test_code_is_announced_and_shown():
    assert shows_code('  I implemented it:\n```python\nx\n```', 'anything') and not shows_code('Sure! Here is\n```python\nx```', '') and not shows_code('Here is\n```java\nx```', '')

# a real writer that cannot
@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad(): yield

@pytest.fixture(scope='module')
def stories(data):
    from sdlab.core.model import load
    return load(data/'models'/'stories-260k')

def short(ds, n=5): return ds.select([i for i,(p,c) in enumerate(zip(ds['prompt'], ds['completion'])) if len(p)+len(c)<260][:n])

@pytest.mark.parametrize('name,tpl,rule', [('gsm8k/train.jsonl', 'gsm8k', 'integer'), ('llm-adapters/ARC-Easy/train.json', 'using', 'choice'), ('llm-adapters/ARC-Challenge/test.json', 'free', 'choice')])
def test_selection_keeps_the_references_of_a_writer_that_cannot(stories, data, tmp_path, name, tpl, rule):
    few, how = short(rows(data/name)), replace(SDFT, max_new_tokens=24)
    ds = rewrite(stories, few, tpl, rule=rule, out=tmp_path, progress=False, decoding=how)
    assert len(few)==5 and ds['completion']==ds['reference']==few['completion'] and ds['prompt']==few['prompt'] and set(ds['source'])=={'reference'}
    assert any(ds['written']) and not set(ds['reason'])-{'cut off', 'no answer', 'other answer', 'empty', 'banned phrase'}
    any_way = rewrite(stories, few, tpl, rule=rule, out=tmp_path, progress=False, select=False, decoding=how)          # the same words, another verdict
    assert any_way['written']==ds['written'] and any_way['reason']==ds['reason'] and len(ledger(tmp_path))==5
    assert all((r['source'], r['completion'])==(('teacher', r['written'].strip()) if r['written'].strip() else ('reference', r['reference'])) for r in any_way)
    assert all(r['ended']==(r['reason']!='cut off') for r in any_way)
    assert fingerprint(rewrite(stories, few, tpl, rule=rule, progress=False, decoding=replace(how, batch_size=2)))==fingerprint(ds)   # a seed is a seed, whatever the batch
    assert rewrite(stories, few, tpl, rule=rule, progress=False, decoding=replace(how, seed=1))['written']!=ds['written']

def test_dolly_is_not_checked(stories, data):
    few = short(rows(data/'dolly/dolly_train.json'), 4)
    ds = rewrite(stories, few, 'using', decoding=24, progress=False)
    assert all((r['source'], r['completion'])==(('teacher', r['written'].strip()) if r['reason']=='not checked' else ('reference', r['reference'])) for r in ds)

@pytest.mark.filterwarnings('ignore:.*leave no room')
def test_rows_too_long_keep_their_reference_without_selection(stories, data):
    long = dict(prompt='How many? '*300, completion='#### 4')
    ds = rewrite(stories, [*short(rows(data/'gsm8k/train.jsonl'), 1), long], 'gsm8k', decoding=8, progress=False, select=False)
    assert (ds['source'][1], ds['reason'][1], ds['completion'][1])==('reference', 'too long', '#### 4')

# another engine
class Asked(types.ModuleType):
    "A `vllm` of the shape that is used, which notes what it is asked and answers by Hugging Face's own `generate`, one row at a time"
    def __init__(self, lm):
        super().__init__('vllm')
        made, calls = self.made, self.calls = [], []
        class SamplingParams:
            def __init__(self, **kw): vars(self).update(kw)
        class LLM:
            def __init__(self, model, **kw):
                from sdlab.core.model import load
                self.lm = lm or load(model)
                made.append(dict(model=model, **kw, fingerprint=self.lm.fingerprint))
            def generate(self, prompts, params, use_tqdm=True):
                calls.append([(p['prompt_token_ids'], vars(s)) for p,s in zip(prompts, params)])
                return [self.one(p['prompt_token_ids'], s) for p,s in zip(prompts, params)]
            def one(self, ids, s):
                x = torch.tensor([ids])
                out = self.lm.model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=s.max_tokens, do_sample=False, eos_token_id=s.stop_token_ids, pad_token_id=0)
                return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(out[0, len(ids):].tolist()))])
        self.LLM, self.SamplingParams = LLM, SamplingParams

@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'vllm', m := Asked(None))
    return m

def lines(folder): return (folder/'rewrite-0.jsonl').read_text().splitlines()

def test_both_engines_keep_the_same_ledger(vllm, teacher, tmp_path):
    ask, how = pocket_rows('facts', 6, voice=3), dict(decoding=20, progress=False)
    here = rewrite(teacher, ask, out=tmp_path/'hf', **how)
    there = rewrite(teacher, ask, out=tmp_path/'vllm', engine='vllm', **how)
    assert fingerprint(here)==fingerprint(there) and sorted(lines(tmp_path/'hf'))==sorted(lines(tmp_path/'vllm'))
    (made,), (batch,) = vllm.made, vllm.calls
    assert made['fingerprint']==teacher.fingerprint and made['dtype']=='float32' and made['max_model_len']==512
    assert [ids for ids,_ in batch]==[prompt_ids(teacher.tokenizer, TEMPLATES['free'].ask(f"{r['prompt']}\nReference: {r['completion']}\nIn your own words:")) for r in ask]
    assert all(s==dict(max_tokens=20, temperature=0., stop_token_ids=sorted(teacher.stops), detokenize=False) for _,s in batch)
    assert lines(tmp_path/'hf')[0]==lines(tmp_path/'vllm')[0]

def test_another_engine_goes_on_where_one_was_killed(vllm, teacher, tmp_path):
    ask, how = pocket_rows('facts', 6, voice=3), dict(decoding=20, progress=False, out=tmp_path)
    whole = rewrite(teacher, ask, decoding=20, progress=False)
    rewrite(teacher, ask.select(range(2)), **how)
    stop = vllm.LLM.generate
    def dies(self, prompts, *args, **kw):
        if len(vllm.calls)==1: raise KeyboardInterrupt
        return stop(self, prompts, *args, **kw)
    vllm.LLM.generate = dies
    with pytest.raises(KeyboardInterrupt): rewrite(teacher, ask, engine='vllm', **how | dict(decoding=Decoding(20, batch_size=2)))
    assert len(ledger(tmp_path))==4                                                          # what was answered is kept, two rows at a time
    vllm.LLM.generate = stop
    vllm.calls.clear()
    assert fingerprint(rewrite(teacher, ask, engine='vllm', **how))==fingerprint(whole) and len(vllm.calls[0])==2
    vllm.made.clear()
    rewrite(teacher, ask, engine='vllm', **how)
    assert not vllm.made                                                                     # nothing to ask, nothing is started

def test_sampling_is_asked_for_row_by_row(vllm, teacher):
    ask = pocket_rows('facts', 3)
    def seeds(seed, ask=ask):
        rewrite(teacher, ask, 'free', progress=False, engine='vllm', decoding=replace(SDFT, max_new_tokens=4, seed=seed))
        return [s for _,s in vllm.calls[-1]]
    one, two = seeds(0), seeds(0, ask.select([2]))
    assert all((s['temperature'], s['top_p'], s['top_k'], s['max_tokens'])==(.95, .7, 50, 4) for s in one) and len({s['seed'] for s in one})==3
    assert two[0]==one[2] and seeds(1)[0]['seed']!=one[0]['seed']                            # a row's seed is its own, whoever is asked beside it

def test_prefill_and_room_are_the_same(vllm, teacher, tmp_path):
    how = dict(template='gsm8k', decoding=480, progress=False)
    ask = pocket_rows('facts', 2)
    assert fingerprint(rewrite(teacher, ask, **how))==fingerprint(rewrite(teacher, ask, engine='vllm', **how))
    for ids,s in vllm.calls[-1]:
        assert s['max_tokens']==min(480, 512-len(ids)) and ids[-len(more := completion_ids(teacher.tokenizer, TEMPLATES['gsm8k'].prefill, end=False)):]==more

def test_an_engine_of_ones_own(vllm, teacher):
    ask, mine = pocket_rows('facts', 2), vllm.LLM(teacher.config._name_or_path)
    vllm.made.clear()
    ds = rewrite(teacher, ask, engine=mine, decoding=20, progress=False)
    assert ds['source']==['teacher']*2 and not vllm.made
    with pytest.raises(TypeError, match='not LM'): rewrite(teacher, ask, engine=teacher, progress=False)

def test_weights_that_lie_nowhere_are_saved(vllm, teacher, tmp_path):
    "A cut or edited teacher still names the folder it came from: what is there is not what it is"
    from sdlab.compress.prune import prune
    from sdlab.core.plan import Plan
    cut = prune(teacher, Plan(teacher.n, (5,)))
    with pytest.warns(UserWarning, match='a copy is saved for vLLM'): rewrite(cut, pocket_rows('facts', 1), engine='vllm', decoding=4, progress=False)
    assert vllm.made[-1]['fingerprint']==cut.fingerprint!=teacher.fingerprint
    from pathlib import Path
    assert not Path(vllm.made[-1]['model']).exists()                                         # it goes afterwards
    cut.save(tmp_path)
    from sdlab.core.model import load
    again = load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with folder_of(again) as f: assert f==str(tmp_path)
    with torch.no_grad(): again.model.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    assert not lies_in(again, tmp_path)
    nowhere = LM(again.model, again.tokenizer, name='nowhere')
    nowhere.config._name_or_path = 'nobody/has-this'
    with pytest.warns(UserWarning, match='not what lies in any folder'), folder_of(nowhere) as f: assert load(f).fingerprint==nowhere.fingerprint

def test_no_vllm(monkeypatch, teacher, tmp_path):
    monkeypatch.setitem(sys.modules, 'vllm', None)
    with pytest.raises(ImportError, match="pip install vllm.*engine='hf'"): rewrite(teacher, pocket_rows('sums', 2), engine='vllm', out=tmp_path/'x')
    with pytest.raises(ValueError, match="no engine 'tgi'"): rewrite(teacher, pocket_rows('sums', 2), engine='tgi', out=tmp_path/'x')
    assert not (tmp_path/'x').exists()

# how far a set is
def test_surprise_is_the_mean_of_the_tokens(teacher):
    ds = pocket_rows('order', 12, voice=2)
    df = surprise(teacher, dict(all=ds, some=ds.select(range(4)), text=['Ann is taller than Ben.']))
    nll, tokens = 0., 0
    for r in ds.select(range(4)):                                                            # an oracle: one row alone, by cross entropy
        head, tail = prompt_ids(teacher.tokenizer, r['prompt']), completion_ids(teacher.tokenizer, r['completion'])
        logits = teacher.model(torch.tensor([head+tail])).logits[0, len(head)-1:-1]
        nll, tokens = nll+float(torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction='sum')), tokens+len(tail)
    assert list(df['set'])==['all', 'some', 'text'] and list(df.n)==[12, 4, 1] and df.tokens[1]==tokens
    assert df.nats_per_token[1]==pytest.approx(nll/tokens, rel=1e-4) and df.low[1]<=df.nats_per_token[1]<=df.high[1] and df.low[2]==df.high[2]
