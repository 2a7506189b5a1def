#!/usr/bin/env bash
# Run the rows of the GPU suite on a machine with a GPU, CUDA, Python 3.12 and torch >= 2.11, without network.
#
#     tests/gpu/wheels.sh            # before, on a machine with a network: fills .wheels
#     tests/gpu/run.sh [--only ROW,...] [--budget SECONDS] [--rehearse]
#     tests/gpu/run.sh --te          # only the rows that need Transformer Engine or mamba-ssm, see te.sh
#
# The machine's Python is not changed. The record (gpu.json) and a log are written to $OUT, by default tests/gpu/results,
# after each row. Rows that remain after the budget (280 s) are not run. --only selects rows by name (family:tiny-fp32) or
# by the first part of the name (family); the record keeps the others. --rehearse runs rows on the CPU where possible.
set -euo pipefail
started=$(date +%s)
cd "$(dirname "$0")/../.."

budget=280 te=
while (($#)); do
    case $1 in
        --only) export BRIDGE_GPU_ONLY=$2 && shift ;;
        --budget) budget=$2 && shift ;;
        --rehearse) export BRIDGE_GPU_REHEARSE=1 ;;
        --te) te=1 ;;
        *) echo "run.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done

python=${PYTHON:-python3}
if [[ -z ${BRIDGE_GPU_REHEARSE:-} ]]; then
    "$python" - <<'END'
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} found no CUDA device: no rows were run (--rehearse runs on the CPU)")
print(f"torch {torch.__version__} found {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
END
fi

if [[ -n $te ]]; then
    . tests/gpu/te.sh
    keep_pieces
fi
. tests/gpu/environment.sh
if [[ -n $te ]]; then
    export BRIDGE_GPU_ONLY=$te_rows
    install_transformer_engine
    started=$(date +%s)
fi

out=${OUT:-tests/gpu/results}
mkdir -p "$out"
export BRIDGE_GPU_RECORD=$out/gpu.json BRIDGE_GPU_DEADLINE=$((started + budget))
if [[ -n ${BRIDGE_GPU_REHEARSE:-} ]]; then
    BRIDGE_GPU_RECORD=$out/rehearsal.json
elif [[ ! -e $BRIDGE_GPU_RECORD && -e tests/gpu/results/gpu.json ]]; then
    cp tests/gpu/results/gpu.json "$BRIDGE_GPU_RECORD"
fi
echo "installed after $(($(date +%s) - started)) s"
status=0
COLUMNS=160 "$python" -m pytest -m gpu --tb=no -v tests/gpu || status=$?
"$python" tests/gpu/record.py "$BRIDGE_GPU_RECORD"
echo "done after $(($(date +%s) - started)) s"
exit "$status"
