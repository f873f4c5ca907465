"Known faults: data that vanishes or changes without a word, types and files that are read wrongly"
import json, unicodedata
import numpy as np, pandas as pd, pytest
from faults import fault, find, outcome, shell, small_lm
from sdlab.all import Task, rows, score, score_all
from toys import CHATML, toy

encode, decode, overlap = (find(f'core.data:{k}') for k in ('encode', 'decode', 'overlap'))
USED = 'Every column and turn is used, or it is refused or reported by its name.'
READ = 'What is meant plainly is read; else one sentence names the row and the column.'


def user(text): return dict(role='user', content=text)
def assistant(text): return dict(role='assistant', content=text)
def system(text): return dict(role='system', content=text)


def asked(row):
    "All that the prompt of a row says, in one string"
    p = row['prompt']
    return p if isinstance(p, str) else '\n'.join(m['content'] for m in p)


# Data vanishes or changes without a word ----------------------------------------------------------------------------
OSLO = [user('Where is Oslo?'), assistant('In Norway.'), user('And Turin?'), assistant('In Italy.')]
SAILOR = [system('Answer like a sailor.'), user('Where is Oslo?'), assistant('Ahoy.')]
CROWDED = {   # rows of which something is left out today: (row, what must be asked, or the column to name)
    'turns beside a prompt': (
        dict(prompt='Where is Oslo?', messages=OSLO), ['Where is Oslo?', 'In Norway.', 'And Turin?'], 'messages'),
    'system turn beside a prompt': (
        dict(prompt='Where is Oslo?', messages=SAILOR), ['Answer like a sailor.', 'Where is Oslo?'], 'messages'),
    'system column': (
        dict(system='Answer in French.', question='Where is Oslo?', answer='Ici.'), ['Answer in French.'], 'system'),
    'system_prompt column': (
        dict(system_prompt='Be brief.', prompt='Where is Oslo?', completion='Up.'), ['Be brief.'], 'system_prompt'),
    'context of a question': (
        dict(question='Who was late?', context='Ben missed it.', answer='Ben'), ['Ben missed it.'], 'context'),
    'history of an instruction': (
        dict(instruction='And Turin?', output='In Italy.', history=[['Oslo?', 'In Norway.']]),
        ['Oslo?', 'In Norway.'], 'history'),
    'choices of a question': (
        dict(question='Which is a metal?', choices=['tin', 'oak'], answer='tin'), ['oak'], 'choices'),
}


@fault(USED)
@pytest.mark.parametrize('kind', CROWDED)
def test_columns_that_vanish(kind):
    "A column that says something of the question is asked, or named"
    row, parts, column = CROWDED[kind]
    got = outcome(lambda: asked(rows([row])[0]))
    assert got.named(column) or got.error is None and all(o in got.value for o in parts), got


@fault(USED)
def test_completion_of_several_turns():
    "Of a completion that is a conversation no turn is left out"
    turns = [assistant('I look it up.'), dict(role='tool', content='17 degrees'), assistant('It is warm.')]
    got = outcome(lambda: str(dict(rows([dict(prompt=[user('Is it warm?')], completion=turns)])[0])))
    whole = got.error is None and all(o in got.value for o in ('17 degrees', 'look it up'))
    assert whole or got.named('completion|turn|tool'), got


@fault('A call of a tool is shown as the chat template writes it, or the row is refused.')
def test_tool_calls():
    "A turn that only calls a tool is no empty turn"
    calls = '{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}'
    tok = toy(chat=CHATML.replace('{{ m.content }}', '{{ m.content or "" }}'+calls))
    clock = dict(type='function', function=dict(name='clock', arguments=dict(zone='CET')))
    call = dict(role='assistant', content=None, tool_calls=[clock])
    row = dict(messages=[user('Late?'), call, dict(role='tool', name='clock', content='23'), assistant('Yes.')])
    assert 'clock' in tok.apply_chat_template(row['messages'], tokenize=False)
    got = outcome(lambda: tok.decode(encode(tok, row)['input_ids']))
    assert got.named('tool_calls') or got.error is None and 'clock' in got.value, got


