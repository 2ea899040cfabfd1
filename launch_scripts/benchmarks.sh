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
step=(--r 128 --precision fp32 --repeats 5 --micro-batch-size 1
  --variants "PEFT, its default" "PEFT, same modules train" "ours, LoRA alone" "ours, dense")
bench throughput --preset llama_60m "${step[@]}" --out $out/step_60m_r128.json
bench throughput --preset llama_60m --r 128 --precision fp32 --repeats 9 --micro-batch-size 1 \
  --variants "PEFT, same modules train" "ours, dense" --out $out/step_60m_again.json
bench throughput --preset wide_2 --seq-len 128 "${step[@]}" --out $out/step_wide_r128.json

bench trainer --out $out/trainer.json
bench startup --out $out/startup.json
bench clusters --out $out/clusters.json
python -m tests.bench.report
