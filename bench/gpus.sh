#!/bin/sh
# SPDX-License-Identifier: MIT
# Tests and measures the CUDA backend on the GPUs of this machine, one rank each (where there are fewer GPUs, ranks share them as threads), unattended, in
# under eight minutes. Reports go to the folder OUT as JSON; bench/gpu_tables.py makes the tables of docs/performance.md from them.
set -u
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: bench/gpus.sh RANKS [--build DIR] [--out DIR] [--python PYTHON]

  RANKS            ranks, a GPU each where there are enough
  --build DIR      programs that are built already (default: builds the preset cuda in Release into build/gpus)
  --out DIR        where reports and logs go (default: out/gpus)
  --python PYTHON  an interpreter with torch, and with deep_ep for train_moe (default: python3)
USAGE
}

build=""
out=out/gpus
python=python3
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  "" | *[!0-9]*) usage >&2; exit 2 ;;
esac
ranks=$1
shift
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --python) python=$2; shift 2 ;;
    *) usage >&2; exit 2 ;;
  esac
done

mkdir -p "$out"
commit=$(git rev-parse HEAD 2>/dev/null || cat COMMIT 2>/dev/null || echo unknown)
export CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER
gpus=$(nvidia-smi --list-gpus | wc -l)
name="${gpus}x$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z_' | sed 's/nvidia_//')"
[ "$ranks" -le "$gpus" ] || name="${name}_${ranks}_ranks"
failed=""

step() { # step NAME SECONDS COMMAND...: runs it; its output goes to OUT/NAME.log
  step=$1 limit=$2
  shift 2
  start=$(date +%s)
  if timeout -k 5 "$limit" "$@" >"$out/$step.log" 2>&1; then status=ok; else status="FAILED ($?)" failed="$failed $step"; fi
  echo "== $step: $status, $(($(date +%s) - start)) s"
  tail -n "${LINES_SHOWN:-3}" "$out/$step.log"
}

if [ -z "$build" ]; then
  build=build/gpus
  cmake --preset cuda -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native && cmake --build "$build" -j || exit 1
fi

step cuda_tests 60 env EP_TEST_BACKEND=cuda "$build/tests/cuda_tests" --gtest_brief=1
step backends_tests 90 env EP_TEST_BACKEND=cuda "$build/tests/backends_tests" --gtest_brief=1
routings="uniform zipf"
[ "$ranks" -lt 4 ] || routings="uniform groups zipf"
# shellcheck disable=SC2086  # words are wanted
LINES_SHOWN=40 step throughput 90 "$build/bench/cuda_exchange" --ranks "$ranks" --sms 4 8 16 24 48 --tokens 4096 8192 --routings $routings --grouped --arena-gib 8 \
  --reps 30 --commit "$commit" --out "$out/cuda_exchange_$name.json"
LINES_SHOWN=40 step low_latency 90 "$build/bench/cuda_low_latency" --ranks "$ranks" --commit "$commit" --out "$out/cuda_low_latency_$name.json"
if [ "$gpus" -ge "$ranks" ]; then
  LINES_SHOWN=12 step nccl 60 "$python" -m torch.distributed.run --nproc-per-node "$ranks" bench/nccl_exchange.py --commit "$commit" --json "$out/nccl_exchange_$name.json"
fi
step train_moe 90 "$python" examples/train_moe.py --num-processes "$ranks" --steps 60 --out "$out/train_moe"

[ -z "$failed" ] || echo "FAILED:$failed"
[ -z "$failed" ]
