#!/usr/bin/env bash
# A first ReLoRA run, from nothing: bash launch_scripts/quickstart.sh [section.key=value ...]
#
# Sets up an environment, then runs the recipe `quickstart` under the DeepSpeed launcher: one rank per GPU, or two
# ranks on the CPU. The run is in runs/quickstart and starts afresh each time, unless resume, overwrite or run_dir
# is given. The exit code is the one of the run.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ''

run_dir=runs/quickstart
overwrite=(overwrite=true)
for argument in "$@"; do
    case $argument in
        run_dir=*) run_dir=${argument#run_dir=} overwrite=() ;;
        resume=* | overwrite=*) overwrite=() ;;
    esac
done

# --- how many ranks, and with how many threads each -------------------------------------------------------------
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
batch=16  # the recipe's train.batch_sequences, to be split evenly
if [ "$gpus" -gt 0 ]; then
    ranks=$gpus
    while [ $((batch % ranks)) -ne 0 ]; do ranks=$((ranks - 1)); done
    say "$gpus GPU(s): one rank on each of $ranks"
else
    ranks=$((cores < 2 ? 1 : 2))
    export DS_ACCELERATOR=cpu
    say "no GPU that PyTorch can use: $ranks rank(s) on $cores CPU core(s)"
fi
which_devices=(--num_gpus "$ranks")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    which_devices=()  # the launcher heeds CUDA_VISIBLE_DEVICES only when no number is given
    CUDA_VISIBLE_DEVICES=$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")
    export CUDA_VISIBLE_DEVICES
fi
micro=$((batch / ranks > 8 ? 8 : batch / ranks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}"
port=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

# --- the launcher -----------------------------------------------------------------------------------------------
# In a process group of its own, so that a signal reaches the launcher and all ranks at once: `deepspeed` itself
# dies of SIGTERM without telling its children.
started=$(mktemp)
set -m
"$PYTHON" -m deepspeed.launcher.runner --quiet --hostfile /dev/null ${which_devices[@]+"${which_devices[@]}"} \
    --master_port "$port" "$ROOT/train.py" --config quickstart "train.micro_batch_size=$micro" \
    ${overwrite[@]+"${overwrite[@]}"} "$@" </dev/null &
launcher=$!
set +m
stopped=
trap 'stopped=1; kill -TERM -- "-$launcher" 2>/dev/null || true' TERM
trap 'stopped=1; kill -INT -- "-$launcher" 2>/dev/null || true' INT
code=0
wait "$launcher" || code=$?
if [ -n "$stopped" ]; then
    # The launcher gives the ranks 30 s to end.
    for ((second = 0; second < 40; second++)); do
        kill -0 -- "-$launcher" 2>/dev/null || break
        sleep 1
    done
fi

# --- the exit code: the launcher does not always pass on the ranks' ---------------------------------------------
if [ "$run_dir/status.json" -nt "$started" ]; then
    recorded=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"])' "$run_dir/status.json")
    case $recorded in
        0) ;;
        None) code=$((code != 0 ? code : 1)) ;;  # a rank died without a word
        *) code=$recorded ;;
    esac
fi
rm -f "$started"
exit "$code"
