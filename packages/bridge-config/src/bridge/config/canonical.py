"""The canonical form of equivalent documents, and its fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from bridge.config.errors import ConfigError
from bridge.config.read.decode import Checked, check
from bridge.config.write.encode import encode_made

_EXACT = 2**53  # RFC 8785 has the numbers of ECMAScript: from here on, not every whole number is one


def canonicalize(data: object, *, defaults: bool = False) -> dict[str, Any]:
    """Return the document `data` in canonical form.

    The canonical form has the current version, fields in the order of their class, full names for aliases, `_target_`
    for every config, the builder by name, short forms where there are any, and no fields that the class computes.

    Args:
        data: a document of any version, or of Megatron Bridge.
        defaults: whether fields that it leaves out are written out with their defaults. What a constructor derives
            is not known without running it: such a field has the default of its declaration.

    Raises:
        DocumentError: it describes no configuration.
    """
    return canonicalize_checked(check(data, defaults=defaults))


def canonicalize_checked(checked: Checked) -> dict[str, Any]:
    """Return the canonical form of a checked document."""
    form = encode_made(checked.made, checked.builder)
    if omitted := checked.present.data.get("_omitted_"):
        form["_omitted_"] = omitted
    return form


def fingerprint(data: object) -> str:
    """Return the fingerprint of the content of the document `data`: `sha256:` and 64 hexadecimal digits.

    It is the SHA-256 of the canonical JSON (RFC 8785) of the canonical form with defaults, without the versions of
    its classes. So it is the same for YAML and JSON, any order of keys, any spelling, and on every machine; a field
    given its default counts as one left out.

    Raises:
        DocumentError: it describes no configuration.
        ConfigError: it holds text that is not Unicode.
    """
    form = canonicalize(data, defaults=True)
    if "_omitted_" in form:  # the reasons name objects of the process that wrote them
        form["_omitted_"] = sorted(entry["path"] for entry in form["_omitted_"])
    try:
        text = rfc8785.dumps(_to_exact(form))
    # ValueError: an integer of more digits than Python writes.
    except (rfc8785.CanonicalizationError, ValueError) as error:
        raise ConfigError(f"cannot compute the fingerprint of this document: {error}") from error
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _to_exact(value: Any) -> Any:
    """`value` without versions, and with large whole numbers as floats or, where no float is equal, as text."""
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
    """A mapping of a canonical form without the version of the class that it names; any other mapping as it is."""
    return {key: item for key, item in form.items() if key != "_version_"} if "_target_" in form else form
