"Known faults: bad arguments that get an inner error, or no word"
import json
import pytest, torch
from faults import fault, find, how, outcome, small_lm
from families import tiny, tokenizer
from sdlab.all import LM, Plan, Task, batches, cka, distances, load, prune, rewrite, rows, split, tune

chunks, linear_cka, score = (find(o) for o in ('core.data:chunks', 'measure.cka:linear_cka', 'judge.score:score'))
QA = [dict(prompt='ab', completion='cd'), dict(prompt='efg', completion='h')]
TEXTS = ['ab', 'cde', 'fghi', 'jk', 'lmn', 'opqr']
nan, inf = float('nan'), float('inf')


def ask(**loose): return lambda lm, tmp: lm.reply('ab', **how(lm.reply, **dict(dict(max_new_tokens=2), **loose)))
def heal(**loose): return lambda lm, tmp: tune(lm, QA, **how(tune, progress=False, **loose))
def say(**loose): return lambda lm, tmp: rewrite(lm, QA, **how(rewrite, max_new_tokens=2, progress=False, **loose))
def read(source, **more): return lambda lm, tmp: rows(source, **more)
def pack(**more): return lambda lm, tmp: batches(lm, TEXTS, **more)


def choose(choices):
    "A choice task with these options"
    return lambda lm, tmp: score(lm, Task('quiz', [dict(prompt='a', choices=choices, answer=0)], metric='choice'))


def read_file(name, raw):
    def f(lm, tmp):
        (tmp/name).write_bytes(raw)
        return rows(tmp/name)
    return f


def measured(**changed):
    "Distances over a batch of which something was changed"
    return lambda lm, tmp: distances(lm, [{**batches(lm, TEXTS)[0], **changed}])


def with_nan(lm, tmp):
    odd = LM(tiny('Llama'), tokenizer(), 'odd')
    odd.model.model.norm.weight.data[0] = nan
    return load(odd.save(tmp/'odd'))


def fewer_blocks(lm, tmp):
    folder = lm.save(tmp/'short')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config|dict(num_hidden_layers=4)))
    return load(folder)


ODD = {
    'weights that are NaN': (with_nan, 'NaN|norm'),
    'fewer blocks than are stored': (fewer_blocks, 'block|layer|weight'),
}


def few_words(): return LM(tiny('Llama', vocab_size=50), tokenizer(), 'few')


