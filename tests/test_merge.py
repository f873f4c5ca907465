"Two students become one: by an independent formula, on disk as in memory, in the memory of two matrices, whole or not at all"
import json, os, shutil, subprocess, sys
import numpy as np
import pytest, torch
from safetensors.torch import load_file, save_file
from families import HEAD, L, MLP_ONLY, tiny, tokenizer
from test_shards import big, give_back, peaks, tensors, watched
from sdlab.compress import merge as page
from sdlab.compress.prune import prune
from sdlab.compress.merge import cosines, merge, slerp
from sdlab.compress.shards import prune_checkpoint
from sdlab.core import disk
from sdlab.core.model import LM, load
from sdlab.core.plan import Plan

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


def oracle(t, x, y):
    "Section 1.4 of the paper file, step by step, in NumPy and double precision"
    x, y = (o.double().numpy() for o in (x, y))
    unit = lambda v: v/np.linalg.norm(v) if np.linalg.norm(v)>1e-8 else v
    dot = (unit(x)*unit(y)).sum()
    if abs(dot)>.9995: return (1-t)*x + t*y, 'lerp'
    theta = np.arccos(dot)
    return np.sin(theta-t*theta)/np.sin(theta)*x + np.sin(t*theta)/np.sin(theta)*y, 'slerp'


def moved(lm, far, seed, only=None):
    "A student: `lm`, every tensor moved by `far` of its length (or only those whose name holds `only`)"
    new = prune(lm, Plan(lm.n))
    g = torch.Generator().manual_seed(seed)
    for k, p in new.model.named_parameters():
        if only is None or only in k:
            d = torch.randn(p.shape, generator=g).to(p)
            p += far*d*(p.norm()/d.norm())
    new.name = f'student {seed}'
    return new


@pytest.fixture(scope='module')
def cut():
    with torch.no_grad(): return prune(LM(tiny('Qwen2'), tokenizer(), 'tiny'), Plan(L, (2, 3), 'by hand'))   # tied


def params(lm): return dict(lm.model.named_parameters())


@pytest.mark.parametrize('far', [.01, .3])
def test_by_another_formula(cut, far, t=.3):
    a, b = moved(cut, far, 1), moved(cut, far, 2)
    for base in (None, cut):
        table = cosines(a, b, base).set_index('tensor')
        for how in ('slerp', 'linear'):
            got = params(merge(a, b, t, how, base))
            for k, x in params(a).items():
                y, o = params(b)[k], params(cut)[k] if base else torch.zeros_like(x)
                want, branch = oracle(t, x-o, y-o)
                assert branch==table.branch[k]
                if how=='linear': want = ((1-t)*(x-o) + t*(y-o)).double().numpy()
                torch.testing.assert_close(got[k].double(), torch.tensor(want)+o.double(), rtol=0, atol=2e-5*float(x.abs().max()))
                assert table.cosine[k]==pytest.approx(float(torch.cosine_similarity((x-o).double().flatten(), (y-o).double().flatten(), 0)), abs=1e-6)
                assert table.difference[k]==pytest.approx(float((x-y).double().norm()/(x-o).double().norm()), rel=1e-5)
        assert set(table.branch)==({'lerp'} if base is None and far==.01 else {'slerp'} if base else set(table.branch))


def test_ends_and_equals(cut):
    "t=0 and t=1 are the students, to the bit; what is equal in both is left alone, whatever t"
    a, b = moved(cut, .2, 1, 'mlp'), moved(cut, .2, 2, 'mlp')
    for base in (None, cut):
        for t, o in ((0, a), (1, b)): assert all(p.equal(params(o)[k]) for k, p in params(merge(a, b, t, base=base)).items())
        half = params(merge(a, b, 1/3, base=base))
        assert all(p.equal(params(cut)[k])==('mlp' not in k) for k, p in half.items())
        assert set(cosines(a, b, base).query('branch=="same"').tensor)=={k for k in half if 'mlp' not in k}
    assert set(cosines(a, a).branch)=={'same'}


