"The Reader, driven without a browser: what it shows against plain pandas, what it gives back, and what it must not do"
import random, re, threading, time
from html.parser import HTMLParser
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from sdlab.core.data import fingerprint
from sdlab.heal.rewrite import rewrite, summary
from sdlab.lab.reader import MARKS, Reader
from sdlab.measure.text import aligned, differences, likelihood, likelihood_steps, rouge_l
from toys import CHATML, HEADERS, INST, toy

HOSTILE = ['"><script>alert(1)</script>', "<img src=x onerror='alert(1)'>", '</article></div><h1>out</h1>', 'שלום עולם, 3 עטים', '\u202eevil\u202c', '😀👩‍🚀🇩🇪', '&lt;b&gt; & &amp;', '{{ 7*7 }} ${x} `y` |', '\x00\x07 control', 'a\n\n\tb', '<!-- --> ]]>', "' onclick='x"]

def row(i, rnd, words):
    say = lambda: ' '.join(rnd.choices([f'w{j}' for j in range(60)], k=rnd.randint(1, words)))
    ref, own, source = say(), say(), rnd.choice(['teacher', 'teacher', 'reference'])
    return dict(prompt=f'Q{i} {say()}', completion=own if source=='teacher' else ref, reference=ref, source=source, reason=rnd.choice(['same answer', 'not checked'] if source=='teacher' else ['other answer', 'cut off']), written=own, ended=True)

def made(n, words=8):
    rnd = random.Random(0)
    return Dataset.from_list([row(i, rnd, words) for i in range(n)])

@pytest.fixture
def data(): return made(100)

def press(reader, act, i=None): reader.guard(reader._heard)(None, dict(act=act, row=i), [])

# what is shown, against pandas
@pytest.mark.parametrize('word', ['w1', 'W17', 'q3 ', 'w1 w', '', 'nowhere', '.*', '(', 'ß'])
def test_search_is_a_plain_search(data, word):
    df = data.to_pandas()
    want = df.index[df.apply(lambda r: any(word.casefold() in r[c].casefold() for c in ('prompt', 'reference', 'completion', 'written')), axis=1)]
    assert list(Reader(data, search=word).view.index)==list(want)

@pytest.mark.parametrize('down', [False, True])
@pytest.mark.parametrize('sort', ['length', 'similarity', 'likelihood'])
def test_sorted_as_pandas_does(data, sort, down):
    reader, df = Reader(data), data.to_pandas()
    rnd = np.random.default_rng(0)
    for v in reader._num.likelihood.values(): v[:] = np.where(rnd.random(len(v))<.3, np.nan, rnd.integers(0, 9, len(v))) # ties and gaps
    keys = dict(length=df.completion.str.split().str.len(), similarity=df.apply(lambda r: rouge_l(r.written, r.reference), axis=1),
                likelihood=pd.Series(np.where(df.source=='teacher', reader._num.likelihood['rewrite'], reader._num.likelihood['reference'])))
    reader.sort, reader.descending = sort, down
    assert list(reader.view.index)==list(keys[sort].sort_values(ascending=not down, kind='stable', na_position='last').index)

def test_filters_work_together(data):
    reader, df = Reader(data), data.to_pandas()
    reader.drop(range(0, 100, 3)).keep(range(1, 100, 3))
    reader.reason, reader.search, reader.mark = 'same answer', 'w2', 'drop'
    want = df.index[(df.reason=='same answer') & df.apply(lambda r: 'w2' in ' '.join((r.prompt, r.reference, r.written)), axis=1) & (df.index%3==0)]
    assert list(reader.view.index)==list(want) and len(want)
    reader.mark = 'none'
    assert all(i%3==2 for i in reader.view.index)
    reader.search, reader.reason, reader.mark = '', '', 'any'
    assert list(reader.view.index)==[i for i in range(100) if i%3<2]

def test_pages_hold_every_row_once(data):
    reader = Reader(data, per_page=7, sort='length')
    seen = []
    for p in range(1, reader.pages+1): reader.page = p; seen += reader.shown
    assert seen==list(reader.view.index) and sorted(seen)==list(range(100)) and reader.pages==15
    reader.page = 1000; assert reader.page==15 and len(reader.shown)==2
    reader.page = -3; assert reader.page==1
    reader.search = 'nowhere'; assert (reader.pages, reader.page, reader.shown, len(reader.view))==(1, 1, [], 0)
    assert '0 of 100 rows' in reader.text()

