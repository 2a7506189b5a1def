"""A folder of transformers, loaded into any layout: every parameter to the bit, and the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from huggingface_cases import MODELS
from huggingface_weights import Weights, convert_weights
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor


class Layout(NamedTuple):
    """Sizes, wrapper and more settings of the transformer."""

    sizes: dict[str, int]
    wrapper: str = "none"
    settings: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """The fewest ranks that show the layout; experts without tensor parallelism take no more."""
        tp, pp, cp = (self.sizes.get(name, 1) for name in ("tp", "pp", "cp"))
        replicas = 2 if "fsdp" in self.wrapper else self.sizes.get("ep", 1) if tp > 1 else 1
        return max(2, tp * pp * cp * replicas)


META = "init_model_with_meta_device"
TP_SP = ("sequence_parallel",)
LAYOUTS = {
    "tp2": Layout({"tp": 2}),
    "tp2 sp": Layout({"tp": 2}, settings=TP_SP),
    "tp4, two query groups": Layout({"tp": 4}),
    "pp2": Layout({"pp": 2}),
    "pp2 vp2": Layout({"pp": 2, "vp": 2}),
    "ep2": Layout({"ep": 2}),
    "tp2 etp1": Layout({"tp": 2, "etp": 1}, settings=TP_SP),
    "etp2": Layout({"etp": 2}),
    "tp2 ep2": Layout({"tp": 2, "ep": 2, "etp": 1}, settings=TP_SP),
    "cp2": Layout({"cp": 2}),
    "ddp": Layout({}, "ddp"),
    "tp2 megatron-fsdp": Layout({"tp": 2}, "megatron-fsdp"),
    "tp2 torch-fsdp2": Layout({"tp": 2}, "torch-fsdp2"),
    "tp2 etp1 megatron-fsdp": Layout({"tp": 2, "etp": 1}, "megatron-fsdp", TP_SP),
    "tp2 from meta": Layout({"tp": 2}, settings=(META,)),
    "megatron-fsdp from meta": Layout({}, "megatron-fsdp", (META,)),
    "torch-fsdp2 from meta": Layout({}, "torch-fsdp2", (META,)),
}
EXPERT_LAYOUTS = ("ep2", "tp2 etp1", "etp2", "tp2 ep2")
EXPERTS_FSDP = "tp2 etp1 megatron-fsdp"


def make_folder(tmp_path: Path, config: dict[str, Any]) -> tuple[Any, Weights]:
    """Save a model of transformers; return it, and its weights by Megatron-Core's names, converted by other code."""
    from huggingface_models import build_transformers_model  # transformers, which ranks do without

    model = build_transformers_model(config)
    model.save_pretrained(tmp_path)
    return model, convert_weights(model.config, model.state_dict())


TOKENS = torch.randint(96, (2, 1, 24), generator=torch.Generator().manual_seed(3))
VOCABULARY = 96


@torch.no_grad()
def compute_expected_logits(model: Any) -> torch.Tensor:
    tokens = TOKENS.flatten(0, 1)
    given = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {"use_cache": False}
    logits: torch.Tensor = model(input_ids=tokens, **given).logits
    return logits


def make_document(folder: Path, layout: Layout) -> Any:
    """Return the document of a folder with a layout."""
    from bridge.config import Document
    from bridge.dist.document_layout import apply_layout
    from bridge.models.huggingface import from_hf

    document = Document(from_hf(json.loads((folder / "config.json").read_text())).data)
    apply_layout(document, dict(layout.sizes))
    document.data["transformer"] |= dict.fromkeys(layout.settings, True)
    document.data["should_pad_vocab"] = True
    return document


class Loaded(NamedTuple):
    """What a rank has loaded: the wrong parameters, the bytes that it read, and on the last stage the logits."""

    wrong: list[str]
    read: int
    logits: list[Any] | None