def test_merging_leaves_them_alone(cut):
    a, b = moved(cut, .2, 1), moved(cut, .2, 2)
    was = [o.fingerprint for o in (a, b, cut)]
    new = merge(a, b, .5, base=cut)
    assert [o.fingerprint for o in (a, b, cut)]==was
    assert not {p.data_ptr() for p in new.model.parameters()} & {p.data_ptr() for o in (a, b, cut) for p in o.model.parameters()}
    assert new.model.lm_head.weight is new.model.model.embed_tokens.weight
    step = new.provenance['steps'][-1]
    assert (step['op'], step['how'], step['t'], step['other'], step['base'], step['tensors'])==('merge', 'slerp', .5, 'student 2', cut.name, len(params(a)))
    assert step['along_an_arc']==(cosines(a, b, cut).branch=='slerp').sum() and step['other_steps']==b.provenance['steps']
    assert new.kept==cut.kept and new.provenance['teacher_fingerprint']==cut.provenance['teacher_fingerprint'] and len(a.provenance['steps'])==1
    table = cosines(a, b, cut)
    assert step['lowest_cosine']==pytest.approx(table.cosine.min(), rel=1e-5) and step['highest_cosine']==pytest.approx(table.cosine.max(), rel=1e-5)
    again = merge(new, b, .5)                                       # a merged model is a model
    assert [s['op'] for s in again.provenance['steps']]==['prune', 'merge', 'merge']


def test_on_disk_as_in_memory(cut, tmp_path):
    "Tied, in half precision, differently sharded: equal to the bit, and a plain model"
    whole = LM(tiny('Qwen2'), tokenizer(chat=True), 'low')
    whole.model.generation_config.eos_token_id = [2, 5]
    low = prune(load(whole.save(tmp_path/'whole'), dtype='bfloat16'), Plan(L, (2, 3)))
    a, b = moved(low, .2, 1), moved(low, .2, 2)
    for o, name, size in ((a, 'a', '20KB'), (b, 'b', '1GB'), (low, 'base', '30KB')): o.model.save_pretrained(tmp_path/name, max_shard_size=size), o.tokenizer.save_pretrained(tmp_path/name)
    ways = dict(plain=dict(), base=dict(base=1), linear=dict(how='linear'))
    for name, kw in ways.items():
        want = merge(a, b, .4, **kw | (dict(base=low) if 'base' in kw else {}))
        out = merge(tmp_path/'a', str(tmp_path/'b'), .4, **kw | (dict(base=tmp_path/'base') if 'base' in kw else {}), out=tmp_path/f'out {name}')
        assert out==tmp_path/f'out {name}'
        got = load(out)
        assert got.dtype==torch.bfloat16 and all(p.equal(params(want)[k]) for k, p in params(got).items())
        assert got.stops==low.stops and got.tokenizer.chat_template==low.tokenizer.chat_template and got.kept==low.kept
        drop = lambda s: {k: v for k, v in s.items() if k not in ('other', 'base')}
        assert drop(got.provenance['steps'][-1])==drop(json.loads(json.dumps(want.provenance['steps'][-1])))
        assert len(list(out.glob('*.safetensors')))==len(list((tmp_path/'a').glob('*.safetensors')))>1
    from transformers import AutoModelForCausalLM
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert plain.dtype==torch.bfloat16 and not info['missing_keys'] | info['unexpected_keys'] and plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.eval()(torch.arange(3, 15)[None]).logits.equal(want.model(torch.arange(3, 15)[None]).logits)
    pd = [cosines(a, b, low), cosines(tmp_path/'a', tmp_path/'b', tmp_path/'base')]
    assert pd[0].set_index('tensor').cosine.sort_index().tolist()==pytest.approx(pd[1].set_index('tensor').cosine.sort_index().tolist())
    mixed = merge(tmp_path/'a', b, .4, out=tmp_path/'mixed')                  # a folder and an LM: in memory, then saved
    assert all(v.equal(tensors(tmp_path/'out plain')[k]) for k, v in tensors(mixed).items())
    loaded = merge(tmp_path/'a', tmp_path/'b', .4)                           # folders without out: an LM
    assert isinstance(loaded, LM) and all(p.equal(params(load(tmp_path/'out plain'))[k]) for k, p in params(loaded).items())


