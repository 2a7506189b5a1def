"""Models modified by ModelOpt: builders restore its state and the weights before wrapping."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks
from tampering import COMMON_STATE, Payload, replace_object

from bridge.config import Document, ModelConfig
from bridge.dist import Layout
from bridge.dist.errors import BuilderContractError, PreflightError
from bridge.models.errors import CheckpointError, ModelConfigError, UnsupportedError
from bridge.models.gpt import GPTModelBuilder, GPTModelConfig
from bridge.models.t5 import T5ModelConfig

BRIDGE = str(Path(sysconfig.get_path("scripts")) / "bridge")
VOCAB = 256
TOKENS = 16
SMALL = {"transformer.num_layers": 2, "transformer.hidden_size": 32}
HYBRID = {"hybrid_layer_pattern": "M*-E", "transformer.num_layers": 4}

Changes = dict[str, Any]


def make_config(preset: str, changes: Changes, sizes: dict[str, int] | None = None) -> Any:
    from bridge.dist.document_layout import apply_layout

    document = Document.load(preset)
    for path, value in changes.items():
        document.set(path, value)
    apply_layout(document, sizes or {})
    return document.config()


def create_groups(config: Any) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.dist import create_process_groups, destroy_process_groups

    if parallel_state.model_parallel_is_initialized():
        destroy_process_groups()
    groups = create_process_groups(Layout.of(config.transformer, torch.distributed.get_world_size()))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return groups


def compute_logits(model: Any, seed: int) -> Any:
    import torch

    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    return model(tokens, torch.arange(TOKENS).expand(2, -1), None).detach()


def quantise(model: Any, *, attention: bool = False) -> None:
    """Quantise and calibrate on a few batches, different ones on each data-parallel rank."""
    import modelopt.torch.quantization as mtq
    from megatron.core import parallel_state

    recipe: dict[str, Any] = dict(mtq.INT8_DEFAULT_CFG)
    if attention:
        recipe["quant_cfg"] = recipe["quant_cfg"] + mtq.FP8_KV_CFG["quant_cfg"]
    first = 10 * parallel_state.get_data_parallel_rank()
    mtq.quantize(model, recipe, lambda model: [compute_logits(model, seed) for seed in range(first, first + 3)])


def sparsify(model: Any) -> None:
    import modelopt.torch.sparsity as mts

    mts.sparsify(model, "sparse_magnitude")


def save_file(model: Any, folder: Path) -> Path:
    import modelopt.torch.opt as mto

    mto.save(model, folder / "whole.pt")
    return folder / "whole.pt"


def save_shards(model: Any, folder: Path) -> Path:
    """Save a sharded checkpoint of one iteration, like megatron.training."""
    import torch
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state

    checkpoint = folder / "iter_0000012"
    if torch.distributed.get_rank() == 0:
        checkpoint.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("12")
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(checkpoint))
    save_sharded_modelopt_state([model], checkpoint)
    return folder


def save_ranks(model: Any, folder: Path) -> Path:
    """Save in Megatron's format `torch`: one file per rank, with the arguments and the weights."""
    from argparse import Namespace

    import torch
    from megatron.core import parallel_state
    from modelopt.torch.opt.plugins import save_modelopt_state

    state = {"args": Namespace(seq_length=TOKENS), "checkpoint_version": 3.0, "model": model.state_dict()}
    save_modelopt_state([model], state)
    file = folder / f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    torch.distributed.barrier()
    return folder


def rebuild(config: Any, groups: Any, checkpoint: Path, **options: Any) -> tuple[Any, Any]:
    """Build and wrap a new model from the document and a checkpoint; check that its configuration does not change."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig

    document = config.as_dict() | {"restore_modelopt_state": True}
    fresh: Any = ModelConfig.from_dict(document)
    torch.manual_seed(99)
    builder = fresh.get_builder_cls()(fresh, modelopt_checkpoint=checkpoint)
    ddp_config = DistributedDataParallelConfig(**options.pop("ddp", {}))
    (stage,) = builder.build_distributed_models(groups, ddp_config, **options)
    assert fresh.as_dict() == document
    return builder, stage


def enabled_quantizers(model: Any) -> dict[str, bool]:
    """Return whether each quantizer is enabled, by name."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {name: part.is_enabled for name, part in model.named_modules() if isinstance(part, TensorQuantizer)}


