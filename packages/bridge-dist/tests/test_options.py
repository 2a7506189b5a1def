"""Flags of a build select a wrapper; contradictory flags are refused."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from wrapped_gpt import SHARDED

from bridge.dist import BuildOptions, Wrapper
from bridge.dist.errors import OptionsError


def test_both_fsdp_flags_are_refused() -> None:
    with pytest.raises(OptionsError, match="use_megatron_fsdp and use_torch_fsdp2 are both True"):
        BuildOptions(ddp_config=DistributedDataParallelConfig(), use_megatron_fsdp=True, use_torch_fsdp2=True)


def test_flags_select_the_wrapper() -> None:
    ddp_config = DistributedDataParallelConfig()
    assert BuildOptions(wrap_with_ddp=False).wrapper is Wrapper.NONE
    assert BuildOptions(ddp_config=ddp_config).wrapper is Wrapper.DDP
    assert BuildOptions(ddp_config=ddp_config, use_torch_fsdp2=True).wrapper is Wrapper.TORCH_FSDP2
    assert BuildOptions(ddp_config=ddp_config, use_megatron_fsdp=True).wrapper is Wrapper.MEGATRON_FSDP


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddp_config": {"use_megatron_fsdp": True}}, "ddp_config.use_megatron_fsdp is True but use_megatron_fsdp is"),
        ({"ddp_config": {}, "use_torch_fsdp2": True, "use_layer_wise_distributed_optimizer": True}, "got torch-fsdp2"),
        (
            {
                "ddp_config": SHARDED,
                "use_layer_wise_distributed_optimizer": True,
                "use_layer_wise_param_layout": False,
            },
            "needs the whole gradients on each rank",
        ),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    ddp_config = DistributedDataParallelConfig(**options.pop("ddp_config"))
    with pytest.raises(OptionsError, match=message):
        BuildOptions(ddp_config=ddp_config, **options)