def test_reasons_and_counts(data):
    assert Reader(data).reasons==data.to_pandas().reason.value_counts().to_dict()

# what comes back
def test_untouched_is_untouched(data): assert fingerprint(Reader(data).rows)==fingerprint(data)

def test_edits_round_trip(data):
    reader = Reader(data)
    mine, other = [next(i for i in range(100) if data[i]['source']==s) for s in ('teacher', 'reference')]
    cut = next(i for i in range(100) if data[i]['reason']=='cut off')
    gone = next(i for i in range(100) if i not in (mine, other, cut))
    reader.take_reference(mine).take_rewrite([other, cut]).drop(gone)
    out = {r['prompt']:r for r in reader.rows}
    assert len(out)==99 and data[gone]['prompt'] not in out
    a, b, c = (out[data[i]['prompt']] for i in (mine, other, cut))
    assert (a['completion'], a['source'], a['reason'], a['written'])==(data[mine]['reference'], 'reference', 'reference taken by hand', data[mine]['written'])
    assert (b['completion'], b['source'], b['reason'])==(data[other]['written'], 'teacher', 'rewrite taken by hand')
    assert c['ended'] is False or data[cut]['reason']!='cut off'                      # no end is learned from what was cut off
    left = [r for r in data if r['prompt'] not in {data[i]['prompt'] for i in (mine, other, cut, gone)}]
    assert [out[r['prompt']] for r in left]==left
    assert set(reader.rows.column_names)==set(data.column_names) and len(summary(reader.rows).examples)
    again = Reader(reader.rows)                                                        # and it can be read again
    assert fingerprint(again.rows)==fingerprint(reader.rows)

def test_numbers_follow_the_hand(data):
    "Words, surprise and order are those of what is read now"
    reader, df = Reader(data), data.to_pandas()
    for k, v in reader._num.likelihood.items(): v[:] = np.arange(len(v))+(1000 if k=='reference' else 0)
    mine = list(df.index[(df.source=='teacher') & (df.written.str.split().str.len()!=df.reference.str.split().str.len())][:5])
    other = list(df.index[df.source=='reference'][:5])
    reader.take_reference(mine).take_rewrite(other)
    words = reader.view.completion.str.split().str.len()
    assert list(reader.view.words)==list(words) and list(words[mine])==list(df.reference[mine].str.split().str.len())
    assert list(reader.view.nats_per_token[mine])==[1000+i for i in mine] and list(reader.view.nats_per_token[other])==other
    assert all(reader._facts(i).startswith(f'{words[i]} words') for i in mine+other)
    reader.sort = 'length'
    assert list(reader.view.index)==list(words.sort_values(kind='stable').index)
    reader.clear(mine, other)
    assert list(reader.view.words.sort_index())==list(df.completion.str.split().str.len())

def test_undo_takes_back_act_by_act(data):
    reader = Reader(data)
    states = [reader.marks]
    for act in (lambda: reader.drop(range(10)), lambda: reader.keep(3, 4), lambda: reader.take_reference([5]), lambda: reader.clear(range(100)), lambda: reader.drop(99)): act(); states.append(reader.marks)
    for want in states[-2::-1]: assert reader.undo().marks==want
    assert reader.undo().undo().marks=={} and fingerprint(reader.rows)==fingerprint(data)

def test_bulk_by_filter(data):
    reader = Reader(data, reason='other answer')
    reader.drop(reader.view.index)
    assert 'other answer' not in set(reader.rows['reason']) and len(reader.rows)==100-data['reason'].count('other answer')

