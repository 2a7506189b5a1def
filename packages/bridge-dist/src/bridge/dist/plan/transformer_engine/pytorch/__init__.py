"""Layers for torch."""

from . import attention as attention
from . import distributed as distributed
from . import fp8 as fp8
from . import ops as ops
from . import permutation as permutation
from .attention import DotProductAttention as DotProductAttention
from .fp8 import fp8_autocast as fp8_autocast
from .fp8 import fp8_model_init as fp8_model_init
from .grouped_linear import GroupedLinear as GroupedLinear
from .linear import LayerNormLinear as LayerNormLinear
from .linear import Linear as Linear
from .norms import LayerNorm as LayerNorm
from .norms import RMSNorm as RMSNorm
from .padding import Fp8Padding as Fp8Padding
from .padding import Fp8Unpadding as Fp8Unpadding
