"What a notebook cannot show of the instruments' base: a kernel that is interrupted, threads that end, what a page would be sent"
import gc, json, threading, time
import pytest
import traitlets as t
from sdlab.lab.widgets import Chart, Grid, Instrument, Worker

def threads(): return [o for o in threading.enumerate() if o.name=='sdlab-worker']

def until(f, seconds=10):
    end = time.monotonic()+seconds
    while not f():
        assert time.monotonic()<end, 'it did not happen'
        time.sleep(.01)

def test_a_worker_has_a_thread_only_while_there_is_work():
    w = Worker()
    assert not threads() and not w.busy
    w.now(lambda: time.sleep(.05))
    assert len(threads())==1 and w.busy
    w.wait(5)
    until(lambda: not threads())

def test_two_long_works_take_turns_in_order():
    w,seen = Worker(),[]
    def steps(k):
        for i in range(3): yield k,i
    w.long(steps('a'), step=seen.append, key='a'); w.long(steps('b'), step=seen.append, key='b')
    w.wait(5)
    assert sorted(seen)==[(k,i) for k in 'ab' for i in range(3)] and [i for k,i in seen if k=='a']==[0,1,2]

def test_what_was_asked_for_last_comes_first():
    "The long map waits while something shorter is looked at"
    w,seen,gate = Worker(),[],threading.Event()
    w.now(lambda: gate.wait(10))
    w.long((i for i in (1,2,3)), step=seen.append, key='old')
    w.long((k for k in 'ab'), step=seen.append, key='new')
    gate.set(); w.wait(5)
    assert seen==['a','b',1,2,3]

def test_a_worker_outlives_who_cannot_be_told():
    def broken(e): raise RuntimeError('cannot be told')
    w,done = Worker(broken),[]
    w.now(lambda: 1/0)
    with pytest.raises(RuntimeError, match='cannot be told'): w.wait(5)
    w.now(lambda: done.append(1)); w.wait(5)
    assert done==[1]

def test_a_new_long_work_takes_the_place_of_the_one_with_its_key():
    w,closed,done = Worker(),[],[]
    def steps(k):
        try:
            while True: time.sleep(.01); yield k
        finally: closed.append(k)
    w.long(steps('old'), key='map')
    until(lambda: w.busy)
    w.long(iter_once('new'), then=done.append, key='map')
    w.wait(5)
    assert closed in (['old'], []) and done==['new']

def iter_once(v): yield v

def test_an_error_in_long_work_unhooks_and_is_told():
    w,log = Worker(),[]
    def steps():
        try: yield 1; raise ValueError('broken text')
        finally: log.append('unhooked')
    w.long(steps())
    with pytest.raises(ValueError, match='broken text'): w.wait(5)
    assert log==['unhooked'] and not w.busy

def test_waiting_has_an_end():
    w = Worker()
    w.now(lambda: time.sleep(.5))
    with pytest.raises(TimeoutError, match='not done after 0.05'): w.wait(.05)
    w.wait(5)

def test_closing_in_the_middle_ends_the_thread():
    w,log = Worker(),[]
    def steps():
        try:
            while True: time.sleep(.01); yield
        finally: log.append('unhooked')
    w.long(steps())
    time.sleep(.05)
    w.close()
    assert log==['unhooked'] and not w.busy
    until(lambda: not threads())

def test_a_worker_that_is_dropped_is_not_kept_alive():
    import weakref
    w = Worker()
    r = weakref.ref(w)
    w.now(lambda: None); w.wait(5)
    until(lambda: not threads())
    del w; gc.collect()
    assert r() is None

class Toy(Instrument):
    n = t.Int(1)
    def build(self):
        import ipywidgets as w
        return w.VBox([self.bind('n', w.IntSlider(description='n')), self.status()])
    def text(self): return f'n is {self.n}'

def test_plain_text_where_no_widget_can_be_shown():
    with Toy() as o:
        assert repr(o)=='n is 1' and o._repr_mimebundle_()=={'text/plain':'n is 1'}
    with pytest.raises(ValueError, match='This Toy was closed'): o.widget

def test_errors_are_escaped_where_they_are_shown():
    with Toy() as o:
        status = o.widget.children[1]
        o.fail(ValueError('<script>alert(1)</script>'))
        assert '<script' not in status.children[0].value and 'alert(1)' in status.children[0].value and 'role="alert"' in status.children[0].value
        o.fail(RuntimeError('deep'))
        assert o.error=='RuntimeError: deep'
        with pytest.raises(RuntimeError): o.check()
        assert o.error=='' and status.children[0].value==''

def test_what_a_page_is_sent_is_json():
    import torch
    for o in (Grid(values=torch.tensor([[float('nan'), 1.], [float('inf'), -2.]])), Chart(series=[dict(x=torch.arange(2), y=[None, float('nan')], labels=['<b>', 'x'])])):
        state = o.get_state()
        json.dumps({k:v for k,v in state.items() if k not in ('layout','tabbable','tooltip')}, allow_nan=False)
        o.close()

KERNEL = '''
import time
from sdlab.lab.widgets import Worker
log = []
def steps():
    try:
        while True: time.sleep(.01); yield len(log)
    finally: log.append('unhooked')
w = Worker()
w.long(steps())
'''

@pytest.fixture(scope='module')
def kernel():
    from jupyter_client.manager import start_new_kernel
    m,c = start_new_kernel(kernel_name='python3')
    yield m,c
    c.stop_channels(); m.shutdown_kernel(now=True)

def ask(c, code, interrupt=None):
    "What `code` prints in the kernel; `interrupt` is called once it runs"
    said,mine = [],c.execute(code)
    while True:
        msg = c.get_iopub_msg(timeout=60)
        if msg['parent_header'].get('msg_id')!=mine: continue
        kind,v = msg['msg_type'],msg['content']
        if kind=='stream': said.append(v['text'])
        if kind=='error': said.append(v['ename'])
        if kind=='stream' and 'ready' in v['text'] and interrupt: interrupt()
        if kind=='status' and v['execution_state']=='idle': break
    c.get_shell_msg(timeout=60)
    return ''.join(said)

STATE = 'time.sleep(.3); print(w.busy, log)'

def test_interrupting_a_cell_cancels_what_runs_in_the_background(kernel):
    m,c = kernel
    assert ask(c, KERNEL+'print(w.busy)').strip()=='True'
    assert 'KeyboardInterrupt' in ask(c, 'print("ready", flush=True); time.sleep(60)', m.interrupt_kernel)
    assert ask(c, STATE).strip()=="False ['unhooked']"

def test_interrupting_an_idle_kernel_cancels_it_too(kernel):
    m,c = kernel
    assert ask(c, KERNEL+'print(w.busy)').strip()=='True'
    m.interrupt_kernel()
    time.sleep(.3)
    assert ask(c, STATE).strip()=="False ['unhooked']"
    assert ask(c, 'print(1+1)').strip()=='2'

def test_many_workers_share_one_handler(kernel):
    m,c = kernel
    assert ask(c, 'from sdlab.lab.widgets import Worker\nfor i in range(2000): Worker()\nprint("made")').strip()=='made'
    assert ask(c, KERNEL+'print(w.busy)').strip()=='True'
    m.interrupt_kernel()
    time.sleep(.3)
    assert ask(c, STATE).strip()=="False ['unhooked']"

def test_interrupting_a_wait_cancels_what_it_waits_for(kernel):
    m,c = kernel
    assert 'KeyboardInterrupt' in ask(c, KERNEL+'print("ready", flush=True); w.wait()', m.interrupt_kernel)
    assert ask(c, STATE).strip()=="False ['unhooked']"
