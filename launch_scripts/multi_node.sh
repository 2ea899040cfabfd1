#!/usr/bin/env bash
# Train a recipe on several machines, in one of three ways:
#
#   bash launch_scripts/multi_node.sh --hostfile FILE [RECIPE] [section.key=value ...]
#       once, on any machine that reaches all of them by ssh without a password. DeepSpeed's launcher starts the ranks
#       through pdsh, which this machine needs (Debian and Ubuntu: apt install pdsh).
#
#   bash launch_scripts/multi_node.sh --no_ssh --node_rank K --hostfile FILE [RECIPE] [section.key=value ...]
#       on each of the machines, with K = 0, 1, ... in the order of the hostfile. Needs neither ssh nor pdsh.
#
#   bash launch_scripts/multi_node.sh --no_ssh --nodes N --node_rank K --master_addr A [RECIPE] [section.key=value ...]
#       likewise, on N machines with as many GPUs each: one rank on each GPU that PyTorch sees, or two on the CPU. For
#       schedulers that tell a machine its K, but not the names of all: launch_scripts/kubeflow.yaml, skypilot.yaml.
#
# --hostfile FILE     the machines and their numbers of ranks: see launch_scripts/hostfile.example
# --master_addr A     the address at which the others reach node 0; with --no_ssh by default the hostfile's first name,
#                     else what `hostname -I` prints first there
# --master_port P     a free port of node 0, the same on all machines (default: MASTER_PORT, else 29500)
# --no_ssh, --node_rank K   the second and the third way
# --nodes N           the third way
#
# RECIPE is a YAML file or the name of a shipped recipe; without one it is quickstart. All machines need this checkout,
# the environment and the working directory at the same paths, and a run directory that they share where the run is to
# be resumed, because each rank writes its part of a checkpoint. A run that was interrupted resumes from its newest
# checkpoint (resume=auto), unless the recipe or the command line sets resume or overwrite. The exit code is the one
# of the run.
#
# The network: if the run hangs at its start or takes a slow network, name the interface that joins the machines:
# NCCL_SOCKET_IFNAME=eth1 bash launch_scripts/multi_node.sh ... on GPUs, GLOO_SOCKET_IFNAME=eth1 on CPUs. Ranks on GPUs
# talk over gloo too, and take NCCL's interface for it unless GLOO_SOCKET_IFNAME names another.
# Over ssh, these variables reach the other machines: NCCL_*, GLOO_*, UCX_*, FI_*, TORCH_*, PYTORCH_*, CUDA_* (but not
# CUDA_VISIBLE_DEVICES), CUBLAS_*, HSA_*, TRITON_*, DEEPSPEED_*, DS_ACCELERATOR, HF_* (but not HF_TOKEN: log in there),
# TRANSFORMERS_*, RELORA_DS_*, PYTHON*, OMP_NUM_THREADS, those that say that a job was restarted, and all in the files
# ~/.deepspeed_env and ./.deepspeed_env of this machine, one NAME=VALUE a line.
# With --no_ssh each machine has its own environment and its own files. The environment comes before the files.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch_scripts/launch.sh
source "$ROOT/launch_scripts/launch.sh"

# read_hostfile: set the arrays `hosts` and `slots`.
read_hostfile() {
    local host count
    [ -n "$hostfile" ] || fail "--hostfile FILE is needed; launch_scripts/hostfile.example shows one"
    [ -f "$hostfile" ] || fail "--hostfile: there is no file $hostfile"
    [ -r "$hostfile" ] || fail "--hostfile: $hostfile cannot be read; change its permissions"
    while read -r host count || [ -n "$host" ]; do
        [[ $host == '' || $host == '#'* ]] && continue
        [[ $count =~ ^slots=([1-9][0-9]{0,4})([[:space:]]|$) ]] || fail "$hostfile: '$host $count' is not NAME slots=RANKS"
        count=${BASH_REMATCH[1]}
        [[ $host =~ $host_name ]] || fail "$hostfile: '$host' is not a host name or an address; they begin with a letter or" \
            "digit and hold only letters, digits and . _ - : %"
        [[ " ${hosts[*]-} " != *" $host "* ]] || fail "$hostfile: '$host' is named twice; give it one line with all its slots"
        hosts+=("$host") slots+=("$count")
    done <"$hostfile"
    [ "${#hosts[@]}" -gt 0 ] || fail "$hostfile: it names no machine"
}