def test_experts(tmp_path):
    "On disk each expert's matrix is a vector of its own, as in mergekit; without provenance a merge begins one"
    lm = LM(tiny('Mixtral'), tokenizer(), 'experts')
    a, b = moved(lm, .2, 1), moved(lm, .2, 2)
    a.save(tmp_path/'a'), b.save(tmp_path/'b')
    x, y, got = tensors(tmp_path/'a'), tensors(tmp_path/'b'), tensors(merge(tmp_path/'a', tmp_path/'b', .3, out=tmp_path/'out'))
    assert any('experts.3.w2' in k for k in got)
    for k in x: torch.testing.assert_close(got[k].double(), torch.tensor(oracle(.3, x[k], y[k])[0]), rtol=0, atol=1e-5)
    new = load(tmp_path/'out')
    assert new.provenance['teacher_fingerprint']==a.fingerprint and new.kept==tuple(range(L)) and [s['op'] for s in new.provenance['steps']]==['merge']
    straight = merge(a, b, .3, 'linear')
    assert all(p.equal(params(load(merge(tmp_path/'a', tmp_path/'b', .3, 'linear', out=tmp_path/'line')))[k]) for k, p in [next(iter(params(straight).items()))])


def test_refused_before_anything_is_read(cut, tmp_path, monkeypatch):
    "From configs and headers: no stretch of a weight is touched"
    lm = LM(tiny('Qwen2'), tokenizer(), 'tiny')
    def saved(lm, name):
        if not (tmp_path/name).exists(): lm.save(tmp_path/name)
        return tmp_path/name
    good = moved(cut, .1, 1)
    words = tokenizer()
    words.add_tokens(['zebra'])
    bad = {
        'depth': (prune(lm, Plan(L, (2,))), 'only models of one shape'),
        'width': (prune(LM(tiny('Qwen2', hidden_size=64), tokenizer(), 'wide'), Plan(L, (2, 3))), 'only models of one shape'),
        'vocabulary': (prune(LM(tiny('Qwen2', vocab_size=120), tokenizer(), 'wordy'), Plan(L, (2, 3))), 'only models of one shape'),
        'cut': (prune(lm, Plan(L, (1, 4))), 'students of different cuts, one of blocks 0–1, 4–5, the other of 0, 2–3, 5'),
        'silence': (prune(lm, Plan(L, (2, 3), mlp=(4,))), 'students of different cuts: other sub-layers'),
        'teacher': (prune(LM(tiny('Qwen2', seed=3), tokenizer(), 'twin'), Plan(L, (2, 3))), 'come from different teachers'),
        'config': (LM(tiny('Qwen2', num_hidden_layers=4, layer_types=cut.config.layer_types, max_window_layers=2, sliding_window=3), tokenizer(), 'odd'), 'differ|different cuts'),
        'heads': (LM(tiny('Qwen2', num_hidden_layers=4, layer_types=cut.config.layer_types, intermediate_size=64), tokenizer(), 'odd'), 'differ|different cuts'),
        'tokenizer': (LM(prune(cut, Plan(4)).model, words, 'words'), 'different tokenizers'),
    }
    touched = []
    monkeypatch.setattr(page, '_chunks', lambda *ts: touched.append(1) or iter(()))
    for name, (other, says) in bad.items():
        for x, y in ((good, other), (saved(good, 'good'), saved(other, name))):
            for act in (lambda: merge(x, y, out=tmp_path/'out'), lambda: cosines(x, y), lambda: merge(x, x, base=y)):
                with pytest.raises(ValueError, match=says) as e: act()
                assert '\n' not in str(e.value), name
    assert not touched and not [p for p in tmp_path.iterdir() if 'out' in p.name]


