#!/usr/bin/env bash
# Is all right on this machine's GPUs, and how fast is it? Within 12 minutes, all into one JSON file.
#
#   bash launch_scripts/gpu_check.sh [FILE.json] [--minutes N]       default: gpu_check.json
#   bash launch_scripts/gpu_check.sh --tiny                          networks of no size, also without a GPU
#
# docs/results/gpu.md says how to read it. Exit code 1: something failed, which is named at the end and in the file.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out=gpu_check.json
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    out=$1
    shift
fi
out=$(realpath -m "$out")
prepare_environment test
cd "$ROOT"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false

exec "$PYTHON" -m relora_ds bench gpu-check --out "$out" "$@"