hostfile='' nodes='' ssh=1 node_rank='' master_addr='' master_port=${MASTER_PORT:-29500}
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help) usage ;;
        --no_ssh) ssh='' ;;
        --hostfile | --nodes | --node_rank | --master_addr | --master_port)
            [ $# -gt 1 ] || fail "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        *) fail "unknown option $1; --help lists them" ;;
    esac
    shift
done
split_arguments "$@"

# The names reach ssh, pdsh and the remote shell: none may look like an option, a pattern or a command there.
host_name='^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*$'
[[ -z $master_addr || $master_addr =~ $host_name ]] || fail "--master_addr: '$master_addr' is not an address or a host name;" \
    "give those of the first machine"
[[ $master_port =~ ^[1-9][0-9]{0,4}$ && $master_port -lt 65536 ]] ||
    fail "--master_port: '$master_port' is not a port; use a free one between 1 and 65535"
hosts=() slots=()
if [ -n "$nodes" ]; then
    [[ $nodes =~ ^[1-9][0-9]{0,4}$ ]] || fail "--nodes: '$nodes' is not a number of machines; use 1 or more"
    [ -z "$hostfile" ] || fail "--nodes goes without --hostfile, which says how many machines there are"
    [[ -z $ssh && -n $master_addr ]] || fail "--nodes goes with --no_ssh and --master_addr; over ssh use --hostfile"
    for ((node = 0; node < nodes; node++)); do hosts+=("node $node"); done
else
    read_hostfile
fi
if [ -n "$ssh" ]; then
    [ -z "$node_rank" ] || fail "--node_rank goes with --no_ssh; over ssh every machine is started from here"
    command -v pdsh >/dev/null || fail "DeepSpeed's launcher starts other machines with pdsh, and there is none in PATH." \
        "Install it (Debian and Ubuntu: apt install pdsh), or start each machine yourself with --no_ssh"
else
    [[ $node_rank =~ ^(0|[1-9][0-9]*)$ && $node_rank -lt ${#hosts[@]} ]] ||
        fail "--node_rank: '$node_rank' is none of 0 to $((${#hosts[@]} - 1)), the machines${hostfile:+ in $hostfile}"
fi

prepare_environment ''
resolve_recipe "$recipe" ${overrides[@]+"${overrides[@]}"}
count_ranks
for ((node = 0; node < ${nodes:-0}; node++)); do slots+=("$ranks"); done

# --- the environment --------------------------------------------------------------------------------------------
# DeepSpeed reads these files itself, over ssh, but stumbles over an empty line and lets them win over the environment.
variables=$(cat ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep -E '^[A-Za-z_][A-Za-z0-9_]*=' || true)
while IFS='=' read -r name value; do
    if [ -n "$name" ] && [ -z "${!name+set}" ]; then
        export "$name=$value"
    fi
done <<<"$variables"
set_threads "${slots[${node_rank:-0}]}"

if [ -n "$ssh" ]; then
    for word in "$PYTHON" "$ROOT" "$PWD" "$recipe" ${overrides[@]+"${overrides[@]}"}; do
        case $word in
            *[!A-Za-z0-9_./:=,@%+~^-]*)
                fail "'$word': the remote shell would take it apart; put overrides into the recipe file, give folders" \
                    "plain names, or use --no_ssh"
                ;;
        esac
    done
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes "$host" "test -x '$PYTHON' -a -f '$ROOT/train.py' -a -d '$PWD'" </dev/null || fail \
            "$host: not reachable by ssh without a password, or one of these is not there: $PYTHON, $ROOT/train.py, $PWD"
    done
    DS_ENV_FILE=$(mktemp)
    export DS_ENV_FILE  # instead of .deepspeed_env
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    names=$(cut -d= -f1 <<<"$variables")
    restarts='SLURM_RESTART_COUNT|TORCHELASTIC_RESTART_COUNT|AWS_BATCH_JOB_ATTEMPT|BATCH_TASK_RETRY_ATTEMPT|LSB_RESTART|RESTARTED'
    # Everybody on the other machines could read a token in the list of processes.
    # CUDA_VISIBLE_DEVICES is each machine's own.
    prefixes='NCCL_|GLOO_|UCX_|FI_|TORCH_|PYTORCH_|CUDA_([^V]|V[^I])|HSA_|CUBLAS_|TRITON_|DEEPSPEED_|HF_|TRANSFORMERS_|RELORA_DS_'
    env | grep -v '^HF_TOKEN=' | grep -E "^($prefixes|DS_ACCELERATOR=|(OMP_NUM_THREADS|$restarts)=${names:+|(${names//$'\n'/|})=})" >"$DS_ENV_FILE"
    launcher=(-m deepspeed.launcher.runner --quiet --hostfile "$hostfile" --master_port "$master_port" --force_multi
        --no_ssh_check ${master_addr:+--master_addr "$master_addr"})
    say "over ssh: ${hosts[*]}"
else
    if [ "$gpus" -eq 0 ]; then
        export DS_ACCELERATOR=cpu
    elif [ "${slots[$node_rank]}" -gt "$gpus" ]; then
        fail "$hostfile: ${hosts[$node_rank]} has slots=${slots[$node_rank]}, but PyTorch sees $gpus GPU(s) here, and" \
            "each rank needs one; give it slots=$gpus on all machines"
    fi
    master_addr=${master_addr:-${hosts[0]}}
    first=0 world_size=0
    for ((node = 0; node < ${#hosts[@]}; node++)); do
        ((node < node_rank)) && ((first += slots[node])) || true
        ((world_size += slots[node]))
    done
    launcher=("$ROOT/launch_scripts/start_ranks.py" --ranks "${slots[$node_rank]}" --first "$first"
        --world_size "$world_size" --master_addr "$master_addr" --master_port "$master_port")
    say "node $node_rank of ${#hosts[@]}: ${slots[$node_rank]} rank(s); node 0 is $master_addr:$master_port"
fi
launch "$run_dir" "${launcher[@]}" "$ROOT/train.py" --config "$recipe" ${resume[@]+"${resume[@]}"} \
    ${overrides[@]+"${overrides[@]}"}
