"A checkpoint is cut on disk as in memory: every bit, every refusal, in the memory of a matrix, and whole or not at all"
import gc, json, os, shutil, threading, time
from pathlib import Path
import pytest, torch
import forks
from safetensors.torch import load_file, save_file
from families import FAMILIES, HEAD, L, MLP_ONLY, tiny, tokenizer
from sdlab.compress import shards
from sdlab.compress.prune import prune
from sdlab.compress.shards import passthrough, prune_checkpoint
from sdlab.core import disk
from sdlab.core.disk import skeleton
from sdlab.core.model import LM, load
from sdlab.core.plan import Plan

pytestmark = pytest.mark.filterwarnings('ignore')
HALF = Plan(L, (1, 5), 'by hand', attn=(0, 3), mlp=(3, 4))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


def folder(name, path, size='30KB', dtype=None, **kwargs):
    "A hub-style checkpoint of a family"
    model, tok = tiny(name, **kwargs), tokenizer()
    if dtype: model.to(dtype)
    model.save_pretrained(path, max_shard_size=size)
    tok.save_pretrained(path)
    return path


def tensors(path): return {k: v for f in sorted(path.glob('*.safetensors')) for k, v in load_file(f).items()}


def same(a, b):
    "The same model to the bit, in weights and words"
    x, y = tensors(a), tensors(b)
    assert set(x)==set(y)
    for k in x: assert x[k].dtype==y[k].dtype and x[k].equal(y[k]), k
    words = {f.name for f in a.iterdir() if f.suffix in ('.json', '.md', '.jinja') and 'index' not in f.name}
    assert words=={f.name for f in b.iterdir() if f.suffix in ('.json', '.md', '.jinja') and 'index' not in f.name}
    for f in words: assert (a/f).read_text()==(b/f).read_text(), f


# of every kind one: lists by block and by index, tied, experts that have other names on disk, parallel halves
SOME = ['Gemma3', 'SmolLM3', 'Qwen3-MoE', 'GPT-2', 'GPT-NeoX']


@pytest.mark.parametrize('name', SOME)
def test_as_in_memory(name, tmp_path):
    src = folder(name, tmp_path/'whole')
    lm = load(src)
    assert skeleton(src).fingerprint==lm.fingerprint and skeleton(src).path==lm.path
    plan = HALF if name in SOME[::2] else Plan(L, (1, 4))
    prune(lm, plan).save(tmp_path/'a')
    assert prune_checkpoint(src, plan, tmp_path/'b')==tmp_path/'b'
    same(tmp_path/'a', tmp_path/'b')
    back = load(tmp_path/'b')
    assert back.kept==plan.keep and back.zeroed=={'attention': plan.attn, 'mlp': plan.mlp}
    index = tmp_path/'b'/'model.safetensors.index.json'
    if index.exists():
        said = json.loads(index.read_text())
        assert said['weight_map']=={k: f.name for f in (tmp_path/'b').glob('*.safetensors') for k in load_file(f)}
        assert said['metadata']==dict(total_parameters=sum(v.numel() for v in tensors(tmp_path/'b').values()), total_size=sum(v.nbytes for v in tensors(tmp_path/'b').values()))


@pytest.mark.slow
@pytest.mark.parametrize('name', [o for o in FAMILIES if o not in SOME])
def test_as_in_memory_elsewhere(name, tmp_path): test_as_in_memory(name, tmp_path)


def test_of_a_cut_and_in_half_precision(tmp_path):
    "A cut of a cut composes, silence included; bfloat16 stays"
    src = folder('Mixtral', tmp_path/'whole', size='1GB', dtype=torch.bfloat16)
    once = prune_checkpoint(src, HALF, tmp_path/'once')
    prune(load(once), Plan(4, (0,), mlp=(1,))).save(tmp_path/'a')
    same(tmp_path/'a', prune_checkpoint(once, Plan(4, (0,), mlp=(1,)), tmp_path/'b'))
    back = load(tmp_path/'b')
    assert back.dtype==torch.bfloat16 and back.kept==(2, 3, 4) and back.zeroed=={'attention': (3,), 'mlp': (2, 3, 4)} and len(back.provenance['steps'])==2
    copy = prune_checkpoint(once, Plan(4), tmp_path/'copy')          # no cut: a copy, history and all
    assert (copy/'config.json').read_text()==(once/'config.json').read_text() and (copy/'model.safetensors').read_bytes()==(once/'model.safetensors').read_bytes()


