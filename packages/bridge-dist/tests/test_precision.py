"""Mixed-precision wrappers of Megatron and of extensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.module import Float16Module
from ranks import run_ranks
from wrapped_gpt import BF16, EXPERTS, Case, GptBuilder

from bridge.dist import Layout, create_process_groups
from bridge.dist.errors import BuilderContractError


class Half(MegatronModule):
    """A wrapper of an extension, which keeps norms in fp32."""

    def __init__(self, config: TransformerConfig, module: MegatronModule) -> None:
        super().__init__(config)
        self.module = module.bfloat16()
        for name, parameter in module.named_parameters():
            if "layernorm" in name:
                parameter.data = parameter.data.float()


def cast_in_place(_: TransformerConfig, module: MegatronModule) -> MegatronModule:
    return module.bfloat16()


def return_nothing(_: TransformerConfig, __: MegatronModule) -> None:
    pass


def wrap_precision(wrapper: Any) -> tuple[str, dict[str, str], list[float]]:
    """Build experts with a router bias that bf16 cannot represent; return the class, the dtypes and the bias."""
    case = Case(
        transformer=BF16
        | EXPERTS
        | {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "moe_router_topk": 1}
    )
    config = case.config

    def set_bias(stages: list[MegatronModule]) -> list[MegatronModule]:
        for name, buffer in stages[0].named_buffers():
            if name.endswith("expert_bias"):
                buffer.fill_(1 / 3)
        return stages

    config.pre_wrap_hooks.append(set_bias)
    groups = create_process_groups(Layout())
    model_parallel_cuda_manual_seed(1)
    (stage,) = GptBuilder(config).build_distributed_models(
        groups, DistributedDataParallelConfig(), mixed_precision_wrapper=wrapper
    )
    dtypes = {name.replace("module.", ""): str(tensor.dtype) for name, tensor in stage.named_parameters()}
    bias = [buffer.double() for name, buffer in stage.named_buffers() if name.endswith("expert_bias")]
    return type(stage.module).__name__, dtypes, torch.cat(bias).tolist()


@pytest.mark.parametrize("wrapper", [Float16Module, Half, cast_in_place])
def test_mixed_precision_wrappers_cast_the_expected_parameters(wrapper: Any) -> None:
    ((name, dtypes, bias),) = run_ranks(wrap_precision, 1, wrapper)
    assert name == ("GPTModel" if wrapper is cast_in_place else wrapper.__name__)
    assert bias == pytest.approx([1 / 3] * 4, rel=1e-7)  # in bf16 the error would be 1e-3
    kept = {parameter for parameter, dtype in dtypes.items() if dtype == "torch.float32"}
    norms = {parameter for parameter in dtypes if "layernorm" in parameter}
    assert norms
    assert kept == (norms if wrapper is Half else set())


def test_a_mixed_precision_wrapper_that_return_nothing_is_an_error() -> None:
    with pytest.raises(BuilderContractError, match="mixed_precision_wrapper return_nothing must return the stage"):
        run_ranks(wrap_precision, 1, return_nothing)
