#!/usr/bin/env bash
# Measure on a bare CUDA machine without a network. Needs: python3 with PyTorch and pip.
#
#   run.sh receive LOAD            copy a load of carry.py into the store, checked
#   run.sh setup                   join the wheels and install them into the work folder
#   run.sh STEP [OPTIONS]          all, table, probe, a case (nano-fp16, nano-int4, 1.7b-fp16,
#                                  1.7b-int4), or a part of one (prepare-CASE, parity-CASE,
#                                  bench-CASE); options are measure.py's
#
# Before the step: --python PROGRAM (python3), --work FOLDER (.gpu/work), --store FOLDER
# (.gpu/store).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=python3
work=$root/.gpu/work
store=$root/.gpu/store

while [ $# -gt 0 ]; do
    case $1 in
        --python) python=$2; shift 2 ;;
        --work) work=$2; shift 2 ;;
        --store) store=$2; shift 2 ;;
        *) break ;;
    esac
done
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$here/run.sh"
    exit 2
fi
mkdir -p "$work"
work=$(cd "$work" && pwd)

link_packages() {
    mkdir -p "$work/path/mvlm_export"
    for folder in engines passes calibration exporter; do
        ln -sfn "$root/$folder" "$work/path/mvlm_export/$folder"
    done
}

setup() {
    link_packages
    if [ ! -f "$store/index.json" ]; then
        echo "No loads in $store: what is installed already is used."
        return
    fi
    "$python" "$here/parts.py" join "$store" "$work/wheels"
    rm -rf "$work/site"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --target "$work/site" "$work/wheels"/*.whl
    echo "Installed into $work/site"
}

# CUDA's libraries come with PyTorch; ONNX Runtime looks for them on this path.
cuda_libraries() {
    "$python" - <<'PY'
import site, sysconfig
from pathlib import Path

bases = {*site.getsitepackages(), sysconfig.get_paths()["purelib"]}
folders = (f for base in sorted(bases) for f in sorted(Path(base).glob("nvidia/*/lib")))
print(":".join(str(folder) for folder in folders))
PY
}

case $1 in
    receive) "$python" "$here/parts.py" receive "$2" "$store" ;;
    setup) setup ;;
    *)
        link_packages
        export PYTHONPATH="$work/site:$work/path${PYTHONPATH:+:$PYTHONPATH}"
        libraries=$(cuda_libraries)
        export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        exec "$python" "$here/measure.py" "$@" --work "$work"
        ;;
esac