def are_equal(buffers: dict[str, Any], others: dict[str, Any]) -> bool:
    import torch

    return buffers.keys() == others.keys() and all(
        torch.equal(buffer, others[name]) for name, buffer in buffers.items()
    )


def train_two_steps(builder: Any, stage: Any, groups: Any) -> list[tuple[float, float]]:
    """Train two steps; return losses and gradient norms."""
    import torch

    from bridge.dist.train.step import TrainOptions, train
    from bridge.dist.train.text import Text, find_default_text

    options = TrainOptions(steps=2, text=find_default_text(), seq_length=TOKENS, global_batch_size=2)
    layout = Layout.of(builder.transformer_config, torch.distributed.get_world_size())
    text = Text.read(options.text, vocab_size=VOCAB)
    steps = train([stage], groups, layout, text=text, options=options, forward_step=builder.forward_step)
    return [(step.loss, step.grad_norm or math.nan) for step in steps]


def check_rebuilt(model: Any, config: Any, groups: Any, checkpoint: Path) -> list[tuple[float, float]]:
    """Rebuild a saved model and compare it bit by bit; then train two steps, which must change only weights."""
    import torch
    from megatron.core.utils import unwrap_model

    builder, stage = rebuild(config, groups, checkpoint)
    inner: Any = unwrap_model(stage)
    assert torch.equal(compute_logits(stage.eval(), 5), compute_logits(model.eval(), 5))
    assert are_equal(dict(inner.named_parameters()), dict(model.named_parameters()))
    assert are_equal(dict(inner.named_buffers()), dict(model.named_buffers()))
    assert enabled_quantizers(inner) == enabled_quantizers(model)
    steps = train_two_steps(builder, stage.train(), groups)
    assert all(math.isfinite(value) and value > 0 for step in steps for value in step)
    still = [
        name
        for (name, parameter), before in zip(inner.named_parameters(), model.parameters(), strict=True)
        if torch.equal(parameter, before)
    ]
    assert still == []
    assert are_equal(dict(inner.named_buffers()), dict(model.named_buffers()))
    assert enabled_quantizers(inner) == enabled_quantizers(model)
    return steps