def test_names_of_the_hub(tmp_path):
    "Without the prefix of the class, with tensors that a reload ignores, beside weights in another format: what a reload makes of it is what is cut"
    src = folder('GPT-2', tmp_path/'whole', size='1GB')
    ts = {k.removeprefix('transformer.'): v for k, v in load_file(src/'model.safetensors').items()}
    assert all(not k.startswith('transformer') for k in ts)
    save_file(ts | {'h.1.attn.bias': torch.ones(1, 1, 4, 4)}, src/'model.safetensors', metadata=dict(format='pt'))
    save_file({'layers.0.w': torch.ones(2)}, src/'consolidated.safetensors')
    prune_checkpoint(src, Plan(L, (0, 3)), tmp_path/'cut')
    assert set(tensors(tmp_path/'cut'))<=set(ts) and not (tmp_path/'cut'/'consolidated.safetensors').exists()
    want, got = prune(load(src), Plan(L, (0, 3))).model.state_dict(), load(tmp_path/'cut').model.state_dict()
    assert set(want)==set(got) and all(got[k].equal(want[k]) for k in want)


RULE = ('gpt2', FAMILIES['GPT-2'][1] | dict(scale_attn_by_inverse_layer_idx=True))
def test_refused_alike(tmp_path):
    "What prune refuses is refused in its words, and nothing is written"
    for family, plans in ((('qwen3_moe', dict(HEAD, decoder_sparse_step=2, **MLP_ONLY)), ((0,),)), (RULE, ((2, 3),)), ('Llama', ((0,),))):
        src = folder(family, tmp_path/f'{family[0]}')
        for drop in plans:
            plan = Plan(L if family!='Llama' else 5, drop)
            with pytest.raises(ValueError) as want: prune(load(src), plan)
            with pytest.raises(ValueError) as got: prune_checkpoint(src, plan, tmp_path/'out')
            assert str(got.value)==str(want.value) and '\n' not in str(got.value)
    assert not [p for p in tmp_path.iterdir() if 'out' in p.name]


def test_bad_folders(tmp_path):
    src, plan = folder('Llama', tmp_path/'whole'), Plan(L, (2,))
    def broken(name, act):
        act(Path(shutil.copytree(src, tmp_path/name)))
        return tmp_path/name
    shard = sorted(src.glob('*.safetensors'))[1].name
    index = 'model.safetensors.index.json'
    cases = {
        'gone': (lambda p: (p/shard).unlink(), FileNotFoundError, f'lacks {shard}, which its index names'),
        'short': (lambda p: (p/shard).write_bytes((p/shard).read_bytes()[:-50]), ValueError, 'corrupt or cut short'),
        'no index': (lambda p: (p/index).unlink(), FileNotFoundError, 'has neither model.safetensors nor'),
        'bad index': (lambda p: (p/index).write_text('{'), ValueError, 'is no index of tensors'),
        'lost': (lambda p: save_file(dict(list(load_file(p/shard).items())[1:]), p/shard), ValueError, 'which the index puts there'),
        'coded': (lambda p: (p/'config.json').write_text(json.dumps(json.loads((p/'config.json').read_text()) | dict(quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True)))), ValueError, 'is quantised'),
        'wide': (lambda p: (p/'config.json').write_text((p/'config.json').read_text().replace('"intermediate_size": 48', '"intermediate_size": 52')), ValueError, 'but its config asks for'),
        'config': (lambda p: (p/'config.json').write_text('{'), OSError, 'The config of'),
        'words': (lambda p: [f.unlink() for f in p.glob('tokenizer*')], OSError, 'The tokenizer of'),
    }
    for name, (act, kind, says) in cases.items():
        with pytest.raises(kind, match=says.replace('(', r'\(')) as e: prune_checkpoint(broken(name, act), plan, tmp_path/'out')
        assert '\n' not in str(e.value), name
    with pytest.raises(FileNotFoundError, match='There is no directory'): prune_checkpoint(tmp_path/'nowhere', plan, tmp_path/'out')
    with pytest.raises(FileExistsError, match='is there already'): prune_checkpoint(src, plan, src)
    with pytest.raises(ValueError, match='its fingerprint is known once'): shards.without(skeleton(src), plan).fingerprint
    assert not [p for p in tmp_path.iterdir() if 'out' in p.name]


def test_shared_across_blocks(tmp_path):
    "A weight that stands on disk with one block and is used by another: said, not lost"
    from test_families import ODD
    src = folder(ODD['Zamba2'], tmp_path/'whole', size='1GB')
    lm = load(src)
    held = [k for k in lm.model.state_dict() if k not in tensors(src) and k!='lm_head.weight']
    assert held                                                     # tied to what is stored with an earlier block
    with pytest.raises(ValueError, match='is tied to a weight that is stored with a block that goes|cannot be cut like this'): prune_checkpoint(src, Plan(L, (2,)), tmp_path/'out')


