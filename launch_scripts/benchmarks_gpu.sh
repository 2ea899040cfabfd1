#!/usr/bin/env bash
# The measurements of docs/results/benchmarks.md that only a GPU can make; one JSON file each in DIRECTORY.
#
#   bash launch_scripts/benchmarks_gpu.sh DIRECTORY [PRESET ...]        default: llama_350m llama_1b_aligned
#
# SEQ_LEN (1024), MICRO_BATCHES ("2 4 8 16 32 64"), VOCAB (32000), R (128) and REPEATS (7) can be set. It runs without a
# GPU too, on a small preset, to try it out: SEQ_LEN=64 MICRO_BATCHES="1 2" VOCAB=1000 R=8 REPEATS=3 ... llama_9m
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: benchmarks_gpu.sh DIRECTORY [PRESET ...]"}
shift
presets=("$@")
[ ${#presets[@]} -gt 0 ] || presets=(llama_350m llama_1b_aligned)
mkdir -p "$out"
read -ra micro <<<"${MICRO_BATCHES:-2 4 8 16 32 64}"
shape=(--seq-len "${SEQ_LEN:-1024}" --vocab-size "${VOCAB:-32000}" --r "${R:-128}")
bench() { echo "== $*" >&2; python -m relora_ds bench "$@"; }

for preset in "${presets[@]}"; do
  bench throughput --preset "$preset" "${shape[@]}" --micro-batch-size "${micro[@]}" --repeats "${REPEATS:-7}" \
    --out "$out/throughput_$preset.json"
  bench memory --preset "$preset" "${shape[@]}" --micro-batch-size "${micro[0]}" --out "$out/memory_$preset.json"
  bench restart --presets "$preset" "${shape[@]}" --micro-batch-size "${micro[0]}" --masters cpu device none \
    --stages 1 3 --ranks 1 --restarts "${REPEATS:-7}" --out "$out/restart_$preset.json"
done
bench layer --r "${R:-128}" --repetitions "${REPEATS:-7}" --out "$out/layer.json"
bench trainer --out "$out/trainer.json"
