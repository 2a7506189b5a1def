#!/usr/bin/env bash
# Run the tests of bridge-config that need no torch, on another Python: config_alone.sh VERSION
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$environment")"' EXIT

uv venv --quiet --python "$1" "$environment"
uv pip install --quiet --no-config --python "$environment" -e packages/bridge-config \
    "pytest>=9" "hypothesis>=6.130" "jsonschema>=4.25"
"$environment/bin/python" --version
"$environment/bin/pytest" -q \
    packages/bridge-config/tests/test_{canonical,edit,jsonschema,megatron_args,paths,text,to_megatron_lm}.py \
    --deselect packages/bridge-config/tests/test_canonical.py::test_the_fingerprint_does_not_depend_on_the_process # a preset
"$environment/bin/bridge" doctor