def test_other_columns_and_conversations_survive():
    talk = [dict(role='system', content='Be brief.'), dict(role='user', content='2+2?')]
    rows = [dict(prompt=talk, completion='4', reference='It is 4', topic='sums', n=1), dict(prompt=talk, completion='5', reference='5', topic='more', n=2)]
    reader = Reader(rows)
    out = reader.take_reference(0).rows
    assert out[0]['prompt']==talk and out[0]['completion']=='It is 4' and list(out['topic'])==['sums', 'more'] and list(out['n'])==[1, 2]
    assert 'system: Be brief.' in reader.text() and Reader(rows, search='be BRIEF').shown==[0, 1]
    assert (out[1]['source'], out[1]['reason'], out[1]['written'])==('reference', 'as given', '')

def test_rows_without_reference():
    reader = Reader([dict(question='Q?', answer='A.'), dict(question='R?', answer='B.')])
    assert set(reader.reasons)=={'as given'} and list(reader.rows['reference'])==['A.', 'B.']
    reader.sort = 'similarity'
    assert 'nothing in this set was rewritten' in reader.note
    with pytest.raises(ValueError, match='no rewrite to take'): reader.take_rewrite(1)
    assert reader.marks=={} and 'rewrite' not in reader.static().data.split('</style>')[1]

# marks in a file
def test_marks_are_found_again_by_content(tmp_path, data):
    path = tmp_path/'deep'/'marks.json'
    Reader(data, marks=path).drop(5, 6).keep(7)
    assert Reader(data, marks=path).marks=={5:'drop', 6:'drop', 7:'keep'}
    back = data.select(range(99, -1, -1))
    assert Reader(back, marks=str(path)).marks=={94:'drop', 93:'drop', 92:'keep'}
    some = Reader(data.select(range(6)), marks=path)                                   # a part of the set knows its part, and loses nothing of the rest
    assert some.marks=={5:'drop'}
    some.clear(5).drop(0)
    assert Reader(data, marks=path).marks=={0:'drop', 6:'drop', 7:'keep'}
    changed = data.map(lambda r, i: {**r, 'written':r['written']+' new'} if i==6 else r, with_indices=True)
    assert Reader(changed, marks=path).marks=={0:'drop', 7:'keep'}                     # written anew: to be read anew
    assert not list(path.parent.glob('*.part'))

def test_repeated_rows_are_told_apart(tmp_path, data):
    twice = Dataset.from_list(list(data.select([0, 1]))+list(data.select([0, 0])))
    Reader(twice, marks=tmp_path/'m.json').drop(2)
    reader = Reader(twice, marks=tmp_path/'m.json')
    assert reader.marks=={2:'drop'} and len(reader.rows)==3

def test_two_readers_of_one_file(tmp_path, data):
    a, b = (Reader(data, marks=tmp_path/'m.json') for _ in 'ab')
    a.drop(1), b.drop(2), a.drop(3)
    assert Reader(data, marks=tmp_path/'m.json').marks=={1:'drop', 2:'drop', 3:'drop'}

def test_save_later(tmp_path, data):
    reader = Reader(data).drop(1)
    reader.save(tmp_path/'m.json').drop(2)
    assert Reader(data, marks=tmp_path/'m.json').marks=={1:'drop', 2:'drop'}

@pytest.mark.parametrize('text', ['[]', '{"marks": {"a": "explode"}}', 'not json', '{"marks": 3}', '', '{"marks": {"a": ["drop"]}}'])
def test_a_file_that_is_something_else(tmp_path, data, text):
    (tmp_path/'m.json').write_text(text)
    with pytest.raises(ValueError, match='does not hold the marks'): Reader(data, marks=tmp_path/'m.json')
    assert (tmp_path/'m.json').read_text()==text

def test_marks_that_cannot_be_written_stay_in_memory(tmp_path, data):
    (tmp_path/'file').write_text('')
    reader = Reader(data)
    with pytest.raises(OSError, match='kept in memory'): reader.drop(1).save(tmp_path/'file'/'m.json')
    assert reader.marks=={1:'drop'}

# hostile text
class Seen(HTMLParser):
    "The tags of a page and their attributes"
    def __init__(self, page):
        super().__init__()
        self.tags, self.attrs, self.text, self.depth, self.least = set(), set(), '', 0, 0
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attrs |= {k for k,_ in attrs}; self.depth += 1
    def handle_endtag(self, tag): self.depth -= 1; self.least = min(self.least, self.depth)
    def handle_data(self, data): self.text += data

