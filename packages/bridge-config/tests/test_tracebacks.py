"""Reports of unexpected errors show the last frames and the caller of a library."""

from collections.abc import Callable
from typing import Any

from bridge.config.tracebacks import format_error


def define_call(module: str, source: str, **names: Any) -> Callable[..., Any]:
    """Run `source` as a module of the given name and return its function `call`."""
    scope: dict[str, Any] = {"__name__": module, **names}
    exec(compile(source, f"{module}.py", "exec"), scope)
    call: Callable[..., Any] = scope["call"]
    return call


def report_lines(call: Callable[..., Any]) -> list[str]:
    try:
        call()
    except Exception as error:
        return [line for line in format_error(error).splitlines() if not line.startswith("    ")]
    raise AssertionError("nothing was raised")


def test_an_error_deep_in_a_library_shows_its_caller() -> None:
    fail = define_call("torch.nn", "def call(depth=4):\n    return call(depth - 1) if depth else 1 / 0\n")
    author = define_call("bigram", "\n\ndef call():\n    return fail()\n", fail=fail)
    found = report_lines(define_call("bridge.dist", "def call():\n    return author()\n", author=author))
    assert found[0] == "ZeroDivisionError: division by zero"
    assert found[1] == '  File "bigram.py", line 4, in call'
    assert found[2:] == ['  File "torch.nn.py", line 2, in call'] * 3


def test_an_error_that_was_not_raised_has_no_frames() -> None:
    assert format_error(KeyError()) == "KeyError"
