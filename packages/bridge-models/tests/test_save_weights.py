"""What save_weights writes, refuses, and leaves behind when a rank dies."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_cases import MODELS
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from ranks import RankError, run_ranks
from safetensors.torch import load_file

from bridge.config import ModelConfig
from bridge.dist.checkpoint.partial import finish, name_partial
from bridge.dist.checkpoint.pickles import read_metadata
from bridge.dist.cpu import cpu_runtime
from bridge.models.errors import WeightsError
from bridge.models.huggingface import from_hf, save_weights
from bridge.models.huggingface.checkpoint.reader import CheckpointReader
from bridge.models.huggingface.folder.folder import open_folder
from bridge.models.huggingface.transfer.output import check_target, prepare

Groups = ProcessGroupCollection
Built = tuple[Any, ModelConfig]


@pytest.fixture(scope="module", autouse=True)
def _on_cpu(pg_collection: Groups) -> Iterator[None]:
    with cpu_runtime():
        yield


def build(config: dict[str, Any], groups: Groups) -> Built:
    """Return a model with random weights, and its configuration."""
    document = from_hf(config).data
    document["transformer"]["use_cpu_initialization"] = True
    read: Any = ModelConfig.from_dict(document)
    read.finalize()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return read.get_builder_cls()(read).build_model(groups), read


def test_transformers_reads_the_folder(pg_collection: Groups, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, config = build(MODELS["qwen3_moe"], pg_collection)
    save_weights([model], tmp_path / "saved", pg_collection, model=config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = loaded(tokens, use_cache=False).logits
        found = model.eval()(tokens, torch.arange(12).expand_as(tokens), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_precision_is_that_of_the_parameters(pg_collection: Groups, tmp_path: Path) -> None:
    """The bias of a router stays in fp32."""
    document = from_hf(MODELS["deepseek_v3"] | {"dtype": "bfloat16"}).data
    document["transformer"]["use_cpu_initialization"] = True
    config: Any = ModelConfig.from_dict(document)
    config.finalize()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    stages = config.get_builder_cls()(config).build_distributed_models(pg_collection, wrap_with_ddp=False)
    save_weights(stages, tmp_path / "saved", pg_collection, model=config)
    found = {name: tensor.dtype for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items()}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert found.pop(bias) is torch.float32
    assert set(found.values()) == {torch.bfloat16}
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "saved" / "config.json").read_text()


def test_copies_of_multi_token_prediction_are_written(pg_collection: Groups, tmp_path: Path) -> None:
    """As in the published DeepSeek-V3: its layer repeats the embedding and the output layer."""
    model, config = build(MODELS["deepseek_v3"] | {"num_nextn_predict_layers": 1}, pg_collection)
    save_weights([model], tmp_path / "saved", pg_collection, model=config)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["model.layers.2.embed_tokens.weight"], saved["model.embed_tokens.weight"])
    assert torch.equal(saved["model.layers.2.shared_head.head.weight"], saved["lm_head.weight"])
    open_folder(tmp_path / "saved")


def test_a_model_in_training_is_saved(pg_collection: Groups, tmp_path: Path) -> None:
    """A training loop gives functions to Megatron's schedule in the configuration."""
    model, config = build(MODELS["llama"], pg_collection)
    config.transformer.finalize_model_grads_func = finalize_model_grads
    config.transformer.grad_scale_func = lambda loss: loss
    with warnings.catch_warnings(action="error"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config)
    assert config.transformer.finalize_model_grads_func is finalize_model_grads
    open_folder(tmp_path / "saved")


