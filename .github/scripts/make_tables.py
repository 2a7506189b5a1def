#!/usr/bin/env python3
"""Make the tables of descriptions that bridge-config ships, from the real classes, functions and arguments.

    make_tables.py            write the tables
    make_tables.py --check    are the committed tables what the installed libraries say?

What is described: everything that bridge-builders and bridge-models declare in the entry-point group `bridge.targets`,
and the configs and enumerations that the annotations of those name. The words about fields come from
`packages/bridge-config/field_docs.yaml`, and for our own classes from the text below each field.
"""

import ast
import inspect
import json
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import replace
from difflib import unified_diff
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.training.arguments import add_megatron_arguments

from bridge.config.model import ModelConfig
from bridge.config.schema.annotations import Fixed, Instance, Items, Mapping, Type
from bridge.config.schema.inspection import OPEN_CLASSES, describe, describe_annotated, is_dtype
from bridge.config.schema.registry import GROUP
from bridge.config.schema.table import target_to_json
from bridge.config.schema.target import Field, Target
from bridge.config.write.defaults import encode_default

PACKAGE = Path(__file__).parents[2] / "packages/bridge-config"
TABLE = PACKAGE / "src/bridge/config/tables.json"
ARGUMENTS = PACKAGE / "src/bridge/config/foreign/arguments.json"
DOCS = yaml.safe_load((PACKAGE / "field_docs.yaml").read_text())
OURS = ("bridge-builders", "bridge-models")


def main() -> int:
    """Write the tables, or check them."""
    is_check, differ = "--check" in sys.argv, False
    for path, data in ((TABLE, table()), (ARGUMENTS, arguments())):
        made = json.dumps(data, indent=1, sort_keys=False, ensure_ascii=False) + "\n"
        if not is_check:
            path.write_text(made)
            continue
        committed = path.read_text()
        sys.stdout.writelines(unified_diff(committed.splitlines(True), made.splitlines(True), "committed", "installed"))
        differ |= made != committed
    if differ:
        print(
            "the tables are not what the installed libraries say: run .github/scripts/make_tables.py", file=sys.stderr
        )
    return int(differ)


def arguments() -> dict[str, Any]:
    """The arguments of Megatron-LM, and their defaults."""
    parser = ArgumentParser(add_help=False)
    add_megatron_arguments(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    plain = json.loads(json.dumps(defaults, default=str))
    return {"made_from": {"megatron-core": version("megatron-core")}, "arguments": dict(sorted(plain.items()))}


def table() -> dict[str, Any]:
    """The table as plain data."""
    points = [point for point in entry_points(group=GROUP) if point.dist and point.dist.name in OURS]
    aliases = {point.name: point.value.replace(":", ".") for point in points if "." not in point.name}
    targets: dict[str, Target] = {}
    for point in points:
        if "." in point.name:
            collect(declared(point), targets)
    collect(describe(ModelConfig), targets)
    for name in targets.keys() - {point.name for point in points}:
        targets[name] = replace(targets[name], nested=True)
    return {
        "made_from": {name: version(name) for name in ("megatron-core", "torch")},
        "aliases": dict(sorted(aliases.items())),
        "dtypes": {name: str(value) for name, value in sorted(vars(torch).items()) if is_dtype(type(value))},
        "targets": {
            name: target_to_json(documented(target, targets), parent(target, targets))
            for name, target in sorted(targets.items())
        },
    }


def declared(point: EntryPoint) -> Target:
    """What `point` declares; of classes that are no configs, the name is all that a document needs to know.

    So the table is the same whether or not the libraries are installed that some of them stand on.
    """
    if point.name in OPEN_CLASSES:
        return Target(point.name, "config", bases=(point.name,), open=True, hashed=())
    try:
        target = describe(point.load(), point.name)
    except (ImportError, AttributeError):
        return Target(point.name, "class", bases=(point.name,))
    return replace(target, bases=(point.name,)) if target.kind == "class" else target


def collect(target: Target, targets: dict[str, Target]) -> None:
    """Add `target` and what its annotations name to `targets`."""
    if target.name in targets:
        return
    targets[target.name] = target
    for field in target.fields.values():
        for member in instances(field.type):
            named = describe_annotated(member)
            if named is not None and named.kind in ("config", "enum"):
                collect(named, targets)


def instances(type_: Type) -> Iterator[Instance]:
    """Every class that a type names, at any depth."""
    for member in type_:
        match member:
            case Instance():
                yield member
            case Items(_, item):
                yield from instances(item)
            case Fixed(items):
                yield from (found for item in items for found in instances(item))
            case Mapping(key, value):
                yield from instances(key)
                yield from instances(value)


def parent(target: Target, targets: dict[str, Target]) -> Target | None:
    """The nearest base of a config that is in the table too, as it stands there."""
    if target.kind != "config":
        return None
    found = next((targets[base] for base in target.bases[1:] if base in targets), None)
    return documented(found, targets) if found else None


def documented(target: Target, targets: dict[str, Target]) -> Target:
    """`target` with words about it and its fields."""
    words, above = words_of(target), parent(target, targets)
    fields = {}
    for field in target.fields.values():
        said = words["fields"].get(field.name)
        inherited = above.fields[field.name].doc if above and field.name in above.fields else ""
        fields[field.name] = plain(field, said or inherited, default=encode_default(target, field.name))
    return replace(target, doc=words["doc"].replace("``", "`"), fields=fields, obj=None)


def plain(field: Field, doc: str, *, default: Any) -> Field:
    """`field` with words about it, and its default in written form."""
    # Where an instance keeps a value concerns only those who have one.
    doc = " ".join(doc.replace("``", "`").split())
    return replace(field, doc=doc, attribute="", default=default, make_default=None)


def words_of(target: Target) -> dict[str, Any]:
    """What is said about `target`, and about each of its own fields."""
    if target.name in DOCS:
        return {"doc": DOCS[target.name]["doc"], "fields": DOCS[target.name].get("fields") or {}}
    if not target.name.startswith("bridge.") or not isinstance(target.obj, type):
        return {"doc": "", "fields": {}}
    summary = (inspect.getdoc(target.obj) or "").split("\n\n")[0]
    ours = [cls for cls in reversed(target.obj.__mro__) if cls.__module__.startswith("bridge.")]
    said = {field: text for cls in ours for field, text in texts_below_fields(cls)}
    return {"doc": " ".join(summary.split()), "fields": said}


def texts_below_fields(cls: type) -> Iterator[tuple[str, str]]:
    """The fields that a class of ours declares, and the text below each in its source."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as said)):
                yield name, said


if __name__ == "__main__":
    sys.exit(main())
