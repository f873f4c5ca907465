"experiment.study where it is stopped: killed in each stage, interrupted, given the wrong folder; and real models with real texts"
import json, signal
from pathlib import Path
import pandas as pd, pytest, torch
import walker
import sdlab.experiment.study as S
from forks import Fork
from sdlab.experiment.cli import main

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return walker.walk(tmp_path_factory.mktemp('whole')/'s')

def same(a, b):
    "Do two studies say the same?"
    order = ['task', 'arm', 'item']
    x, y = (o.items.sort_values(order).reset_index(drop=True) for o in (a, b))
    pd.testing.assert_frame_equal(x, y, check_exact=False, rtol=1e-5)
    assert a.plan==b.plan and list(a.data)==list(b.data)
    for k in ('pruned', 'SFT', 'self-data'):
        p, q = (o.load(k).model.state_dict() for o in (a, b))
        assert p.keys()==q.keys() and all(torch.allclose(p[n], q[n], atol=1e-5) for n in p), k
        pd.testing.assert_frame_equal(a.maps[k], b.maps[k], check_exact=False, rtol=1e-4, atol=1e-6)

def test_kill_9_in_each_stage(tmp_path, whole):
    "One study, killed ten times, each time a stage later: what was finished is not done again, and the end is the same"
    out, marks = tmp_path/'s', {}
    for stage in walker.STAGES:
        p = Fork(walker.die, str(out), stage)
        assert p.wait()==-signal.SIGKILL, p.said()[-2000:]
        assert not (out/stage/'done.json').exists() and not (out/'report.html').exists()
        now = {str(m): m.stat().st_mtime_ns for m in out.rglob('done.json') if 'run' not in m.parts}
        assert all(now[k]==t for k,t in marks.items()), stage       # what was finished was left alone
        marks = now
    found = walker.walk(out)
    assert {str(m): m.stat().st_mtime_ns for m in map(Path, marks)}==marks and (out/'report.html').exists()
    same(found, whole)

def test_an_interrupt_keeps_what_is_done(tmp_path, monkeypatch, capsys, whole):
    "Ctrl-C in the third stage; through the command it is one sentence and 130, and the same call goes on"
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(S, 'prune', stop)
        with pytest.raises(KeyboardInterrupt): walker.walk(tmp_path/'s')
        assert main(['demo', '--out', str(tmp_path/'d')])==130
    assert 'goes on from there' in capsys.readouterr().err
    done = {p.parent.name for p in (tmp_path/'s').rglob('done.json')}
    assert done=={'0 tasks', '1 spans'}
    same(walker.walk(tmp_path/'s'), whole)

def test_what_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match='lr is 0.0002 there and 0.001 here'): walker.walk(whole.out, lr=1e-3)
    with pytest.raises(ValueError, match='at least 1, not 0'): S.study(walker.teacher(), walker.asked(), 0, tmp_path/'a')
    with pytest.raises(ValueError, match='would be dropped'): S.study(walker.teacher(), walker.asked(), 6, tmp_path/'a')
    assert not (tmp_path/'a').exists()
    (tmp_path/'f').write_text('a file')
    with pytest.raises(ValueError, match='is no study'): walker.walk(tmp_path/'f')

def test_a_full_disk_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    "A folder that cannot be written (the tests may run as root, so the file system is asked to refuse)"
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(S.os, 'replace', full)
    monkeypatch.setattr(S, 'stage', lambda *args: pytest.fail('a stage was run'))
    with pytest.raises(OSError, match='No space left'): walker.walk(tmp_path/'s')

def test_the_page_can_be_shown(whole):
    "All tasks, arms and numbers are there; nothing is fetched; nothing that was generated is markup"
    page = (whole.out/'report.html').read_text()
    assert all(k in page for k in ('What came of it', 'Hear them answer', 'What happened inside', 'self-data', 'in domain'))
    assert 'http://' not in page and 'https://' not in page and '<script' not in page
    for f in ('recovery.csv', 'items.csv', 'figures/recovery.png', 'figures/spans-spans.png', 'figures/SFT-cka.png', '2 pruned/model/model.safetensors', '4 self-data/model/README.md'): assert (whole.out/f).stat().st_size
    s = json.loads((whole.out/'study.json').read_text())
    assert s['seed']==0 and s['drop']==2 and s['tasks']

@pytest.mark.slow
@pytest.mark.parametrize('name', ['stories-260k', 'babyllama-1m'])
def test_real_models_on_real_stories(data, tmp_path, name):
    "Plain text, a model that somebody else trained: one of five blocks goes, and tuning takes some of the loss back"
    found = S.study(data/'models'/name, data/'tinystories'/'stories.json', 1, tmp_path/'s', controls=False, epochs=3.)
    f = found.frame().set_index('arm').score
    assert f['teacher']<f['SFT']<f['pruned'] and f['self-data']<f['pruned']
