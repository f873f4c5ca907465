"""A model goes in, every compression choice can be seen before it is made, and what it cost is healed with its own words

Importing this loads neither torch nor transformers: `sdlab.load`, `sdlab.prune` and the rest of the vocabulary of
`sdlab.all` are imported when they are first asked for. Notebooks use `from sdlab.all import *`."""
__version__ = "0.2.0"

_wings = ('core', 'measure', 'compress', 'heal', 'judge', 'experiment', 'lab', 'all')

def __getattr__(name):
    "A wing, or a name of the public vocabulary (PEP 562)"
    from importlib import import_module
    if name in _wings: return import_module(f'sdlab.{name}')
    if not name.startswith('_'):
        every = import_module('sdlab.all')
        if name in every.__all__: return getattr(every, name)
    raise AttributeError(f"module 'sdlab' has no attribute {name!r}")
