"""Rotary positions: frequencies, and their scaling for sequences longer than in pre-training.

Version 4 of transformers has ``rope_theta`` and ``rope_scaling``. Version 5 has ``rope_parameters`` and also reads the
old fields, so the old ones are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bridge.config.errors import did_you_mean
from bridge.config.problems import describe_value
from bridge.models.huggingface.fields.row import Row
from bridge.models.huggingface.targets import YARN_TRANSFORMER
from bridge.models.huggingface.translation import (
    INTEGER,
    MAPPING,
    NUMBER,
    Name,
    RefusedError,
    Translation,
    is_number,
    refuse_choice,
)

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants that megatron-core 0.19.2 hard-codes for Llama 3 scaling."""

_UNSUPPORTED = {
    "dynamic": "its frequencies depend on the length of each sequence",
    "longrope": "it has a separate factor for each frequency",
    "su": "it has a separate factor for each frequency",
    "proportional": "it leaves out the frequencies of some channels",
    "mrope": "its positions have several dimensions",
}


class Scaling:
    """Reads ``rope_scaling`` or ``rope_parameters``, and tracks the keys that were read."""

    def __init__(self, t: Translation, name: str, values: Mapping[str, Any]) -> None:
        self.t = t
        self.name = name
        self.values = values
        self.known = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
        self.key = "rope_type" if "rope_type" in values else "type"
        self.kind = values.get(self.key, "default")
        if not isinstance(self.kind, str):
            raise self.refuse(self.key, f"expected a string, got {describe_value(self.kind)}")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the number at ``key``, or ``default`` if it is missing or null.

        Raises:
            RefusedError: The value is not a number.
        """
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not is_number(value):
            raise self.refuse(key, f"expected a number, got {describe_value(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return whether ``key`` is true, or ``default`` if it is missing or null.

        Raises:
            RefusedError: The value is not a boolean.
        """
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.refuse(key, f"expected true or false, got {describe_value(value)}")
        return value

    def factor(self) -> float:
        """Return the factor by which sequences are longer than in pre-training.

        Raises:
            RefusedError: It is missing, or less than 1.
        """
        factor: float = self.get("factor", 0)
        if factor < 1:
            raise self.refuse("factor", f"expected a number >= 1, got {describe_value(self.values.get('factor'))}")
        return factor

    def original(self, given: int | None) -> int:
        """Return the sequence length of pre-training: ``given``, else from the mapping, else the longest supported.

        Raises:
            RefusedError: It is not an integer.
        """
        inside = self.get("original_max_position_embeddings", self.t["max_position_embeddings"])
        if given is None and type(inside) is not int:
            raise self.refuse("original_max_position_embeddings", f"expected an integer, got {describe_value(inside)}")
        return inside if given is None else given

    def refuse(self, key: str, message: str) -> RefusedError:
        """Refuse the value at ``key``."""
        return self.t.refuse(self.name, message, key)

    def refuse_unknown(self) -> None:
        """Refuse the keys that were not read."""
        for key, value in self.values.items():
            if key not in self.known and value is not None:
                free = [known for known in self.known if known not in self.values]
                self.refuse(key, f"unknown to Bridge for rope_type {self.kind}{did_you_mean(key, free)}")


