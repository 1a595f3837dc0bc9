#!/bin/sh
# SPDX-License-Identifier: MIT
# Measures and tests the CUDA backend on the GPUs of this machine, unattended, in six minutes at most: one rank per GPU, each a process; where there are fewer GPUs
# than ranks, ranks share them as threads. A step that fails or is late stops no other. Reports go to the folder OUT as JSON, whole after every line of theirs;
# bench/gpu_tables.py makes the tables of docs/performance.md from them. Logical nodes over a network are left out: no kind of such a machine has a NIC.
set -u
cd "$(dirname "$0")/.." || exit 1

usage() {
  cat <<'USAGE'
usage: bench/gpus.sh RANKS [--or N] [--build DIR] [--out DIR] [--python PYTHON] [--seconds N] [--quick]

  RANKS            ranks, a GPU each where there are enough
  --or N           N ranks instead where there are exactly N GPUs
  --build DIR      programs that are built already (default: builds the preset cuda in Release into build/gpus, which the time does not count)
  --out DIR        where reports and logs go (default: out/gpus)
  --python PYTHON  an interpreter with torch, and with deep_ep for train_moe (default: python3)
  --seconds N      for all steps together (default: 350); a step gets what is left at most
  --quick          a few small shapes and tests, to try this script
USAGE
}

build="" out=out/gpus python=python3 seconds=350 quick="" other=""
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  "" | *[!0-9]*) usage >&2; exit 2 ;;
esac
ranks=$1
shift
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1; shift; continue ;;
    -h | --help) usage; exit 0 ;;
  esac
  [ $# -ge 2 ] || { usage >&2; exit 2; }
  case $1 in
    --or) other=$2 ;;
    --build) build=$2 ;;
    --out) out=$2 ;;
    --python) python=$2 ;;
    --seconds) seconds=$2 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift 2
done

gpus=$(nvidia-smi --list-gpus | wc -l)
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | wc -l)
[ "$gpus" != "$other" ] || ranks=$gpus
[ "$gpus" -gt 0 ] || { echo "bench/gpus.sh: there is no GPU" >&2; exit 1; }
mkdir -p "$out"
commit=$(git rev-parse HEAD 2>/dev/null || cat COMMIT 2>/dev/null || echo unknown)
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER
used=$ranks
[ "$ranks" -le "$gpus" ] || used=$gpus
name="${used}x$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z_' | sed 's/nvidia_//')"
[ "$ranks" -eq "$used" ] || name="${name}_${ranks}_ranks"

if [ -z "$build" ]; then
  build=build/gpus
  cmake --preset cuda -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native && cmake --build "$build" -j || exit 1
fi

failed=""
begin=$(date +%s)
step() { # step NAME SECONDS LINES COMMAND...: runs it, at most so long; its output goes to OUT/NAME.log, the last lines are shown
  step=$1 limit=$2 lines=$3
  shift 3
  start=$(date +%s)
  left=$((seconds - (start - begin)))
  rm -f "$out/$step.log"
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then status="FAILED (no time left)"
  elif timeout -k 5 "$limit" "$@" >"$out/$step.log" 2>&1; then status=ok
  else status="FAILED ($?)"; fi
  [ "$status" = ok ] || failed="$failed $step"
  echo "== $step: $status, $(($(date +%s) - start)) of $limit s"
  [ ! -f "$out/$step.log" ] || tail -n "$lines" "$out/$step.log"
}

if [ "$ranks" -ge 4 ]; then
  throughput="--sms 8 16 24 48 --tokens 4096 --routings uniform groups zipf --grouped --pairs"
  low_latency="--experts 256 288 --routings uniform groups"
else
  throughput="--sms 4 8 16 24 48 --tokens 4096 8192 --routings uniform zipf --grouped --pairs"
  low_latency="--models --overlap"
fi
reps=30 steps=60 tests='*'
if [ -n "$quick" ]; then
  throughput="--sms 8 24 --tokens 512 --routings uniform --grouped --pairs"
  low_latency="--tokens 1 8 --overlap"
  reps=10 steps=6 tests='*ProcessRanks*:*CudaGraph*'
fi

# shellcheck disable=SC2086  # words are wanted
step throughput 80 40 "$build/bench/cuda_exchange" --ranks "$ranks" $throughput --arena-gib 8 --reps $reps --commit "$commit" --out "$out/cuda_exchange_$name.json"
# shellcheck disable=SC2086
step low_latency 80 40 "$build/bench/cuda_low_latency" --ranks "$ranks" $low_latency --commit "$commit" --out "$out/cuda_low_latency_$name.json"
if [ "$gpus" -ge "$ranks" ]; then
  step nccl 45 12 "$python" -m torch.distributed.run --nproc-per-node "$ranks" bench/nccl_exchange.py --runs $reps --commit "$commit" --json "$out/nccl_exchange_$name.json"
fi
step train_moe 60 3 "$python" examples/train_moe.py --num-processes "$ranks" --steps $steps --out "$out/train_moe"
left=$((seconds - ($(date +%s) - begin)))
step tests "$left" 1 "$python" tools/run_gpu_tests.py --tests "$build/tests" --commit "$commit" --filter "$tests" --limit $((left - 8)) --test-limit 40 --log "$out/cuda_tests_$name.log"

[ -z "$failed" ] || echo "FAILED:$failed"
[ -z "$failed" ]
