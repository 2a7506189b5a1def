"""Attention."""

from .dot_product import DotProductAttention as DotProductAttention
from .rope import apply_rotary_pos_emb as apply_rotary_pos_emb
from .split import _SplitAlongDim as _SplitAlongDim
