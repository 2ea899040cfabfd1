#!/usr/bin/env bash
# Lint and test: bash launch_scripts/test.sh [--all] [pytest arguments]
#
#   bash launch_scripts/test.sh                     everything but the slow tests
#   bash launch_scripts/test.sh --all               the slow ones too: minutes, downloads, the DeepSpeed launcher
#   bash launch_scripts/test.sh tests/zero -k restart
#
# Where there are GPUs, those in tests/cuda run on them; all others run on the CPU as they do elsewhere.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Three files at a time: ranks wait for each other and for imports, and would leave a part of two cores idle.
options=(-m "not slow" -n 3 --dist loadfile --no-loadscope-reorder)
arguments=()
for argument in "$@"; do
    case $argument in
        --all) options=() ;;  # one after another, since some of them measure
        *) arguments+=("$argument") ;;
    esac
done

prepare_environment test
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # a test runs up to three ranks
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false

lint() {
    local check failed=0
    for check in "ruff check ." "ruff format --check ." codespell_lib mypy; do
        # shellcheck disable=SC2086
        "$PYTHON" -m $check || failed=1
    done
    return $failed
}

report=$(mktemp)
trap 'rm -f "$report"' EXIT
lint >"$report" 2>&1 &  # types take half a minute: meanwhile the first tests import their libraries
linting=$!
if [ ${#options[@]} -eq 0 ]; then  # some of the slow tests measure
    wait "$linting" || true
fi
tests=0
"$PYTHON" -m pytest -q --durations=30 ${options[@]+"${options[@]}"} ${arguments[@]+"${arguments[@]}"} || tests=$?
found=0
wait "$linting" || found=$?
cat "$report"
if [ "$found" -ne 0 ]; then
    echo "error: ruff, codespell or mypy found problems; they are listed above" >&2
fi
exit $((tests != 0 ? tests : found))
