"""The canonical form of equivalent documents, and its fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from bridge.config.errors import ConfigError
from bridge.config.read.decode import Checked, check
from bridge.config.write.encode import encode_parsed_config

_EXACT = 2**53  # RFC 8785 numbers are doubles (ECMAScript): from here on, not every integer is exact


def canonicalize(data: object, *, defaults: bool = False) -> dict[str, Any]:
    """Return the document `data` in canonical form.

    The canonical form has the current version, fields in the order of their class, full names instead of aliases,
    `_target_` for every config, the builder by name, short forms where possible, and no fields that a class computes.

    Args:
        data: a Bridge document of any version, or a Megatron Bridge document.
        defaults: whether to fill in missing fields with the defaults of their declarations. Values that a
            constructor derives are unknown, since it is not run.

    Raises:
        DocumentError: `data` does not describe a valid configuration.
    """
    return canonicalize_checked(check(data, defaults=defaults))


def canonicalize_checked(checked: Checked) -> dict[str, Any]:
    """Return the canonical form of a checked document."""
    form = encode_parsed_config(checked.parsed, checked.builder)
    if omitted := checked.present.data.get("_omitted_"):
        form["_omitted_"] = omitted
    return form


def fingerprint(data: object) -> str:
    """Return the content fingerprint of the document `data`: `sha256:` and 64 hexadecimal digits.

    It is the SHA-256 of the canonical JSON (RFC 8785) of the canonical form with defaults, without class versions. It
    does not depend on YAML or JSON, the order of keys, the spelling of names, or the machine. A field set to its
    default counts as missing.

    Raises:
        DocumentError: `data` does not describe a valid configuration.
        ConfigError: `data` holds a string with unpaired surrogates, or an integer too large to print.
    """
    form = canonicalize(data, defaults=True)
    if "_omitted_" in form:  # keep the paths only: reasons mention objects of the process that wrote them
        form["_omitted_"] = sorted(entry["path"] for entry in form["_omitted_"])
    try:
        text = rfc8785.dumps(_to_exact(form))
    # ValueError: Python refuses to print integers of more than 4300 digits.
    except (rfc8785.CanonicalizationError, ValueError) as error:
        raise ConfigError(f"cannot compute the fingerprint of this document: {error}") from error
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _to_exact(value: Any) -> Any:
    """Return `value` without versions. Large integers become equal floats, else a `builtins.int` entry."""
    if isinstance(value, dict):
        return {key: _to_exact(item) for key, item in drop_version(value).items()}
    if isinstance(value, list):
        return [_to_exact(item) for item in value]
    if type(value) is not int or abs(value) < _EXACT:
        return value
    try:
        if (number := float(value)) == value:
            return number
    except OverflowError:
        pass
    return {"_target_": "builtins.int", "_args_": [str(value)]}


def drop_version(form: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping of the canonical form without `_version_`, unless it is a plain dict (without `_target_`)."""
    return {key: item for key, item in form.items() if key != "_version_"} if "_target_" in form else form
