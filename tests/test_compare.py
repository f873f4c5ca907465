"lab.compare without a browser: what is asked, what is recorded, what overtakes what, and what must not be markup"
import threading, time
from html.parser import HTMLParser
import pandas as pd, pytest
import sdlab.lab.compare as C
from sdlab.core.answers import Task
from sdlab.core.plan import Plan
from sdlab.core.pocket import pocket_tasks
from sdlab.core.units import without
from sdlab.judge.recovery import Recovery, recovery
from sdlab.lab.compare import Compare, differing
from sdlab.experiment.study import Study

SUM = 'Ann has 12 pens. Ann buys 5 more. How many pens does Ann have now?'
BAD = '<script>alert(1)</script><img src=x onerror=alert(2)> שלום $x^2$ 🎈 "\' &amp;'

@pytest.fixture(scope='module')
def arms(teacher): return {'teacher': teacher, 'pruned': without(teacher, Plan(12, (3, 4))), 'other': without(teacher, Plan(12, (8, 9)))}

@pytest.fixture(scope='module')
def tasks(): return pocket_tasks(4, sums=8)

@pytest.fixture(scope='module')
def known(arms, tasks): return recovery(arms['teacher'], {k: v for k, v in arms.items() if k!='teacher'}, tasks)

@pytest.fixture
def c(arms, tasks, known):
    with Compare(arms, tasks, known) as it: yield it

def opened(c): return sorted(c.models)

class Tags(HTMLParser):
    def __init__(self): super().__init__(); self.tags, self.attrs = set(), []
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attrs += [k for k, _ in attrs]

def markup(html):
    t = Tags()
    t.feed(html)
    return t

def test_a_question_of_ones_own(c, arms):
    said = c.ask(SUM)
    assert said=={k: lm.reply(SUM, 96) for k, lm in arms.items()}
    assert c.answers==said and set(c.marks.values())=={None} and (c.task, c.item, c.reference)==('', -1, '')
    assert c.ask('')=={} and 'nothing asked' in c.text()
    c.question = SUM                                                  # the trait does the same
    assert c.wait().answers==said

def test_an_item_is_marked_as_the_judge_marks_it(c, known, tasks):
    c.pick('sums', 3)
    assert opened(c)==[]                                              # read from the record
    rec = known.items.query("task=='sums' and item==3").set_index('arm')
    assert c.marks=={k: bool(rec.score[k]) for k in c.names} and c.answers==rec.reply.to_dict()
    with Compare(c.arms, tasks) as live:
        live.pick('sums', 3).wait(120).check()
        assert live.marks==c.marks and live.answers==c.answers and opened(live)==sorted(c.names)
        live.pick('choice', 1).wait(120).check()
    c.pick('choice', 1)
    assert live.marks==c.marks and live.answers==c.answers and c.reference==tasks['choice'].rows[1]['choices'][tasks['choice'].rows[1]['answer']]

def test_traits_pick_too(c, tasks):
    c.task = 'facts'
    assert c.item==0 and c.question==tasks['facts'].rows[0]['prompt']
    c.item = 2
    assert c.question==tasks['facts'].rows[2]['prompt']
    c.task = 'sums'
    assert c.item==0
    c.item = -1
    assert (c.task, c.question, c.answers)==('', '', {})
    c.pick('sums', 7)
    c.task = ''
    assert c.item==-1 and not c.question

def test_leafing(c, known, tasks):
    seen = [(c.next().task, c.item) for _ in range(20)]
    assert seen==[('sums', i%8) for i in range(20)]                  # the first item fixes the task; round and round
    assert (c.previous().item, c.previous().item)==(2, 1) and c.pick('sums', 0).previous().item==7
    assert {(c.random().task, c.item) for _ in range(40)}<={('sums', i) for i in range(8)}
    c.only = True
    d = differing(known)
    want = [(t, i) for t in tasks if t!='stories' for i in d[d.task==t]['item']]
    c.pick('sums', 0)
    mine = [i for t, i in want if t=='sums']
    assert mine and [c.next().item for _ in mine]==[i for i in mine if i>0]+[i for i in mine if i==0]
    assert all(len(set(c.next().marks.values()))>1 for _ in range(5)) and opened(c)==[]
    assert set(zip(c.disagreements.task, c.disagreements['item']))==set(want) and set(c.disagreements.columns)>={'prompt', 'reference', *c.names}