def hostile_rows(): return Dataset.from_list([dict(prompt=h, completion=h+' new', reference=h+' old', source='teacher', reason=h, written=h+' new', ended=True) for h in HOSTILE])

@pytest.mark.parametrize('marked', [True, False])
def test_hostile_text_is_text(marked):
    reader = Reader(hostile_rows(), per_page=100, marked=marked)
    for i,item in enumerate(reader._items()):
        seen = Seen(item)
        assert seen.tags<={'article', 'div', 'span', 'b', 'button', 'ins', 'del', 'small'}, HOSTILE[i]
        assert seen.attrs<={'class', 'tabindex', 'data-mark', 'aria-label', 'role', 'type', 'data-act', 'data-row', 'aria-pressed', 'dir'}, HOSTILE[i]
        assert seen.depth==0 and seen.least==0
        assert HOSTILE[i].split()[0] in seen.text
        assert not re.search('<script|<img|<h1', item)
        inside = ''.join(re.findall('<[^>]*>', re.sub('"[^"]*"', '""', item)))
        assert not re.search('=(?!"")', inside)                                        # every attribute is quoted
        assert item.count('dir="auto"')==3
    page = reader.static().data
    assert '<script' not in page and '<img' not in page
    assert '<script>alert(1)</script>' in reader.text()

def test_hostile_text_in_the_widget():
    with Reader(hostile_rows(), teacher=object(), search='<script') as reader:
        htmls = [o.value for o in walk(reader.widget) if type(o).__name__=='HTML']
        assert not any('<script' in o or '<img' in o for o in htmls) and any('&lt;script' in o for o in htmls)
        reader.fail(ValueError('<script>x</script>'))
        assert not any('<script' in o.value for o in walk(reader.widget) if type(o).__name__=='HTML')

def test_a_hostile_reason_can_be_chosen():
    reader = Reader(hostile_rows())
    reader.reason = HOSTILE[0]
    assert reader.shown==[0]

# the widget
def walk(o):
    yield o
    for c in getattr(o, 'children', ()): yield from walk(c)

def find(reader, **traits): return next(o for o in walk(reader.widget) if all(getattr(o, k, None)==v for k,v in traits.items()))
def sheet(reader): return next(o for o in walk(reader.widget) if type(o).__name__=='_RowPage')

def test_controls_and_state_follow_each_other(data):
    with Reader(data) as reader:
        find(reader, description='search').value = 'w3'
        assert reader.search=='w3' and len(reader.view)<100
        reader.sort = 'length'
        assert find(reader, description='sort by').value=='length'
        find(reader, description='reason').value = 'cut off'
        assert set(reader.view.reason)=={'cut off'}
        find(reader, description='page').value = 2
        assert reader.page==2 and sheet(reader).page==2
        find(reader, description='◀ previous').click()
        assert reader.page==1
        assert [int(re.search(r'data-row="(\d+)"', o)[1]) for o in sheet(reader).items]==reader.shown
        reader.reason, reader.search = '', ''
        assert find(reader, description='page').max==reader.pages==9
        for o in walk(reader.widget):                                                  # every control has a name
            if type(o).__name__ in ('Text', 'Dropdown', 'Checkbox', 'Button', 'BoundedIntText'): assert o.description

def test_widgets_are_made_once(data):
    with Reader(data) as reader:
        before = [id(o) for o in walk(reader.widget)]
        for p in range(1, 9): reader.page = p
        reader.search = 'w5'; reader.sort = 'similarity'; reader.drop(reader.shown); reader.shows = 'similarity'; reader.undo()
        assert [id(o) for o in walk(reader.widget)]==before

def test_a_click_means_its_own_row(data):
    with Reader(data) as reader:
        sheet(reader)
        reader.page = 4
        press(reader, 'drop', 2)
        assert reader.marks=={2:'drop'} and reader.page==4
        press(reader, 'keep', 2); assert reader.marks=={2:'keep'}
        press(reader, 'keep', 2); assert reader.marks=={}
        press(reader, 'undo'); assert reader.marks=={2:'keep'}
        press(reader, 'next'); assert reader.page==5
        press(reader, 'reference', reader.shown[0])
        assert 'aria-pressed="true"' in sheet(reader).items[0] and 'reference taken by hand' in sheet(reader).items[0]
        for bad in (dict(act='drop', row=100), dict(act='drop', row='1'), dict(act='drop', row=None), dict(act='boom'), dict(), dict(act='drop', row=True)):
            reader.guard(reader._heard)(None, bad, [])
            assert reader.error
            with pytest.raises((ValueError, TypeError)): reader.check()
        assert len(reader.marks)==2

