"The pocket teacher as it ships: its size, its files, what a bare loader makes of it, and whether it deserves its certificate"
import json
from pathlib import Path
import pandas as pd
import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from sdlab.core.answers import agree
from sdlab.core.stats import wilson
from sdlab.core.model import load
from sdlab.core.pocket import REWRITE, pocket_assets, pocket_rows, rewrite_rows
from sdlab.judge.score import score
from sdlab.maintain.pocket import exam, passed

HERE = Path(str(pocket_assets()))

def test_size():
    lm = load()
    assert lm.n>=12 and lm.n_params<=3.5e6
    assert (HERE/'model.safetensors').stat().st_size<=8e6
    assert not list(HERE.glob('*.bin'))+list(HERE.glob('*.pt'))

def test_bare_load():
    model,tok = AutoModelForCausalLM.from_pretrained(HERE),AutoTokenizer.from_pretrained(HERE)
    assert model.dtype==torch.float32 and model.config.use_cache
    ids = tok.apply_chat_template([dict(role='user', content='Hi'), dict(role='assistant', content='Ho')], return_dict=False)
    assert ids[0]==tok.bos_token_id and ids[-1]==tok.eos_token_id and ids.count(tok.bos_token_id)==1

def test_carries_its_rewriting_template():
    assert load().tokenizer.init_kwargs['sdlab_rewrite']==REWRITE

@pytest.mark.parametrize('text', ['Ann has 12 pens.', 'naïve 数学 🙂 <b>', '3,141 x 59'])
def test_any_text_can_be_typed(text):
    tok = load().tokenizer
    assert tok.decode(tok(text, add_special_tokens=False).input_ids)==text

def test_the_certificate_is_of_these_weights():
    "Sixty new draws of every task agree with the certificate: neither interval lies wholly outside the other"
    cert,lm = pd.read_csv(HERE/'certificate.csv').set_index('task'),load()
    for name,task in exam(60, seed=3).items():
        right = score(lm, task)['score']
        low,high = (100*o for o in wilson(right.sum(), len(right), z=3))
        assert low<=cert.high[name] and cert.low[name]<=high, (name, right.mean(), cert.score[name])

def test_a_certificate_can_fail():
    cert = pd.read_csv(HERE/'certificate.csv')
    assert passed(cert.assign(score=99.)) and not passed(cert.assign(score=89.)) and not passed(cert.assign(score=91.))

def test_the_teacher_passes(): assert passed(pd.read_csv(HERE/'certificate.csv'))

def test_the_annotators_are_fair():
    "Measured with the demo's rows, epochs and steps"
    import inspect, yaml
    from importlib import resources
    from sdlab.maintain.pocket import fairness
    demo = yaml.safe_load((resources.files('sdlab.experiment')/'assets'/'recipes'/'demo.yaml').read_text())
    fair, mine = pd.read_csv(HERE/'fairness.csv'), {k: p.default for k, p in inspect.signature(fairness).parameters.items()}
    assert set(fair.task)=={'sums','facts','choice','order'} and (fair.score>=90).all() and not fair.duplicated(['task', 'voice']).any()
    assert set(fair.voice)==set(mine['voices'])>={demo['rows']['annotator']} and len(fair)==12
    heal = demo['steps']['heal']['tune']
    assert (mine['size'], mine['batch_size'])==(demo['rows']['n'], heal['batch_size']) and heal['epochs']==2

def test_ranks_train_and_one_process_examines(tmp_path, monkeypatch):
    "A finished teacher is not trained again; under torchrun nobody examines it, since the others would be waited for"
    import sdlab.maintain.pocket as P
    (tmp_path/'teacher').mkdir()
    (tmp_path/'teacher'/'how.txt').write_text('made before')
    seen = []
    monkeypatch.setattr(P, 'load', lambda p: p)
    monkeypatch.setattr(P, 'certify', lambda *args: seen.append(args))
    monkeypatch.setattr(P, 'train', lambda *args, **kwargs: pytest.fail('it was trained again'))
    monkeypatch.setenv('WORLD_SIZE', '2'); P.main(tmp_path)
    assert not seen
    monkeypatch.setenv('WORLD_SIZE', '1'); P.main(tmp_path, n=7)
    assert seen==[(tmp_path/'teacher', tmp_path/'teacher', 'made before', 7)]
