#!/usr/bin/env bash
# make gpu-check: install gpu-wheels offline, into a folder that goes away again, and run the check within
# GPU_CHECK_SECONDS (480) altogether. torch, transformers and all else of the machine stay as they are.
set -euo pipefail
python=${PYTHON:-python3}
total=${GPU_CHECK_SECONDS:-480}
[[ $total =~ ^[1-9][0-9]*$ ]] || { echo "GPU_CHECK_SECONDS is $total; it is a whole number of seconds." >&2; exit 2; }
SECONDS=0
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels=${GPU_WHEELS:-$repository/gpu-wheels}
if [ -f "$wheels/SHA256SUMS" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    (cd "$wheels" && sha256sum --check --quiet SHA256SUMS) ||
        { echo "$wheels is not as make gpu-wheels wrote it. Copy it again." >&2; exit 1; }
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$packages" "$wheels"/*.whl ||
        { echo "$wheels was made for another Python: make gpu-wheels GPU_PYTHON=3.N makes it for yours." >&2; exit 1; }
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
    echo "installed $(ls "$wheels"/*.whl | wc -l) wheels in $SECONDS s" >&2
else
    echo "$wheels is not there (make gpu-wheels makes it): the check uses what is installed." >&2
fi
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
trap 'if [ -n "${!:-}" ]; then kill -TERM $! 2>/dev/null || true; else exit 143; fi' TERM INT
# In the background, since bash hears a signal only when what is in front has ended.
"$python" "$repository/benchmarks/gpu_check.py" --seconds $((total - SECONDS)) "$@" &
code=0
wait $! || code=$?
if kill -0 $! 2>/dev/null; then wait $! || code=$?; fi # the signal ended the first wait
exit "$code"
