#!/usr/bin/env python3
"""Write the tables that bridge-config ships, from the installed classes, functions and arguments.

    make_tables.py            write the tables
    make_tables.py --check    check that the committed tables match the installed libraries

The tables describe everything that bridge-builders and bridge-models declare in the entry-point group `bridge.targets`,
and the configuration classes and enums in the annotations of those. Descriptions of fields come from
`packages/bridge-config/field_docs.yaml`, and for Bridge's own classes from the string below each field.
"""

import ast
import inspect
import json
import sys
import textwrap
from argparse import Action, ArgumentParser, BooleanOptionalAction
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
from bridge.config.write.encoded_defaults import encode_default

PACKAGE = Path(__file__).parents[2] / "packages/bridge-config"
TABLE = PACKAGE / "src/bridge/config/tables.json"
ARGUMENTS = PACKAGE / "src/bridge/config/foreign/arguments.json"
DOCS = yaml.safe_load((PACKAGE / "field_docs.yaml").read_text())
DISTRIBUTIONS = ("bridge-builders", "bridge-models")


def main() -> int:
    """Write the tables, or check them."""
    is_check, differ = "--check" in sys.argv, False
    for path, data in ((TABLE, make_table()), (ARGUMENTS, collect_arguments())):
        made = json.dumps(data, indent=1, sort_keys=False, ensure_ascii=False) + "\n"
        if not is_check:
            path.write_text(made)
            continue
        committed = path.read_text()
        sys.stdout.writelines(unified_diff(committed.splitlines(True), made.splitlines(True), "committed", "installed"))
        differ |= made != committed
    if differ:
        print("the tables do not match the installed libraries: run .github/scripts/make_tables.py", file=sys.stderr)
    return int(differ)


def collect_arguments() -> dict[str, Any]:
    """Return Megatron-LM's arguments, their defaults, and how they are written on the command line."""
    parser = ArgumentParser(add_help=False)
    add_megatron_arguments(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    plain = json.loads(json.dumps(defaults, default=str))
    options: dict[str, dict[str, Any]] = {}
    for action in parser._actions:
        options.setdefault(action.dest, {}).update(describe_options(action))
    usual = {name: {f"--{name.replace('_', '-')}": None} for name in options}
    return {
        "made_from": {"megatron-core": version("megatron-core")},
        "arguments": dict(sorted(plain.items())),
        "options": {name: found for name, found in sorted(options.items()) if found != usual[name]},
    }


def describe_options(action: Action) -> dict[str, Any]:
    """Return the options of an argument: the constant that each sets, None if it takes a value, [] if several."""
    if isinstance(action, BooleanOptionalAction):
        return {option: not option.startswith("--no-") for option in action.option_strings}
    return {action.option_strings[0]: action.const if action.nargs == 0 else None if action.nargs is None else []}


def make_table() -> dict[str, Any]:
    """Return the table of classes and functions as plain data."""
    points = [point for point in entry_points(group=GROUP) if point.dist and point.dist.name in DISTRIBUTIONS]
    aliases = {point.name: point.value.replace(":", ".") for point in points if "." not in point.name}
    targets: dict[str, Target] = {}
    for point in points:
        if "." in point.name:
            collect_targets(describe_declared(point), targets)
    collect_targets(describe(ModelConfig), targets)
    for name in targets.keys() - {point.name for point in points}:
        targets[name] = replace(targets[name], nested=True)
    return {
        "made_from": {name: version(name) for name in ("megatron-core", "torch")},
        "aliases": dict(sorted(aliases.items())),
        "dtypes": {name: str(value) for name, value in sorted(vars(torch).items()) if is_dtype(type(value))},
        "targets": {
            name: target_to_json(add_docs(target, targets), find_parent(target, targets))
            for name, target in sorted(targets.items())
        },
    }


def describe_declared(point: EntryPoint) -> Target:
    """Return the description of an entry point. Classes other than configurations get only a name.

    So the table does not depend on optional libraries that some of these classes need.
    """
    if point.name in OPEN_CLASSES:
        return Target(point.name, "config", bases=(point.name,), open=True, hashed=())
    try:
        target = describe(point.load(), point.name)
    except (ImportError, AttributeError):
        return Target(point.name, "class", bases=(point.name,))
    return replace(target, bases=(point.name,)) if target.kind == "class" else target


def collect_targets(target: Target, targets: dict[str, Target]) -> None:
    """Add `target`, and the configurations and enums in its annotations, to `targets`."""
    if target.name in targets:
        return
    targets[target.name] = target
    for field in target.fields.values():
        for member in find_instances(field.type):
            named = describe_annotated(member)
            if named is not None and named.kind in ("config", "enum"):
                collect_targets(named, targets)


def find_instances(type_: Type) -> Iterator[Instance]:
    """Yield every class in a type, at any depth."""
    for member in type_:
        match member:
            case Instance():
                yield member
            case Items(_, item):
                yield from find_instances(item)
            case Fixed(items):
                yield from (found for item in items for found in find_instances(item))
            case Mapping(key, value):
                yield from find_instances(key)
                yield from find_instances(value)


def find_parent(target: Target, targets: dict[str, Target]) -> Target | None:
    """Return the closest base class of a configuration that is in the table, with its descriptions, or None."""
    if target.kind != "config":
        return None
    found = next((targets[base] for base in target.bases[1:] if base in targets), None)
    return add_docs(found, targets) if found else None


def add_docs(target: Target, targets: dict[str, Target]) -> Target:
    """Return `target` with descriptions of itself and its fields."""
    docs, above = read_docs(target), find_parent(target, targets)
    fields = {}
    for field in target.fields.values():
        doc = docs["fields"].get(field.name)
        inherited = above.fields[field.name].doc if above and field.name in above.fields else ""
        fields[field.name] = add_field_doc(field, doc or inherited, default=encode_default(target, field.name))
    return replace(target, doc=docs["doc"].replace("``", "`"), fields=fields, obj=None)


def add_field_doc(field: Field, doc: str, *, default: Any) -> Field:
    """Return `field` with a description, and its default in written form."""
    # Without `attribute`: where an instance stores the value matters only where the class is installed.
    doc = " ".join(doc.replace("``", "`").split())
    return replace(field, doc=doc, attribute="", default=default, make_default=None)


def read_docs(target: Target) -> dict[str, Any]:
    """Return the descriptions of `target` and of its own fields."""
    if target.name in DOCS:
        return {"doc": DOCS[target.name]["doc"], "fields": DOCS[target.name].get("fields") or {}}
    if not target.name.startswith("bridge.") or not isinstance(target.obj, type):
        return {"doc": "", "fields": {}}
    summary = (inspect.getdoc(target.obj) or "").split("\n\n")[0]
    ours = [cls for cls in reversed(target.obj.__mro__) if cls.__module__.startswith("bridge.")]
    texts = {field: text for cls in ours for field, text in read_field_docs(cls)}
    return {"doc": " ".join(summary.split()), "fields": texts}


def read_field_docs(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the fields that a class declares, and the string below each in its source."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as doc)):
                yield name, doc


if __name__ == "__main__":
    sys.exit(main())
