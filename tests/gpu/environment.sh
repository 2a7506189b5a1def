# Sourced by run.sh. Installs .wheels into a temporary folder that precedes the machine's packages on the path.
# Bridge's code comes from the working tree; its wheels provide the entry points and the command.

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --no-warn-script-location --root-user-action ignore --target "$site" .wheels/*.whl
export PYTHONPATH=$site
changed=
for package in config builders dist models; do
    code=$PWD/packages/bridge-$package/src
    PYTHONPATH=$code:$PYTHONPATH
    diff -rqx __pycache__ "$site/bridge/$package" "$code/bridge/$package" >/dev/null || changed=-changed
done
export PATH=$site/bin:$PATH
if [[ -e .wheels/commit ]]; then # there may be no git here, and the code may be newer than the wheels
    BRIDGE_GPU_COMMIT=$(<.wheels/commit)$changed
    export BRIDGE_GPU_COMMIT
fi
# Ignore the machine's pytest plugins, which may fail or change results. Without a network only the loopback is usable.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