def test_distribution_beside_the_page(data):
    with Reader(data) as reader:
        chart = next(o for o in walk(reader.widget) if type(o).__name__=='Chart')
        assert [s['name'] for s in chart.series]==['reference', 'rewrite'] and all(abs(sum(s['y'])-100)<1e-6 for s in chart.series)
        reader.shows = 'similarity'
        assert [s['name'] for s in chart.series]==['rewrite'] and 'ROUGE-L' in chart.xlabel
        reader.shows = 'likelihood'
        assert chart.series==[] and any('Nothing of this was measured' in getattr(o, 'value', '') for o in walk(reader.widget) if type(o).__name__=='HTML')
        reader.shows = 'length'; reader.search = 'nowhere'
        assert chart.series==[]

def test_pictures(data):
    import matplotlib.pyplot as plt
    reader = Reader(data).drop(1).take_reference(0)
    fig = reader.figure()
    assert len(fig.axes)==3 and '100 of 100 rows' in fig.axes[0].get_title()
    assert 'dropped by hand' in [o.get_text() for o in fig.axes[0].get_xticklabels()]
    assert reader.plot('likelihood').texts[0].get_text()=='not measured'
    reader.search = 'nowhere'
    assert len(reader.figure().axes)==1
    with pytest.raises(ValueError, match='There is no distribution'): reader.plot('mood')
    plt.close('all')

# ten thousand rows; a limit that only something gone wrong can reach, the figures are in `make bench`
def test_a_reason_is_no_formula():
    "A reason that matplotlib would read as broken mathematics is drawn letter by letter"
    import io
    rs = [dict(prompt='a', completion='b c', reference='b', source='teacher', reason=r'$\frac{1$', written='b c', ended=True)]
    Reader(Dataset.from_list(rs)).figure().savefig(io.BytesIO(), format='png')

def test_ten_thousand_rows():
    data = made(10_000, words=60)
    with Reader(data) as reader:
        reader.widget
        def takes(f): start = time.perf_counter(); f(); return time.perf_counter()-start
        assert max(takes(lambda: setattr(reader, 'search', w)) for w in ('w1', 'w12', ''))<2
        assert takes(lambda: setattr(reader, 'reason', 'cut off'))<2
        reader.reason = ''
        assert max(takes(lambda: setattr(reader, 'page', p)) for p in (2, 500, 834))<2
        assert reader.shown==list(range(9996, 10_000))
        assert takes(lambda: reader.drop(range(5000)))<5 and len(reader.rows)==5000
        reader.sort = 'similarity'                                                     # compared in the background
        reader.wait(120).check()
        assert reader.note=='' and reader.view.likeness.is_monotonic_increasing
        assert sum(len(o) for o in sheet(reader).items)<100_000

def test_a_long_text_is_shown_in_part():
    long = Reader([dict(prompt='Q '*9000, completion='a '*50_000, reference='b '*50_000)])
    assert len(long._items()[0])<60_000 and 'more characters' in long._items()[0]
    assert len(long.rows[0]['completion'])==100_000

# bad input, and the end
@pytest.mark.parametrize('state, why', [(dict(sort='mood'), 'sort'), (dict(reason='mood'), 'no reason'), (dict(per_page=0), 'per_page'), (dict(colour=1), "no 'colour'"), (dict(mark='x'), 'mark')])
def test_bad_state(data, state, why):
    with pytest.raises(Exception, match=why): Reader(data, **state)
    with pytest.raises(Exception):
        reader = Reader(data)
        for k,v in state.items(): setattr(reader, k, v) if k!='colour' else Reader(data, **state)

