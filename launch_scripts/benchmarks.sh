#!/usr/bin/env bash
# Measure all that docs/benchmarks.md shows, then write the page and its figures again.
#
#   sudo -E bash launch_scripts/benchmarks.sh          about two hours on two CPU cores
#
# Root is needed for two-hosts alone, which makes network namespaces (iproute2); the rest runs without. Nothing else
# should run on the machine. For GPUs there is benchmarks_gpu.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/benchmarks
mkdir -p $out
bench() { echo "== $*" >&2; python -m relora_ds bench "$@" >/dev/null; }

bench bandwidth --preset llama_20m --vocab-size 8192 --r 64 --out $out/bandwidth.json
for rate in 10gbit 1gbit 100mbit; do
  bench two-hosts --rate $rate --out $out/two_hosts_$rate.json
done
bench two-hosts --rate 1gbit --stage 0 --shapes wide_4 --out $out/two_hosts_stage_0.json

# In fp32: on a CPU without units for bf16, PyTorch's bf16 products are slow, and full rank would look bad.
for r in 32 128; do
  step=(--r $r --precision fp32 --repeats 7 --micro-batch-size 1
    --variants "PEFT, its default" "PEFT, same modules train" "ours, LoRA alone" "ours, dense")
  bench throughput --preset llama_60m "${step[@]}" --out $out/step_60m_r$r.json
  bench throughput --preset wide_2 --seq-len 128 "${step[@]}" --out $out/step_wide_r$r.json
done
bench throughput --preset llama_20m --precision fp32 --repeats 5 --micro-batch-size 1 2 4 8 \
  --variants "PEFT, same modules train" "ours, dense" "ours, recomputed" --out $out/step_20m_batches.json
bench throughput --preset llama_20m --precision fp32 --repeats 5 --micro-batch-size 4 \
  --variants "ours, dense" "ours, int8" "ours, nf4" "full rank, compiled" "ours, compiled" --out $out/step_20m_formats.json
bench throughput --preset llama_20m --precision bf16 --repeats 5 --micro-batch-size 1 \
  --variants "PEFT, same modules train" "ours, dense" --out $out/step_20m_bf16.json

bench restart --presets llama_20m llama_60m --stages 1 3 --masters cpu --precision fp32 --micro-batch-size 1 \
  --out $out/restart.json
bench trainer --out $out/trainer.json
bench startup --out $out/startup.json
bench clusters --out $out/clusters.json
python -m tests.bench.report
