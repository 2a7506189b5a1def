"""Documents as arguments of Megatron-LM.

bridge-models/tests/test_reference_models.py gives the arguments to Megatron-LM's real parser.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from bridge.config import ConfigError, Document, DocumentError
from bridge.config.cli.megatron_lm import to_megatron_lm as command
from bridge.config.cli.output import write_output
from bridge.config.foreign.argument_names import get_options, load_arguments
from bridge.config.megatron_lm import to_megatron_lm

SMALL = """\
_target_: bridge.models.gpt.GPTModelConfig
vocab_size: 256
seq_length: 64
hf_model_id: none/small
transformer:
  num_layers: 4
  hidden_size: 32
  num_attention_heads: 4
"""


def write_arguments(*overrides: str) -> dict[str, str]:
    """Return the arguments of a small GPT, each with its values joined."""
    document = Document(yaml.safe_load(SMALL))
    document.override(list(overrides))
    return {option: " ".join(values) for option, *values in to_megatron_lm(document.data).words}


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(DocumentError) as caught:
        write_arguments(*overrides)
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("override", "option", "value"),
    [
        ("transformer.num_query_groups=2", "--num-query-groups", "2"),
        ("transformer.num_query_groups=2", "--group-query-attention", ""),
        ("transformer.moe_layer_freq=[0, 0, 1, 1]", "--moe-layer-freq", "[0]*2+[1]*2"),
        ("transformer.window_size=[16, 0]", "--window-size", "(16,0)"),
        ("transformer.layernorm_epsilon=1e-6", "--norm-epsilon", "1e-06"),
        ("transformer.hidden_dropout=0.0", "--hidden-dropout", "0"),
        ("transformer.add_bias_linear=false", "--disable-bias-linear", ""),
        ("transformer.recompute_modules=[mlp, core_attn]", "--recompute-modules", "mlp core_attn"),
        ("transformer.attention_backend=fused", "--attention-backend", "fused"),
        ("should_pad_vocab=true", "--vocab-size", "256"),
        ("should_pad_vocab=false", "--padded-vocab-size", "256"),
        ("vocab_size=null", "--seq-length", "64"),
        ("transformer.glu_linear_offset=-0.5", "--glu-linear-offset=-0.5", ""),
    ],
)
def test_values_are_written_for_their_options(override: str, option: str, value: str) -> None:
    assert write_arguments(override)[option] == value


def test_values_that_megatron_lm_has_anyway_are_left_out() -> None:
    assert write_arguments("transformer.hidden_dropout=0.1").keys() == {
        *("--num-layers", "--hidden-size", "--num-attention-heads", "--ffn-hidden-size"),
        *("--padded-vocab-size", "--max-position-embeddings", "--seq-length"),
        # The defaults of megatron-core are others than those of Megatron-LM.
        *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm"),
        *("--no-bias-dropout-fusion", "--no-bias-gelu-fusion", "--attention-softmax-in-fp32"),
        "--untie-embeddings-and-output-weights",
    }


def test_every_field_that_no_argument_expresses_is_named() -> None:
    found = problems("transformer.softmax_scale=0.5", "transformer.activation_func=mish", "transformer.bf16=true")
    assert found == {
        "$.transformer.softmax_scale": "no argument of Megatron-LM sets this to 0.5: the model would have None",
        "$.transformer.params_dtype": "no argument of Megatron-LM sets this to 'torch.float32': "
        "the model would have 'torch.bfloat16'",
        "$.transformer.activation_func": "no argument of Megatron-LM sets this to 'torch.nn.functional.mish': "
        "the model would have 'torch.nn.functional.gelu'",
    }


def test_one_virtual_stage_is_no_virtual_pipeline() -> None:
    assert write_arguments("transformer.virtual_pipeline_model_parallel_size=1") == write_arguments()


def test_the_default_layers_may_be_named() -> None:
    named = write_arguments("transformer_layer_spec=bridge.models.layer_specs.default_layer_spec")
    assert named == write_arguments()


def test_other_layers_are_refused_with_their_name_and_the_remedy() -> None:
    name = "bridge.models.hybrid_layers.default_stack_spec"
    assert problems(f"transformer_layer_spec={name}") == {
        "$.transformer_layer_spec": f"no argument of Megatron-LM sets this to {name!r}: the model would have None; "
        "for the default layers, remove it: ~transformer_layer_spec"
    }


def test_a_value_that_no_option_can_set_is_refused() -> None:
    assert problems("tp_comm_overlap_cfg={qkv: {method: ring}}").keys() == {"$.tp_comm_overlap_cfg"}
    assert problems("transformer.cp_comm_type=[]", "transformer.context_parallel_size=2").keys() == {
        "$.transformer.cp_comm_type"
    }


def test_a_scaling_that_megatron_lm_ignores_is_refused() -> None:
    rope = ("position_embedding_type=rope", "rope_scaling=true")
    assert "--use-rope-scaling" in write_arguments(*rope)
    assert problems(*rope, "rope_scaling_factor=32.0").keys() == {"$.rope_scaling_factor"}


def test_xavier_is_refused_because_megatron_lm_fails_with_it() -> None:
    assert problems("transformer.init_method=torch.nn.init.xavier_uniform_").keys() == {"$.transformer.init_method"}


def test_the_command_prints_one_quoted_argument_a_line(small: Path) -> None:
    done = run(small, "transformer.window_size=[16, 0]")
    assert done.exit_code == 0, done.output
    assert "--window-size '(16,0)'\n" in done.stdout
    assert done.stderr == f"{small}: note: left out, Megatron-LM has no arguments for it: hf_model_id\n"
    words = json.loads(run(small, "transformer.window_size=[16, 0]", "--json").stdout)
    assert words == shlex.split(done.stdout)


def test_the_command_writes_a_file_once(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.args"
    done = run(small, "-o", output)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.endswith(f"{output}: written\n")
    assert "--num-layers 4\n" in output.read_text()
    assert "give --force to overwrite it" in str(run(small, "-o", output).exception)
    assert run(small, "-o", output, "--force").exit_code == 0
    assert "there is no folder" in str(run(small, "-o", tmp_path / "missing" / "model.args").exception)


def test_a_write_that_fails_keeps_the_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model.args"
    output.write_text("before\n")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert "cannot be written: No space left on device" in str(run(small, "-o", output, "--force").exception)
    assert [(file.name, file.read_text()) for file in tmp_path.glob("model.*")] == [("model.args", "before\n")]


def test_a_working_directory_that_is_gone_is_a_clear_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert str(run(small, "-o", "a.args").exception) == "a.args cannot be written: No such file or directory"
    with pytest.raises(ConfigError, match=r"a\.args cannot be written: No such file or directory"):
        write_output("", Path("a.args"))


def test_text_with_names_that_are_not_utf8_is_written(tmp_path: Path) -> None:
    write_output("bridge plan \udcff.yaml", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "bridge plan \\udcff.yaml\n"


def test_problems_have_the_line_of_the_document(small: Path) -> None:
    small.write_text(SMALL + "  softmax_scale: 0.5\n")
    assert str(run(small).exception).startswith(f"{small}:9:3: $.transformer.softmax_scale: ")


def test_other_models_are_refused() -> None:
    mamba: Any = {"_target_": "bridge.models.mamba.MambaModelConfig", "transformer": {"num_layers": 2}}
    mamba["transformer"] |= {"hidden_size": 512, "num_attention_heads": 4, "is_hybrid_model": True}
    with pytest.raises(DocumentError, match=r"pretrain_gpt\.py trains only bridge\.models\.gpt\.GPTModelConfig"):
        to_megatron_lm(mamba)


def test_every_argument_has_an_option() -> None:
    assert all(option.startswith("-") for name in load_arguments() for option in get_options(name))