def rotary(
    theta: float = 10000.0,
    *,
    partial: bool = False,
    original: int | None = None,
    kinds: tuple[str, ...] = ("linear", "llama3", "yarn"),
    default: Mapping[str, Any] | None = None,
) -> Row:
    """Return the row of rotary positions of GPTs.

    Args:
        theta: The default of ``rope_theta`` in transformers.
        partial: Whether the architecture supports rotating only some channels of a head.
        original: The default of the top-level ``original_max_position_embeddings``; None if there is no such field.
        kinds: The supported kinds of frequency scaling.
        default: The default of the scaling mapping.
    """
    readers: Mapping[str, Callable[[Translation, Scaling], None]] = {
        "linear": _read_linear,
        "llama3": _read_llama3,
        "yarn": _read_yarn,
    }

    def read(t: Translation) -> None:
        scaling = find_scaling(t, default)
        t["position_embedding_type"] = "rope"
        base = scaling.get("rope_theta", t["rope_theta"])
        if base != int(base):  # GPTModelConfig declares an integer
            t.refuse("rope_theta", f"Megatron-Core needs a whole number, got {describe_value(base)}")
        t["rotary_base"] = int(base)
        _read_share(t, scaling, partial=partial)
        read_scaling(t, scaling, {kind: readers[kind] for kind in kinds})

    def write(t: Translation) -> None:
        positions = t["position_embedding_type"]
        if positions not in ("rope", "yarn"):
            raise t.refuse("position_embedding_type", f"{t.model_type} has rotary positions: must be rope or yarn")
        t["rope_theta"] = float(t["rotary_base"])
        if t["rotary_percent"] != 1:
            if not partial:
                raise t.refuse("rotary_percent", f"{t.model_type} rotates all channels of a head: must be 1.0")
            t["partial_rotary_factor"] = t["rotary_percent"]
        if (scaling := _write_scaling(t)) is not None:
            if scaling["rope_type"] not in kinds:
                raise t.refuse(
                    "position_embedding_type", f"{t.model_type} does not support {scaling['rope_type']} scaling"
                )
            t["rope_scaling"] = scaling
        elif default is not None:
            t["rope_scaling"] = {"rope_type": "default"}

    return Row(
        rope_names(theta) | ({} if original is None else {"original_max_position_embeddings": Name(INTEGER, original)}),
        (
            "position_embedding_type",
            "rotary_base",
            "rotary_percent",
            "rope_scaling",
            "rope_scaling_factor",
            "seq_len_interpolation_factor",
        ),
        read,
        write,
    )


def rope_names(theta: float) -> dict[str, Name]:
    """Return the fields of config.json, of versions 4 and 5."""
    return {
        "rope_theta": Name(NUMBER, theta),
        "rope_scaling": Name(MAPPING),
        "rope_parameters": Name(MAPPING),
        "partial_rotary_factor": Name(NUMBER),
    }


def find_scaling(t: Translation, default: Mapping[str, Any] | None = None) -> Scaling:
    """Return the scaling mapping; version 4's has precedence if both are set, as in transformers."""
    for name in ("rope_scaling", "rope_parameters"):
        values = t[name]
        # An empty mapping means that nothing is scaled in version 5; in version 4, it counts as missing.
        if values or (values is not None and name == "rope_parameters"):
            return Scaling(t, name, values)
    return Scaling(t, "rope_parameters", default or {})


def read_scaling(
    t: Translation, scaling: Scaling, readers: Mapping[str, Callable[[Translation, Scaling], None]]
) -> None:
    """Read how frequencies are scaled; "default" means no scaling.

    Raises:
        RefusedError: The kind of scaling is not supported.
    """
    kind = scaling.kind
    if kind in _UNSUPPORTED or (kind in ("linear", "llama3", "yarn") and kind not in readers):
        reason = f": {_UNSUPPORTED[kind]}" if kind in _UNSUPPORTED else f" for {t.model_type}"
        raise scaling.refuse(scaling.key, f"Megatron-Core does not support {kind} scaling{reason}")
    if kind != "default" and kind not in readers:
        raise refuse_choice(t, scaling.name, kind, ("default", *readers), scaling.key)
    if kind != "default":
        readers[kind](t, scaling)
    scaling.refuse_unknown()


def _read_share(t: Translation, scaling: Scaling, *, partial: bool) -> None:
    inside = scaling.values.get("partial_rotary_factor") is not None
    share = scaling.get("partial_rotary_factor", t["partial_rotary_factor"])
    if share is None or share == 1:
        return
    if not partial or not 0 < share < 1:
        why = "must be above 0, at most 1" if partial else f"{t.model_type} rotates all channels of a head: must be 1"
        raise scaling.refuse("partial_rotary_factor", why) if inside else t.refuse("partial_rotary_factor", why)
    t["rotary_percent"] = share


def _read_linear(t: Translation, scaling: Scaling) -> None:
    t["seq_len_interpolation_factor"] = float(scaling.factor())


def _read_llama3(t: Translation, scaling: Scaling) -> None:
    t["rope_scaling"] = True
    t["rope_scaling_factor"] = float(scaling.factor())
    for key, value in LLAMA3.items():
        if scaling.get(key) != value:
            scaling.refuse(key, f"Megatron-Core hard-codes {value:g} for Llama 3 scaling: must be {value:g}")