def test_bad_input(cut, tmp_path):
    a, b = moved(cut, .1, 1), moved(cut, .1, 2)
    for t in (-.1, 1.1, '0.5', None, True, float('nan')):
        with pytest.raises(ValueError, match='`t` is a number from 0'): merge(a, b, t)
    with pytest.raises(ValueError, match="'slerp' or 'linear', not 'ties'"): merge(a, b, how='ties')
    with pytest.raises(TypeError, match='are LMs or folders, not'): merge(a, b.model)
    with pytest.raises(FileExistsError, match='is there already'): merge(a, b, out=a.save(tmp_path/'a'))
    away = moved(cut, .1, 3)
    away.model.is_quantized = True
    with pytest.raises(ValueError, match='is quantised'): merge(a, away)
    from peft import LoraConfig, get_peft_model
    wrapped = LM(get_peft_model(moved(cut, .1, 4).model, LoraConfig(r=2, target_modules=['q_proj'])), tokenizer(), 'adapted')
    with pytest.raises(ValueError, match='is wrapped in a PeftModel'): merge(a, wrapped)
    params(b)['model.norm.weight'][3] = float('nan')
    for out in (None, tmp_path/'out'):
        with pytest.raises(ValueError, match='model.norm.weight holds NaN'): merge(a, b, out=out)
    b.save(tmp_path/'b')
    with pytest.raises(ValueError, match='model.norm.weight holds NaN'): merge(tmp_path/'a', tmp_path/'b', out=tmp_path/'out')
    save_file({k: v for k, v in load_file(tmp_path/'b'/'model.safetensors').items() if 'layers.1.mlp' not in k}, tmp_path/'b'/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='only one has model.layers.1.mlp'): merge(tmp_path/'a', tmp_path/'b', out=tmp_path/'out')
    assert sorted(p.name for p in tmp_path.iterdir())==['a', 'b']


KILLED = '''
import os, sys, warnings; warnings.filterwarnings('ignore')
import torch; torch.set_num_threads(1)
import sdlab.core.disk as disk
from sdlab.compress.merge import merge
from sdlab.compress.shards import prune_checkpoint
from sdlab.core.plan import Plan
write, seen, (a, b, out, cut) = disk._bytes, [], sys.argv[1:]
def dying(t):
    seen.append(t)
    if len(seen)>20: os._exit(9)
    return write(t)
disk._bytes = dying
pid = os.fork()
if not pid: merge(a, b, out=out)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==9
prune_checkpoint(a, Plan(4, (1,)), cut)
'''
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_on_the_way(cut, tmp_path):
    "Nothing that is taken for a model, nothing in the way of the next run, and nothing left of the first one after it"
    a, b, out, gone = moved(cut, .1, 1).save(tmp_path/'a'), moved(cut, .1, 2).save(tmp_path/'b'), tmp_path/'out', tmp_path/'cut'
    p = subprocess.run([sys.executable, '-c', KILLED, *map(str, (a, b, out, gone))], capture_output=True, text=True)
    assert p.returncode==9 and not out.exists() and not gone.exists(), p.stderr
    assert sorted(p.name.split('.')[-1] for p in tmp_path.iterdir())==['a', 'b', 'part', 'part']
    got, less = load(merge(a, b, out=out)), load(prune_checkpoint(a, Plan(4, (1,)), gone))
    assert all(x.equal(params(merge(a, b))[k]) for k, x in params(got).items())
    assert all(x.equal(params(prune(load(a), Plan(4, (1,))))[k]) for k, x in params(less).items())
    assert sorted(p.name for p in tmp_path.iterdir())==['a', 'b', 'cut', 'out']


def merged_after_a_small_one(small, a, b, out): # what the libraries themselves hold is there before
    give_back()
    merge(small, small, out=out.parent/'warm')
    watched(in_thirds, a, b, out)

def in_thirds(a, b, out): merge(a, b, .3, base=a, out=out)

def test_memory_of_two_matrices(cut, tmp_path):
    "Whatever the models weigh, the process holds less of its own than two of their matrices, the base included"
    src, matrix, total = big(tmp_path/'a')
    shutil.copytree(src, tmp_path/'b')
    for f in (tmp_path/'b').glob('*.safetensors'):
        with open(f, 'r+b') as o: o.seek(-8*10**6, 2), o.write(bytes(10**6))                     # not the same
    cut.save(tmp_path/'c')
    peak, = peaks(merged_after_a_small_one, tmp_path/'c', src, tmp_path/'b', tmp_path/'out')
    assert total>190e6 and peak<2*matrix, (total, matrix, peak)
