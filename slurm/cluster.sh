# shellcheck shell=bash
# Functions of all launchers: the command line, the site file, the size of the run, and the environment of nodes. Sourced, never run.
# shellcheck disable=SC2034 # variables are for scripts that source this one

# Every name that a site file may have, and the form of its values. "environment" values are passed to the nodes unchanged.
declare -A SITE_RULES=(
    [DEVICES_PER_NODE]=count [PYTHON]=path [MODULES]=words [SET_ENV_FILES]=paths [MAX_RESTARTS]=number [MASTER_PORT]=port
    [SHARED_FILES]=yes-or-no [ONE_MACHINE]=yes-or-no [CONTAINER_IMAGE]=word [CONTAINER_MOUNTS]=word [CONTAINER_COMMAND]=words
    [PARTITION]=word [ACCOUNT]=word [TIME_LIMIT]=time [SAVE_SECONDS]=count [DEVICE_REQUEST]=words [SBATCH_OPTIONS]=words
    [SRUN_OPTIONS]=words [SSH_OPTIONS]=words [REMOTE_SHELL]=ssh-or-pdsh
)
for name in GLOO_SOCKET_IFNAME OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF \
    NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT NCCL_IB_TC NCCL_DEBUG NCCL_DEBUG_SUBSYS \
    NCCL_ALGO NCCL_PROTO NCCL_NET NCCL_CROSS_NIC NCCL_P2P_LEVEL NCCL_NET_GDR_LEVEL NCCL_NVLS_ENABLE NCCL_TOPO_FILE NCCL_MIN_NCHANNELS \
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_TRACE_BUFFER_SIZE \
    TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_NAN_CHECK \
    HCCL_SOCKET_IFNAME HCCL_IF_IP HCCL_IF_BASE_PORT HCCL_HOST_SOCKET_PORT_RANGE HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT HCCL_EVENT_TIMEOUT \
    HCCL_BUFFSIZE P2P_HCCL_BUFFSIZE HCCL_ALGO HCCL_WHITELIST_DISABLE TORCH_HCCL_ASYNC_ERROR_HANDLING TORCH_HCCL_ZERO_COPY \
    PYTORCH_NPU_ALLOC_CONF TASK_QUEUE_ENABLE CPU_AFFINITY_CONF STREAMS_PER_DEVICE MULTI_STREAM_MEMORY_REUSE COMBINED_ENABLE \
    INF_NAN_MODE_ENABLE NPU_ASD_ENABLE TORCH_NPU_FALLBACK_CPU_DISABLE ASCEND_LAUNCH_BLOCKING; do
    case $name in
        *_TIMEOUT | *_TIMEOUT_SEC | *_NUM_THREADS | *_MAX_CONNECTIONS) SITE_RULES[$name]=environment-number ;;
        *) SITE_RULES[$name]=environment ;;
    esac
done
declare -A SITE

refuse() { # MESSAGE: value, rule, remedy
    echo "error: $*" >&2
    exit 2
}

open_pause() { # before pause; programs that are started get 8>&-
    local pipe
    pipe=$(mktemp -u)
    mkfifo "$pipe"
    exec 8<> "$pipe"
    rm -f "$pipe"
}

pause() { # SECONDS, in a loop that waits. Not a program: bash loses a Ctrl-C that comes just as a program ends, as if it were the program's.
    read -r -t "$1" -u 8 || true # from a pipe that has no writer
}

check_site_value() { # WHERE NAME VALUE
    local rule=${SITE_RULES[$2]} pattern means
    case $rule in
        count) pattern='^[1-9][0-9]*$' means="a whole number above 0" ;;
        number | environment-number) pattern='^[0-9]+$' means="a whole number" ;;
        port) pattern='^[1-9][0-9]{3,4}$' means="a port above 1023" ;;
        path) pattern='^/[^[:space:]]*$' means="an absolute path" ;;
        paths) pattern='^/[^[:space:]]*( /[^[:space:]]*)*$' means="a list of absolute paths, separated by spaces" ;;
        word) pattern='^[^[:space:]]+$' means="one word" ;;
        time) pattern='^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$' means="a time of SLURM, such as 2-00:00:00" ;;
        *-or-*) pattern="^(${rule//-or-/|})$" means="one of ${rule//-or-/, }" ;;
        *) pattern='.' means="a value" ;;
    esac
    if [[ ! $3 =~ $pattern ]] || { [ "$rule" = port ] && [ "$3" -gt 65535 ]; }; then
        refuse "$1: $2 is '$3', which is not $means. Change it, or leave the line out."
    fi
}

