#!/bin/bash
# The launchers' command on every node, inside the container if there is one. NODE-RANK is a number, "slurm", or "listed" (SORTED_HOSTS).
#   node.sh check NODE-RANK RUN-ARGUMENTS...     print facts and errors of this node, for judge.awk
#   node.sh train NODE-RANK RUN-ARGUMENTS...     become torchrun
#   node.sh attend NODE-RANK RUN-ARGUMENTS...    run torchrun as long as standard input is open, and leave nothing running
set -uo pipefail
trap '' USR1 # a scheduler's warning is for the workers; it would end torchrun
# shellcheck source=slurm/cluster.sh
. "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
mode=$1 rank=$2
shift 2
host=${SORTED_HOST:-${SLURMD_NODENAME:-$HOSTNAME}}
case $rank in
    slurm) rank=$SLURM_NODEID ;;
    listed) rank=$(tr ' ' '\n' <<< "$SORTED_HOSTS" | grep -nxF "$host" | cut -d : -f 1) rank=$((rank - 1)) ;;
esac
failed=no
declare -A FACT

report() { # NAME VALUE
    printf 'fact\t%s\t%s\t%s\n' "$host" "$1" "$2"
}

problem() { # MESSAGE [first|after]: an error of this node; further checks still run
    printf 'error\t%s\t%s\t%s\n' "$host" "${2:-first}" "$(printf %s "$1" | tr '\n\t' '  ')"
    failed=yes
}

prepare() { # load modules, the device's own environment, and variables
    local file
    set +u # sourced files of others may read unset variables
    if [ -n "$SORTED_MODULES" ]; then
        # shellcheck disable=SC1091
        type module > /dev/null 2>&1 || . /etc/profile > /dev/null 2>&1
        # shellcheck disable=SC2086
        if ! type module > /dev/null 2>&1; then problem "MODULES is '$SORTED_MODULES', but this node has no command 'module'. Leave the line out of the site file."
        elif ! module load $SORTED_MODULES; then problem "'module load $SORTED_MODULES' failed (above). Correct MODULES in the site file."; fi
    fi
    use_project "$SORTED_ROOT"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    if [ "$SORTED_KIND" = gpu ]; then
        export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # an installed torch_npu would be loaded, and fail
        return
    fi
    for file in $SORTED_SET_ENV_FILES; do
        # shellcheck disable=SC1090
        if [ -r "$file" ]; then . "$file"; else problem "$file is not there. Install CANN, or name its set_env.sh: SET_ENV_FILES in the site file."; fi
    done
    unset RANK_TABLE_FILE # torchrun needs none, and one left by another job would be used
    # SLURM sets no variable for NPUs; where a site declares them as gpu, it sets that of GPUs
    export ASCEND_RT_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((SORTED_DEVICES - 1)))}
    [ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
}

limit_waits() { # TIMEOUT-SECONDS of the process groups: HCCL must give up before them, to report its own error
    local name limit=$1 ours=$(($1 - $1 / 10))
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-$((ours < 7200 ? ours : 7200))} HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-$ours}
    if [ "$HCCL_CONNECT_TIMEOUT" -lt 120 ] || [ "$HCCL_CONNECT_TIMEOUT" -gt 7200 ]; then
        problem "HCCL_CONNECT_TIMEOUT is $HCCL_CONNECT_TIMEOUT s, and HCCL accepts 120 to 7200. Correct it, or give --distributed-timeout-minutes 3 or more."
    fi
    for name in HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT; do
        # 0: no limit
        if ! [ "${!name}" -gt 0 ] || ! [ "${!name}" -lt "$limit" ]; then
            problem "$name is ${!name} s, not below the $limit s of --distributed-timeout-minutes. Lower it, or raise --distributed-timeout-minutes."
        fi
    done
    [ "$HCCL_EXEC_TIMEOUT" -lt 1868 ] || export HCCL_EVENT_TIMEOUT=${HCCL_EVENT_TIMEOUT:-$((HCCL_EXEC_TIMEOUT + 68))}
}