def test_differing_by_hand():
    "Against a list of marks written out"
    it = pd.DataFrame([dict(task=t, metric='exact', arm=a, item=i, score=float(s), answer='', reference='r', reply='')
                       for t, rows in dict(x=['11', '10', '00'], y=['01']).items() for i, s2 in enumerate(rows) for a, s in zip(('teacher', 'pruned'), s2)])
    d = differing(Recovery(it))
    assert list(zip(d.task, d['item'], d.teacher, d.pruned))==[('x', 1, True, False), ('y', 0, False, True)]

def test_scoring_in_the_background_gives_the_table(arms, tasks, known):
    with Compare(arms, tasks, batch_size=3) as c:
        assert c.scores.empty and c.recovery is None
        seen = []
        c.observe(lambda e: seen.append(e['new']), 'progress')
        c.score().wait(300)
        c.check()
        cols = ['task', 'arm', 'score', 'low', 'high', 'n']
        pd.testing.assert_frame_equal(c.scores[cols], known.frame()[cols], check_exact=False, rtol=1e-4)   # pieces of three, or all at once
        assert max(seen)>.8 and seen==sorted(seen) and c.doing==''

def test_cancel_in_the_middle(arms, tasks):
    with Compare(arms, tasks, batch_size=2) as c:
        c.observe(lambda e: e['new']>.2 and c.cancel(), 'progress')
        c.score().wait(120)
        assert c.recovery is None and c.doing=='' and c.failed is None and not c.worker.busy
        c.unobserve_all('progress')
        assert set(c.ask(SUM))==set(arms)                             # it can be used again

def test_a_new_question_overtakes(arms, monkeypatch):
    "The first arm is held until somebody asks something else: of the old question no answer is seen"
    gate, real, asked = threading.Event(), C.generate, []
    def slow(lm, prompts, n):
        asked.append(prompts[0])
        if prompts[0]=='old': gate.wait(20)
        return real(lm, prompts, 4)
    monkeypatch.setattr(C, 'generate', slow)
    with Compare(arms) as c:
        c.question = 'old'
        while not asked: time.sleep(.01)
        c.question = 'new'
        gate.set()
        c.wait(60)
        assert asked==['old', *['new']*3] and set(c.answers)==set(arms) and c.question=='new'
        gate.clear(); asked.clear()
        c.question = 'old'
        while not asked: time.sleep(.01)
        c.cancel()
        gate.set()
        c.wait(60)
        assert asked==['old'] and c.answers=={} and c.doing==''

def test_an_answer_does_not_wait_for_the_scores(arms, tasks, monkeypatch):
    "Between two pieces of a scoring a question is answered, and its answer handed over while the next piece is still held"
    gate, real, held, said = threading.Event(), C.score, [], []
    with Compare(arms, tasks, batch_size=4) as c:
        def slow(lm, task, *args):
            held.append(task)
            end = time.monotonic()+60
            while len(held)==1 and not c.worker._soon and time.monotonic()<end: time.sleep(.01) # the first piece lasts until the question is there
            if len(held)>1: gate.wait(60)                                # and the second is held
            return real(lm, task, *args)
        monkeypatch.setattr(C, 'score', slow)
        c.score()
        while not held: time.sleep(.01)
        t = threading.Thread(target=lambda: said.append(c.ask(SUM)))
        t.start(), t.join(20)
        try: assert said and set(said[0])==set(arms) and not gate.is_set() and c.recovery is None
        finally: c.cancel(), gate.set(), t.join(60), c.wait(120)

def test_a_folder_is_opened_when_it_is_asked(arms):
    from sdlab.core.pocket import pocket_assets
    with Compare({'teacher': arms['teacher'], 'copy': str(pocket_assets())}) as c:
        assert opened(c)==[]
        said = c.ask(SUM)
        assert said['copy']==said['teacher'] and opened(c)==['copy', 'teacher']

def test_one_arm_fails_and_the_others_answer(arms):
    def none(): raise OSError('the disk with this model is gone')
    with Compare({**arms, 'lost': none}) as c:
        with pytest.raises(OSError, match='disk with this model'): c.ask(SUM)
        assert set(c.answers)==set(arms)
        c.question = SUM+' '
        c.wait(60)
        assert 'disk with this model' in c.error and isinstance(c.failed, OSError)
        assert c.doing==''

