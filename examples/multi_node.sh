#!/usr/bin/env bash
# Train examples/own_loop.py on several machines. Run it on each of them, with the same first machine:
#
#   MASTER_ADDR=10.0.0.1 NODES=2 NODE_RANK=0 bash examples/multi_node.sh --stage 1
#   MASTER_ADDR=10.0.0.1 NODES=2 NODE_RANK=1 bash examples/multi_node.sh --stage 1
#
# MASTER_ADDR   the address of the first machine, which all others reach
# MASTER_PORT   a free port there (29500)
# NODES         the number of machines
# NODE_RANK     which one this is: 0, 1, ...
# RANKS         ranks on each machine: one a GPU (all GPUs; 1 where there is none)
#
# Between machines the bytes count: stage 1 sends what trains and nothing else; stage 3 gathers the frozen weights in
# every micro-step. Checkpoints need a directory that all machines share: each rank writes its own part.
# Where a machine has several networks, name the one to use: NCCL_SOCKET_IFNAME=eth1 (GPUs), GLOO_SOCKET_IFNAME=eth1.
# Recipes have launchers of their own: launch_scripts/multi_node.sh and launch_scripts/slurm.sbatch.
set -euo pipefail

if [ -z "${RANKS:-}" ]; then
    RANKS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
    [ "$RANKS" -gt 0 ] || RANKS=1
fi
exec torchrun \
    --nnodes "${NODES:?set it to the number of machines}" \
    --node_rank "${NODE_RANK:?set it to 0 on the first machine, 1 on the second, ...}" \
    --nproc_per_node "$RANKS" \
    --master_addr "${MASTER_ADDR:?set it to the address of the first machine}" \
    --master_port "${MASTER_PORT:-29500}" \
    "$(dirname "${BASH_SOURCE[0]}")/own_loop.py" "$@"
