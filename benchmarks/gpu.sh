#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes: the tests marked gpu, then the cases with goals, head, step and
# scale, and the report. Run again, the same command goes on where it stopped: test files that have ended, at this
# commit, and cases that were measured, are left alone. Delete gpu-tests.log to have the tests run again.
#
#     benchmarks/gpu.sh [RESULTS] [SECONDS]      with a Python that has logratio[test,bench] in front of the PATH
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results} seconds=${2:-520} started=$SECONDS status=0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$results"
log=$results/gpu-tests.log
commit=$(git rev-parse HEAD 2>/dev/null || echo "no commit")
for file in $(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort); do
  ended="$file at $commit: status"
  if ! grep -qsF "$ended" "$log"; then
    left=$((seconds * 2 / 5 - SECONDS + started))
    if [ "$left" -le 0 ]; then echo "$file is left for the next run"; status=1; continue; fi
    timeout -k 10 "$left" python3 -m pytest -m gpu -q -p no:cacheprovider "$file" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    if [ "$code" != 124 ]; then echo "$ended $code" | tee -a "$log"; fi
  fi
  grep -qsF "$ended 0" "$log" || status=1
done
left=$((seconds - 40 - SECONDS + started))
left=$((left > 0 ? left : 1))
# a case that has begun could go on for minutes; what has ended is on the disk
timeout -k 10 "$left" python3 -m logratio.benchmarks.bench all --device cuda --results "$results" --budget_s "$left"
code=$?
[ "$code" = 0 ] || [ "$code" = 124 ] || status=1
python3 -m logratio.benchmarks.report --results "$results" --out "$results" || status=1
exit $status
