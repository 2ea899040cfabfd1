# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use what it sets
# Sourced by the launch scripts, after environment.sh: how many ranks a machine gets, and how they are started, with
# signals that reach every rank, and the exit code of the run.

# usage: print the comment at the head of the script, and exit.
usage() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
    exit 0
}

# count_ranks: set `gpus`, `cores` and `ranks`, which is one for each GPU, or two on the CPU. Ends where the ranks could
# not compute on what is here; DeepSpeed, which takes seconds to import, is asked only where PyTorch sees reason to.
count_ranks() {
    gpus=$("$PYTHON" - "$ROOT" <<'PYTHON'
import os
import sys

import torch

seen = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
if seen not in ("cuda", "cpu") or os.environ.get("DS_ACCELERATOR", seen) != seen:
    sys.path.insert(0, sys.argv[1])
    from relora_ds.zero import accelerator
    if found := accelerator.problems():
        sys.exit(f"error: {found[0]}")
print(torch.cuda.device_count())
PYTHON
    ) || exit 1
    cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    ranks=$((gpus > 0 ? gpus : cores < 2 ? 1 : 2))
}

# divide_machine: share GPUs and cores between `ranks` ranks.
divide_machine() {
    if [ "$gpus" -gt 0 ]; then
        say "$gpus GPU(s): one rank on each of $ranks"
    else
        export DS_ACCELERATOR=cpu
        say "no GPU that PyTorch can use: $ranks rank(s) on $cores CPU core(s)"
    fi
    set_threads "$ranks"
}

# set_threads RANKS: share the cores between so many ranks.
set_threads() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / $1 > 0 ? cores / $1 : 1))}"
}

# free_port: print a free port below those that Linux hands out for connections, so that no connection of another
# program takes it before rank 0 listens on it, which is some imports later.
free_port() {
    "$PYTHON" - <<'PYTHON'
import random
import socket

while True:
    port = random.randrange(20000, 32768)
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            continue
    print(port)
    break
PYTHON
}

# split_arguments [RECIPE] [section.key=value ...]: set `recipe` and the array `overrides`.
split_arguments() {
    recipe=quickstart overrides=()
    if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
        recipe=$1
        shift
    fi
    local argument
    for argument in "$@"; do
        [[ $argument == *=* && $argument != -* ]] ||
            fail "$argument: after the recipe, only section.key=value; --help shows how to call this"
    done
    overrides=("$@")
}

# resolve_recipe RECIPE [section.key=value ...]: set `run_dir`, and `resume` to what makes an interrupted run resume:
# (resume=auto), or nothing where the recipe or the user says something about resume or overwrite.
resolve_recipe() {
    local found argument
    found=$("$PYTHON" - "$ROOT" "$@" <<'PYTHON'
import sys

root, name, *overrides = sys.argv[1:]
sys.path.insert(0, root)
from relora_ds.config import read_recipe

recipe, problems = read_recipe(name, overrides, check_files=False)  # problems: for the run to report
print(recipe.run_dir, "" if recipe.resume or recipe.overwrite else "resume=auto", sep="\n")
PYTHON
    ) || fail "the recipe could not be read"
    run_dir=${found%%$'\n'*} resume=()
    if [[ $found == *$'\n'resume=auto ]]; then
        resume=(resume=auto)
    fi
    for argument in "$@"; do
        case $argument in
            resume=* | overwrite=*) resume=() ;;
        esac
    done
}

# launch_here RUN_DIR SCRIPT ARGUMENT...: run `ranks` ranks on this machine alone, and return the run's exit code.
launch_here() {
    local run_dir=$1
    shift
    launch "$run_dir" "$ROOT/launch_scripts/start_ranks.py" --ranks "$ranks" \
        --master_port "${MASTER_PORT:-$(free_port)}" "$@"
}

# launch RUN_DIR ARGUMENT...: run Python with these arguments, a launcher's, to its end, and return the run's exit
# code.
launch() {
    local run_dir=$1 launcher started code=0 second
    shift
    # In a process group of its own, so that a signal reaches the launcher and all ranks at once: DeepSpeed's dies of
    # SIGTERM without telling its children.
    started=$(mktemp)
    set -m
    "$PYTHON" "$@" </dev/null &
    launcher=$!
    set +m
    trap 'kill -TERM -- "-$launcher" 2>/dev/null || true' TERM HUP USR1
    trap 'kill -INT -- "-$launcher" 2>/dev/null || true' INT
    wait "$launcher" || code=$?
    # The launchers give the ranks their time to end. One that was killed leaves ranks that notice it, and save.
    for ((second = 0; second < ${GRACE_SECONDS:-30} + 10; second++)); do
        kill -0 -- "-$launcher" 2>/dev/null || break
        sleep 1
    done
    code=$(exit_code "$run_dir" "$started" "$code")
    rm -f "$started"
    return "$code"
}

# exit_code RUN_DIR STARTED CODE: print the run's exit code, where it recorded one since the file STARTED was made, or
# else CODE: the ranks may have failed for different reasons, and DeepSpeed's launcher does not pass on their codes.
exit_code() {
    local recorded code=$3
    if [ "$1/status.json" -nt "$2" ]; then
        recorded=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"])' "$1/status.json")
        case $recorded in
            0) ;;
            None)  # a rank died without a word; but another machine may be late to see what node 0 wrote
                code=$((code == 0 && ${node_rank:-0} == 0 ? 1 : code))
                ;;
            *) code=$recorded ;;
        esac
    fi
    printf '%s' "$code"
}
