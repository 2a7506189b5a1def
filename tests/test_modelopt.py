"""Models modified by ModelOpt: builders restore its state and the weights before wrapping."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from modelopt_models import (
    SMALL,
    TOKENS,
    build_changed,
    check_rebuilt,
    compute_logits,
    enabled_quantizers,
    make_config,
    quantise,
    rebuild,
    save_file,
    save_ranks,
    save_shards,
    sparsify,
    train_two_steps,
)
from ranks import run_ranks

from bridge.models.errors import CheckpointError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig

BRIDGE = str(Path(sysconfig.get_path("scripts")) / "bridge")
HYBRID = {"hybrid_layer_pattern": "M*-E", "transformer.num_layers": 4}


def check_faults(config: Any, groups: Any, whole: Path, shards: Path) -> None:
    """Check that ModelOpt still has the faults that pre-flight rules refuse or Bridge works around."""
    import torch
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from torch.distributed.checkpoint.metadata import TensorProperties

    from bridge.models.backend.norms import TorchLayerNorm

    restored = config.as_dict() | {"restore_modelopt_state": True}
    with torch.device("meta"):
        builder: Any = GPTModelBuilder(GPTModelConfig.from_dict(restored), modelopt_checkpoint=whole)
        model = builder.build_model(groups)
        with pytest.raises(CheckpointError, match="Cannot copy out of meta tensor"):
            builder.restore([model], groups)

    with pytest.raises(ValueError, match="does not support virtual pipeline"):
        restore_sharded_modelopt_state([model, model], shards)

    experts = GPTModelBuilder(make_config("moe-tiny", SMALL | {"restore_modelopt_state": True})).build_model(groups)
    config = experts.decoder.layers[0].mlp.experts.config
    config.expert_model_parallel_size = config.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match="Set either TP or EP to 1"):
        quantise(experts)

    assert torch.nn.LayerNorm in QuantModuleRegistry
    assert TorchLayerNorm not in QuantModuleRegistry
    if "strides" in TensorProperties.__dataclass_fields__:
        with pytest.raises(TypeError, match="strides"):
            load_sharded_metadata(str(shards))


def run_on_one_rank(folder: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}

    # Bridge has not imported ModelOpt yet, so ModelOpt does not know Bridge's attention and cannot quantise it.
    assert "bridge.models.modelopt.state" not in sys.modules
    model, config, groups = build_changed("tiny", SMALL, quantise)
    assert not any("core_attention" in name for name in enabled_quantizers(model))
    whole = save_file(model, folder)
    found["gpt"] = check_rebuilt(model, config, groups, whole)
    check_rebuilt(model, config, groups, save_ranks(model, folder / "ranks"))
    shards = save_shards(model, folder / "gpt")
    check_rebuilt(model, config, groups, shards)

    check_faults(config, groups, whole, shards / "iter_0000012")

    changes = SMALL | {"restore_modelopt_state": True, "transformer.normalization": "RMSNorm"}
    model, config, groups = build_changed("tiny", changes, lambda model: quantise(model, attention=True))
    assert enabled_quantizers(model)["decoder.layers.0.self_attention.core_attention.k_bmm_quantizer"]
    check_rebuilt(model, config, groups, save_file(model, folder))
    check_rebuilt(model, config, groups, save_shards(model, folder / "attention"))

    model, config, groups = build_changed("hybrid-tiny", HYBRID | {"restore_modelopt_state": True}, quantise)
    quantised = {name for name, enabled in enabled_quantizers(model).items() if enabled}
    assert "decoder.layers.0.mixer.in_proj.weight_quantizer" in quantised
    assert "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight_quantizer" in quantised
    assert "decoder.layers.2.input_layernorm.input_quantizer" not in quantised
    check_rebuilt(model, config, groups, save_shards(model, folder / "hybrid"))

    model, config, groups = build_changed("tiny", SMALL, sparsify)
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    assert (weight.unflatten(-1, (-1, 4)) == 0).sum(-1).eq(2).all()
    for checkpoint in (save_file(model, folder), save_shards(model, folder / "sparse")):
        builder, stage = rebuild(config, groups, checkpoint)
        assert torch.equal(compute_logits(stage.eval(), 5), compute_logits(model.eval(), 5))
        found["sparse"] = train_two_steps(builder, stage.train(), groups)
        masked = stage.module.decoder.layers[0].mlp.linear_fc1.weight
        assert torch.equal(masked == 0, weight == 0)
        assert not torch.equal(masked, weight)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    (found,) = run_ranks(run_on_one_rank, 1, folder)
    return found


def test_a_model_changed_by_modelopt_is_rebuilt_bit_by_bit_and_trains(one_rank: dict[str, Any]) -> None:
    assert len(one_rank["gpt"]) == len(one_rank["sparse"]) == 2


def test_bridge_build_trains_from_the_weights_of_the_checkpoint(one_rank: dict[str, Any], folder: Path) -> None:
    changes = [f"{path}={value}" for path, value in SMALL.items()]
    sizes = ["--steps", "2", "--seq-length", str(TOKENS), "--global-batch-size", "2"]
    command = [BRIDGE, "build", "tiny", *changes, "--load", str(folder / "gpt"), *sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    steps = list(zip(report["losses"], report["grad_norms"], strict=True))
    assert steps == [pytest.approx(step, rel=1e-5) for step in one_rank["gpt"]]
    assert "quantizers" not in done.stderr
    assert "UserWarning" not in done.stderr
    assert f"{folder / 'gpt'}: note: has a ModelOpt state: restore_modelopt_state is set to true" in done.stderr
