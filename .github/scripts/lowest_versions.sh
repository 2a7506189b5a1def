#!/usr/bin/env bash
# Run the quick tests with the lowest versions that are declared, in an environment of its own. ModelOpt is left out: it
# wants a newer torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=.venv-lowest

uv venv --quiet --clear --python 3.12 "$environment"
# Without the configuration, which pins the highest.
uv pip install --quiet --no-config --python "$environment" --resolution lowest-direct --group test \
    -e packages/bridge-config -e packages/bridge-builders -e packages/bridge-dist -e packages/bridge-models
"$environment/bin/python" - <<'END'
import torch
print("torch", torch.__version__)
assert torch.__version__.startswith("2.6."), "the lowest torch that is declared is 2.6"
END

# Left out is what needs a newer torch and says so (FSDP2, uneven collectives on the CPU), and what imports
# megatron.training, which looks for a GPU beside the triton of torch 2.6.
config=packages/bridge-config/tests dist=packages/bridge-dist/tests models=packages/bridge-models/tests
"$environment/bin/pytest" -n 2 --dist loadfile -q -p no:cacheprovider \
    $config/test_{model,round_trip,document,saving,paths,text,migrate,canonical,edit}.py packages/bridge-builders/tests \
    $dist/test_{internals,rank_environment,devices,store,failure_detection,pool,memory,build,options,cpu_install,cpu_redirect,cpu_ranks}.py \
    $models/test_{gpt_config,attention,experts,norms}.py \
    -k "not TorchFully and not fsdp2 and not without_the_compiler and not of_different and not installed_megatron_training"