def test_what_is_refused(c, arms, tasks, known, tmp_path):
    for f, exc, what in ((lambda: c.pick('poems'), ValueError, "no task 'poems'"), (lambda: c.pick('sums', 8), ValueError, 'items 0 to 7'), (lambda: c.pick('stories'), ValueError, 'with questions'),
                         (lambda: setattr(c, 'item', 1), ValueError, 'belongs to a task'), (lambda: Compare({}), ValueError, 'nothing to compare'),
                         (lambda: Compare(arms).next(), ValueError, 'no item to show'), (lambda: Compare(arms).score(), ValueError, 'no tasks'),
                         (lambda: Compare({'pruned': arms['pruned']}, tasks).score(), ValueError, "called 'teacher'"), (lambda: Compare(arms, tasks).disagreements, ValueError, 'score'),
                         (lambda: setattr(Compare(arms, tasks), 'only', True), ValueError, 'score'), (lambda: Compare(arms, {'sums': tasks['sums'].sample(3)}, known), ValueError, 'made from 8 items'),
                         (lambda: Compare(tmp_path), ValueError, 'holds no study')):
        with pytest.raises(exc, match=what): f()
    same = Recovery(known.items.assign(score=1.).query("metric!='perplexity'"))
    with Compare(arms, tasks, same) as agree:
        agree.only = True
        with pytest.raises(ValueError, match='agree on all'): agree.next()

def test_after_close(arms, tasks, known):
    c = Compare(arms, tasks, known)
    c.widget
    c.close(); c.close()
    for f in (lambda: c.ask('x'), lambda: c.pick('sums'), c.next, c.score, lambda: c.widget):
        with pytest.raises(ValueError, match='closed'): f()
    assert c.models=={} and isinstance(c.text(), str) and '<Compare' not in repr(c)

def test_hostile_text_is_text(arms, monkeypatch):
    "In names, questions, references and answers; in the page, in the picture and in the terminal"
    monkeypatch.setattr(C, 'generate', lambda lm, prompts, n: [BAD])
    task = Task(BAD, [dict(prompt=BAD, completion=BAD+' #### 3')])
    with Compare({BAD: arms['teacher'], 'teacher': arms['teacher']}, {BAD: task}) as c:
        c.ask(BAD)
        page = C._answer_cards(*c.shown)
        seen = markup(page)
        assert seen.tags<={'div', 'b', 'section', 'span', 'p'} and not {a for a in seen.attrs if a.startswith('on') or a=='src'} and page.count('dir="auto"')>=4
        c.figure().canvas.draw()
        assert BAD in c.text()
        assert 'script' not in markup(c.widget.children[3].value).tags
        c.pick(BAD, 0).wait(60)
        c.figure().canvas.draw()

def test_the_page_follows_the_state(c):
    "Through its own controls, as a browser would move them"
    own, items, _, cards, verdicts = c.widget.children
    task, item, previous, other, further, only = items.children
    task.value = 'sums'
    assert c.task=='sums' and c.question in own.children[0].value and '✓ right' in cards.value
    further.click()
    assert (c.item, item.value)==(1, 1)
    only.value = True
    assert c.only
    item.value = 99
    assert item.value==7                                              # bounded by what there is
    own.children[0].value = SUM
    own.children[1].click()
    c.wait(60)
    assert task.value=='' and item.value==-1 and all(v in cards.value for v in ('pruned', 'other')) and c.answers['teacher'] in cards.value
    assert verdicts.children[1].value and verdicts.children[2].value[:4]==b'\x89PNG'
    controls = [o for box in (own, items) for o in box.children]
    assert all(getattr(o, 'description', '') for o in controls)

def test_the_teacher_is_left_alone(teacher, tasks):
    was = teacher.fingerprint, [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in teacher.model.modules()]
    with Compare({'teacher': teacher}, tasks) as c:
        c.ask(SUM)
        assert c.models['teacher'].model is not teacher.model
    assert was==(teacher.fingerprint, [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in teacher.model.modules()])

@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    import walker
    return walker.walk(tmp_path_factory.mktemp('study')/'s')

def test_a_study_from_its_folder(walked):
    "Models are opened when they are first asked, and its teacher must be the one that it had"
    import walker
    with Compare(str(walked.out), teacher=walker.teacher()) as c:
        assert c.names==walked.arms() and opened(c)==[] and list(c.tasks)==list(walked.recovery().tasks)
        pd.testing.assert_frame_equal(c.scores, walked.recovery().frame())
        k = next((k for k, m in walked.recovery().tasks.items() if m!='perplexity'), None)
        if k: assert set(c.pick(k, 0).answers)==set(c.names) and opened(c)==[]
        assert set(c.ask('anything'))==set(c.names) and opened(c)==sorted(c.names)
    with Compare(Study(walked.out)) as c:
        with pytest.raises(ValueError, match='keeps the name of its teacher'): c.ask('anything')
        assert set(c.answers)==set(c.names)-{'teacher'}

def test_a_study_has_one_teacher(walked, teacher):
    with Compare(walked, teacher=teacher) as c:
        with pytest.raises(ValueError, match='is not the teacher of this study'): c.ask('anything')
