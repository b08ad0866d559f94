#!/usr/bin/env bash
# The operators on a GPU machine: the tests that need one, then the benchmark. No install: `make test-gpu` says what
# must be there.
#   bash benchmarks/gpu_ops.sh            tests and benchmark
#   bash benchmarks/gpu_ops.sh tune       tests, then the timing of launch sizes
#   bash benchmarks/gpu_ops.sh test       tests alone
# Results go to $OUT (default benchmarks/results). A failing test does not keep the benchmark from running.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=src
out=${OUT:-benchmarks/results}
mkdir -p "$out"
make test-gpu > "$out/gpu-tests.txt" 2>&1
tested=$?
tail -c 3500 "$out/gpu-tests.txt"
case ${1:-bench} in
  test) ;;
  tune) python3 benchmarks/ops.py --tune --json "$out/ops-tuning.json" ;;
  *) python3 benchmarks/ops.py --json "$out/ops.json" ;;
esac || exit 1
exit $tested
