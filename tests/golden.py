"""What the library gave on the day before it was rebuilt, taken again by whatever stands here now.

`python tests/golden.py --write [GROUP ...]` writes tests/golden.json: for the library whose figures are the truth, and
where a change was meant. `tests/test_golden.py` compares. Only public names are used, wherever they are exported; one
that was given another name has it in `NAMES`."""
import argparse
import ast
import hashlib
import json
import math
import re
import tempfile
import time
import warnings
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
import torch

FILE = Path(__file__).resolve().with_name('golden.json')

# Names that were given another: what else each may be called, alone or as 'module:name'
NAMES = {
    'ExactLoss': ('Trial',),
    'agreement': ('rank_agreement', 'foretells'),
    'degeneration': ('health',),
    'exact_quality': ('quality', 'measure.exact:exact'),
}

# Arguments that became fields of a value: the argument that takes it, its class, and what each is called in there
VALUES = {
    'learn': ('Weights', dict(lora='lora', last='last')),
    'run': ('Run', dict(out='out', seed='seed', progress='progress')),
    'evaluation': ('Evaluation', dict(valid='rows')),
    'decoding': ('Decoding', {k: k for k in ('max_new_tokens', 'temperature', 'top_p', 'top_k', 'seed')}),
}
ALSO = {'part': ('kind', 'unit')}   # arguments that were given another name


@cache
def exports():
    "{public name: function that gives it} of every module of the package, the first that has it"
    import sdlab
    top, out = Path(sdlab.__file__).parent, {}
    for file in sorted(top.glob('*/*.py')):
        said = re.search(r'^__all__ = (\[.*?\])', file.read_text(encoding='utf-8'), re.M | re.S)
        for name in ast.literal_eval(said[1]) if said else ():
            out.setdefault(name, f'{file.parent.name}.{file.stem}:{name}')
    return out


def public(spelling):
    "What 'module:name', a name of `sdlab.all` or one that some module exports stands for; None if there is no such"
    import sdlab.all
    if ':' not in spelling and hasattr(sdlab.all, spelling):
        return getattr(sdlab.all, spelling)
    module, _, name = (spelling if ':' in spelling else exports().get(spelling, '')).rpartition(':')
    if not module or not find_spec(f'sdlab.{module}'):
        return None
    return getattr(import_module(f'sdlab.{module}'), name, None)


def find(name):
    "A public name of the library, wherever it is by now and whatever it is called"
    spellings = name, *NAMES.get(name, ())
    for o in spellings:
        if (found := public(o)) is not None:
            return found
    named = ' or '.join(spellings)
    raise LookupError(f'{named} is nowhere in the library: add its new name to NAMES in tests/golden.py')


def fitting(f, loose):
    "Arguments as `f` takes them by now: renamed, or gathered into values"
    known, out, values = signature(f).parameters, {}, {}
    for k, v in loose.items():
        home = next((o for o, (_, fields) in VALUES.items() if k not in known and o in known and k in fields), None)
        if home:
            values.setdefault(home, {})[VALUES[home][1][k]] = v
        else:
            out[next((o for o in (k, *ALSO.get(k, ())) if o in known), k)] = v
    return out | {home: find(VALUES[home][0])(**v) for home, v in values.items()}


def call(name, *args, **kwargs):
    "A public function called by its first name, with its first arguments"
    f = find(name)
    return f(*args, **fitting(f, kwargs))


# What a figure is ----------------------------------------------------------------------------------------------

def plain(o):
    "Anything as JSON: numbers keep 12 digits, NaN and infinity become words"
    if hasattr(o, 'tolist'):
        return plain(o.tolist())
    if isinstance(o, dict):
        return {str(k): plain(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)):
        return [plain(v) for v in o]
    if isinstance(o, float):
        return float(f'{o:.12g}') if math.isfinite(o) else str(o)
    if isinstance(o, str):
        return str(o)
    return o


def columns(frame, *names):
    "Some columns of a table, or of a `Dataset`"
    return {k: list(frame[k]) for k in names}


