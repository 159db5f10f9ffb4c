#!/usr/bin/env bash
# Everything that needs a GPU, in the order of what it is worth, so that it may be cut at any time. The plan of nine
# minutes on an H100 or H200:
#
#     1.5 min  the tests on a GPU (pytest -m gpu)
#     0.5 min  bench: the head of the smallest model, beside TRL
#     5 min    bench: a step of every method and model with LoRA and QLoRA, beside TRL
#     1 min    bench: completions of a GRPO step, beside transformers' generate
#     0.5 min  the rest of the head, and what time is left for; the report
#
#     benchmarks/gpu.sh [RESULTS] [SECONDS]      with a Python that has logratio[test,bench] in front of the PATH
#
# Run again, the same command goes on where it stopped: tests that have passed at this commit (gpu-tests.log has a line
# for each) and cases that were measured at it are left alone. LOGRATIO_COMMIT names the commit where there is no git.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results} seconds=${2:-520} status=0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# one kernel at a time is compiled: a pool of compilers takes longer to start than it saves
export TORCHINDUCTOR_COMPILE_THREADS=1
mkdir -p "$results"
log=$results/gpu-tests.log
commit=${LOGRATIO_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo "no commit")}
grep -qsF "commit $commit" "$log" || echo "commit $commit" >"$log"

# seconds that are left until a share (in percent) of all of them is spent, at least 1
until_share() { local left=$((seconds * $1 / 100 - SECONDS)); echo $((left > 0 ? left : 1)); }

tests() { # SHARE FILES...: those that have not passed yet
  local left skip=() passed
  left=$(until_share "$1")
  while IFS= read -r passed; do skip+=(--deselect "$passed"); done < <(sed -nE 's/.*PASSED (tests\/.*[^ ]) *$/\1/p' "$log")
  timeout -k 10 "$left" python3 -m pytest -m gpu -v -n 12 -p no:cacheprovider "${skip[@]}" "${@:2}" 2>&1 | tee -a "$log"
  case ${PIPESTATUS[0]} in
    0 | 5) ;; # 5: none is left to run
    124 | 137) echo "the tests of $* are gone on with in the next run" ;;
    *) status=1 ;;
  esac
}

bench() { # SHARE SUITE OPTIONS...: cases that have no line yet
  local left
  left=$(until_share "$1")
  # a case that has begun could go on for minutes; what has ended is on the disk
  timeout -k 10 "$left" python3 -m logratio.benchmarks.bench "$2" --device cuda --results "$results" --repeats 3 \
    --budget_s "$((left * 9 / 10))" "${@:3}"
  case $? in 0 | 124 | 137) ;; *) status=1 ;; esac
}

mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu|@on_device' tests | sort)
tests 18 "${files[@]}"
bench 23 head --only 896x151936-8192-bfloat16-frozen --contestants logratio trl
bench 83 step --no-truth --contestants logratio trl
bench 93 rollout --only limit --contestants logratio transformers --repeats 2
bench 99 all --contestants logratio eager trl trl+liger "liger (cross entropy)" # others compile for half a minute
python3 -m logratio.benchmarks.report --results "$results" --out "$results" || status=1
exit $status
