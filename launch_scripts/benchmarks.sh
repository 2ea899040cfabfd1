#!/usr/bin/env bash
# Measure all that docs/results/benchmarks.md shows, then write the page and its figures again.
#
#   sudo -E bash launch_scripts/benchmarks.sh          about two hours on two CPU cores
#
# Root is needed for two-hosts and islands, which make network namespaces (iproute2); the rest runs without. Nothing else
# should run on the machine. For GPUs there is benchmarks_gpu.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
out=docs/results/benchmarks
mkdir -p $out
bench() { echo "== $*" >&2; python -m relora_ds bench "$@" >/dev/null; }

bench bandwidth --preset llama_20m --vocab-size 8192 --r 64 --out $out/bandwidth.json
for rate in 10gbit 1gbit 100mbit; do
  bench two-hosts --rate $rate --out $out/two_hosts_$rate.json
done
bench two-hosts --rate 1gbit --shapes wide_4 --repeats 9 --variants "PEFT, its default" "ours, LoRA alone" \
  "PEFT, same modules train" "ours, dense" --out $out/two_hosts_1gbit_peft.json
bench two-hosts --rate 1gbit --stage 0 --shapes wide_4 --out $out/two_hosts_stage_0.json
OMP_NUM_THREADS=1 bench islands --recipe tiny_full --repeats 2 \
  --out $out/islands.json model.preset=llama_20m train.micro_batch_size=1 train.batch_sequences=2 relora.r=16 \
  relora.lora_alpha=16 islands.compress=int4

# In bf16; on a CPU without units for it, add --precision fp32.
baselines=("PEFT, its default" "PEFT, same modules train" "ours, LoRA alone" "ours, dense")
for r in 128 32; do
  step=(--vocab-size 8192 --r $r --repeats 9 --variants "${baselines[@]}")
  bench throughput --preset llama_60m "${step[@]}" --out $out/step_60m_r$r.json
  bench throughput --preset wide_2 "${step[@]}" --out $out/step_wide_r$r.json
done
small=(--preset llama_20m --vocab-size 8192)
bench throughput "${small[@]}" --repeats 9 --out $out/step_20m_formats.json
bench throughput "${small[@]}" --micro-batch-size 1 2 4 8 --variants "${baselines[@]}" --out $out/step_20m_sizes.json
OMP_NUM_THREADS=1 bench layer --compare products --r-part 16 4 --rows 4096 --repetitions 5 \
  --out $out/layer_products.json
OMP_NUM_THREADS=1 bench throughput --preset llama_60m --vocab-size 2048 --r 128 --micro-batch-size 6 --repeats 3 \
  --variants "PEFT, same modules train" "ours, separate" "ours, folded" "ours, one-sided, separate" \
  "ours, one-sided, folded" --out $out/step_60m_products.json
methods=("ours, dense" "ours, one-sided, residual" SwitchLoRA CoLA CR-Net Fira APOLLO APOLLO-Mini SCALE Muon SST CoLA-M
  "CR-Net, inverted")
OMP_NUM_THREADS=1 bench throughput --preset llama_60m --vocab-size 2048 --r 128 --micro-batch-size 6 --repeats 5 \
  --variants "${methods[@]}" --out $out/methods_60m.json
mkdir -p $out/widths
for network in "512 llama_60m 128 32" "1024 medium_4 256 64" "2048 wide_2 512 128"; do
  read -r width preset ranks <<<"$network"
  for precision in bf16 fp32; do
    for r in $ranks; do
      OMP_NUM_THREADS=1 bench throughput --preset "$preset" --vocab-size 2048 --r "$r" --micro-batch-size 6 --repeats 3 \
        --precision $precision --variants "PEFT, same modules train" "ours, separate" "ours, dense" \
        "ours, one-sided, separate" "ours, one-sided, random" --out "$out/widths/width_${width}_r${r}_$precision.json"
    done
  done
done
bench restart --presets llama_20m llama_60m --stages 1 3 --masters cpu --out $out/restart.json
bench restart --presets llama_20m llama_60m --stages 1 --masters cpu --variants "ours, one-sided, random" \
  "ours, one-sided, sketch" "ours, one-sided, warm sketch" "ours, one-sided, exact" --out $out/restart_subspaces.json
chains=("full rank" "PEFT, same modules train" "ours, dense" "ours, bf16" "ours, one-sided, exact"
  "ours, one-sided, sketch" "ours, one-sided, random" "ours, one-sided, residual")
bench memory --preset llama_130m --r 192 --threads 1 --variants "${chains[@]}" --out $out/memory_chains_130m.json
bench memory --preset llama_350m --r 256 --threads 1 --variants "${chains[@]}" --out $out/memory_chains_350m.json
bench memory --preset llama_130m --r 192 --threads 1 --checkpointing none --variants "full rank" "${methods[@]}" \
  --out $out/memory_methods.json
bench memory --preset llama_130m --r 192 --threads 1 --micro-batch-size 8 --checkpointing none --variants "full rank" \
  CoLA CoLA-M CR-Net "CR-Net, inverted" --out $out/memory_recomputed.json

bench host-memory --vocab-size 54000 --out $out/host_memory_168m.json
bench host-memory --preset llama_350m --out $out/host_memory_350m.json
bench trainer --out $out/trainer.json
bench startup --out $out/startup.json
bench clusters --out $out/clusters.json
# host_memory_*_before.json stay: they are of 0.1.0.
python -m tests.lab.bench.report