count_devices() {
    local files=()
    if [ "$SORTED_KIND" = gpu ] && type nvidia-smi > /dev/null 2>&1; then nvidia-smi -L 2> /dev/null | grep -c '^GPU '; else
        shopt -s nullglob
        if [ "$SORTED_KIND" = gpu ]; then files=(/dev/nvidia[0-9]*); else files=(/dev/davinci[0-9]*); fi
        echo ${#files[@]}
    fi
}

query_python() { # RUN-ARGUMENTS...: set FACT, the facts about run and host
    local output errors packages=torch,megatron-core name value lock=()
    [ -x "$SORTED_PYTHON" ] || { problem "$SORTED_PYTHON cannot be run. Name the Python to use on the nodes: PYTHON in the site file."; return 1; }
    [ "$SORTED_KIND" = npu ] && packages+=,torch_npu
    [ "$rank" = 0 ] && lock=(--check-lock)
    errors=$(mktemp)
    output=$(PYTHONSAFEPATH=1 "$SORTED_PYTHON" -m megatron_sorted.launching.facts --world-size $((SORTED_NODES * SORTED_DEVICES)) --packages "$packages" "${lock[@]}" \
        -- "$@" 2> "$errors") || problem "$(sed 's/^error: //' "$errors" | tail -n 1)"
    rm -f "$errors"
    [ -n "$output" ] || return 1
    while IFS=$'\t' read -r name value; do
        FACT[$name]=$value
        report "$name" "$value"
    done <<< "$output"
    report commit "$(git -C "$SORTED_ROOT" rev-parse --short HEAD 2> /dev/null || echo unknown)"
    report run "$(sha256sum < "$2" | cut -c 1-12)"
}

check_torch() { # with a torch that sees no devices, --device auto would mean cpu
    local packages=torch module=cuda output errors remedy
    [ "$SORTED_KIND" = gpu ] || packages="torch, torch_npu" module=npu
    errors=$(mktemp)
    if output=$(TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$SORTED_PYTHON" -c "import $packages; print(torch.__version__, torch.$module.device_count())" 2> "$errors"); then
        output=$(tail -n 1 <<< "$output")
        [ "${output##* }" -ge "$SORTED_DEVICES" ] ||
            problem "torch ${output% *} sees ${output##* } of the $SORTED_DEVICES devices of DEVICES_PER_NODE: another build, an old driver, or a variable that hides them. Run 'megatron-sorted doctor' there to see which."
    else
        output=$(tail -n 1 "$errors")
        case $SORTED_KIND-$output in
            *"Two accelerators"*) remedy="Use a CPU build of torch on Ascend hosts." ;;
            npu-*) remedy="Source CANN's set_env.sh (SET_ENV_FILES) and install a torch_npu of torch's version." ;;
            *) remedy="Install torch again for this node, or load what it needs: MODULES in the site file." ;;
        esac
        problem "${packages##* } does not load: $output. $remedy"
    fi
    rm -f "$errors"
}

check_devices() {
    local count cann
    case $SORTED_KIND-${FACT[device]} in
        *-cpu) return ;;
        gpu-npu | npu-cuda) problem "--device ${FACT[device]} does not fit the launcher for ${SORTED_KIND}s. Start the launcher for the other kind of devices, or give --device auto." ;;
    esac
    count=$(count_devices)
    [ "${count:-0}" -ge "$SORTED_DEVICES" ] ||
        problem "has ${count:-0} of the $SORTED_DEVICES devices of DEVICES_PER_NODE. Leave the node out until it is repaired, or correct the site file."
    check_torch
    [ "$SORTED_KIND" = npu ] || return 0
    limit_waits "${FACT[timeout_seconds]}"
    cann=${ASCEND_TOOLKIT_HOME:-${ASCEND_HOME_PATH:-}}
    report cann "${cann:+$(readlink -f "$cann")}" # its path holds the version
}

