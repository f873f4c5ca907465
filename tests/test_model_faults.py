"""What bad input gets from core.model and compress.prune: one sentence, before the expensive part, and nothing half done"""
import copy, json, resource, shutil
import pandas as pd, pytest, torch
from families import L, config, loud, tiny, tokenizer
from sdlab.compress.prune import prune
from sdlab.core.units import without
from sdlab.core.model import LM, load
from sdlab.core.generate import Decoding, generate
from sdlab.core.plan import Plan


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


@pytest.fixture(scope='module')
def lm(): return LM(tiny('Llama'), tokenizer(), 'tiny')


@pytest.fixture(scope='module')
def saved(lm, tmp_path_factory): return lm.save(tmp_path_factory.mktemp('saved')/'tiny')


@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved, tmp_path/'model')


def says(kind, words, f, *args, **kwargs):
    "`f` raises one sentence of at most 500 characters that has `words` in it"
    with pytest.raises(kind) as e: f(*args, **kwargs)
    text = str(e.value)
    assert words in text and '\n' not in text and len(text) < 500, text


# Loading --------------------------------------------------------------------------------------------------------------
def test_no_model(tmp_path):
    says(FileNotFoundError, 'There is no directory', load, tmp_path/'nowhere')
    says(FileNotFoundError, 'There is no directory', load, './nowhere')
    says(FileNotFoundError, 'is no model', load, tmp_path)
    (tmp_path/'notes.txt').write_text('hello')
    says(FileNotFoundError, 'is no model', load, tmp_path/'notes.txt')


def test_no_hub(): says(OSError, 'could not be loaded', load, 'nobody/no-such-model')


def test_no_weights(folder):
    (folder/'model.safetensors').unlink()
    says(FileNotFoundError, 'no weights', load, folder)


def test_pickles(folder):
    "Refused, and never opened"
    (folder/'model.safetensors').unlink()
    (folder/'pytorch_model.bin').write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(folder/'ran').encode())
    says(ValueError, 'pickles (pytorch_model.bin)', load, folder)
    assert not (folder/'ran').exists()


@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b[:4], lambda b: b'', lambda b: b'\xff'*64 + b[64:], lambda b: b'<html>not found</html>'])
def test_corrupt(folder, damage):
    f = folder/'model.safetensors'
    f.write_bytes(damage(f.read_bytes()))
    says(ValueError, 'corrupt or cut short', load, folder)


def test_missing_weights(folder):
    "transformers would fill them with random numbers"
    from safetensors.torch import load_file, save_file
    ws = load_file(folder/'model.safetensors')
    del ws['model.layers.3.mlp.up_proj.weight']
    save_file(ws, folder/'model.safetensors', metadata=dict(format='pt'))
    says(ValueError, 'such as model.layers.3.mlp.up_proj.weight', load, folder)


def test_remote_code(folder):
    "Not run unless asked for"
    cfg = json.loads((folder/'config.json').read_text())
    cfg |= dict(model_type='own_kind', auto_map=dict(AutoConfig='own.OwnConfig', AutoModelForCausalLM='own.OwnModel'))
    (folder/'config.json').write_text(json.dumps(cfg))
    (folder/'own.py').write_text(f"open({str(folder/'ran')!r}, 'w')\n")
    says(ValueError, 'trust_remote_code=True', load, folder)
    assert not (folder/'ran').exists()


def test_no_tokenizer(folder):
    for f in folder.glob('token*'): f.unlink()
    says(OSError, 'tokenizer', load, folder)


def test_broken_config(folder):
    (folder/'config.json').write_text('{"model_type": ')
    says(OSError, 'could not be loaded', load, folder)


def test_dtype(folder):
    "What the config says, unless the caller says otherwise"
    assert load(folder).dtype==torch.float32 and load(folder, dtype='bfloat16').dtype==torch.bfloat16
    cfg = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(cfg | dict(dtype='bfloat16')))
    assert load(folder).dtype==torch.bfloat16


# Tokenizers -----------------------------------------------------------------------------------------------------------
def test_no_pad_no_template(lm):
    tok = tokenizer(pad=False)
    one = LM(lm.model, tok)
    assert tok.pad_token is None and one.tokenizer.pad_token=='<eos>' and tok.chat_template is None
    prompts = ['Ann has 12 pens', 'the', 'One day']
    assert one.reply(prompts, 8)==lm.reply(prompts, 8)


def test_chat_template(lm):
    chat = LM(lm.model, tokenizer(chat=True))
    assert chat.reply('Hi', 8)==chat.reply([dict(role='user', content='Hi')], 8)==lm.reply('user: Hi\nassistant: ', 8)


# Generation -----------------------------------------------------------------------------------------------------------
def test_generate_leaves_the_model_alone(lm):
    model = copy.deepcopy(lm.model).train()
    model.model.layers[2].eval()
    was, flags, rng = model.generation_config.to_dict(), [m.training for m in model.modules()], torch.get_rng_state()
    generate(LM(model, lm.tokenizer), ['Ann', 'the pen'], Decoding(5, temperature=.8))
    assert model.generation_config.to_dict()==was and [m.training for m in model.modules()]==flags and torch.equal(torch.get_rng_state(), rng)