def load_on_ranks(folder: str, layout: Layout, expected: Weights, saved: str | None = None) -> Loaded:
    """Build a model with the folder's weights on this rank, compare them, and save them to another folder."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bridge.config import ModelConfig
    from bridge.dist.engine.groups import create_process_groups, destroy_process_groups
    from bridge.dist.engine.placement import named_tensors
    from bridge.dist.job import BuildJob
    from bridge.dist.train.logits import compute_logits
    from bridge.dist.wrapper import Wrapper
    from bridge.models.huggingface import load_weights, save_weights
    from bridge.models.huggingface.transfer.tensors import TensorReader

    document = make_document(Path(folder), layout)
    config: Any = ModelConfig.from_dict(document.data)
    job = BuildJob(document=document.data, wrapper=Wrapper(layout.wrapper))
    sizes = job.finalize(config, torch.distributed.get_world_size())
    groups = create_process_groups(sizes, embedding_ranks=job.find_embedding_ranks(config))
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    wrong: list[str] = []
    read: list[int] = []
    unsharded: list[int] = []
    built: list[Any] = []

    def count(_: object, *taken: torch.Tensor) -> None:
        read.extend(one.nbytes for one in taken)
        parameters = [one for stage in built for one in stage.parameters()]
        unsharded.append(sum(one.numel() for one in parameters if not (one.is_meta or isinstance(one, DTensor))))

    def load(stages: list[Any]) -> list[Any]:
        built[:] = stages
        load_weights(stages, folder, groups)
        if stages[0].config.init_model_with_meta_device and "fsdp" in layout.wrapper:
            assert any(one.is_meta for stage in stages for one in stage.parameters())  # Mamba has some with memory
            return stages  # they are loaded when they are wrapped
        for placement, tensor in (one for stage in stages for one in named_tensors(stage, groups)):
            whole = expected.get(placement.full_name, torch.zeros(VOCABULARY))  # T5's bias, which transformers lacks
            if not torch.equal(placement.take_shard(placement.pad(whole)), tensor):
                wrong.append(placement.full_name)
        return stages

    config.pre_wrap_hooks = [load]
    builder = job.make_builder(config)
    builder.transformer_config.perform_initialization = False
    options = job.make_options(builder.transformer_config)
    with patch.object(TensorReader, "_count", count):
        stages = builder.build_distributed_models(
            groups,
            ddp_config=options.ddp_config,
            use_megatron_fsdp=options.use_megatron_fsdp,
            use_torch_fsdp2=options.use_torch_fsdp2,
            wrap_with_ddp=options.wrap_with_ddp,
        )
    if options.use_torch_fsdp2 and builder.transformer_config.init_model_with_meta_device:
        modules = [module for stage in stages for module in stage.modules()]
        largest = max(sum(one.numel() for one in module.parameters(recurse=False)) for module in modules)
        assert max(unsharded) == largest  # one module at a time
    for stage in stages:
        stage.eval()
    logits = compute_logits(stages, groups, sizes, TOKENS, logits_step=builder.logits_step)
    if saved is not None:
        config.pre_wrap_hooks = []
        save_weights(stages, saved, groups, model=config, shard_bytes=20_000)
    destroy_process_groups()
    return Loaded(wrong, sum(read), None if logits is None else logits[..., :VOCABULARY].float().tolist())


def count_planned_bytes(folder: Path, layout: Layout) -> dict[int, int]:
    """Return the bytes that each rank reads, as `bridge check-hf` counts them."""
    from bridge.models.huggingface.folder.folder import open_folder
    from bridge.models.huggingface.transfer.reads import count_reads

    reads = count_reads(open_folder(folder), make_document(folder, layout), layout.ranks)
    return {rank: one.bytes for one in reads for rank in one.ranks}


def check(folder: Path, config: dict[str, Any], layout: Layout) -> None:
    """Load the folder of a small model under a layout, and compare parameters and logits with transformers."""
    source, saved = folder / "source", folder / "saved"
    model, expected = make_folder(source, config)
    results = run_ranks(load_on_ranks, layout.ranks, str(source), layout, expected, str(saved))
    assert [loaded.wrong for loaded in results] == [[]] * layout.ranks
    assert dict(enumerate(loaded.read for loaded in results)) == count_planned_bytes(source, layout)
    logits = compute_expected_logits(model)
    computed = [torch.tensor(loaded.logits) for loaded in results if loaded.logits is not None]
    assert computed
    for found in computed:
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    compare_folders(saved, source)


def read_tensors(folder: Path) -> Weights:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def compare_folders(saved: Path, source: Path) -> None:
    """Compare all tensors to the bit; the norm that T5 1.0 scales within one unit in the last place."""
    expected, found = read_tensors(source), read_tensors(saved)
    if (source / "config.json").read_text().find('"t5"') >= 0:  # version 5 leaves out an output layer that it ties
        found.pop("lm_head.weight", None)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if not torch.equal(found[name], tensor):
            assert name == "decoder.final_layer_norm.weight"
            torch.testing.assert_close(found[name], tensor, rtol=2**-23, atol=0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in (*EXPERT_LAYOUTS, EXPERTS_FSDP)])
def test_dense_model_under_each_layout(layout: str, tmp_path: Path) -> None:
    check(tmp_path, MODELS["llama"] | {"num_hidden_layers": 4}, LAYOUTS[layout])


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3", "nemotron_h, experts"])
def test_experts_under_each_layout(case: str, layout: str, tmp_path: Path) -> None:
    check(tmp_path, MODELS[case], LAYOUTS[layout])


def test_experts_that_fsdp_divides_otherwise_than_other_layers(tmp_path: Path) -> None:
    check(tmp_path, MODELS["qwen3_moe"], LAYOUTS[EXPERTS_FSDP])


@pytest.mark.parametrize("layout", ["megatron-fsdp from meta", "torch-fsdp2 from meta"])
@pytest.mark.parametrize("case", ["gpt_oss", "mamba2"])
def test_other_layers_that_fsdp_divides(case: str, layout: str, tmp_path: Path) -> None:
    """Ranks write single numbers of the experts of GPT-OSS, whose rows alternate in the folder."""
    check(tmp_path, MODELS[case], LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["pp2", "pp2 vp2", "tp2 megatron-fsdp"])
def test_tied_embedding_across_stages(layout: str, tmp_path: Path) -> None:
    check(tmp_path, MODELS["llama 3.2, tied"] | {"num_hidden_layers": 4}, LAYOUTS[layout])


@pytest.mark.parametrize("wrapper", ["megatron-fsdp", "torch-fsdp2"])
def test_fsdp_in_bf16_saves_what_it_loaded(wrapper: str, tmp_path: Path) -> None:
    """Megatron-FSDP divides parameters in fp32, torch FSDP2 those in bf16; the folder has bf16 either way."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    _, expected = make_folder(source, MODELS["llama"] | {"dtype": "bfloat16"})
    results = run_ranks(load_on_ranks, 2, str(source), Layout({}, wrapper), expected, str(saved))
    assert [loaded.wrong for loaded in results] == [[], []]
    assert {tensor.dtype for tensor in read_tensors(saved).values()} == {torch.bfloat16}
    compare_folders(saved, source)


@pytest.mark.parametrize("case", MODELS)
def test_each_architecture_on_two_ranks(case: str, tmp_path: Path) -> None:
    """Under tensor parallelism; GPT-OSS, whose experts have biases, with experts on different ranks."""
    check(tmp_path, MODELS[case], LAYOUTS["ep2" if case == "gpt_oss" else "tp2"])