def table(scores):
    "Every value of `Scores` and its error, in the order of their table"
    return columns(scores.frame(), 'value', 'stderr')


def plan_of(**drop):
    "A plan by what goes: `block`, `attention`, `mlp`"
    n = drop.pop('n', 12)
    return find('Plan').from_json(dict(n=n, drop=dict(block=[]) | drop))


def summary(x):
    "A tensor in seven numbers: mean size, mean square, and five of its values"
    x = x.detach().double().flatten()
    at = torch.linspace(0, len(x)-1, 5).long()
    return dict(size=x.abs().mean().item(), square=x.square().mean().item(), some=x[at])


def weights(lm, since=None):
    "The weights of a model in a few numbers, and how far they are from those of another"
    ps = dict(lm.model.named_parameters())
    out = dict(size=math.fsum(p.double().abs().sum().item() for p in ps.values()),
               square=math.fsum(p.double().square().sum().item() for p in ps.values()))
    if since is not None:
        was = dict(since.model.named_parameters())
        out['moved'] = math.sqrt(math.fsum((p.double()-was[k].double()).square().sum().item() for k, p in ps.items()))
    return out


def logits(lm, ids):
    "What a model says of some ids"
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


# What the groups share -----------------------------------------------------------------------------------------

@cache
def teacher():
    "The pocket teacher; nothing here may change it"
    return call('load')


@cache
def texts():
    "What its stream is measured on: four rows of each task"
    return call('pocket_calibration', 4)


@cache
def read():
    "The same as batches"
    return call('batches', teacher(), texts(), size=8)


@cache
def few():
    "Six of them, for what is dear"
    return call('batches', teacher(), texts().select(range(0, 12, 2)), size=3)


@cache
def pruned():
    "The teacher without three of its blocks: it still speaks, and errs"
    return call('prune', teacher(), plan_of(block=[2, 5, 8]))


@cache
def taught(seed=0):
    "A student of ten steps"
    log = []
    how = dict(epochs=1, lr=5e-4, batch_size=4, seed=seed, valid=lessons(8, 1))
    return call('tune', pruned(), lessons(40), progress=log.append, **how), log


def students():
    "A cut and a tuned one"
    return dict(pruned=pruned(), tuned=taught()[0])


def lessons(n, seed=0):
    "Word problems, answered by the farthest annotator"
    return call('pocket_rows', 'sums', n, 3, 'train', seed)


def course(log):
    "What was logged of a training: its losses, gradients and tokens"
    steps = [o for o in log if 'loss' in o]
    looks = [o['valid_loss'] for o in log if 'valid_loss' in o]
    return dict(columns_of(steps, 'step', 'loss', 'grad_norm', 'lr', 'tokens', 'trained_tokens'), valid_loss=looks)


def columns_of(rows, *names):
    "Rows as columns"
    return {k: [float(o[k]) if k in ('loss', 'grad_norm', 'lr') else int(o[k]) for o in rows] for k in names}


def trained(name, student, *args, **kwargs):
    "A short training: its log and the weights it came to"
    log = []
    lm = call(name, student, *args, seed=0, lr=5e-4, batch_size=4, progress=log.append, **kwargs)
    return dict(course(log), weights=weights(lm, student))


# The groups ----------------------------------------------------------------------------------------------------

def spans():
    "Angular distance of every span, at the last token and at all of them, and the spans that it would cut"
    last = call('distances', teacher(), read())
    everywhere = call('distances', teacher(), read(), tokens='all')
    best = [last.best(n).drop for n in range(1, 12)]
    return dict(last=table(last), all=table(everywhere), best=best)


def influence():
    "Block influence, and the blocks that it would cut"
    found = call('influence', teacher(), read())
    return dict(blocks=table(found), sums=table(found.spans()), best=[found.best(n).drop for n in range(1, 12)])


def update():
    "Relative update of every span"
    last = call('relative_update', teacher(), read(), tokens='last')
    return dict(all=table(call('relative_update', teacher(), read())), last=table(last))