def test_generate_refuses(lm):
    says(TypeError, 'lm.reply', generate, lm, 'one')
    says(ValueError, 'at least 1', generate, lm, ['one'], 0)
    says(ValueError, 'Prompt 1 is empty', generate, lm, ['one', ''])
    says(ValueError, 'Prompt 0 has 128 tokens', generate, lm, ['a'*128])


def test_context_is_not_overrun():
    "An answer ends where a model with learned positions has no more of them"
    gpt = LM(tiny('GPT-2'), tokenizer())
    out = generate(gpt, ['a'*120, 'a'*60], 20)
    assert len(out[0]) <= 8 and len(out[1]) <= 20


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['Llama', ('mamba', dict(vocab_size=100, hidden_size=32, num_hidden_layers=L, state_size=4))])
def test_nan(name, bad):
    lm = LM(tiny(name), tokenizer(), 'broken')
    list(lm.blocks[3].parameters())[-1].view(-1)[0] = bad
    says(ValueError, 'NaN or infinite logits', generate, lm, ['Ann'], 4)


def test_other_caches():
    "Mamba layers keep states: the model's own generate is used, and padding does not change an answer"
    lm = LM(tiny(('mamba', dict(vocab_size=100, hidden_size=32, num_hidden_layers=L, state_size=4))), tokenizer())
    prompts = ['Ann has 12 pens', 'the', 'One day']
    assert generate(lm, prompts, 8)==[generate(lm, [p], 8)[0] for p in prompts]
    assert generate(lm, prompts, Decoding(8, temperature=1.))==generate(lm, prompts, Decoding(8, temperature=1.))


# Surgery --------------------------------------------------------------------------------------------------------------
def test_plans(lm):
    says(ValueError, 'outside a model of 6', Plan, 6, (6,))
    says(ValueError, 'outside a model of 6', Plan, 6, (-1,))
    says(ValueError, 'more than once', Plan, 6, (2, 2))
    says(ValueError, 'keep at least one', Plan, 6, range(6))
    for cut in (without, prune):
        says(ValueError, 'for a model of 7 blocks, but tiny has 6', cut, lm, Plan(7, (2,)))
        says(TypeError, 'Surgery takes a Plan', cut, lm, [2])


def test_config_and_stack_disagree(lm):
    model = copy.deepcopy(lm.model)
    del model.model.layers[5]
    says(ValueError, 'runs 5 blocks, but its config says 6', without, LM(model, lm.tokenizer, 'odd'), Plan(5, (1,)))


def test_adapters(lm):
    from peft import LoraConfig, get_peft_model
    wrapped = LM(get_peft_model(copy.deepcopy(lm.model), LoraConfig(target_modules=['q_proj'])), lm.tokenizer, 'lora')
    says(ValueError, 'merge adapters', prune, wrapped, Plan(6, (1,)))


# Saving ---------------------------------------------------------------------------------------------------------------
def test_disk_full(lm, folder):
    "A file that can grow no further: nothing of the new model, all of the old"
    was = {p.name: p.read_bytes() for p in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try: says(OSError, 'could not be saved', prune(lm, Plan(6, (2,))).save, folder)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in folder.iterdir()}==was


def test_unwritable(lm, tmp_path):
    (tmp_path/'file').write_text('')
    says(OSError, 'could not be saved', lm.save, tmp_path/'file')
    says(OSError, 'could not be saved', lm.save, '/proc/sdlab')


def test_saved_over(lm, folder):
    "Another model in the same place: none of the old weights stay"
    (folder/'model-00001-of-00002.safetensors').write_bytes(b'old')
    cut = prune(lm, Plan(6, (0, 3)))
    assert load(cut.save(folder)).kept==(1, 2, 4, 5)
    assert [p.name for p in folder.glob('*.safetensors*')]==['model.safetensors'] and not list(folder.glob('.part*'))


def test_card_is_escaped(lm, tmp_path):
    evil = '</code><script>alert(1)</script>|\n# x ```'
    cut = prune(LM(lm.model, lm.tokenizer, evil), Plan(6, (2,), evil))
    text = (cut.save(tmp_path/'m', pd.DataFrame({evil: [evil], 'score': [1.]}))/'README.md').read_text()
    assert '<script' not in text and text.count('```')==4 and '\n# x' not in text
    assert '<script' not in cut._repr_markdown_() and '<script' not in Plan(6, (2,), evil)._repr_markdown_()
    assert json.loads(text.split('```json')[1].split('```')[0])==load(tmp_path/'m').provenance


def test_push(lm, monkeypatch):
    import huggingface_hub
    sent = {}
    class Api:
        def __init__(self, token=None): sent['token'] = token
        def create_repo(self, repo_id, private, exist_ok): sent['private'] = private
        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path
            sent['files'] = {p.name for p in Path(folder_path).iterdir()}
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    assert lm.push_to_hub('me/tiny', token='t')=='https://huggingface.co/me/tiny'
    assert sent['private'] and sent['token']=='t' and {'model.safetensors', 'config.json', 'generation_config.json', 'README.md', 'tokenizer.json'} <= sent['files']
    says(ValueError, "called 'user/name'", lm.push_to_hub, 'tiny')
    def refuse(*args, **kwargs): raise ConnectionError('no\nnetwork')
    monkeypatch.setattr(Api, 'create_repo', refuse)
    says(OSError, 'could not be pushed', lm.push_to_hub, 'me/tiny')
