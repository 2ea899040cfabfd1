#!/usr/bin/env bash
# Train a recipe on this machine: bash launch_scripts/single_node.sh [RECIPE] [section.key=value ...]
#
#   bash launch_scripts/single_node.sh my.yaml relora.r=64 checkpoint.every=500
#   CUDA_VISIBLE_DEVICES=2,3 bash launch_scripts/single_node.sh llama_60m_relora
#
# RECIPE is a YAML file or the name of a shipped recipe; without one it is quickstart. The run gets one rank on each GPU
# of this machine (CUDA_VISIBLE_DEVICES chooses among them), or two ranks on the CPU.
# A run that was interrupted resumes from its newest checkpoint (resume=auto), unless the recipe or the command line
# sets resume or overwrite. The exit code is the one of the run: 0 done, 2 bad recipe, 3 stopped by a guard, 4 resume
# or run directory refused, 75 asked to stop and saved, 1 anything else. MASTER_PORT, OMP_NUM_THREADS and GRACE_SECONDS
# (that the ranks have to save, 30 by default) are taken from the environment where they are set.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch_scripts/launch.sh
source "$ROOT/launch_scripts/launch.sh"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; fi
split_arguments "$@"
prepare_environment ''
resolve_recipe "$recipe" ${overrides[@]+"${overrides[@]}"}

count_ranks
divide_machine

launch_here "$run_dir" "$ROOT/train.py" --config "$recipe" ${resume[@]+"${resume[@]}"} \
    ${overrides[@]+"${overrides[@]}"}
