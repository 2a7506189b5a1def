#!/usr/bin/env bash
# Collect the wheels that run.sh installs in .wheels: Bridge's four packages and their dependencies except torch and numpy,
# for CPython 3.12 on x86-64, in the versions of locked.txt. With --te, collect what te.sh installs in .wheels-te.
#
#     tests/gpu/wheels.sh [--te]
#
# A transfer is limited to 64 MiB, including the working tree, so Transformer Engine is split into pieces.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Dependencies of Bridge, pytest and ModelOpt. Left out are those that the machine must have: torch, numpy, psutil, scipy
# and others.
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

size() { # bytes of the files that git does not ignore, and of folders
    { git ls-files --cached --others --exclude-standard -z && find "$@" -type f -print0; } |
        du --files0-from=- --apparent-size --bytes --total 2>/dev/null | tail -n 1 | cut -f 1
}

locked() { # print NAME==VERSION of each name
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
# pip runs setup.py of a source distribution to read its metadata, which imports torch.
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
