# Sourced by run.sh --te: Transformer Engine and mamba-ssm, which are never required.
#
# Their wheels are larger than what may be brought at a time, so that several calls on one machine bring them: each keeps
# what is in .wheels-te (see wheels.sh --te) in a folder outside the working tree. The call that brings .wheels-te/small,
# and .wheels, comes last and does the rest. transformer-engine-torch is a source distribution, compiled here. Of
# mamba-ssm the kernels in Triton are tried; what it compiles is left out.

te_rows=te-layers,te-fp8,te-memory,mamba-scan
te_store=${TMPDIR:-/tmp}/bridge-te

keep_pieces() {
    mkdir -p "$te_store"
    cp -r .wheels-te/*/ "$te_store"
    echo "kept in $te_store: $(ls "$te_store" | tr '\n' ' ')"
    [[ -d .wheels-te/small ]] || exit 0
    (
        cd "$te_store"
        cat piece-?/? >"small/$(cut -d ' ' -f 3 small/SHA256SUMS)"
        cd small && sha256sum --check --quiet SHA256SUMS
    ) || { echo "run.sh --te: not all pieces of Transformer Engine are here" >&2 && exit 1; }
}

install_transformer_engine() {
    local install=("$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile
        --no-cache-dir --disable-pip-version-check --root-user-action ignore --target "$site")
    "${install[@]}" "$te_store"/small/*.whl
    # Headers of cuDNN and NCCL are in nvidia's packages where the toolkit has none.
    CPLUS_INCLUDE_PATH=$("$python" -c 'import nvidia, pathlib
folders = [folder for root in nvidia.__path__ for folder in pathlib.Path(root).glob("*/include")]
print(":".join(map(str, folders)))')
    export CPLUS_INCLUDE_PATH MAX_JOBS=16 TORCH_CUDA_ARCH_LIST=9.0 NVTE_CUDA_ARCHS=90
    export NVTE_PYTORCH_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
    local source
    for source in "$te_store"/small/*.tar.gz; do # one that does not build leaves the rows of the other
        "${install[@]}" "$source" || echo "run.sh --te: $(basename "$source") was not built" >&2
    done
}
