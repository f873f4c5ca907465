"Known faults: answers that are read or compared wrongly"
import pytest, torch
from faults import fault, lm_of, outcome
from sdlab.all import Task, agree, extract, score

PAIRS = {   # (an answer, its reference, the rule, do they give the same answer?)
    'decimal without a zero': ('#### .25', '#### 25', 'final', False),
    'decimal in two spellings': ('#### .25', '#### 0.25', 'final', True),
    'beyond 2^53': ('#### 18014398509481985', '#### 18014398509481984', 'final', False),
    'beyond 2^53, as an integer': ('so it is 18014398509481985', '18014398509481984', 'integer', False),
    'twenty-one digits': ('#### 100000000000000000001', '#### 100000000000000000002', 'final', False),
    'Unicode minus': ('#### \u22127', '#### -7', 'final', True),
    'plus': ('#### +7', '#### 7', 'final', True),
    'brackets': ('#### (31)', '#### 31', 'final', True),
    'unit': ('#### 31 pens', '#### 31', 'final', True),
    'variable': ('#### n = 31', '#### 31', 'final', True),
    'box': (r'#### \boxed{31}', '#### 31', 'final', True),
}


@fault('Answers are compared by exact arithmetic, in every common spelling of a number.')
@pytest.mark.parametrize('kind', PAIRS)
def test_numbers_that_agree(kind):
    "Two numbers agree if they are the same number"
    answer, reference, rule, same = PAIRS[kind]
    assert agree(answer, reference, rule)==same


SIGNED = {
    'currency': ('-$31', '-31'),
    'Unicode minus': ('it fell to \u221231', '-31'),
    'exponent': ('about 3e5', '300000'),
}


@fault('A number is read with its sign and its exponent, or it is no answer.')
@pytest.mark.parametrize('kind', SIGNED)
def test_signs_of_integers(kind):
    "No sign is lost on the way to an integer"
    text, right = SIGNED[kind]
    assert extract(text, 'integer') in (right, None)


@fault('An answer of any length is compared, and wrong.')
@pytest.mark.parametrize('rule', ['final', 'integer'])
def test_endless_digits(rule):
    "A model that repeats a digit is wrong on that item and does not end the scoring"
    got = outcome(agree, '#### '+'7'*400, '#### 7', rule)
    assert got.value is False, got


@fault('A student that repeats itself scores 0 on that item.')
def test_student_that_repeats_a_digit():
    "A looping student is scored to the end"
    lm = lm_of('Llama', num_hidden_layers=2, max_position_embeddings=512)
    nine = lm.tokenizer.convert_tokens_to_ids('9')
    with torch.no_grad():
        for block in lm.blocks:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        lm.model.model.embed_tokens.weight.fill_(1.)
        lm.model.model.norm.weight.fill_(1.)
        lm.model.lm_head.weight.zero_()
        lm.model.lm_head.weight[nine] = 1.
    assert lm.reply('n', 4)=='9999'
    got = outcome(score, lm, Task('sums', [dict(prompt='n', completion='#### 9')], rule='integer', max_new_tokens=330))
    assert got.error is None and list(got.value.score)==[0], got


PROSE = ['The right answer must be {}.', 'So {} is the one.', 'I take {} here', 'Thus {} fits best.', 'We end with {}.']


@fault('Answers in plain prose are read whatever the letter is, A and I included.')
@pytest.mark.parametrize('letter', 'AI')
def test_letters_that_are_words(letter):
    "A and I are read where B is read"
    readable = [o for o in PROSE if extract(o.format('B'), 'choice')=='B']
    if len(readable) < 3: raise RuntimeError('B is not read any more')
    assert [o for o in readable if extract(o.format(letter), 'choice')!=letter]==[]
