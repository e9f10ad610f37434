"""Grad-Mimic in JAX: which training samples pull a model toward a better one.

Own loop: replace `jax.value_and_grad` by `mimic_value_and_grad`, or wrap the
optimizer with `mimic`. Data work: collect scores in a `ScoreLedger`, then
`select` what to keep; or run `gradmimic curate scores.csv --out DIR`.

The public names are those of `__init__.pyi`. Each is imported when it is first
used: who only selects doesn't wait for JAX, nor does the command's `--help`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
