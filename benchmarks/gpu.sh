#!/bin/sh
# Every check and every number that needs a GPU, in one go: benchmarks/gpu.sh [FOLDER FOR LOGS]
# Runs all steps even if one fails; exits 1 if any did. PYTHON chooses the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1
logs=${1:-runs/gpu}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$logs"
failed=0

step() { # name, command...
    name=$1
    shift
    echo "== $name: $*"
    if "$@" >"$logs/$name.log" 2>&1; then tail -n 3 "$logs/$name.log"; else
        echo "FAILED"
        tail -n 30 "$logs/$name.log"
        failed=1
    fi
}

# By name: a test that cannot be imported (of a library that is not here) would stop all the others.
# shellcheck disable=SC2046
step tests "$python" -m pytest -q -m gpu tests/qat_kernels $(grep -rl 'mark\.gpu' tests/qatcli)
if command -v compute-sanitizer >/dev/null; then
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$python" -m pytest -q -m gpu -k "not real_size" tests/qat_kernels
    step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 \
        "$python" -m pytest -q -m gpu -k "not real_size" tests/qat_kernels/test_triton_linear.py
fi
step untuned "$python" benchmarks/kernels.py --csv "$logs/kernels.csv"
step tune "$python" -m qat_kernels.tune
step compile "$python" -m pytest -q tests/qat_kernels/test_compile.py
step tuned "$python" benchmarks/kernels.py --csv "$logs/kernels.csv"
step block "$python" benchmarks/block_speed.py
sed -n '/^targets/,$p' "$logs/tuned.log"
exit $failed
