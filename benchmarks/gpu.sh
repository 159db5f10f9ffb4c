#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes: the tests marked gpu, then head, step and scale, the cases with
# goals first, and the report. What is left over goes on where it stopped when the same command is run again.
#
#     benchmarks/gpu.sh [RESULTS] [SECONDS]      with a Python that has logratio[test,bench] in front of the PATH
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results} seconds=${2:-520} started=$SECONDS status=0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$results"
if ! [ -e "$results/gpu-tests.passed" ]; then
  if timeout 200 python3 -m pytest -m gpu -q -p no:cacheprovider tests 2>&1 | tee "$results/gpu-tests.log"; then
    touch "$results/gpu-tests.passed"
  else
    status=1
  fi
fi
python3 -m logratio.benchmarks.bench all --device cuda --results "$results" --budget_s $((seconds - 40 - SECONDS + started)) || status=1
python3 -m logratio.benchmarks.report --results "$results" --out "$results" || status=1
exit $status