def test_tokenizer_is_copied(pg_collection: Groups, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_llama.py").write_text("raise SystemExit")
    (templates := source / "additional_chat_templates").mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    (templates / "run.py").write_text("raise SystemExit")
    model, config = build(MODELS["llama"], pg_collection)
    save_weights([model], tmp_path / "saved", pg_collection, model=config, source=source)
    saved = tmp_path / "saved"
    names = {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/rag.jinja"}


@pytest.mark.parametrize("source", ["nothing", "no-org/nothing"])
def test_a_source_that_does_not_exist_is_refused(source: str, pg_collection: Groups, tmp_path: Path) -> None:
    """Before anything is written; a name with a slash may be a repository of Hugging Face."""
    model, config = build(MODELS["llama"], pg_collection)
    with pytest.raises(WeightsError, match=r"no such (file or )?folder"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config, source=source)
    assert not (tmp_path / "saved").exists()


def test_a_tokenizer_that_cannot_be_read_leaves_no_folder(pg_collection: Groups, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/proc/self/mem")  # a regular file; its first byte is not readable
    model, config = build(MODELS["llama"], pg_collection)
    with pytest.raises(WeightsError, match="saved: cannot be written: Input/output error"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config, source=tmp_path)
    assert not (tmp_path / "saved").exists()


def test_a_symbolic_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").touch()
    (tmp_path / "saved").symlink_to(tmp_path / "real")
    (problem,) = check_target(tmp_path / "saved", replaces="config.json", force=True)
    assert problem.message == "exists, and is not replaced, as it is a symbolic link: pass the folder that it names"


def test_the_working_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert check_target(Path(), replaces="config.json", force=True) == []
    assert prepare(Path()) == []
    (name_partial(Path()) / "new").touch()
    finish(Path())
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["here", "here/new"]


def test_an_existing_folder_is_kept(pg_collection: Groups, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "precious").touch()
    model, config = build(MODELS["llama"], pg_collection)
    with pytest.raises(WeightsError, match="saved: exists: choose another folder"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config)
    assert [file.name for file in (tmp_path / "saved").iterdir()] == ["precious"]
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk_is_found_before_writing(
    pg_collection: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    model, config = build(MODELS["llama"], pg_collection)
    with pytest.raises(WeightsError, match=r"needs \d\.\d{3} MB, but the disk has 0\.000 MB left"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config)
    assert not (tmp_path / "saved").exists()


def test_a_bias_that_transformers_lacks_must_be_zero(pg_collection: Groups, tmp_path: Path) -> None:
    model, config = build(MODELS["t5, 1.0"], pg_collection)
    with torch.no_grad():
        model.lm_head.output_layer.bias.fill_(1)
    with pytest.raises(WeightsError, match=r"lm_head\.output_layer\.bias: is not zero"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config)


def test_a_model_without_some_layers_is_not_saved(pg_collection: Groups, tmp_path: Path) -> None:
    """Stages that are left out: config.json would promise layers that nobody wrote."""
    model, config = build(MODELS["llama"], pg_collection)
    del model.decoder.layers[1]
    with pytest.raises(WeightsError, match="is not whole: no rank holds some of the weights"):
        save_weights([model], tmp_path / "saved", pg_collection, model=config)
    assert not (tmp_path / "saved").exists()


def save_after_a_step(folder: str, overlap: bool) -> None:
    """Save weights and a checkpoint right after a step of the distributed optimizer, on two data-parallel ranks."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from bridge.dist import Progress, save_checkpoint
    from bridge.dist.engine.groups import create_process_groups
    from bridge.dist.engine.weights import draw_weights
    from bridge.dist.layout import Layout
    from bridge.dist.train.optimizer import set_up_optimizer

    config: Any = ModelConfig.from_dict(from_hf(MODELS["qwen3_moe"]).data)
    config.finalize()
    groups = create_process_groups(Layout.of(config.transformer, 2))
    config.pre_wrap_hooks = [lambda stages: draw_weights(stages, groups, vocab_size=None) or stages]
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    stages = config.get_builder_cls()(config).build_distributed_models(groups, ddp)
    config.pre_wrap_hooks = []
    with set_up_optimizer(stages) as optimizer:
        for parameter in stages[0].parameters():
            parameter.main_grad.fill_(1)
        optimizer.step()
        save_weights(stages, f"{folder}/weights", groups, model=config)
        save_checkpoint(stages, f"{folder}/run", groups, model=config, progress=Progress(step=1), optimizer=optimizer)


def read_checkpoint(iteration: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors and those of its optimizer."""
    metadata = read_metadata(iteration)
    sizes = {key: one.size for key, one in metadata.state_dict_metadata.items() if hasattr(one, "size")}
    with CheckpointReader(iteration, metadata) as reader:
        return {key: reader.read(key, [0] * len(size), size) for key, size in sizes.items()}


def test_weights_that_are_gathered_with_the_next_forward_pass_are_saved(tmp_path: Path) -> None:
    """With overlap_param_gather a rank has old values of the parameters that others have updated."""
    for overlap in (False, True):
        run_ranks(save_after_a_step, 2, str(tmp_path / str(overlap)), overlap)
    for read, file in ((load_file, "weights/model.safetensors"), (read_checkpoint, "run/iter_0000001")):
        expected, found = (read(tmp_path / str(overlap) / file) for overlap in (False, True))
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def save_on_two_ranks(folder: str, write_on_second: Callable[..., None]) -> None:
    """Save, and call this on the second rank in place of what writes a parameter."""
    from bridge.dist.engine.groups import create_process_groups
    from bridge.dist.layout import Layout
    from bridge.dist.patch import Replacement, replace_attributes
    from bridge.models.huggingface.transfer.write import TensorWriter

    config: Any = ModelConfig.from_dict(from_hf(MODELS["llama"]).data)
    config.transformer.tensor_model_parallel_size = 2
    config.finalize()
    groups = create_process_groups(Layout.of(config.transformer, 2))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = config.get_builder_cls()(config).build_model(groups)
    replacements = [Replacement(TensorWriter, "write", write_on_second)] if os.environ["RANK"] == "1" else []
    with replace_attributes(*replacements):
        save_weights([model], folder, groups, model=config)


def die(*given: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*given: Any) -> None:
    raise MemoryError("no room")


def save_until_killed(folder: str) -> None:
    save_on_two_ranks(folder, die)


def save_until_an_error(folder: str) -> str:
    """Return the error of this rank."""
    with pytest.raises(WeightsError) as error:
        save_on_two_ranks(folder, fail)
    return str(error.value)


def test_a_killed_rank_leaves_no_folder(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError):
        run_ranks(save_until_killed, 2, str(tmp_path / "saved"))
    assert time.monotonic() - start < 60
    assert not (tmp_path / "saved").exists()
    assert not list((tmp_path / "saved.partial").glob("config.json"))


def test_an_error_of_any_kind_on_one_rank_ends_all(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    assert run_ranks(save_until_an_error, 2, folder) == [f"{folder}: cannot be written: MemoryError: no room"] * 2
    assert not (tmp_path / "saved").exists()
