"""Read scalars by the core schema of YAML 1.2, without extensions, and of JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from bridge.config.text.limits import MAX_DIGITS

_TOO_LARGE = 10**MAX_DIGITS
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),  # "": no value, as in `key:`
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_plain(text: str) -> Any:
    """Return the value of a plain scalar by the core schema of YAML 1.2; an empty one is null.

    Raises:
        ValueError: the scalar exceeds a limit, is ambiguous, or is NaN.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] not in "+-.0123456789":  # a word, as most scalars are: skip the patterns
        return text
    if _INTEGER.fullmatch(text):
        return _parse_integer(text)
    if _BASED.fullmatch(text):
        return _parse_based_integer(text)
    if _OCTAL.fullmatch(text):  # octal in YAML 1.1, decimal in 1.2
        raise ValueError(
            f"{text[:20]} is ambiguous: drop the leading zero (decimal), write 0o (octal), or quote it (string)"
        )
    if _FLOAT.fullmatch(text):
        return _parse_float(text)
    if infinity := _INFINITY.fullmatch(text):
        return float(infinity[1] + "inf")
    if text in (".nan", ".NaN", ".NAN"):
        raise ValueError("NaN is not allowed")
    return text


def read_json_scalar(text: str) -> Any:
    """Return the value of a JSON scalar.

    Raises:
        ValueError: the scalar exceeds a limit, is not JSON, or has an unpaired surrogate.
    """
    value = json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_integer, parse_float=_parse_float)
    if isinstance(value, str):
        _check_text(value)
    return value


def find_flaw(value: Any) -> str:
    """Return why `value` cannot be written, or an empty string. Items of collections are not checked."""
    kind = type(value)
    if kind is str:
        wrong = None if value.isascii() else _SURROGATE.search(value)
        return f"contains the unpaired surrogate U+{ord(wrong[0]):04X}" if wrong else ""
    if kind is float:
        return "NaN is not allowed" if math.isnan(value) else ""
    if kind is int:
        return f"integer with more than {MAX_DIGITS:,} digits" if abs(value) >= _TOO_LARGE else ""
    return "" if value is None or kind in (bool, dict, list, tuple) else f"a {kind.__qualname__} is not plain data"


def _parse_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"integer with {len(text):,} digits: quote it if it is a string")
    return int(text)


def _parse_based_integer(text: str) -> int:
    number = int(text, 0)  # before the check: linear time for bases that are powers of two
    if number >= _TOO_LARGE:
        raise ValueError(f"integer with more than {MAX_DIGITS:,} decimal digits: quote it if it is a string")
    return number


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large for a float: quote it if it is a string")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _check_text(text: str) -> None:
    if flaw := find_flaw(text):
        raise ValueError(flaw)
