# Sourced by run.sh and te.sh: installs the wheels of .wheels into a folder of their own, in front of what the machine has.
# The packages' code is that of the working tree; what is installed of them declares entry points and the command.

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --no-warn-script-location --root-user-action ignore --target "$site" .wheels/*.whl
export PYTHONPATH=$site
for package in config builders dist models; do
    PYTHONPATH=$PWD/packages/bridge-$package/src:$PYTHONPATH
done
export PATH=$site/bin:$PATH
if [[ -e .wheels/commit ]]; then
    BRIDGE_GPU_COMMIT=$(<.wheels/commit)
    export BRIDGE_GPU_COMMIT
fi
# Other plugins of the machine's pytest are none of our business; without network there is one interface.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
