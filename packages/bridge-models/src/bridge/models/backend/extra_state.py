"""The extra state that Transformer Engine's layers write into checkpoints."""

from __future__ import annotations

from typing import Any

import torch


class HasExtraState(torch.nn.Module):
    """A layer with an empty ``_extra_state`` in its state, as Megatron's own linear layers have.

    Transformer Engine's layers store their quantisation there, and require the key in each checkpoint.
    """

    def get_extra_state(self) -> None:
        """Return None: the state is empty, but torch writes the key."""

    def set_extra_state(self, state: object) -> None:
        """Ignore the state."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