def sublayers():
    "All three measures of attention and MLP of each block"
    out = {}
    for part in ('attention', 'mlp'):
        found = call('importance', teacher(), read(), part=part)
        out[part] = {k: table(v) for k, v in found.items()}
    return out


def exact():
    "Exact loss and divergence without spans of four sizes, of some of sub-layers, and without a mixture"
    out = dict(block=call('exact_quality', teacher(), few(), (1, 2, 4, 8)))
    for part, size in (('attention', 8), ('mlp', 9)):
        out[part] = call('exact_quality', teacher(), few(), size, part=part)
    out = {part: {k: table(v) for k, v in found.items()} for part, found in out.items()}
    tried = find('ExactLoss')(teacher(), few())(plan_of(block=[3], attention=[5, 7], mlp=[7, 9]))
    return out | dict(mixture={k: tried[k] for k in ('loss', 'kl', 'loss_stderr', 'kl_stderr', 'perplexity')})


def agreement():
    "Does angular distance rank the spans as their loss does? And a rank correlation of two lists"
    import pandas as pd
    true = pd.DataFrame([dict(first=l, size=n, value=math.sin(3*l+n)) for n in (1, 2, 3) for l in range(13-n)])
    found = call('agreement', dict(distance=call('distances', teacher(), read())), true)
    a, b = ([math.sin(k*i) for i in range(20)] for k in (1, 2))
    pair = call('rank_correlation', a, b, seed=3)
    return dict(table=columns(found, 'n', 'rho', 'low', 'high'), pair=list(pair)[:3])


def similarity():
    "CKA of the unhealed cut student with its teacher"
    many = call('pocket_calibration', 8)
    ways = dict(last={}, mean=dict(pool='mean', unbiased=False), rbf=dict(kernel='rbf', sigma=.5),
                tokens=dict(examples='tokens', tokens_per_text=2))
    found = {k: call('cka', pruned(), teacher(), many, group=16, **how).frame() for k, how in ways.items()}
    layers = {k: found['last'][k].drop_duplicates().tolist() for k in ('student', 'teacher')}
    return layers | {k: columns(f, 'cka') for k, f in found.items()}


PRICE = ('params', 'linear', 'attention', 'head', 'macs', 'bytes', 'reduction', 'macs_reduction')


def configs():
    "The two models of the paper, and a small mixture of experts"
    from transformers import LlamaConfig, MistralConfig, MixtralConfig
    wide = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, dtype='bfloat16', tie_word_embeddings=False)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4, vocab_size=50, num_local_experts=8, num_experts_per_tok=2)
    return dict(llama=LlamaConfig(**wide, vocab_size=128256, max_position_embeddings=131072),
                mistral=MistralConfig(**wide, vocab_size=32768, max_position_embeddings=32768, sliding_window=None),
                experts=MixtralConfig(**small))


def prices():
    "What cuts of the paper's two models save, from their configs; the price of a mixture of experts, and of a cut"
    config = configs()
    out = {k: columns(call('by_depth', config[k]).frame(), *PRICE) for k in ('llama', 'mistral')}
    cut = call('cost', teacher(), plan_of(block=[2, 3], attention=[5], mlp=[6]), context=256)
    experts = call('cost', config['experts'])
    return out | dict(experts=columns(experts.frame(), *PRICE), pocket=columns(cut.frame(), *PRICE))


def facts(lm, ids):
    "A cut model: how deep, what is left, what its config says block by block, and what it computes"
    config = lm.config.get_text_config().to_dict()
    lists = {k: v for k, v in config.items() if isinstance(v, (list, tuple)) and k!='architectures'}
    return dict(n=lm.n, teacher_n=lm.teacher_n, kept=lm.kept, strip=lm.strip, params=lm.n_params,
                config=lists, logits=summary(logits(lm, ids)))


