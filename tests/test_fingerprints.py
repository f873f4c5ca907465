"What a fingerprint has to see: every tensor, every element, and nothing else"
import os, subprocess, sys
import pytest, torch
from families import tiny, tokenizer
from sdlab.core.model import LM, load


def model(): return LM(tiny('Llama'), tokenizer(), 'small')


@pytest.fixture(scope='module')
def same(): return model().fingerprint


def test_equal_models_have_equal_fingerprints(same):
    "A fingerprint depends on the numbers alone, not on the name or on who asks how often"
    lm = model()
    assert lm.fingerprint==lm.fingerprint==same==LM(lm.model, tokenizer(), 'other').fingerprint
    assert len(same)==16 and int(same, 16) >= 0


DOWN, UP, NORM = 'model.layers.3.mlp.down_proj.weight', 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'
HEAD = 'lm_head.weight'


@pytest.mark.parametrize('name', [DOWN, UP, 'model.layers.5.self_attn.o_proj.weight', HEAD])
def test_zeroed_channels_are_seen(same, name):
    "Every row and every column that is set to zero gives another fingerprint"
    lm = model()
    p = lm.model.get_parameter(name)
    missed = []
    with torch.no_grad():
        for dim, n in enumerate(p.shape):
            for i in range(0, n, 5):
                part = p.select(dim, i)
                was = part.clone()
                part.zero_()
                if lm.fingerprint==same: missed.append((dim, i))
                part.copy_(was)
    assert missed==[] and lm.fingerprint==same


def exchange(part, i, j):
    "What stands at `i` and at `j` of a tensor changes places"
    part[[i, j]] = part[[j, i]].clone()


def move(part, amount):
    "What the first element gains the second one loses"
    part[0] += amount
    part[1] -= amount


def last_bit(element): element.copy_(torch.nextafter(element, torch.tensor(9.)))


SMALL = {   # changes that leave a tensor almost what it was
    'two rows change places': (UP, lambda p: exchange(p, 6, 17)),
    'two neighbours change places': (HEAD, lambda p: exchange(p, 40, 41)),
    'two columns change places': (DOWN, lambda p: exchange(p.T, 0, 1)),
    'two elements change places': (UP, lambda p: exchange(p[3], 4, 5)),
    'a row changes its sign': (UP, lambda p: p[9].neg_()),
    'an element changes its sign': (UP, lambda p: p[8, 13].neg_()),
    'an element of a norm': (NORM, lambda p: p[5].add_(1e-3)),
    'an element of a matrix': (DOWN, lambda p: p[7, 11].add_(1e-3)),
    'the last bit of an element': (UP, lambda p: last_bit(p[8, 13])),
    'a sum that stays': (UP, lambda p: move(p[2], .25)),
}


@pytest.mark.parametrize('kind', SMALL)
def test_small_changes_are_seen(same, kind):
    "A change that keeps most sums and most samples is seen"
    name, change = SMALL[kind]
    before = model().model.get_parameter(name).clone()
    lm = model()
    with torch.no_grad(): change(lm.model.get_parameter(name))
    assert not torch.equal(before, lm.model.get_parameter(name)), 'the test changed nothing'
    assert lm.fingerprint!=same


def test_swapped_tensors_are_seen(same):
    "Two tensors of one shape that change places are another model"
    lm = model()
    a, b = (lm.model.get_parameter(f'model.layers.{i}.mlp.up_proj.weight') for i in (0, 4))
    with torch.no_grad():
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
    assert lm.fingerprint!=same


def test_another_dtype_is_another_model(same):
    "A copy in bfloat16 has a fingerprint of its own"
    lm = model()
    lm.model.to(torch.bfloat16)
    assert lm.fingerprint!=same


def test_saved_and_opened(same, tmp_path):
    "What was saved is what is opened, whatever the shards"
    lm = model()
    assert load(lm.save(tmp_path/'lm')).fingerprint==same
    lm.model.save_pretrained(tmp_path/'shards', max_shard_size='60KB')
    lm.tokenizer.save_pretrained(tmp_path/'shards')
    assert load(tmp_path/'shards').fingerprint==same


def test_other_processes_agree(same, tmp_path):
    "The fingerprint of a folder does not depend on the process or its hash seed"
    folder = model().save(tmp_path/'lm')
    program = f"from sdlab.core.model import load; print(load({str(folder)!r}).fingerprint)"
    env = os.environ|dict(PYTHONHASHSEED='7', OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=120)
    assert p.stdout.split()[-1:]==[same], p.stderr


def test_threads_agree(teacher):
    "Nor does it depend on the number of threads, among which a sum is shared out"
    was, seen = torch.get_num_threads(), set()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            seen.add(teacher.fingerprint)
    finally: torch.set_num_threads(was)
    assert len(seen)==1