@fault('An answer is trained as the template writes it: no thought is opened and never closed.')
def test_open_thoughts():
    "A generation prompt that opens <think> does not teach answers inside a thought"
    tok = toy(chat=CHATML.replace('assistant\n{% endif %}', 'assistant\n<think>\n{% endif %}'))
    row = dict(prompt='Who has more?', completion='Ann has more.')
    got = outcome(lambda: tok.decode(encode(tok, row)['input_ids']))
    assert got.named('think') or got.error is None and got.value.count('<think>')==got.value.count('</think>'), got


@fault('Marks of channels are kept in the text, or what stands before the final one is cut off.')
def test_channel_marks():
    "The text of an answer in two channels is not glued together"
    tok = toy(chat=CHATML)
    tok.add_special_tokens(dict(additional_special_tokens=['<|plan|>', '<|say|>']))
    ids = []
    for mark, text in (('<|plan|>', 'Ann has 12'), ('<|say|>', 'Ben has 3')):
        ids += [tok.convert_tokens_to_ids(mark), *tok(text, add_special_tokens=False).input_ids]
    assert '12Ben' not in decode(tok, ids)


@fault('Options that are a text are parsed or refused, never taken letter by letter.')
@pytest.mark.parametrize('choices', ['tin|oak', '["tin","oak"]', 'tin;oak'])
def test_choices_that_are_text(tmp_path, choices):
    "A table has room for a text only where the options should be a list"
    table = pd.DataFrame(dict(prompt=['Which is a metal?', 'Which is a tree?'], choices=choices, answer=[0, 1]))
    table.to_csv(tmp_path/'quiz.csv', index=False)
    got = outcome(lambda: set(score(small_lm(), Task('quiz', rows(tmp_path/'quiz.csv'), metric='choice')).reference))
    assert got.refused('choices') or got.error is None and got.value=={'tin', 'oak'}, got


@fault('Two tasks of one name are refused, or told apart.')
def test_tasks_of_one_name():
    "No task takes the place of another"
    tasks = [Task('quiz', [dict(prompt='a', completion='#### b')]*k, max_new_tokens=1) for k in (1, 2)]
    got = outcome(lambda: len(score_all({'small': small_lm()}, tasks)))
    assert got.refused('quiz') or got.value==3, got


@fault('Files of one name in two folders are refused, or told apart.')
def test_task_files_of_one_name(tmp_path):
    "Two files that are both called test.jsonl are two tasks"
    for k, texts in dict(algebra=['one', 'two', 'three'], botany=['oak', 'elm']).items():
        (tmp_path/k).mkdir()
        (tmp_path/k/'test.jsonl').write_text(''.join(json.dumps(dict(text=o))+'\n' for o in texts))
    lm = small_lm().save(tmp_path/'lm')
    files = [tmp_path/k/'test.jsonl' for k in ('algebra', 'botany')]
    got = shell('recovery', '--teacher', lm, '--arms', f'same={lm}', '--tasks', *files, '--out', tmp_path/'out')
    table = tmp_path/'out'/'items.parquet'
    assert got.refused('test') or table.exists() and pd.read_parquet(table).task.nunique()==2, got.said


@fault('A rule that finds no answer in any reference is refused, by `score` as by `rewrite`.')
def test_rule_that_matches_nothing():
    "References without #### are not scored 0 % by the rule that looks behind ####"
    quiz = [dict(prompt='Is tin a metal?', completion='Yes'), dict(prompt='Is oak a metal?', completion='No')]
    task = Task('quiz', quiz, max_new_tokens=1)
    got = outcome(score, small_lm(), task)
    assert got.named('rule|final|####'), got


NEAR = {   # one question, written twice
    'question mark': ('Is tin a metal?', 'Is tin a metal'),
    'zero width': ('Is tin a metal?', 'Is tin\u200b a metal?'),
    'full width': ('Is tin a metal?', 'Is tin a metal？'),
    'decomposed': ('Où est Besançon ?', unicodedata.normalize('NFD', 'Où est Besançon ?')),
    'system turn': ('Is tin a metal?', [system('Be brief.'), user('Is tin a metal?')]),
}


@fault('Near duplicates are found as duplicates, so that they cannot lie on both sides of a split.')
@pytest.mark.parametrize('kind', NEAR)
def test_near_duplicates(kind):
    "One question in two spellings is one question"
    a, b = ([dict(prompt=p, completion='Yes')] for p in NEAR[kind])
    assert len(overlap(a, b))==1


# Types and files ----------------------------------------------------------------------------------------------------
def jsonl(**row): return json.dumps(row, ensure_ascii=False).encode()+b'\n'


