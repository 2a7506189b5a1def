"""Checking a document against a layout, without a rank: what `bridge validate --layout` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

from bridge.config import BridgeError, Document, DocumentError, Problem
from bridge.dist.documents import CONFIG_FIELDS, apply_layout
from bridge.dist.errors import LayoutError, OptionsError, PreflightError
from bridge.dist.imports import import_megatron


def check_document(document: Document, layout: Mapping[str, int], *, wrapper: str = "ddp") -> list[Problem]:
    """Return what is known to fail, or to train wrong, when a document's model is built under a layout.

    Args:
        document: Describes the model; it is not changed.
        layout: Sizes by axis: tp, pp, vp, cp, ep, etp, dp. They are written into the document as `bridge build` does.
            A size that is not named is the document's; dp is 1.
        wrapper: The data-parallel wrapper, with the options that `bridge build` gives it: ddp, megatron-fsdp,
            torch-fsdp2 or none.

    Raises:
        LayoutError: An axis is unknown.
        OptionsError: The wrapper is unknown.
    """
    from bridge.dist.job import BuildJob, make_builder
    from bridge.dist.options import Wrapper

    known = (*CONFIG_FIELDS, "dp")
    if unknown := [axis for axis in layout if axis not in known]:
        raise LayoutError(f"unknown in a layout: {', '.join(unknown)}; its axes are {', '.join(known)}")
    if wrapper not in list(Wrapper):
        raise OptionsError(f"unknown wrapper {wrapper!r}: choose one of {', '.join(Wrapper)}")
    document = deepcopy(document)
    try:
        document.migrate()
        apply_layout(document, {axis: size for axis, size in layout.items() if axis != "dp"})
        config = document.config()
        transformer = make_builder(config).transformer_config
        ranks = [getattr(transformer, CONFIG_FIELDS[axis]) for axis in ("tp", "pp", "cp")]
        job = BuildJob(document=document.data, wrapper=Wrapper(wrapper))
        job.check(config, math.prod(ranks) * layout.get("dp", 1))
    except DocumentError as error:
        return error.problems
    except PreflightError as error:
        return [Problem("$", problem, document.source) for problem in error.problems]
    except BridgeError as error:
        return [Problem("$", str(error), document.source)]
    return []


def check_for_terminal(document: Document, layout: Mapping[str, int], *, wrapper: str = "ddp") -> list[Problem]:
    """``check_document`` for the command line, without what Megatron says of libraries that are missing."""
    import_megatron(with_compiler=False)
    return check_document(document, layout, wrapper=wrapper)
