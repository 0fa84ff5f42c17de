"""agcl: attribution-guided continual learning of large language models.

The method in plain torch. Start at `train.py` (the loop), `attribution.py` (relevance of every
weight) and `modulation/` (how relevance slows or redirects updates); `METHOD.md` maps every
equation to its function.
"""

__version__ = "0.5.0"