BAD = {   # what is wrong: (call, what the refusal names)
    'load a number': (lambda lm, tmp: load(7), 'path|directory|folder|hub|int|7'),
    'load a list': (lambda lm, tmp: load(['pocket']), 'path|directory|folder|hub|list'),
    'load bytes': (lambda lm, tmp: load(b'pocket'), 'path|directory|folder|hub|bytes'),
    'load an unknown argument': (lambda lm, tmp: load(dtyp='float32'), 'dtyp'),
    'LM of a text': (lambda lm, tmp: LM('pocket', lm.tokenizer), 'model|str'),
    'LM with fewer words than its tokenizer': (lambda lm, tmp: few_words().reply('xyz{|}', 2), r'vocabular|\bids?\b'),
    'reply to a number': (lambda lm, tmp: lm.reply(5), 'prompt'),
    'reply to a dict': (lambda lm, tmp: lm.reply(dict(role='user', content='ab')), 'prompt|list'),
    'reply to an id that is none': (lambda lm, tmp: lm.reply([1, 5000], 2), '5000'),
    'reply to a negative id': (lambda lm, tmp: lm.reply([1, -3], 2), '-3'),
    'reply with half a token': (ask(max_new_tokens=2.5), 'max_new_tokens'),
    'reply with a text for a number': (ask(max_new_tokens='9'), 'max_new_tokens'),
    'reply at temperature NaN': (ask(temperature=nan), 'temperature'),
    'reply below zero': (ask(temperature=-.5), 'temperature'),
    'reply at infinite temperature': (ask(temperature=inf), 'temperature'),
    'reply with negative top_p': (ask(temperature=1., top_p=-.1), 'top_p'),
    'reply with top_p over 1': (ask(temperature=1., top_p=3), 'top_p'),
    'reply with negative top_k': (ask(temperature=1., top_k=-2), 'top_k'),
    'reply with half of top_k': (ask(temperature=1., top_k=2.5), 'top_k'),
    'reply in batches of none': (ask(batch_size=0), 'batch_size'),
    'reply in negative batches': (ask(batch_size=-2), 'batch_size'),
    'reply with an unknown argument': (ask(temprature=.5), 'temprature'),
    'reply to a turn without a role': (lambda lm, tmp: lm.reply([dict(content='ab')], 2), 'role'),
    'save a text as table': (lambda lm, tmp: lm.save(tmp/'x', table='scores'), 'table'),
    'rows of messages that are numbers': (read([dict(messages=[1, 2])]), 'messages'),
    'rows of a turn without a role': (read([dict(messages=[dict(content='a')])]), 'role'),
    'rows below zero': (read(TEXTS, limit=-2), 'limit'),
    'rows up to a text': (read(TEXTS, limit='two'), 'limit'),
    'rows with empty misspelt': (read(['a', ''], empty='dropp'), 'empty'),
    'rows with a list of columns': (read(QA, columns=['prompt']), 'columns'),
    'rows of JSON that is a number': (read_file('a.json', b'7'), 'row|JSON'),
    'rows of JSON that is null': (read_file('a.json', b'null'), 'row|JSON'),
    'rows of lines that are numbers': (read_file('a.jsonl', b'{"text": "a"}\n7\n'), 'line|row'),
    'rows of an empty table': (read_file('a.csv', b''), 'a.csv|empty|columns'),
    'rows of a ragged table': (read_file('a.csv', b'prompt,completion\na,b\nc,d,e\n'), 'line 3|row'),
    'rows of a table with an open quote': (read_file('a.csv', b'prompt,completion\n"a,b\n'), 'quot|line|row'),
    'rows of a broken parquet': (read_file('a.parquet', b'PAR1PAR'), 'a.parquet'),
    'rows with half a character': (read([dict(text='a\ud83d')]), 'surrogate|character|text|row'),
    'batches of none': (pack(size=0), 'size'),
    'batches below zero': (pack(size=-2), 'size'),
    'batches on no side': (pack(side='lefft'), 'side'),
    'batches with long misspelt': (pack(long='kut', max_length=2), 'long'),
    'batches of negative length': (pack(max_length=-3), 'max_length'),
    'batches without a model': (lambda lm, tmp: batches(None, TEXTS), 'LM|tokenizer|model'),
    'a split by NaN': (lambda lm, tmp: split(TEXTS, train=nan), 'share|train|nan'),
    'chunks of none': (lambda lm, tmp: chunks(lm, TEXTS, size=0), 'size'),
    'prune without a model': (lambda lm, tmp: prune(None, Plan(6, (1,))), 'LM|model'),
    'prune a model that is no LM': (lambda lm, tmp: prune(lm.model, Plan(6, (1,))), 'LM'),
    'distances without a model': (lambda lm, tmp: distances(None, batches(small_lm(), TEXTS)), 'LM|model'),
    'distances of fractions': (measured(input_ids=torch.rand(6, 4)), 'input_ids|integer|int64'),
    'distances of one text without a batch': (measured(input_ids=torch.arange(4)), 'input_ids|shape'),
    'distances under another mask': (measured(attention_mask=torch.ones(6, 9, dtype=torch.long)), 'mask|shape'),
    'CKA in groups of a text': (lambda lm, tmp: cka(lm, lm, TEXTS, group='six'), 'group'),
    'CKA without a student': (lambda lm, tmp: cka(None, lm, TEXTS), 'LM|student|model'),
    'CKA in batches of none': (lambda lm, tmp: cka(lm, lm, TEXTS, group=6, batch_size=0), 'batch_size'),
    'CKA of two rows with NaN': (lambda lm, tmp: linear_cka(torch.full((8, 3), nan), torch.rand(8, 3)), 'NaN'),
    'choices that are numbers': (choose([1, 2]), 'choices'),
    'choices that are a dict': (choose(dict(text=['a', 'b'], label=['A', 'B'])), 'choices'),
    'tune in batches of none': (heal(batch_size=0), 'batch_size'),
    'tune for no time': (heal(epochs=0), 'epochs'),
    'tune for less than no time': (heal(epochs=-1), 'epochs'),
    'tune for NaN epochs': (heal(epochs=nan), 'epochs'),
    'tune at NaN': (heal(lr=nan), r'\blr\b'),
    'rewrite at temperature NaN': (say(temperature=nan), 'temperature'),
    'rewrite in batches of none': (say(batch_size=0), 'batch_size'),
}


@fault('A bad argument is refused in one sentence that names it.')
@pytest.mark.parametrize('kind', BAD)
def test_bad_argument(tmp_path, kind):
    "One sentence, of the right kind, that says what was wrong"
    call, name = BAD[kind]
    got = outcome(call, small_lm(), tmp_path)
    assert got.refused(name), got


@fault('What is odd about a checkpoint is refused, or said in a warning.')
@pytest.mark.parametrize('kind', ODD)
def test_odd_checkpoint(tmp_path, kind):
    "A checkpoint that cannot be what was meant is not opened without a word"
    call, name = ODD[kind]
    got = outcome(call, small_lm(), tmp_path)
    assert got.named(name), got


@fault('top_p=0 means greedy, as everywhere, or is refused.')
def test_top_p_of_nothing():
    "The least likely token is never picked"
    got = outcome(ask(max_new_tokens=4, temperature=1., top_p=0), small_lm(), None)
    assert got.refused('top_p') or got.value==small_lm().reply('ab', 4), got
