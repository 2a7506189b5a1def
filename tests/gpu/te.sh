# Sourced by run.sh --te. Installs Transformer Engine and mamba-ssm, which are optional.
#
# Their wheels exceed the limit of one transfer, so several calls on the same machine bring them in pieces. Each call keeps
# .wheels-te (see wheels.sh --te) in a folder outside the working tree. The last call brings .wheels-te/small and .wheels,
# then installs and runs. transformer-engine-torch is a source distribution and is compiled here. Only mamba-ssm's Triton
# kernels are used; its CUDA extension is not built.

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
    ) || { echo "run.sh --te: pieces of Transformer Engine are missing or damaged: send all of .wheels-te again" >&2 && exit 1; }
}

install_transformer_engine() {
    local install=("$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile
        --no-cache-dir --disable-pip-version-check --root-user-action ignore --target "$site")
    "${install[@]}" "$te_store"/small/*.whl
    # The toolkit may lack the headers of cuDNN and NCCL: take them from NVIDIA's Python packages.
    CPLUS_INCLUDE_PATH=$("$python" -c 'import nvidia, pathlib
folders = [folder for root in nvidia.__path__ for folder in pathlib.Path(root).glob("*/include")]
print(":".join(map(str, folders)))')
    export CPLUS_INCLUDE_PATH MAX_JOBS=16 TORCH_CUDA_ARCH_LIST=9.0 NVTE_CUDA_ARCHS=90
    export NVTE_PYTORCH_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
    local source
    for source in "$te_store"/small/*.tar.gz; do # if one fails to build, the rows of the other still run
        "${install[@]}" "$source" || echo "run.sh --te: $(basename "$source") could not be built" >&2
    done
}
