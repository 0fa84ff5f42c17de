"""agcl: attribution-guided continual learning of large language models.

The method in plain torch. Start with `train.py` (the loop), `attribution/attribute.py` (relevance
of weights, second moments of layer inputs) and `modulation/` (how these slow or redirect updates).
`METHOD.md` maps each equation to its function.
"""

__version__ = "0.14.1"
