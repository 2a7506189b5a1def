#!/usr/bin/env bash
# Collect in .wheels what run.sh installs: our four packages, and what they need beside torch and numpy, for CPython 3.12
# on x86-64, in the versions of locked.txt. With --te in .wheels-te what te.sh installs and builds.
#
#     tests/gpu/wheels.sh [--te]
#
# A machine without network may take 64 MiB at a time, the working tree included: Transformer Engine comes in pieces.
set -euo pipefail
cd "$(dirname "$0")/../.."

# The packages' needs, pytest's and ModelOpt's; torch, numpy, psutil, scipy and others are expected there.
needed="megatron-core rfc8785 click pyyaml rich markdown-it-py mdurl pygments einops pytest pluggy iniconfig packaging
    nvidia-modelopt omegaconf pulp pydantic pydantic-core annotated-types typing-inspection typing-extensions"
limit=$((64 << 20))
te=2.17.1 mamba=2.3.2.post1

uv() {
    if command -v uv >/dev/null; then command uv "$@"; else python3 -m uv "$@"; fi
}

download() { # download FOLDER REQUIREMENT...
    local folder=$1 platforms=()
    shift
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${tag}_x86_64")
    done
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$folder" "$@" \
        2> >(grep -v "neither a file nor a directory" >&2)
}

size() { # size of what is committed or would be, and of folders
    { git ls-files --cached --others --exclude-standard -z && find "$@" -type f -print0; } |
        du --files0-from=- --apparent-size --bytes --total 2>/dev/null | tail -n 1 | cut -f 1
}

locked() { # NAME==VERSION of each name
    local name
    for name in "$@"; do
        grep -iE "^$name==" locked.txt | cut -d ' ' -f 1
    done
}

if [[ ${1:-} != --te ]]; then
    rm -rf .wheels
    mkdir .wheels
    # shellcheck disable=SC2046,SC2086
    download .wheels $(locked $needed)
    uv build --quiet --all-packages --wheel --out-dir .wheels
    git describe --always --dirty --abbrev=12 >.wheels/commit
    total=$(size .wheels)
    echo "$(find .wheels -name '*.whl' | wc -l) wheels in .wheels; with the working tree $((total >> 20)) MiB of 64"
    ((total < limit))
    exit
fi

rm -rf .wheels-te
mkdir -p .wheels-te/small
download .wheels-te "transformer-engine-cu13==$te"
download .wheels-te/small "transformer-engine==$te" nvdlfw-inspect importlib-metadata zipp
# pip asks a source distribution for its metadata, which takes torch.
export MAMBA_SKIP_CUDA_BUILD=TRUE
uv run --quiet --with pip --with setuptools --with wheel python -m pip download --quiet --no-deps --no-binary=:all: \
    --no-build-isolation --disable-pip-version-check --dest .wheels-te/small \
    "transformer-engine-torch==$te" "mamba-ssm==$mamba"
cd .wheels-te
wheel=$(echo transformer_engine_cu13-*.whl)
sha256sum "$wheel" >small/SHA256SUMS
split --bytes=48M --numeric-suffixes --suffix-length=1 "$wheel" piece-
rm "$wheel"
for part in piece-?; do
    mv "$part" part && mkdir "$part" && mv part "$part/${part#piece-}"
done
du --apparent-size -sm ./*