def _read_yarn(t: Translation, scaling: Scaling) -> None:
    if t["partial_rotary_factor"] not in (None, 1) or scaling.get("partial_rotary_factor", 1) != 1:
        raise scaling.refuse(scaling.key, "Megatron-Core supports yarn only with partial_rotary_factor 1")
    if scaling.get("attn_factor", 1) != 1:
        scaling.refuse("attn_factor", "Megatron-Core has no such factor, and transformers ignores it: remove it")
    mscale, mscale_all_dim = read_mscales(scaling)
    given = t["original_max_position_embeddings"] if "original_max_position_embeddings" in t.names else None
    t["position_embedding_type"] = "yarn"
    t["transformer._target_"] = YARN_TRANSFORMER
    read_yarn_range(t, scaling, "transformer.yarn_", original=given)
    if mscale is not None and mscale_all_dim is not None:
        t["transformer.yarn_mscale"] = float(mscale)
        t["transformer.yarn_mscale_all_dim"] = float(mscale_all_dim)
    t["transformer.yarn_correction_range_round_to_int"] = scaling.flag("truncate", True)


def read_mscales(scaling: Scaling) -> tuple[float | None, float | None]:
    """Return YaRN's ``mscale`` and ``mscale_all_dim``; None, as in transformers, for 0 too.

    An ``attention_factor`` that does not follow from them is refused.
    """
    factor, given = scaling.factor(), scaling.get("attention_factor")
    mscale, all_dim = (scaling.get(key) or None for key in ("mscale", "mscale_all_dim"))
    if mscale and all_dim:
        follows = _compute_concentration(factor, mscale) / _compute_concentration(factor, all_dim)
    else:
        follows = _compute_concentration(factor, 1)
    if given is not None and not math.isclose(given, follows, rel_tol=1e-6):
        scaling.refuse("attention_factor", f"Megatron-Core computes it from the other fields: must be {follows}")
    return mscale, all_dim


def read_yarn_range(t: Translation, scaling: Scaling, prefix: str, *, original: int | None = None) -> None:
    """Set the fields that determine which frequencies YaRN scales; their paths start with ``prefix``."""
    t[f"{prefix}rotary_scaling_factor"] = float(scaling.factor())
    t[f"{prefix}original_max_position_embeddings"] = scaling.original(original)
    # The defaults of transformers, which treats 0 like a missing value.
    t[f"{prefix}beta_fast"] = float(scaling.get("beta_fast") or 32)
    t[f"{prefix}beta_slow"] = float(scaling.get("beta_slow") or 1)


def write_yarn_range(t: Translation, prefix: str) -> dict[str, Any]:
    """Return the scaling mapping with the fields of ``read_yarn_range``."""
    return {
        "rope_type": "yarn",
        "factor": t[f"{prefix}rotary_scaling_factor"],
        **{key: t[f"{prefix}{key}"] for key in ("original_max_position_embeddings", "beta_fast", "beta_slow")},
    }


def _compute_concentration(factor: float, mscale: float) -> float:
    """Return YaRN's factor on sines and cosines: 0.1 mscale ln(factor) + 1 (https://arxiv.org/abs/2309.00071)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _write_scaling(t: Translation) -> dict[str, Any] | None:
    ways = {
        "rope_scaling": bool(t["rope_scaling"]),
        "seq_len_interpolation_factor": t["seq_len_interpolation_factor"] is not None,
        "position_embedding_type": t["position_embedding_type"] == "yarn",
    }
    chosen = [name for name, is_on in ways.items() if is_on]
    if len(chosen) > 1:
        raise t.refuse(chosen[0], f"config.json can scale frequencies in one way only: unset this or {chosen[1]}")
    if not ways["position_embedding_type"] and t.given.get("transformer.yarn_rotary_scaling_factor", 1) != 1:
        raise t.refuse(
            "position_embedding_type", "Megatron-Core uses yarn_rotary_scaling_factor even without yarn: must be yarn"
        )
    if ways["rope_scaling"]:
        return {"rope_type": "llama3", "factor": t["rope_scaling_factor"]} | LLAMA3
    if ways["seq_len_interpolation_factor"]:
        return {"rope_type": "linear", "factor": t["seq_len_interpolation_factor"]}
    return _write_yarn(t) if ways["position_embedding_type"] else None


def _write_yarn(t: Translation) -> dict[str, Any]:
    if t["transformer._target_"] != YARN_TRANSFORMER:
        raise t.refuse("transformer._target_", f"the position_embedding_type yarn needs {YARN_TRANSFORMER}")
    scaling = write_yarn_range(t, "transformer.yarn_")
    scaling["truncate"] = t["transformer.yarn_correction_range_round_to_int"]
    mscale, mscale_all_dim = t["transformer.yarn_mscale"], t["transformer.yarn_mscale_all_dim"]
    if mscale is not None and mscale_all_dim is not None:
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    return scaling