check_rendezvous() { # check address, port and interface
    local address=$SORTED_MASTER_ADDR port=$SORTED_MASTER_PORT machine
    machine=$(cat /proc/sys/kernel/random/boot_id 2> /dev/null)
    [ "$SORTED_ONE_MACHINE" = yes ] || [ -z "$machine" ] || report machine "$machine $(uname -n) $(readlink /proc/self/ns/net)"
    if [ "$rank" = 0 ]; then
        # on any address: torchrun listens on all of them
        awk -v port="$(printf ':%04X' "$port")" '$4 == "0A" && substr($2, length($2) - 4) == port { found = 1 } END { exit !found }' \
            < <(cat /proc/net/tcp /proc/net/tcp6 2> /dev/null) &&
            problem "port $port of $address is in use. Give another: MASTER_PORT in the site file, or end the program that listens there."
    elif [ "$SORTED_ONE_MACHINE" = no ]; then
        address=$(getent hosts "$address" | cut -d ' ' -f 1)
        is_loopback "$address" && problem "the first node, $SORTED_MASTER_ADDR, is '$address' seen from here. Correct /etc/hosts or name resolution."
    fi
    [ -z "${GLOO_SOCKET_IFNAME:-}" ] || [ -e "/sys/class/net/$GLOO_SOCKET_IFNAME" ] ||
        problem "has no network interface $GLOO_SOCKET_IFNAME (it has $(cd /sys/class/net && echo ./* | sed 's|\./||g')). Correct GLOO_SOCKET_IFNAME in the site file."
}

check_files() { # all nodes must see the directory of checkpoints
    local directory=${FACT[save]:-$PWD} token
    [ "$SORTED_NODES" -gt 1 ] || return
    if [ "$SORTED_SHARED_FILES" = no ]; then
        [ -z "${FACT[save]}" ] || [ "$rank" != 0 ] ||
            problem "--save $directory: all nodes write into one checkpoint, but the site file has SHARED_FILES=no. Mount a shared file system, or leave --save out."
        return
    fi
    token=$directory/.launch_token
    if [ "$rank" = 0 ]; then
        { mkdir -p "$directory" && echo "$SORTED_LAUNCH" > "$token"; } 2> /dev/null || problem "$directory cannot be written. Give --save a directory that can."
        return
    fi
    for _ in {1..60}; do # a network file system may show a new file late
        [ "$(cat "$token" 2> /dev/null)" = "$SORTED_LAUNCH" ] && return
        sleep 0.5
    done
    problem "does not see the first node's file in $directory. Use a file system that all nodes share, or set SHARED_FILES=no and save nothing." after
}

end_everything() { # end every process of this launch on this node, also those in other sessions
    local environ pid
    while read -r environ; do
        pid=${environ#/proc/}
        kill -KILL "${pid%/environ}" 2> /dev/null
    done < <(grep -lzxF "SORTED_NODE=$SORTED_LAUNCH.$rank" /proc/[0-9]*/environ 2> /dev/null)
}

attend() { # run torchrun and end it when standard input closes: ssh does not end what it has started
    local child until=0 line
    SORTED_NODE=$SORTED_LAUNCH.$rank setsid "${TORCHRUN[@]}" < /dev/null &
    child=$!
    trap '' TERM HUP INT
    while kill -0 "$child" 2> /dev/null; do
        if [ "$until" -gt 0 ]; then
            sleep 0.5
            [ "$SECONDS" -lt "$until" ] || break
        else
            read -r -t 0.5 line
            if [ $? = 1 ]; then # closed; a status above 128 is the timeout of read
                kill -TERM "$child" 2> /dev/null # ranks save; torchrun gives them 30 s
                until=$((SECONDS + 40))
            fi
        fi
    done
    end_everything
    wait "$child"
}

main() { # a function, so that a change of this file does not affect running nodes
    prepare
    set -u
    if [ "$mode" = check ]; then
        if query_python "$@"; then
            check_devices
            check_rendezvous
            check_files
        fi
        [ "$failed" = no ]
        return
    fi
    [ "$failed" = no ] || return 1
    [ "$SORTED_KIND" = gpu ] || limit_waits "$SORTED_TIMEOUT_SECONDS"
    set_torchrun "$rank" "$@"
    if [ "$mode" = attend ]; then
        attend
        return
    fi
    exec "${TORCHRUN[@]}"
}

main "$@"; exit
