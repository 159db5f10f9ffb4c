#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes: the tests marked gpu, then the cases with goals, head, step and
# scale, and the report. What is left over goes on where it stopped when the same command is run again; tests that have
# ended run again when gpu-tests.log is deleted.
#
#     benchmarks/gpu.sh [RESULTS] [SECONDS]      with a Python that has logratio[test,bench] in front of the PATH
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results} seconds=${2:-520} started=$SECONDS status=0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$results"
log=$results/gpu-tests.log
if ! grep -qs '^tests ended with status' "$log"; then
  timeout $((seconds * 2 / 5)) python3 -m pytest -m gpu -q -p no:cacheprovider tests 2>&1 | tee "$log"
  tests=${PIPESTATUS[0]}
  if [ "$tests" != 124 ]; then echo "tests ended with status $tests" | tee -a "$log"; fi
fi
grep -qs '^tests ended with status 0$' "$log" || status=1
left=$((seconds - 40 - SECONDS + started))
left=$((left > 0 ? left : 1))
# a case that has begun would go on for minutes; what has ended is on the disk
timeout "$left" python3 -m logratio.benchmarks.bench all --device cuda --results "$results" --budget_s "$left" || status=1
python3 -m logratio.benchmarks.report --results "$results" --out "$results" || status=1
exit $status
