#!/usr/bin/env bash
# Steered vLLM against the embedded engine on a GPU, in float32: each runner, eager and with CUDA graphs; plain steering,
# gates, and an engine behind a monitor. With RANKS=tp or RANKS=pp, each on two GPUs.
#   [RANKS=tp] bash benchmarks/gpu_vllm.sh [REQUESTS [SCENARIO...]]
# vLLM and trimtab must be installed. One line per case goes to $OUT/vllm-parity.txt or $OUT/vllm-parity-$RANKS.txt
# (default of OUT: benchmarks/results).
set -u
cd "$(dirname "$0")/.."
out=$(realpath "${OUT:-benchmarks/results}")
mkdir -p "$out"
logs=$(mktemp -d)
requests=${1:-48}
shift
scenarios=${*:-parity gates monitor}
ranks=${RANKS:-}
export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_ALLOW_INSECURE_SERIALIZATION=1
cd tests/engines/vllm/scenarios
failed=0
for scenario in $scenarios; do
  for runner in V1 V2; do
    for mode in eager graphs piecewise; do
      python3 on_gpu.py $scenario $runner $mode "$requests" $ranks > "$logs/$scenario-$runner-$mode" 2>&1 &
    done
  done
  # The engines of two scenarios fit a GPU of 140 GB side by side, those of three do not.
  if [ "$scenario" != parity ]; then for job in $(jobs -p); do wait "$job" || failed=1; done; fi
done
for job in $(jobs -p); do wait "$job" || failed=1; done
for log in "$logs"/*; do grep -h "answers that differ" "$log" || { echo "$(basename "$log") FAILED"; tail -n 5 "$log"; }; done |
  tee "$out/vllm-parity${ranks:+-$ranks}.txt"
exit $failed