def families():
    "Cuts of every family: scattered blocks, a cut of that cut, and blocks together with sub-layers"
    from families import FAMILIES, VOCAB, tiny, tokenizer
    ids = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(1))
    out = {}
    for k in FAMILIES:
        lm = find('LM')(tiny(k), tokenizer(), k)
        blocks = call('prune', lm, plan_of(n=6, block=[0, 3]))
        deeper = call('prune', blocks, plan_of(n=4, block=[1]), proof=False)
        mixed = call('prune', lm, plan_of(n=6, block=[2], attention=[0, 5], mlp=[3, 5]))
        out[k] = {name: facts(o, ids) for name, o in dict(blocks=blocks, deeper=deeper, mixed=mixed).items()}
    return out


def rewriting():
    "Twelve rows of three tasks in the words of the teacher and of a student, greedy and sampled; three plain texts"
    rows = call('pocket_mixture', ('sums', 'facts', 'order'), 12, 3)
    how = dict(progress=False, max_new_tokens=64)
    got = dict(teacher=call('rewrite', teacher(), rows, **how),
               student=call('rewrite', pruned(), rows, **how),
               sampled=call('rewrite', pruned(), rows, temperature=1.2, top_p=.9, top_k=50, seed=3, **how),
               stories=call('rewrite', pruned(), call('pocket_rows', 'stories', 3), template='Go on: {prompt}', **how))
    return {k: columns(ds, 'source', 'reason', 'completion', 'written') for k, ds in got.items()}


def tuning():
    "Ten steps of all weights, and a few of the last blocks, of adapters, and of a student with zeroed sub-layers"
    lm, log = taught()
    zeroed = call('prune', teacher(), plan_of(block=[4], attention=[6], mlp=[8]))
    return dict(all=dict(course(log), weights=weights(lm, pruned())),
                last=trained('tune', pruned(), lessons(16), epochs=1, last=2),
                adapters=trained('tune', pruned(), lessons(16), epochs=1, lora=4),
                zeroed=trained('tune', zeroed, lessons(16), epochs=1))


def distilling():
    "A few steps on the teacher's logits, over fixed rows and over answers of the student's own"
    def course_of(name, n, **how):
        return trained(name, pruned(), lessons(n), teacher(), epochs=1, **how)
    return dict(forward=course_of('distil', 20),
                mixed=course_of('distil', 12, divergence='mixed', temperature=2.),
                on_policy=course_of('on_policy', 12, rollout=12),
                half=course_of('on_policy', 12, rollout=12, share=.5))


BACK = ('score', 'low', 'high', 'recovery', 'recovery_low', 'recovery_high', 'gap_closed')


def judging():
    "Scores, recovery and paired differences of a cut and a tuned student on small tasks"
    found = call('recovery', teacher(), students(), call('pocket_tasks', 8))
    gap, kinds = found.difference('tuned', 'pruned'), found.by(than='pruned')
    return dict(items=columns(found.items, 'task', 'arm', 'item', 'score', 'answer'),
                table=columns(found.frame(), 'task', 'arm', 'n', *BACK),
                difference=columns(gap, 'task', 'difference', 'low', 'high'),
                kinds=columns(kinds, 'kind', 'arm', 'recovery', 'low', 'high', 'difference_low', 'difference_high'))


def made_up(task, arm, run, n):
    "Items of one training of an arm on a task, whose scores nobody measured"
    waves = [math.sin(i*(2+run)+len(arm+task)) for i in range(n)]
    row = dict(task=task, metric='exact', arm=arm, run=run, reference='')
    if task!='stories':
        return [row | dict(item=i, score=float(w>-.06*len(arm))) for i, w in enumerate(waves)]
    return [row | dict(item=i, metric='perplexity', score=1., nll=30+10*w, tokens=20+i%7) for i, w in enumerate(waves)]


def runs():
    "Recovery of an arm that was trained three times, on items that are made up"
    import pandas as pd
    trainings = [('teacher', 0), ('pruned', 0), *(('healed', i) for i in range(3))]
    items = [o for task in ('sums', 'order', 'stories') for arm, run in trainings for o in made_up(task, arm, run, 40)]
    found = find('Recovery')(pd.DataFrame(items), seed=4)
    return dict(table=columns(found.frame(), 'task', 'arm', 'runs', *BACK),
                difference=columns(found.difference('healed', 'pruned'), 'task', 'difference', 'low', 'high'))


