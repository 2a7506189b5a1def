"""A small config and its YAML document, for tests of documents."""

from dataclasses import dataclass, field
from typing import ClassVar

from bridge.config import ModelConfig, WriteThrough


@dataclass
class Block:
    size: int
    ratio: float = 0.5


@dataclass(kw_only=True)
class Model(WriteThrough, ModelConfig):
    _embeds: ClassVar[str] = "block"
    builder: ClassVar[str] = "nowhere.Builder"
    block: Block
    blocks: list[Block] = field(default_factory=list)
    vocab_size: int | None = None


TARGET = f"{__name__}.Model"
YAML = f"""\
# a model
_target_: {TARGET}
vocab_size: 1
block:
  size: 2
blocks:
  - {{size: 1}}
  - size: 3
    ratio: 1e-1
"""
MODEL = Model(vocab_size=1, block=Block(2), blocks=[Block(1), Block(3, 0.1)])
