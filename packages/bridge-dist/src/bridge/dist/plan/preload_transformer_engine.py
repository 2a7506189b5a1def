"""The first import of a fork server whose processes plan with Transformer Engine's layers."""

from bridge.dist.plan.layers import Layers, prepare_process

prepare_process(Layers.TRANSFORMER_ENGINE)
