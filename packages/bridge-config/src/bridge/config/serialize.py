"""Encodes a config as a document, and warns about values that cannot be encoded or read back."""

from __future__ import annotations

from typing import Any

from bridge.config.errors import OmittedWarning, warn
from bridge.config.paths import format_path
from bridge.config.problems import MAX_PROBLEMS
from bridge.config.read.rehearsal import Rehearsal
from bridge.config.write.encode import Omitted, encode_mapping


def encode_config(config: object) -> dict[str, Any]:
    """Return `config` as a document; see `ModelConfig.as_dict`.

    Warns:
        OmittedWarning: Values were left out, or a reader would reject them.
    """
    omitted: Omitted = []
    rehearsal = Rehearsal()
    data = encode_mapping(config, (), omitted, rehearsal)
    rehearsal.check_document(data, config)
    document: dict[str, Any] = {"_target_": data.pop("_target_")}
    if (builder := getattr(config, "builder", None)) is not None:
        document["_builder_"] = builder
    document |= data
    if omitted:
        document["_omitted_"] = omitted
        what = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in omitted)
        warn(f"{type(config).__qualname__} is written without {what}", OmittedWarning)
    if rehearsal.problems:
        what = "; ".join(f"{format_path(path)} ({message})" for path, message in rehearsal.problems[:MAX_PROBLEMS])
        warn(f"{type(config).__qualname__} is written with values that cannot be read back: {what}", OmittedWarning)
    return document
