#!/usr/bin/env bash
# Run the quick tests with the lowest versions that are declared, in an environment of its own. ModelOpt is left out: it
# wants a newer torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=.venv-lowest

uv venv --quiet --clear --python 3.12 "$environment"
uv pip install --quiet --python "$environment" --resolution lowest-direct --group test \
    -e packages/bridge-config -e packages/bridge-builders -e packages/bridge-dist -e packages/bridge-models
"$environment/bin/python" - <<'END'
import torch
print("torch", torch.__version__)
assert torch.__version__.startswith("2.6."), "the lowest torch that is declared is 2.6"
END
"$environment/bin/pytest" -m quick -q