def restore_error(config: Any, groups: Any, checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        rebuild(config, groups, checkpoint)
    return str(caught.value)


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


def replace_extra_state(folder: Path, other: object) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(index.fqn for index in metadata.storage_data if "._extra_state/" in index.fqn)
    replace_object(folder, key, other)


HOSTILE: dict[str, Callable[[Path, object], object]] = {
    "metadata": lambda folder, bad: (folder / ".metadata").write_bytes(pickle.dumps(bad)),
    "metadata of the state": lambda folder, bad: (folder / "modelopt_state/.metadata").write_bytes(pickle.dumps(bad)),
    "common state": lambda folder, bad: replace_object(folder / "modelopt_state", COMMON_STATE, [{"bad": bad}]),
    "extra state": replace_extra_state,
}


def restore_hostile(config: Any, groups: Any, shards: Path) -> dict[str, str]:
    """Return the errors of restoring from checkpoints with an object that runs something when it is unpickled."""
    errors = {}
    for name, change in HOSTILE.items():
        folder = shards.parent / name
        shutil.copytree(shards, folder)
        change(folder / "iter_0000012", Payload(folder / "ran"))
        errors[name] = restore_error(config, groups, folder)
        assert not (folder / "ran").exists()
    return errors


def run_on_one_rank(folder: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}

    def build_changed(preset: str, changes: Changes, change: Callable[[Any], None] = quantise) -> tuple[Any, Any, Any]:
        config = make_config(preset, changes)
        groups = create_groups(config)
        model = config.get_builder_cls()(config).build_model(groups)
        change(model)
        return model, config, groups

    # Bridge has not imported ModelOpt yet, so ModelOpt does not know Bridge's attention and cannot quantise it.
    assert "bridge.models.modelopt.state" not in sys.modules
    model, config, groups = build_changed("tiny", SMALL)
    assert not any("core_attention" in name for name in enabled_quantizers(model))
    whole = save_file(model, folder)
    found["gpt"] = check_rebuilt(model, config, groups, whole)
    check_rebuilt(model, config, groups, save_ranks(model, folder / "ranks"))
    (folder / "ranks/mp_rank_00").rename(folder / "ranks/mp_rank_01")
    found["other rank"] = restore_error(config, groups, folder / "ranks")
    shards = save_shards(model, folder / "gpt")
    check_rebuilt(model, config, groups, shards)

    check_faults(config, groups, whole, shards / "iter_0000012")
    found["hostile"] = restore_hostile(config, groups, shards)

    others: dict[str, Changes] = {
        "layers": SMALL | {"transformer.num_layers": 4},
        "sizes": SMALL | {"transformer.hidden_size": 64},
    }
    for name, changes in others.items():
        other = make_config("tiny", changes)
        for checkpoint in (whole, shards):
            found[f"other {name}, {checkpoint.name}"] = restore_error(other, groups, checkpoint)
    with pytest.raises(UnsupportedError, match="virtual pipeline"):
        GPTModelBuilder(make_config("tiny", SMALL | {"restore_modelopt_state": True})).build_model(groups, vp_stage=0)

    changes = SMALL | {"restore_modelopt_state": True, "transformer.normalization": "RMSNorm"}
    model, config, groups = build_changed("tiny", changes, lambda model: quantise(model, attention=True))
    assert enabled_quantizers(model)["decoder.layers.0.self_attention.core_attention.k_bmm_quantizer"]
    check_rebuilt(model, config, groups, save_file(model, folder))
    check_rebuilt(model, config, groups, save_shards(model, folder / "attention"))

    model, config, groups = build_changed("hybrid-tiny", HYBRID | {"restore_modelopt_state": True})
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

    model, config, groups = build_changed("tiny", SMALL, lambda model: None)
    found["unchanged"] = restore_error(config, groups, save_file(model, folder))
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


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("layers, whole.pt", "decoder.layers.3."),
        ("layers, gpt", "only the model has decoder.layers.2."),
        ("sizes, whole.pt", "other shapes of decoder.final_layernorm.bias"),
        ("sizes, gpt", "embedding.position_embeddings.weight"),
    ],
)
def test_modelopt_state_of_another_architecture_is_refused(one_rank: dict[str, Any], other: str, named: str) -> None:
    message = one_rank[f"other {other}"]
    assert "cannot be restored into this model" in message
    assert named in message


