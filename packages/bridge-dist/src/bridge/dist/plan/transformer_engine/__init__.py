"""A stand-in for Transformer Engine on the meta device. It computes no values.

Its layers have the parameters of Transformer Engine 2.17.1, call the same matrix products and collectives, and save
the same tensors for the backward pass, as read in its source. Each module names the files that it follows. Plans import
it as ``transformer_engine`` (see ``bridge.dist.plan.layers``), so that megatron-core builds its own layers on it.

Only what megatron-core 0.19.2 needs to build and to run a training step is here. It takes modules that are missing for
those of an older version, and does without them.
"""

from . import common as common
from . import pytorch as pytorch

__version__ = "2.17.1"
