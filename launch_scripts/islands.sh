#!/usr/bin/env bash
# Try islands on this machine: bash launch_scripts/islands.sh COUNT [RECIPE] [section.key=value ...]
#
#   bash launch_scripts/islands.sh 2 tiny islands.sync_every=5
#
# Starts a server and COUNT islands, each as single_node.sh starts a run, in RUN_DIR/island-0, RUN_DIR/island-1, ...
# RUN_DIR is the recipe's run_dir. On a machine with GPUs each island gets an equal part of them. Output goes to
# RUN_DIR/island-N.log and RUN_DIR/server.log, that of island 0 to the terminal too. On several machines start the server
# and the islands by hand: docs/guides/islands.md. The exit code is 0 if all islands are done, else the first other one.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch_scripts/launch.sh
source "$ROOT/launch_scripts/launch.sh"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; fi
count=${1:-}
[[ $count =~ ^[1-9][0-9]{0,2}$ ]] || fail "COUNT: '$count' is not a number of islands; use e.g. 2"
shift
split_arguments "$@"
prepare_environment ''
resolve_recipe "$recipe" ${overrides[@]+"${overrides[@]}"}
count_ranks
[ "$gpus" -eq 0 ] || [ "$gpus" -ge "$count" ] || fail "COUNT: $count islands on $gpus GPU(s); give at most one island a GPU"

export RELORA_ISLANDS_SECRET="${RELORA_ISLANDS_SECRET:-$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')}"
mkdir -p "$run_dir"
started=()
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT HUP

"$PYTHON" -m relora_ds islands serve "$run_dir/rounds" --listen 127.0.0.1:0 >"$run_dir/server.log" 2>&1 &
server=$!
started+=("$server")
address=''
until [ -n "$address" ]; do
    kill -0 "$server" 2>/dev/null || fail "the server of the islands ended: $(cat "$run_dir/server.log")"
    sleep 0.2
    address=$(sed -n 's|.*listening on tcp://\([^,]*\),.*|\1|p' "$run_dir/server.log")
done
say "server of the islands: $address, rounds in $run_dir/rounds"

# island INDEX: run it to its end.
island() {
    if [ "$gpus" -gt 0 ]; then
        CUDA_VISIBLE_DEVICES=$("$PYTHON" - "$1" "$count" "$gpus" <<'PYTHON'
import os
import sys

index, count, gpus = map(int, sys.argv[1:])
seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
each = gpus // count
print(",".join(seen[index * each : (index + 1) * each]))
PYTHON
        )
        export CUDA_VISIBLE_DEVICES
    fi
    bash "$ROOT/launch_scripts/single_node.sh" "$recipe" ${overrides[@]+"${overrides[@]}"} run_dir="$run_dir/island-$1" \
        islands.count="$count" islands.index="$1" islands.address="$address"
}

islands=()
for ((index = count - 1; index > 0; index--)); do
    island "$index" >"$run_dir/island-$index.log" 2>&1 &
    islands+=($!)
done
say "output of the others: $run_dir/island-*.log"
island 0 > >(tee "$run_dir/island-0.log") 2>&1 &
islands+=($!)
started+=("${islands[@]}")

code=0
for process in "${islands[@]}"; do
    wait "$process" || { ended=$? && [ "$code" -ne 0 ] || code=$ended; }
done
kill -TERM "$server"
wait "$server" || true
exit "$code"
