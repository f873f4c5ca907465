"Flat keywords of a test, folded into the values that the library takes"
from dataclasses import fields
from sdlab.heal.train import Evaluation, Run, Weights

VALUES = dict(learn=Weights, run=Run, evaluation=Evaluation)
WHERE = {f.name: name for name, kind in VALUES.items() for f in fields(kind)}

def folded(progress=False, **flat):
    "`dict(lora=4, out='x', lr=1.)` -> `dict(learn=Weights(lora=4), run=Run(out='x', progress=False), evaluation=Evaluation(), lr=1.)`"
    given = {name: {} for name in VALUES} | dict(run=dict(progress=progress))
    for k in [k for k in flat if k in WHERE]: given[WHERE[k]][k] = flat.pop(k)
    return flat | {name: kind(**given[name]) for name, kind in VALUES.items()}

def with_values(f):
    "`f` for flat keywords, without a bar"
    return lambda *args, **flat: f(*args, **folded(**flat))