def test_holes_in_a_set_that_rewrite_might_have_made():
    reader = Reader(Dataset.from_list([dict(prompt='Q', completion=None, reference=None, source=None, reason=None, written=None, ended=None), dict(prompt='R', completion='a', reference='b', source='teacher', reason='', written='a', ended=True)]))
    assert list(reader.view.reason)==['as given', 'not checked'] and reader.text() and len(reader.rows)==2

def test_bad_data(tmp_path, data):
    with pytest.raises(ValueError, match='plain texts'): Reader(['one', 'two'])
    with pytest.raises(ValueError, match='no ledger'): Reader(tmp_path)
    with pytest.raises(FileNotFoundError): Reader(tmp_path/'none.jsonl')
    with pytest.raises(ValueError, match='There is no rule'): Reader(data, rule='mood')
    with pytest.raises(ValueError): Reader([])
    for bad in (100, -1): 
        with pytest.raises(ValueError, match='rows 0 to 99'): Reader(data).drop(bad)
    for bad in (1.5, 'all', None, True):
        with pytest.raises(TypeError, match='named by its number'): Reader(data).drop(bad)
    with pytest.raises(ValueError, match='Every row was dropped'): Reader(data).drop(range(100)).rows
    with pytest.raises(ValueError, match='need the teacher'): Reader(data).measure()
    with pytest.raises(ValueError, match='no measure'): Reader(data).measure('mood')

def test_one_bad_row_changes_nothing(data):
    reader = Reader(data)
    with pytest.raises(ValueError): reader.drop(1, 2, 500)
    assert reader.marks=={} and reader.undo().marks=={}

def test_after_close(data):
    reader = Reader(data).drop(3)
    widget = reader.widget
    reader.close(), reader.close()
    assert len(reader.rows)==99 and len(reader.view)==100 and reader.text()            # what was decided can still be had
    for act in (lambda: reader.drop(1), reader.undo, lambda: reader.widget, lambda: reader.measure('likeness')):
        with pytest.raises(ValueError, match='closed'): act()
    assert widget.comm is None and 'Reader' in repr(reader)

# with a teacher
def test_a_ledger_is_read_as_it_grows(teacher, tmp_path):
    from sdlab.core.pocket import pocket_rows
    rows = pocket_rows('facts', 6, voice=3)
    made = rewrite(teacher, rows, out=tmp_path, progress=False)
    reader = Reader(tmp_path)
    by = lambda o: sorted(o, key=lambda r: r['prompt'])
    assert by(reader.rows)==by(made)
    path = next(tmp_path.glob('rewrite-*.jsonl'))
    path.write_bytes(path.read_bytes()[:-30])                                          # killed in the middle of a line
    assert len(Reader(str(tmp_path)))==5

def test_measures_and_teacher_left_alone(teacher):
    from sdlab.core.pocket import pocket_rows
    data = rewrite(teacher, pocket_rows('facts', 10, voice=2), progress=False)
    hooks = lambda: sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in teacher.model.modules())
    was, print_ = hooks(), teacher.fingerprint
    with Reader(data, teacher, batch_size=4, sort='likelihood') as reader:
        assert 'Not sorted yet' in reader.note and 'Not sorted yet' in reader.text()
        reader.measure().wait(120).check()
        assert reader.note=='' and reader.doing=='' and reader.view.nats_per_token.is_monotonic_increasing
        want = likelihood(teacher, data, on='reference').nats_per_token
        assert np.allclose(reader._num.likelihood['reference'], want, atol=1e-4)
        assert reader._num.answers[3]==teacher.reply(data[3]['prompt'])
        reader.sort = 'own'
        assert reader.view.likeness_own.is_monotonic_increasing
        assert len(reader.figure().axes)==5
    assert hooks()==was and teacher.fingerprint==print_
    assert 'nats per token: reference' in reader.text()

def test_two_readers_of_one_teacher(teacher):
    from sdlab.core.pocket import pocket_rows
    data = rewrite(teacher, pocket_rows('facts', 12, voice=3), progress=False)
    want = [likelihood(teacher, data, on=k).nats_per_token for k in ('reference', 'written')]
    with Reader(data, teacher, batch_size=4) as a, Reader(data, teacher, batch_size=5) as b:
        for o in (a, b): o.measure()
        for o in (a, b):
            o.wait(120).check()
            assert all(np.allclose(o._num.likelihood[k], v, atol=1e-4) for k,v in zip(('reference', 'rewrite'), want))
        assert a.answers==b.answers