def test_unsuitable_checkpoint_files_are_refused(one_rank: dict[str, Any]) -> None:
    assert "whole.pt has no ModelOpt state" in one_rank["unchanged"]
    assert "ranks has no mp_rank_00/model_optim_rng.pt" in one_rank["other rank"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_checkpoint_would_run_is_refused(one_rank: dict[str, Any], name: str) -> None:
    assert "cannot be read: it refers to " in one_rank["hostile"][name]


TORCH_FSDP2: dict[str, Any] = {"use_torch_fsdp2": True}
MEGATRON_FSDP: dict[str, Any] = {
    "use_megatron_fsdp": True,
    "ddp": {
        "use_megatron_fsdp": True,
        "use_distributed_optimizer": True,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "gradient_reduce_div_fusion": False,
    },
}


def run_on_two_ranks(folder: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    saved = {}
    layouts: dict[str, dict[str, int]] = {"dp": {}, "tp": {"tp": 2}}
    for name, sizes in layouts.items():
        config = make_config("tiny", SMALL | {"restore_modelopt_state": True}, sizes)
        groups = create_groups(config)
        model = GPTModelBuilder(config).build_model(groups)
        quantise(model)
        saved[name] = save_shards(model, folder / name)
        found[name] = check_rebuilt(model, config, groups, saved[name])
        if name == "tp":
            check_rebuilt(model, config, groups, save_ranks(model, folder / "ranks"))
            parts = [torch.empty(0) for _ in range(2)]
            torch.distributed.all_gather_object(parts, compute_logits(model, 5))
            found["tp, one file"] = restore_error(config, groups, save_file(model, folder))

    # Load the checkpoint of two tensor-parallel ranks into whole models.
    config = make_config("tiny", SMALL)
    groups = create_groups(config)
    _, stage = rebuild(config, groups, saved["tp"])
    torch.testing.assert_close(compute_logits(stage, 5), torch.cat(parts, dim=-1))
    for name, options in {"torch-fsdp2": TORCH_FSDP2, "megatron-fsdp": MEGATRON_FSDP}.items():
        found[name] = train_two_steps(*rebuild(config, groups, saved["dp"], **options), groups)

    model = GPTModelBuilder(config).build_model(groups)
    sparsify(model)
    checkpoint = save_shards(model, folder / "sparse")
    for name, options in {"ddp, sparse": {}, "torch-fsdp2, sparse": TORCH_FSDP2}.items():
        found[name] = train_two_steps(*rebuild(config, groups, checkpoint, **options), groups)
    with pytest.raises(PreflightError, match="Megatron-FSDP crashes"):
        rebuild(config, groups, checkpoint, **MEGATRON_FSDP)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = run_ranks(run_on_two_ranks, 2, tmp_path_factory.mktemp("two"))
    assert first == second
    return first


def test_state_and_weights_are_restored_under_data_and_tensor_parallelism(two_ranks: dict[str, Any]) -> None:
    assert "the file of one rank, but 2 hold parts of the model" in two_ranks["tp, one file"]


@pytest.mark.parametrize("wrapper", ["torch-fsdp2", "megatron-fsdp"])
def test_a_quantised_model_trains_the_same_in_every_wrapper(two_ranks: dict[str, Any], wrapper: str) -> None:
    assert two_ranks[wrapper] == [pytest.approx(step, rel=1e-5) for step in two_ranks["dp"]]


def test_a_sparse_model_trains_the_same_with_torch_fsdp2(two_ranks: dict[str, Any]) -> None:
    expected = [pytest.approx(step, rel=1e-5) for step in two_ranks["ddp, sparse"]]
    assert two_ranks["torch-fsdp2, sparse"] == expected


def small(**fields: Any) -> GPTModelConfig:
    transformer = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, **fields)
    return GPTModelConfig(transformer=transformer, vocab_size=VOCAB, restore_modelopt_state=True)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere to restore"):
        GPTModelBuilder(small(), modelopt_checkpoint=tmp_path / "nowhere").check_restore()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint of Megatron"):
        GPTModelBuilder(small(), modelopt_checkpoint=tmp_path).check_restore()


def test_a_distributed_checkpoint_without_modelopt_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(CheckpointError, match=r"has no ModelOpt state .no folder modelopt_state"):
        GPTModelBuilder(small(), modelopt_checkpoint=tmp_path).check_restore()


def test_restoring_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="true, but there is no checkpoint to restore from"):
        GPTModelBuilder(small()).check_restore()


def test_a_checkpoint_without_restoring_is_refused(tmp_path: Path) -> None:
    config = small()
    config.restore_modelopt_state = False
    with pytest.raises(CheckpointError, match=r"false, but .* is given to restore from"):
        GPTModelBuilder(config, modelopt_checkpoint=tmp_path).check_restore()


def test_t5_with_modelopt_state_is_refused() -> None:
    config = T5ModelConfig(transformer=small().transformer, vocab_size=VOCAB, restore_modelopt_state=True)
    with pytest.raises(ModelConfigError, match="neither ModelOpt nor Megatron-Core supports it for T5"):
        config.validate()
    with pytest.raises(BuilderContractError, match="T5ModelBuilder cannot restore a ModelOpt state"):
        config.get_builder_cls()(config).check_restore()


class Blocked:
    """An import finder that hides ModelOpt."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "modelopt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without_modelopt(folder: Path) -> list[str]:
    sys.meta_path.insert(0, Blocked())
    (folder / "mp_rank_00").mkdir()
    config = small()
    errors = []
    for attempt in (
        GPTModelBuilder(config, modelopt_checkpoint=folder).check_restore,
        lambda: GPTModelBuilder(config).build_model(create_groups(config)),
    ):
        with pytest.raises(UnsupportedError) as caught:
            attempt()
        errors.append(str(caught.value))
    return errors


def test_a_missing_modelopt_is_an_error(tmp_path: Path) -> None:
    (errors,) = run_ranks(without_modelopt, 1, tmp_path)
    assert len(errors) == 2
    for message in errors:
        assert "No module named 'modelopt'" in message
        assert "install bridge-models[modelopt]" in message
