#!/usr/bin/env bash
# A first run, from nothing: bash launch_scripts/quickstart.sh [section.key=value ...]
#
# Sets up an environment, then runs the recipe `quickstart`: one rank per GPU, or two ranks on the CPU. The run
# is in runs/quickstart and starts afresh each time, unless resume, overwrite or run_dir is given. A complete run ends
# with sentences on what was learned, and figures in RUN/plots. The exit code is the one of the run.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch_scripts/launch.sh
source "$ROOT/launch_scripts/launch.sh"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; fi
prepare_environment plot

run_dir=runs/quickstart
overwrite=(overwrite=true)
for argument in "$@"; do
    case $argument in
        run_dir=*) run_dir=${argument#run_dir=} overwrite=() ;;
        resume=* | overwrite=*) overwrite=() ;;
    esac
done

count_ranks
batch=16  # the recipe's train.batch_sequences, to be split evenly
while [ $((batch % ranks)) -ne 0 ]; do ranks=$((ranks - 1)); done
divide_machine
micro=$((batch / ranks > 8 ? 8 : batch / ranks))

launch_here "$run_dir" "$ROOT/train.py" --config quickstart "train.micro_batch_size=$micro" \
    ${overwrite[@]+"${overwrite[@]}"} "$@"
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m relora_ds plot "$run_dir" --out "$run_dir/plots" ||
    say "the run is complete, and could not be drawn; to try again: relora plot $run_dir --out $run_dir/plots"