def test_cancel_keeps_what_is_there(teacher):
    from sdlab.core.pocket import pocket_rows
    data = rewrite(teacher, pocket_rows('facts', 30, voice=2), progress=False)
    with Reader(data, teacher, batch_size=2) as reader:
        reader.measure('likelihood')
        while not np.isfinite(reader._num.likelihood['reference']).any() and not reader.error: time.sleep(.01)
        reader.worker.cancel()
        reader.wait(60).check()
        some = np.isfinite(np.concatenate(list(reader._num.likelihood.values()))).sum()
        assert 0<some<60 and reader.doing==''
        reader.measure('likelihood').wait(120).check()
        assert np.isfinite(np.concatenate(list(reader._num.likelihood.values()))).all()
    assert not [o for o in threading.enumerate() if o.name=='sdlab-worker' and o.is_alive()]

def test_a_failing_teacher_is_seen(data):
    class Broken: n = 3
    with Reader(data, Broken()) as reader:
        reader.measure('likelihood').wait(30)
        assert reader.error and reader.doing==''
        with pytest.raises(Exception): reader.check()
        assert reader.error=='' and reader.drop(1).marks=={1:'drop'}                   # and can still be used

# measure.text, what would not teach
@pytest.mark.parametrize('chat', [None, CHATML, HEADERS, INST])
def test_likelihood_of_conversations(chat):
    "Batched and padded against one row at a time, by hand"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from sdlab.core.data import encode
    from sdlab.core.model import LM
    torch.manual_seed(0)
    tok = toy('bytes', chat)
    lm = LM(LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)).eval(), tok)
    talk = [dict(role='user', content='Ann has 12 pens.'), dict(role='assistant', content='Yes.'), dict(role='user', content='Who has more?')]
    rows = [dict(prompt=talk, completion='Ann has more.'), dict(prompt=talk[:1], completion='Once upon a time there was a river.'), dict(prompt=talk, completion='Ben', ended=False)]
    got = likelihood(lm, rows, batch_size=2)
    for r,(_,g) in zip(rows, got.iterrows()):
        e = encode(tok, r)
        with torch.no_grad(): logp = lm.model(torch.tensor([e['input_ids']])).logits.log_softmax(-1)[0]
        want = -sum(logp[t-1, i].item() for t,(i,m) in enumerate(zip(e['input_ids'], e['completion_mask'])) if m)
        assert abs(want-g.nll)<1e-3 and g.tokens==sum(e['completion_mask'])
    last = [list(o) for o in likelihood_steps(lm, rows, batch_size=2)]
    assert [(d, n) for d,n,_ in last]==[(2, 3), (3, 3)]
    assert np.allclose(pd.concat([f for *_,f in last]).sort_index().nll, got.nll, atol=1e-4)

def test_likelihood_of_plain_texts(teacher):
    got = likelihood(teacher, ['Once there was a cat.', 'zz qq xx jj'])
    assert got.nats_per_token[0]<got.nats_per_token[1] and list(got.index)==[0, 1]
    with pytest.raises(ValueError, match='column'): likelihood(teacher, ['text'], on='reference')

def test_rouge_l_of_odd_texts():
    for a in [*HOSTILE, '', ' ', 'İstanbul ß', 'a'*10_000]:
        assert rouge_l(a, a)==1
        for b in HOSTILE: assert 0<=rouge_l(a, b)==rouge_l(b, a)<=1
    assert rouge_l('Hello World', 'hello, world!')==1 and rouge_l('héllo wörld', 'Héllo Wörld!')==1

def test_differences_put_both_texts_together_again():
    rnd = random.Random(0)
    for _ in range(300):
        a, b = (''.join(rnd.choice(HOSTILE+['x', 'y', ' ', '\n', '我有笔']) for _ in range(rnd.randint(0, 8))) for _ in 'ab')
        assert ''.join(w for op,w in differences(a, b) if op!='delete')==b
        assert ''.join(x for _,x,_ in aligned(a, b))==a and ''.join(y for *_,y in aligned(a, b))==b