SAID = {'a b c d e f': 'a b c d e f g', 'round and '*8: 'round it goes', '': 'something was said',
        'one two three four one two three four': 'one two three'}


def words():
    "Intervals and signs of answers in words: shares, likelihood of rows, shift of a student, degeneration"
    rows = call('pocket_rows', 'sums', 12, 3)
    signs = call('degeneration', list(SAID), references=list(SAID.values()))
    moved = call('shift', students(), teacher(), rows.select(range(4)), max_new_tokens=48)
    far = call('surprise', teacher(), dict(far=rows))
    return dict(wilson=[call('wilson', k, 20) for k in (0, 7, 20)],
                likelihood=columns(call('likelihood', teacher(), rows), 'nll', 'tokens'),
                surprise=columns(far, 'tokens', 'nats_per_token', 'low', 'high'),
                shift=columns(moved.frame(), 'arm', 'value', 'low', 'high', 'n'),
                degeneration=columns(signs.frame(), 'value', 'low', 'high', 'n'))


def drafted(found):
    "A drafting in counts, with the intervals of its rates"
    lengths = [v for pair in found.accepted_length.values() for v in pair]
    return dict(texts=found.texts, rounds=len(found.rounds), **columns(found.rounds, 'drafted', 'accepted', 'emitted'),
                work=columns(found.work, 'blocks', 'calls', 'tokens', 'macs'), cost_ratio=found.cost_ratio,
                acceptance=list(found.acceptance), alpha=list(found.alpha), lengths=lengths)


def drafting():
    "The student drafts for its teacher, and the teacher for itself: greedy and sampled"
    asks = list(call('pocket_rows', 'sums', 6, 0, 'evaluation')['prompt'])
    how = dict(k=3, max_new_tokens=32, timed=False)
    late = plan_of(block=[7, 8])
    out = {}
    for name, heat in dict(greedy={}, sampled=dict(temperature=2., seed=5)).items():
        out[f'draft, {name}'] = drafted(call('draft', pruned(), teacher(), asks, **how, **heat))
        out[f'self-draft, {name}'] = drafted(call('self_draft', teacher(), late, asks, **how, **heat))
    out['no bonus'] = drafted(call('self_draft', teacher(), late, asks, bonus=False, **how))
    return out


def merging():
    "How two students of one cut lie to each other, and what is between them"
    a, b = taught()[0], taught(1)[0]
    cosines = dict(whole=call('cosines', a, b), learned=call('cosines', a, b, base=pruned()))
    ways = dict(arc=dict(t=.3), line=dict(how='linear'), learned=dict(base=pruned()))
    merged = {k: weights(call('merge', a, b, **how), pruned()) for k, how in ways.items()}
    told = {k: columns(o, 'tensor', 'size', 'cosine', 'difference', 'branch') for k, o in cosines.items()}
    return dict(merged=merged, cosines=told)


def demo():
    "The demo's table at seed 0"
    with tempfile.TemporaryDirectory() as folder:
        found = call('demo', out=Path(folder)/'demo')
        back = getattr(found, 'recovery', found).frame().sort_values(['task', 'arm'])
        return columns(back, 'task', 'arm', 'n', *BACK)


GROUPS = {f.__name__: f for f in (
    spans, influence, update, sublayers, exact, agreement, similarity, prices, families, rewriting, tuning, distilling,
    judging, runs, words, drafting, merging, demo)}
SLOW = {'demo'}


# Taking and comparing ------------------------------------------------------------------------------------------

@contextmanager
def one_thread():
    "One thread and one seed inside, as sums in another order are other sums"
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(was)


def figures(group):
    "The figures of a group as they are now"
    with one_thread():
        return plain(GROUPS[group]())