FILES = {   # (name, bytes, what the completion or text of the first row is)
    'U+2028 in JSON lines': ('a.jsonl', jsonl(text='tin\u2028oak')+jsonl(text='elm'), 'tin\u2028oak'),
    'U+2029 in JSON lines': ('a.jsonl', jsonl(prompt='q', completion='tin\u2029oak'), 'tin\u2029oak'),
    'U+0085 in JSON lines': ('a.jsonl', jsonl(prompt='q', completion='tin\x85'), 'tin\x85'),
    'BOM in JSON lines': ('a.jsonl', b'\xef\xbb\xbf'+jsonl(text='tin'), 'tin'),
    'BOM in JSON': ('a.json', b'\xef\xbb\xbf'+b'[{"text": "tin"}]', 'tin'),
    'UTF-16 JSON lines': ('a.jsonl', '{"text": "tin"}\n'.encode('utf-16'), 'tin'),
    'Latin-1 table': ('a.csv', 'text\nd\xe9j\xe0 vu\n'.encode('latin-1'), 'déjà vu'),
    'numbers as answers': ('a.csv', b'question,answer\n6*7?,42\n5*5?,25\n', '42'),
    'decimals as answers': ('a.csv', b'prompt,completion\n1/4?,0.25\n', '0.25'),
    'leading zeros': ('a.csv', b'prompt,completion\ncode?,0042\n', '0042'),
    'numbers in JSON': ('a.json', b'[{"prompt": "6*7?", "completion": 42}]', '42'),
}


@fault(READ)
@pytest.mark.parametrize('kind', FILES)
def test_files(tmp_path, kind):
    "Marks, codes and numbers in files are read as what they mean"
    name, raw, right = FILES[kind]
    (tmp_path/name).write_bytes(raw)
    got = outcome(lambda: [dict(o) for o in rows(tmp_path/name)][0])
    said = got.error is None and got.value.get('completion', got.value.get('text'))
    encoding = not raw.startswith(b'\xef') and name.endswith('l')==(b'\0' in raw)
    assert said==right or encoding and got.refused('row|line|UTF|encod|column'), got


def parts(text): return [dict(type='text', text=text)]


TURNS = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'tin'}]
CELLS = {   # (source, what the answer of the first row that is kept may be, what a refusal has to name)
    'number in a dict': ([dict(question='6*7?', answer=42)], '42', 'answer'),
    'NaN in a frame': (pd.DataFrame(dict(prompt=['p', 'q'], completion=[np.nan, 'tin'])), 'tin', 'completion'),
    'None in a question': ([dict(question=None, answer='b'), dict(question='q', answer=7)], '7', 'answer'),
    'parts of a message': ([dict(messages=[user(parts('q')), assistant(parts('tin'))])], 'tin', 'messages|content'),
    'turns by from and value': ([dict(messages=TURNS)], 'tin', 'from|value|role|messages'),
    'messages as text': ([dict(messages=json.dumps([user('q'), assistant('tin')]))], 'tin', 'messages'),
    'messages that are None': ([dict(messages=None), dict(messages=[user('q'), assistant('tin')])], 'tin', 'messages'),
    'a row that is None': ([None], None, 'row'),
    'a row that is a number': ([3, 4], None, 'row'),
    'a row that is a list': ([['a', 'b']], None, 'row'),
    'an index as answer': ([dict(question='Which?', choices=['oak', 'tin'], answer=1)], 'tin', 'answer|choices'),
}


@fault(READ)
@pytest.mark.parametrize('kind', CELLS)
def test_cells(kind):
    "Every cell is a text, becomes one, or is named"
    source, right, name = CELLS[kind]
    got = outcome(lambda: [dict(o) for o in rows(source)][0])
    said = got.error is None and got.value.get('completion', got.value.get('text'))
    assert got.refused(name) or right is not None and said==right, got


@fault('Of a stream as many rows are read as were asked for.')
def test_streams_are_not_read_to_their_end():
    "Three rows of a stream cost about three rows"
    from datasets import IterableDataset
    seen = []

    def stream():
        for i in range(3000):
            seen.append(i)
            yield dict(prompt=f'{i}?', completion=str(i))
    rows(IterableDataset.from_generator(stream), limit=3)
    assert len(seen) <= 100