class Peak:
    "The most that the process held of its own inside, beyond what it held before: anonymous pages, asked for every millisecond"
    def __enter__(self):
        if not os.path.exists('/proc/self/status') or 'RssAnon' not in open('/proc/self/status').read(): pytest.skip('needs Linux')
        gc.collect()
        self.was, self.bytes, self.on = self.now(), 0, True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self
    def __exit__(self, *_):
        self.on = False
        self.thread.join()
    def now(self): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])*1024
    def watch(self):
        while self.on:
            self.bytes = max(self.bytes, self.now()-self.was)
            time.sleep(.001)


def big(path, d=1024, vocab=4096, **kwargs):
    "A folder of large plain matrices: (path, bytes of the largest, bytes of all)"
    from transformers import AutoConfig, AutoModelForCausalLM
    cfg = AutoConfig.for_model('llama', hidden_size=d, intermediate_size=2*d, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(cfg).save_pretrained(path, max_shard_size='60MB'), tokenizer().save_pretrained(path)
    return path, vocab*d*4, sum(f.stat().st_size for f in path.glob('*.safetensors'))


def watched(f, *args):
    "To be run in a process of its own, where nobody else's leavings are counted: says the most that `f(*args)` held"
    import warnings
    warnings.simplefilter('ignore')
    with torch.no_grad(), Peak() as peak: f(*args)
    print(f'peak {peak.bytes}', flush=True)

def give_back(): # what is freed goes back at once, instead of staying with the allocator and being counted
    import ctypes
    ctypes.CDLL(None).mallopt(-3, 2**18)                                                         # M_MMAP_THRESHOLD

def after_a_small_one(small, big, *args): # what the libraries themselves hold is there before
    give_back()
    prune_checkpoint(small, Plan(L, (0,)), Path(args[-1]).parent/'warm')
    watched(prune_checkpoint, big, *args)
    watched(load, big)

def peaks(f, *args):
    p = forks.Fork(f, *args)
    assert p.wait()==0, p.said()
    return [int(l.split()[1]) for l in p.said().splitlines() if l.startswith('peak ')]

def test_memory_of_a_matrix(tmp_path):
    "Whatever the model weighs: the decision, the proof and the copying, all together"
    if not os.path.exists('/proc/self/status') or 'RssAnon' not in open('/proc/self/status').read(): pytest.skip('needs Linux')
    src, matrix, total = big(tmp_path/'whole')
    cut, whole = peaks(after_a_small_one, folder('Llama', tmp_path/'tiny'), src, Plan(4, (2,)), tmp_path/'cut')
    assert total>190e6 and cut<2*matrix, (total, matrix, cut)
    assert whole>.5*total or whole<matrix                                                        # (that a load would be seen, unless it maps)


def test_passthrough():
    import yaml
    for plan, want in ((Plan(L, (2, 3)), [[0, 2], [4, 6]]), (Plan(L, (0, 2, 5)), [[1, 2], [3, 5]]), (Plan(L), [[0, 6]])):
        got = yaml.safe_load(passthrough('user/model', plan))
        assert [s['sources'] for s in got['slices']]==[[dict(model='user/model', layer_range=r)] for r in want] and got['merge_method']=='passthrough'
        assert [i for a, b in want for i in range(a, b)]==list(plan.keep)
    with pytest.raises(ValueError, match='no word for'): passthrough('user/model', Plan(L, attn=(1,)))


def test_where_the_folder_is_to_be(tmp_path, monkeypatch):
    "A link is followed; a place that no folder can take is refused before the work, not after it; names that YAML would read otherwise are quoted"
    import yaml
    src = folder('Llama', tmp_path/'whole')
    (tmp_path/'real').mkdir(), (tmp_path/'link').symlink_to(tmp_path/'real')
    prune_checkpoint(src, Plan(L, (2,)), tmp_path/'link')
    assert load(tmp_path/'real').n==load(tmp_path/'link').n==L-1 and (tmp_path/'link').is_symlink()
    def late(*args): raise AssertionError('too late')
    monkeypatch.setattr(shards, 'skeleton', late)
    (tmp_path/'here').mkdir(), monkeypatch.chdir(tmp_path/'here')
    with pytest.raises(ValueError, match='where this program runs'): prune_checkpoint(src, Plan(L, (2,)), '.')
    monkeypatch.setattr(Path, 'is_mount', lambda o: o.name=='disk')
    with pytest.raises(ValueError, match='where a disk is mounted'): prune_checkpoint(src, Plan(L, (2,)), tmp_path/'disk')
    for name in ('runs: one/a #b', 'true', '3', '', 'org/model-7B.v2', '- x', "it's"):
        assert {o['sources'][0]['model'] for o in yaml.safe_load(passthrough(name, Plan(L, (2, 3))))['slices']}=={name}
