#!/usr/bin/env bash
# The operators on a GPU machine: their tests, then their benchmark. Needs torch, triton, numpy and pytest; no install.
#   bash benchmarks/gpu_ops.sh            tests and benchmark
#   bash benchmarks/gpu_ops.sh tune       tests, then the timing of launch sizes
#   bash benchmarks/gpu_ops.sh test       tests alone
# Results go to $OUT (default benchmarks/results). A failing test does not keep the benchmark from running.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=src
out=${OUT:-benchmarks/results}
mkdir -p "$out"
# no project settings: their plugins need not be installed here
python3 -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -m gpu --durations=5 tests/ops/test_gpu_ops.py \
  -W ignore --tb=short > "$out/gpu-tests.txt" 2>&1
tested=$?
tail -c 3500 "$out/gpu-tests.txt"
case ${1:-bench} in
  test) ;;
  tune) python3 benchmarks/ops.py --tune --json "$out/ops-tuning.json" ;;
  *) python3 benchmarks/ops.py --json "$out/ops.json" ;;
esac || exit 1
exit $tested
