#!/usr/bin/env bash
# Build, test, sanitize and time the package on a bare machine with a GPU, in under nine minutes.
#
#   scripts/gpu_check.sh OUTDIR [--device cuda|cpu] [--quick] [--commit SHA]
#
# Needs Python >= 3.11, torch >= 2.11, Triton, nvcc, cmake, ninja and pybind11; no network, and
# nothing is installed. A stage that fails does not stop the next one. OUTDIR gets summary.json, one
# log per stage and bench.json; the exit code is 1 if a stage failed. --device cpu runs what can run
# without a GPU, --quick a small piece of each stage. PYTHON names the interpreter.
set -u -o pipefail

# Seconds per stage: 530 in all. On a machine with an H200 and 16 cores the tests took 66.
LIMIT_build=80 LIMIT_test=120 LIMIT_sanitize=100 LIMIT_bench=230
BENCH_BUDGET=210  # the benchmark plans with this, so that it ends by itself

# ------------------------------------------------------------------- the stages
# Each prints to its log. Exit code 77 means skipped; the last line then says why.

skip() { echo "skipped: $*"; exit 77; }
has_module() { "$PYTHON" -c "import $1" 2>/dev/null; }

# True when rlhf_fast/_C is newer than everything it is made of, and serves this device.
built() {
  local extension
  extension="$(ls rlhf_fast/_C*.so 2>/dev/null | head -n 1)"
  [ -n "$extension" ] || return 1
  [ -z "$(find csrc CMakeLists.txt setup.py -newer "$extension" -type f)" ] || return 1
  [ "$DEVICE" = cpu ] || "$PYTHON" -c 'import rlhf_fast._C as c; raise SystemExit(not c.WITH_CUDA)'
}

stage_build() {
  if built; then
    echo "up to date: $(ls rlhf_fast/_C*.so)"
  else
    "$PYTHON" setup.py build_ext --inplace || return 1
    built || { echo "rlhf_fast/_C is still missing, old, or without CUDA"; return 1; }
  fi
  "$PYTHON" -m rlhf_fast info
  [ "$DEVICE" = cpu ] || "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'
}

# The tests that run on every backend that serves here, and the contract. Training, packaging and
# the CPU's own kernels are no business of a GPU.
stage_test() {
  if ! has_module pytest; then
    echo "pytest is not installed; running the self-check instead"
    "$PYTHON" -m rlhf_fast.doctor
    return
  fi
  local files=() file
  for file in $(grep -lE 'usable_backends|device_of' tests/test_*.py) tests/test_contract.py; do
    if grep -q hypothesis "$file" && ! has_module hypothesis; then
      echo "left out, hypothesis is not installed: $file"
    else
      files+=("$file")
    fi
  done
  [ "$QUICK" = 0 ] || files=(tests/test_gae.py)
  local options=()
  # Triton compiles each kernel's variants: by far most of the time, and on the CPU.
  ! has_module xdist || options=(-n auto)
  OMP_NUM_THREADS=2 "$PYTHON" -m pytest -q -p no:cacheprovider "${options[@]}" "${files[@]}"
}

stage_sanitize() {
  [ "$DEVICE" = cuda ] || skip "compute-sanitizer needs a GPU"
  command -v compute-sanitizer >/dev/null || skip "compute-sanitizer is not on the PATH"
  local tool backend result=0
  for tool in memcheck racecheck; do
    for backend in cuda triton; do
      echo "== $tool, $backend"
      compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$PYTHON" -m rlhf_fast doctor --backend "$backend" || result=1
    done
  done
  return $result
}

stage_bench() {
  local options=(--device "$DEVICE" --json "$OUTDIR/bench.json" --seconds "$BENCH_BUDGET")
  [ -z "$COMMIT" ] || options+=(--commit "$COMMIT")
  [ "$QUICK" = 0 ] || options+=(--op logprob)
  [ "$DEVICE$QUICK" = cuda0 ] || options+=(--quick)
  "$PYTHON" -m rlhf_fast bench "${options[@]}"
}

if [ "${1:-}" = --stage ]; then  # the call that `stage` below makes, under `timeout`
  "stage_$2"
  exit
fi

# ------------------------------------------------------------------- arguments

usage() { sed -n '2,9p' "$0" | cut -c3-; exit 2; }

export PYTHON="${PYTHON:-python3}" OUTDIR="" DEVICE=cuda QUICK=0 COMMIT="" BENCH_BUDGET
while [ $# -gt 0 ]; do
  case "$1" in
    --device) DEVICE="${2:-}"; shift ;;
    --quick) QUICK=1 ;;
    --commit) COMMIT="${2:-}"; shift ;;
    -*) usage ;;
    *) [ -z "$OUTDIR" ] || usage; OUTDIR="$1" ;;
  esac
  shift || usage
done
[ -n "$OUTDIR" ] || usage
[ "$DEVICE" = cuda ] || [ "$DEVICE" = cpu ] || usage

self="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
mkdir -p "$OUTDIR" && OUTDIR="$(cd "$OUTDIR" && pwd)" || exit 2
cd "$(dirname "$self")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
[ "$DEVICE" = cpu ] || export RLHF_FAST_CUDA=ON

# ------------------------------------------------------------------- the run

stages="" failed=0

write_summary() {  # after every stage, so that a killed run leaves what it has
  local ok=true quick=false
  [ $failed = 0 ] || ok=false
  [ "$QUICK" = 0 ] || quick=true
  printf '{"device": "%s", "quick": %s, "ok": %s, "stages": [%s]}\n' \
    "$DEVICE" $quick $ok "${stages%, }" >"$OUTDIR/summary.json"
}

stage() {
  local name="$1" limit="LIMIT_$1" start=$SECONDS log="$OUTDIR/$1.log" status seconds
  timeout --kill-after=5 "${!limit}" bash "$self" --stage "$name" >"$log" 2>&1
  case $? in
    0) status=ok ;;
    77) status=skipped ;;
    124 | 137) status=timeout failed=1 ;;
    *) status=failed failed=1 ;;
  esac
  seconds=$((SECONDS - start))
  stages+="{\"stage\": \"$name\", \"status\": \"$status\", \"seconds\": $seconds, "
  stages+="\"limit\": ${!limit}, \"log\": \"$name.log\"}, "
  write_summary
  echo "$name: $status (${seconds} s) $(tail -n 1 "$log")"
}

for name in build test sanitize bench; do
  stage "$name"
done
exit $failed