read_site() { # FILE
    local file=$1 where line number=0 name value plain='^([^[:space:]"'"'"']*)[[:space:]]*([[:space:]]#.*)?$' quoted='^"([^"]*)"[[:space:]]*(#.*)?$'
    [ -n "$file" ] || refuse "no site file. Copy one of examples/sites, adapt it to this cluster, and give it with --site FILE."
    [[ -f $file && -r $file ]] || refuse "--site $file: cannot be read as a file. Copy one of examples/sites and adapt it to this cluster."
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1)) line=${line%$'\r'} # a file written under Windows has carriage returns
        where="$file, line $number"
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^([A-Za-z_][A-Za-z_0-9]*)=(.*)$ ]] ||
            refuse "$where: '$line' is not NAME=value. Write one assignment on each line, without export or spaces before '='."
        name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        [[ -v SITE_RULES[$name] ]] || refuse "$where: there is no $name in a site file. $(nearest_names "$name")"
        [[ ! -v SITE[$name] ]] || refuse "$where: $name is given twice. Leave one out."
        if [[ $value =~ $plain ]] || [[ $value =~ $quoted ]]; then value=${BASH_REMATCH[1]}; else
            refuse "$where: the value of $name is not one word. Put it in double quotes."
        fi
        case $value in *[\$\`\\]*) refuse "$where: $name is '$value'; \$, \` and \\ are not expanded in a site file. Write the value out." ;; esac
        check_site_value "$where" "$name" "$value"
        SITE[$name]=$value
    done < "$file"
    [ -n "${SITE[DEVICES_PER_NODE]:-}" ] || refuse "$file: DEVICES_PER_NODE is missing. Give the number of devices of a node, such as DEVICES_PER_NODE=8."
    [ -z "${SITE[CONTAINER_IMAGE]:-}" ] || [ -z "${SITE[CONTAINER_COMMAND]:-}" ] ||
        refuse "$file: CONTAINER_IMAGE (pyxis) and CONTAINER_COMMAND are both given. Leave one out."
    [ -z "${SITE[PYTORCH_ALLOC_CONF]:-}" ] || [ -z "${SITE[PYTORCH_NPU_ALLOC_CONF]:-}${SITE[PYTORCH_CUDA_ALLOC_CONF]:-}" ] ||
        refuse "$file: PYTORCH_ALLOC_CONF beside the variable of one device, which torch refuses. Leave one out."
    PYTHON=${SITE[PYTHON]:-$ROOT/.venv/bin/python}
    # the Python of `megatron-sorted launch`, where the package is installed and this is not a clone
    [ -n "${SITE[PYTHON]:-}" ] || [ -x "$PYTHON" ] || PYTHON=${SORTED_OWN_PYTHON:-$PYTHON}
}

nearest_names() { # NAME: names of which it may be a misspelling, else all that are not environment variables
    local name near=()
    for name in "${!SITE_RULES[@]}"; do
        [ "${name:0:5}" = "${1:0:5}" ] || [ "${name: -6}" = "${1: -6}" ] && near+=("$name")
    done
    if [ ${#near[@]} -gt 0 ]; then echo "Did you mean $(printf '%s\n' "${near[@]}" | sort | paste -sd ' ')?"; else
        for name in "${!SITE_RULES[@]}"; do [[ ${SITE_RULES[$name]} == environment* ]] || near+=("$name"); done
        echo "Use $(printf '%s\n' "${near[@]}" | sort | paste -sd ' '), or a variable of docs/clusters.md."
    fi
}

show_help() { # print the comment at the head of the script
    sed -n '/^set -euo/q; s/^# //p' "$0"
    exit 0
}

read_arguments() { # ALLOWED-OPTIONS ARGUMENTS...: set PRINT, RUN, RUN_ARGUMENTS and OPTION[--name]
    local allowed=$1 argument
    shift
    PRINT=no
    declare -gA OPTION=([--site]=${SORTED_SITE:-})
    while [ $# -gt 0 ]; do
        case " $allowed " in
            *" $1 "*)
                [ -n "${2:-}" ] || refuse "$1: its value is missing."
                OPTION[$1]=$2
                shift 2
                continue
                ;;
        esac
        case $1 in
            --print) PRINT=yes ;;
            -h | --help) show_help ;;
            -*) refuse "$1: options before the run file are --print $allowed. Settings of the run come after it." ;;
            *) break ;;
        esac
        shift
    done
    [ $# -gt 0 ] || refuse "no run file. Usage: $(basename "$0") [--print] [--site FILE] ... RUN.yaml [settings that override it]"
    [[ -f $1 && -r $1 ]] || refuse "$1: there is no such run file. Give a YAML file such as those in examples/."
    RUN=$(realpath "$1")
    shift
    for argument; do
        case ${argument%%=*} in --world-size | --world_size) refuse "$argument: launchers read the key world-size of the run file. Change it there." ;; esac
        case " --print $allowed " in *" ${argument%%=*} "*) refuse "$argument: stands after the run file, where settings of the run are. Put it before." ;; esac
    done
    RUN_ARGUMENTS=(--config "$RUN" "$@")
}

set_size() { # NODES (may be empty) THEIR-SOURCE: set NODES, DEVICES and WORLD_SIZE
    local given
    given=$(sed -n 's/^world[-_]size:[[:space:]]*\([1-9][0-9]*\)[[:space:]]*\(#.*\)\{0,1\}$/\1/p' "$RUN" | head -n 1)
    if [ -z "$given" ]; then
        given=$(sed -n '/^$/q; s/^# world-size: \([1-9][0-9]*\)[[:space:]]*$/\1/p' "$RUN" | head -n 1)
        [ -z "$given" ] || echo "note: $RUN: '# world-size: $given' is a comment. Write it as a key of the file: world-size: $given" >&2
    fi
    DEVICES=${SITE[DEVICES_PER_NODE]}
    [[ ${1:-1} =~ ^[1-9][0-9]*$ ]] || refuse "$2: '$1' is not a number of nodes. Give a whole number above 0."
    if [ -n "${1:-}" ]; then NODES=$1; else
        [ -n "$given" ] || refuse "$RUN: no key 'world-size: N'. Add it, or give --nodes."
        [ $((given % DEVICES)) = 0 ] ||
            refuse "$RUN: world-size $given is not a multiple of the $DEVICES devices of a node (DEVICES_PER_NODE). Change one of them."
        NODES=$((given / DEVICES))
    fi
    WORLD_SIZE=$((NODES * DEVICES))
    [ -z "$given" ] || [ "$given" = "$WORLD_SIZE" ] ||
        refuse "$NODES nodes (${2:-}) x $DEVICES devices are $WORLD_SIZE processes, but $RUN says 'world-size: $given'. Change the nodes, DEVICES_PER_NODE or that line."
}

use_project() { # ROOT: let Python find the package of a clone before an installed one; copied-out scripts have no package beside them
    [ ! -e "$1/megatron_sorted/__init__.py" ] || export PYTHONPATH=$1${PYTHONPATH:+:$PYTHONPATH}
}

check_run_here() { # check the settings before a job is queued, if this host can
    [ -z "${SITE[CONTAINER_IMAGE]:-}${SITE[CONTAINER_COMMAND]:-}" ] && [ -x "$PYTHON" ] || return 0
    "$PYTHON" -c "" > /dev/null 2>&1 || return 0 # Python may need MODULES, which only the nodes load
    use_project "$ROOT"
    PYTHONSAFEPATH=1 "$PYTHON" -m megatron_sorted.launching.facts --world-size "$WORLD_SIZE" -- "${RUN_ARGUMENTS[@]}" > /dev/null || exit 2
}

is_loopback() { # ADDRESS
    case $1 in "" | localhost | localhost.* | ip6-localhost | 127.* | ::1 | 0.0.0.0 | ::) return 0 ;; *) return 1 ;; esac
}

refuse_loopback() { # ADDRESS ITS-SOURCE
    [ "$NODES" = 1 ] || [ "${SITE[ONE_MACHINE]:-no}" = yes ] || ! is_loopback "$1" ||
        refuse "MASTER_ADDR '$1' ($2) is empty or this host itself, and $NODES nodes cannot connect there. Name the first node so that the others can reach it."
}

set_environment() { # MASTER-ADDR MASTER-PORT: set NODE_ENV, the environment of every node
    local name
    NODE_ENV=(
        "SORTED_KIND=$KIND" "SORTED_ROOT=$ROOT" "SORTED_NODES=$NODES" "SORTED_DEVICES=$DEVICES" "SORTED_PYTHON=$PYTHON"
        "SORTED_MASTER_ADDR=$1" "SORTED_MASTER_PORT=$2" "SORTED_MAX_RESTARTS=${SITE[MAX_RESTARTS]:-0}" "SORTED_LAUNCH=$LAUNCH"
        "SORTED_MODULES=${SITE[MODULES]:-}" "SORTED_SHARED_FILES=${SITE[SHARED_FILES]:-yes}" "SORTED_ONE_MACHINE=${SITE[ONE_MACHINE]:-no}"
        "SORTED_SET_ENV_FILES=${SITE[SET_ENV_FILES]:-/usr/local/Ascend/ascend-toolkit/set_env.sh}"
    )
    for name in "${!SITE[@]}"; do
        [[ ${SITE_RULES[$name]} != environment* ]] || NODE_ENV+=("$name=${SITE[$name]}")
    done
}

set_torchrun() { # NODE-RANK RUN-ARGUMENTS...: set TORCHRUN, the command. Static rendezvous: with c10d, any node may get any rank.
    TORCHRUN=(
        "$SORTED_PYTHON" -m torch.distributed.run "--nnodes=$SORTED_NODES" "--nproc-per-node=$SORTED_DEVICES" "--node-rank=$1"
        --rdzv-backend=static "--master-addr=$SORTED_MASTER_ADDR" "--master-port=$SORTED_MASTER_PORT" "--max-restarts=$SORTED_MAX_RESTARTS"
    )
    if [ -e "$SORTED_ROOT/pretrain_sorted.py" ]; then TORCHRUN+=("$SORTED_ROOT/pretrain_sorted.py"); else TORCHRUN+=(-m megatron_sorted train); fi
    TORCHRUN+=("${@:2}")
}

print_node_command() { # print the command of a node
    local assignment
    for assignment in "${NODE_ENV[@]}"; do local "${assignment?}"; done
    set_torchrun NODE_RANK "${RUN_ARGUMENTS[@]}"
    echo "# on every node, NODE_RANK 0..$((NODES - 1)):"
    printf '%q ' "${TORCHRUN[@]}"
    echo
    echo "# environment of the nodes:"
    printf '%s\n' "${NODE_ENV[@]}" | sort
}

print_noise() { # print the lines of modules and the like among the reports of nodes
    awk -F '\t' '$1 != "fact" && $1 != "error"'
}

judge_nodes() { # FILE HOSTS...: check the reports of the nodes; set FACT[name], or print the errors and return 1
    local name value
    awk -f "$ROOT/slurm/judge.awk" -v hosts="${*:2}" "$1" || return 1
    declare -gA FACT=()
    while IFS=$'\t' read -r name value; do FACT[$name]=$value; done < <(awk -F '\t' -v OFS='\t' '$1 == "fact" && !seen[$3]++ { print $3, $4 }' "$1")
}
