"The built package: what is in it, and that it works where nothing of the checkout is"
import json, os, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest

def sh(*cmd, **kw):
    p = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kw)
    assert p.returncode==0, f"{' '.join(map(str, cmd))}\n{p.stdout[-2000:]}{p.stderr[-4000:]}"
    return p.stdout

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "The sdist, and the wheel made from it (not from the checkout)"
    root, d = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp('dist')
    src = d/'src'
    skip = shutil.ignore_patterns('__pycache__', '*.egg-info', '.*', 'runs', 'build', 'dist', 'nbs', 'tests')
    shutil.copytree(root, src, ignore=skip)
    sh(sys.executable, '-m', 'build', '--no-isolation', '--outdir', d, src, env={k:v for k,v in os.environ.items() if k!='PYTHONPATH'})
    return next(d.glob('*.tar.gz')), next(d.glob('*.whl'))

@pytest.fixture(scope='module')
def fresh(dist, tmp_path_factory):
    "Python of a new environment holding the wheel; its requirements are borrowed from this one, the editable install is not"
    env = tmp_path_factory.mktemp('fresh')/'env'
    sh(sys.executable, '-m', 'venv', '--without-pip', env)
    python = env/'bin'/'python'
    site = Path(sh(python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])').strip())
    (site/'borrowed.pth').write_text('\n'.join(dict.fromkeys([sysconfig.get_paths()['purelib'], sysconfig.get_paths()['platlib']]))+'\n')   # .pth files in there are not read
    sh(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', '--force-reinstall', dist[1])
    return python

def run(python, code, cwd, **env):
    keep = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    return sh(python, '-c', code, cwd=cwd, env={**keep, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', **env})

def test_contents(dist, root):
    sdist, wheel = (set(tarfile.open(dist[0]).getnames()), set(zipfile.ZipFile(dist[1]).namelist()))
    sdist = {n.split('/', 1)[1] for n in sdist if '/' in n}
    ours = {p.relative_to(root).as_posix() for p in (root/'sdlab').rglob('*') if p.is_file() and not {'__pycache__', 'maintain'} & set(p.parts) and p.suffix!='.pyc'}
    assert {n for n in wheel if n.startswith('sdlab/')}==ours         # every module and every asset, nothing else
    assert ours <= sdist and {'settings.ini', 'setup.py', 'README.md', 'LICENSE', 'constraints.txt'} <= sdist
    assert not [n for n in wheel if n.startswith(('tests', 'nbs'))]

def test_metadata(dist, root):
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini')
    cfg = ini['DEFAULT']
    z = zipfile.ZipFile(dist[1])
    meta = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))).decode()
    assert f"Version: {cfg['version']}\n" in meta and f"Requires-Python: >={cfg['min_python']}\n" in meta
    needs = [l.split(': ')[1] for l in meta.splitlines() if l.startswith('Requires-Dist') and 'extra' not in l]
    assert len(needs)==len(cfg['requirements'].split())
    assert not [n for n in needs if n.startswith(('nbdev', 'fastcore', 'execnb'))]   # the library needs none of its tools
    assert any(n.endswith('licenses/LICENSE') for n in z.namelist())

def test_comes_from_the_wheel(fresh, tmp_path, root):
    where = Path(run(fresh, 'import sdlab; print(sdlab.__file__)', tmp_path).strip()).resolve()
    assert fresh.parents[1].resolve() in where.parents and root not in where.parents

def test_pocket_teacher_answers(fresh, tmp_path):
    code = '''
        import json
        from sdlab.all import *
        lm = load()
        task = next(iter(pocket_tasks(n=4).values()))
        print('@'+json.dumps([lm.n, lm.n_params, str(lm.dtype), lm.reply(task.rows[0]["prompt"], 16)]))'''
    import textwrap
    n, params, dtype, reply = json.loads(run(fresh, textwrap.dedent(code), tmp_path).split('@')[-1])
    assert n>=12 and params<=3.5e6 and dtype=='torch.float32' and reply.strip()

def test_pocket_teacher_is_a_plain_model(fresh, tmp_path):
    code = '''
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer
p = str(files('sdlab.core')/'assets'/'pocket')
m, t = AutoModelForCausalLM.from_pretrained(p), AutoTokenizer.from_pretrained(p)
ids = t.apply_chat_template([{'role': 'user', 'content': 'hello'}], add_generation_prompt=True, return_tensors='pt', return_dict=True)
print('@'+str(m.dtype), m.generate(**ids, max_new_tokens=4, do_sample=False).shape[0])'''
    assert run(fresh, code, tmp_path).split('@')[-1].split()==['torch.float32', '1']

def test_shell(fresh, tmp_path):
    out = sh(fresh.parent/'sdlab', '--help', cwd=tmp_path, env={k:v for k,v in os.environ.items() if k!='PYTHONPATH'})
    assert 'demo' in out and 'study' in out
