#!/usr/bin/env bash
# The experiments of docs/results/training.md: bash launch_scripts/experiments.sh SCALE DIRECTORY [section.key=value ...]
#
#   bash launch_scripts/experiments.sh tiny results/tiny              two CPU cores, a run on each; hours
#   bash launch_scripts/experiments.sh mini results/mini              two CPU cores, hours a run; or one GPU
#   bash launch_scripts/experiments.sh small results/small            one GPU, C4 from the hub
#   bash launch_scripts/experiments.sh small results/small data.source=pretokenized data.path=TOKENS
#                                                      without a hub: TOKENS is what `relora_ds prepare` wrote elsewhere,
#                                                      of C4 or of the text that english_corpus.py puts together
#
# The text of mini is collected by english_corpus.py, into data/english.
#
# DIRECTORY receives a file for each run, tables and figures; the runs themselves are in runs/SCALE. Stopped, the same
# command resumes where it was. The learning rates come first: where a method's best is not its recipe's, write it there
# before the other suites. SUITES="main" runs these only, and --dry-run says what it would cost.
set -euo pipefail
if [ $# -lt 2 ] || [[ $1 == -* ]]; then
    echo "usage: bash launch_scripts/experiments.sh SCALE DIRECTORY [section.key=value ...]" >&2
    exit 2
fi
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
scale=$1 results=$2
shift 2
prepare_environment plot,islands
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    machine=(--num-gpus 1)
else
    machine=(--jobs 2 --threads 1)
    # glibc returns large blocks to the system after every step and faults them in again: a fifth of the time.
    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=100000000
fi
all="lr main ablation reset precision rank horizon variants galore rivals islands island_choices"
if [ "$scale" = mini ]; then
    all="lr main rank galore rivals islands"  # an hour or more a run
    [ -f data/english/validation.jsonl ] || "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/english_corpus.py" data/english
fi
read -ra suites <<<"${SUITES:-$all}"
exec "$PYTHON" -m relora_ds reproduce "${suites[@]}" --scale "$scale" --runs "runs/$scale" --results "$results" \
    "${machine[@]}" "$@"