def arithmetic():
    "A fingerprint of how this machine adds up: the bits of a small training step without the library"
    from transformers import LlamaConfig, LlamaForCausalLM
    lm = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=344, vocab_size=1024,
                                      num_hidden_layers=4, num_attention_heads=4))
    ids = torch.arange(120).view(2, 60)
    loss = lm(input_ids=ids, labels=ids).loss
    loss.backward()
    bits = b''.join(p.grad.numpy().tobytes() for p in lm.parameters())
    return hashlib.sha256(bits).hexdigest()[:16]


def machine():
    "What else the last digits depend on"
    import transformers
    import trl
    with one_thread(), torch.enable_grad():
        versions = dict(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__)
        return versions | dict(arithmetic=arithmetic())


def leaves(o, path=''):
    "(path, value) of everything in nested dictionaries and lists"
    if isinstance(o, dict):
        for k, v in o.items():
            yield from leaves(v, f'{path}.{k}' if path else k)
    elif isinstance(o, list):
        for i, v in enumerate(o):
            yield from leaves(v, f'{path}[{i}]')
    else:
        yield path, o


def are_numbers(*os):
    "Are all of these numbers?"
    return all(isinstance(o, (int, float)) and not isinstance(o, bool) for o in os)


def same(a, b, rel=1e-6, abs_=1e-9):
    "Equal; where one of two numbers is a fraction, to a relative or an absolute tolerance"
    if isinstance(a, float) or isinstance(b, float):
        return are_numbers(a, b) and math.isclose(a, b, rel_tol=rel, abs_tol=abs_)
    return type(a) is type(b) and a==b


def differences(was, now, **tolerance):
    "A line for every figure that is not what it was, with its path"
    old, new = dict(leaves(was)), dict(leaves(now))
    out = [f'{k} was {old[k]!r} and is gone' for k in old if k not in new]
    out += [f'{k} is {new[k]!r} and was not there' for k in new if k not in old]
    for k in old:
        if k in new and not same(old[k], new[k], **tolerance):
            far = f' (relative {abs(new[k]/old[k]-1):.1e})' if are_numbers(old[k], new[k]) and old[k] else ''
            out.append(f'{k} was {old[k]!r} and is {new[k]!r}{far}')
    return out


def stored():
    "The golden file"
    return json.loads(FILE.read_text(encoding='utf-8')) if FILE.exists() else {}


def keep(file, groups):
    "A line for each part of a group, so that a change of figures is a change of few lines"
    def part(k, v):
        return f'  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}'
    lines = {k: ',\n'.join(part(*o) for o in v.items()) for k, v in groups.items()}
    body = ',\n'.join(f' {json.dumps(k)}: {{\n{v}\n }}' for k, v in lines.items())
    file.write_text(f'{{\n{body}\n}}\n', encoding='utf-8')


def arguments():
    "What the command takes"
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('groups', nargs='*', metavar='GROUP', help=f'of {", ".join(GROUPS)} (default: all)')
    args.add_argument('--write', action='store_true', help='keep what is found as the truth')
    args.add_argument('--out', type=Path, default=FILE, help='write to this file (default: tests/golden.json)')
    return args.parse_args()


def take(group, was=None):
    "The figures of a group, after a line that says how long they took and lines for what differs"
    start, work = time.time(), time.process_time()
    now = figures(group)
    took = f'{time.time()-start:.1f} s, {time.process_time()-work:.1f} s of them on the processor'
    odd = [] if was is None else differences(was, now)
    print(f'{group}: {len(list(leaves(now)))} figures, {took}', *odd[:20], sep='\n  ', flush=True)
    return now


def main():
    "Take figures, and write them or say what differs"
    import sdlab
    args, gold = arguments(), stored()
    print('the library in', Path(sdlab.__file__).parent)
    if args.write:
        gold['machine'] = machine()
    for k in args.groups or GROUPS:
        now = take(k, None if args.write else gold[k])
        if args.write:
            gold[k] = now
            keep(args.out, {o: gold[o] for o in ('machine', *GROUPS) if o in gold})


if __name__=='__main__':
    main()
