#!/bin/bash
# Trains on hosts that are reached by ssh, without a scheduler: one command, from one of them or from elsewhere.   docs/clusters.md
#   slurm/launch_hosts.sh [--print] gpu|npu --hosts FILE|A,B,C [--site FILE] [--logs DIR] RUN.yaml [settings that override it]
# A log per host in DIR. The first failure ends all, so do Ctrl-C and the end of this script, however it comes: what runs on a host lives
# as long as the standard input of its ssh, which this script alone holds open.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=slurm/cluster.sh
. "$ROOT/slurm/cluster.sh"
STOP_SECONDS=60  # torchrun gives its ranks 30 to save, node.sh gives torchrun 40
NO_DIRECTORY=91  # status of a host that lacks the directory of the run
UNREACHABLE=255  # status of ssh when it does not get in
NOT_FOUND=127    # status of env when there is no such program
stopped_by=

read_hosts() { # FILE|A,B,C: sets HOSTS and HOSTS_FROM
    local host seen=" " nofile=""
    [ -n "$1" ] || refuse "--hosts is missing. Give a file with one host a line, the first node first, or their names with commas between."
    HOSTS_FROM=--hosts
    if [ -f "$1" ]; then read -r -d '' -a HOSTS < <(sed 's/#.*//' "$1" | tr -d '\r') || true; else
        IFS=, read -r -a HOSTS <<< "$1"
        [[ $1 == *,* ]] || nofile="there is no file $1"
        [ -z "$nofile" ] || HOSTS_FROM="--hosts; $nofile, so it names a host"
    fi
    [ ${#HOSTS[@]} -gt 0 ] || refuse "--hosts $1: names no host. Write one a line."
    for host in "${HOSTS[@]}"; do
        # what begins with - would be an option of ssh
        [[ $host =~ ^[A-Za-z0-9_:][A-Za-z0-9_@.:-]*$ ]] ||
            refuse "--hosts $1: ${nofile:+$nofile, and }'$host' is not the name of a host. Give names, one a line or with commas between."
        [[ $seen != *" $host "* ]] || refuse "--hosts $1: $host is named twice. A host runs one launcher for all its devices; leave one out."
        seen+="$host "
    done
}

settle_ways() { # sets WAY and SSH, exported because pdsh starts what runs for a host
    WAY=${SITE[REMOTE_SHELL]:-}
    if [ -z "$WAY" ]; then if type pdsh > /dev/null 2>&1; then WAY=pdsh; else WAY=ssh; fi; fi
    type ssh > /dev/null 2>&1 || refuse "there is no command ssh here. Install it (openssh-client)."
    type "$WAY" > /dev/null 2>&1 || refuse "REMOTE_SHELL is $WAY, which is not installed here. Install it, or leave the line out of the site file."
    export SSH="ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 ${SITE[SSH_OPTIONS]:-}"
    [ -z "${SITE[CONTAINER_IMAGE]:-}" ] || refuse "CONTAINER_IMAGE is pyxis's, a part of SLURM. Give CONTAINER_COMMAND, such as 'apptainer exec --nv IMAGE'."
}

remote_command() { # MODE: what a host is told, with @HOST@ for its name. bash, as the user's own shell there may be another.
    local words
    words=$(printf '%q ' "${NODE_ENV[@]}" "$ROOT/slurm/node.sh" "$1" listed "${RUN_WORDS[@]}")
    printf 'bash -c %q' "cd $(printf %q "$PWD") || exit $NO_DIRECTORY; exec ${SITE[CONTAINER_COMMAND]:-} env SORTED_HOST=@HOST@ $words"
}

reach() { # HOST: runs REMOTE there, notes its status in OUT/ended
    local status=0
    trap '' INT TERM HUP # those are for the launcher, which ends the hosts in good order; ssh keeps what is ignored
    # shellcheck disable=SC2029,SC2086 # expanded here, into words
    $SSH "$1" "${REMOTE//@HOST@/$1}" < "$LIFELINE" > "$OUT/$1.log" 2>&1 || status=$?
    echo "$1 $status" >> "$OUT/ended"
}

fan_out() { # MODE DIRECTORY
    local host
    REMOTE=$(remote_command "$1") OUT=$2
    export REMOTE OUT
    mkdir -p "$OUT"
    : > "$OUT/ended"
    if [ "$WAY" = pdsh ]; then
        # in a session of its own, as it would end all at a Ctrl-C; it gets numbers, as it reads USER@ and : in names its own way
        export -f reach
        # shellcheck disable=SC2016
        setsid pdsh -R exec -f "$NODES" -w "$(seq -s , 1 "$NODES")" bash -c 'reach "${@:$1+1:1}"' reach %h "${HOSTS[@]}" 8>&- 9>&- &
        REACHING=($!)
    else
        REACHING=()
        for host in "${HOSTS[@]}"; do
            reach "$host" 8>&- 9>&- &
            REACHING+=($!)
        done
    fi
}

all_ended() { # without a program, as is all that runs again and again while hosts work (see pause)
    local lines
    mapfile -t lines < "$OUT/ended"
    [ ${#lines[@]} -ge "$NODES" ]
}

one_failed() {
    local lines line
    mapfile -t lines < "$OUT/ended"
    for line in "${lines[@]}"; do [[ $line == *" 0" ]] || return 0; done
    return 1
}

pass_time() { # a moment, in which what reaches the hosts must not die
    if kill -0 "${REACHING[@]}" 2> /dev/null || all_ended; then pause 0.3; else
        echo "error: $WAY ended before the hosts did. It said why above; REMOTE_SHELL=ssh in the site file does without pdsh." >&2
        exit 1
    fi
}

await() { # until all hosts have ended, or one has failed, or this script is told to end: 1 for the latter two
    while [ -z "$stopped_by" ]; do
        ! one_failed || return 1
        ! all_ended || return 0
        pass_time
    done
    return 1
}

end_all() { # closes the line that holds the hosts, and waits until they are done
    local until=$((SECONDS + STOP_SECONDS)) host
    exec 9>&-
    while ! all_ended && [ "$SECONDS" -lt "$until" ]; do pause 0.3; done
    for host in "${HOSTS[@]}"; do
        grep -q "^$host " "$OUT/ended" || echo "error: $host did not answer within $STOP_SECONDS s; look there for processes that are left." >&2
    done
}

check_hosts() {
    local host status why
    fan_out check "$LOGS/check"
    while [ -z "$stopped_by" ] && ! all_ended; do pass_time; done
    if [ -n "$stopped_by" ]; then
        echo "stopped by $stopped_by before training" >&2
        exit 130
    fi
    while read -r host status; do
        why=
        case $status in
            "$UNREACHABLE") why="cannot be reached: $(tail -n 1 "$OUT/$host.log" | sed 's/[.[:space:]]*$//'). Make \"$SSH $host true\" work, or leave the host out." ;;
            "$NO_DIRECTORY") why="has no directory $PWD, in which the run works. Start it in one that all hosts share, or make it there." ;;
            "$NOT_FOUND") why="lacks a program (above). The project, $ROOT, and CONTAINER_COMMAND must be there on every host." ;;
        esac
        [ -z "$why" ] || printf 'error\t%s\tfirst\t%s\n' "$host" "$why" >> "$OUT/$host.log"
    done < "$OUT/ended"
    for host in "${HOSTS[@]}"; do print_noise < "$OUT/$host.log" | sed "s|^|$host: |"; done
    for host in "${HOSTS[@]}"; do cat "$OUT/$host.log"; done > "$OUT/all"
    judge_nodes "$OUT/all" "${HOSTS[@]}" || exit 1
    rm -f "${FACT[save]:-$PWD}/.launch_token"
    NODE_ENV+=("SORTED_TIMEOUT_SECONDS=${FACT[timeout_seconds]}")
}

tell_end() { # STATUS-OF-AWAIT
    local host status
    if [ -n "$stopped_by" ]; then
        ! all_ended || echo "stopped by $stopped_by; nothing is left running. The same command goes on from the last checkpoint." >&2
        exit 130
    fi
    if [ "$1" != 0 ]; then
        read -r host status < <(grep -v ' 0$' "$OUT/ended")
        echo "error: $host ended first, with status $status; all others were ended. The end of $OUT/$host.log:" >&2
        tail -n 25 "$OUT/$host.log" | sed 's/^/    /' >&2
        exit 1
    fi
    [ -n "${FACT[save]}" ] && [ -e "${FACT[save]}/stopped.json" ] || exit 0
    echo "stopped early: $(cat "${FACT[save]}/stopped.json")"
    exit 75
}

main() { # a function, so that a change of this file does not reach a script that runs
    local name host address console line ended=0 before=()
    while [ "${1:-}" = --print ]; do before=(--print) && shift; done
    case ${1:-} in gpu | npu) KIND=$1 ;; -h | --help) show_help ;; *) refuse "'${1:-}': the first word is gpu or npu, what the hosts have." ;; esac
    shift
    read_arguments "--site --hosts --logs" ${before[@]+"${before[@]}"} "$@"
    read_site "${OPTION[--site]}"
    read_hosts "${OPTION[--hosts]:-}"
    settle_shape ${#HOSTS[@]} "$HOSTS_FROM"
    settle_ways
    # an ssh alias is not an address; loopback is where every host would meet itself
    # shellcheck disable=SC2086
    address=$($SSH -T -G "${HOSTS[0]}" | sed -n 's/^hostname //p') || refuse "ssh does not take its options (above). Correct SSH_OPTIONS in the site file."
    refuse_loopback "$address" "the first of --hosts"
    check_run_here
    LAUNCH=$HOSTNAME.$$.$(date +%s)
    settle_environment "$address" "${SITE[MASTER_PORT]:-29500}"
    NODE_ENV+=("SORTED_HOSTS=${HOSTS[*]}")
    if [ "$PRINT" = yes ]; then
        echo "# by $WAY:"
        REMOTE=$(remote_command attend)
        for host in "${HOSTS[@]}"; do
            line=${REMOTE//@HOST@/$host}
            echo "$SSH $host '${line//"'"/"'\\''"}'"
        done
        print_node_command
        return
    fi

    LOGS=${OPTION[--logs]:-logs/$(basename "$RUN" | sed 's/\.[^.]*$//')-$(date +%Y%m%d-%H%M%S)}
    mkdir -p "$LOGS"
    for name in INT TERM HUP; do
        # shellcheck disable=SC2064 # the name of now
        trap "stopped_by=SIG$name" "$name"
    done
    LIFELINE=$(mktemp -u)
    export LIFELINE
    trap 'rm -f "$LIFELINE"; kill $(jobs -p) 2> /dev/null || true' EXIT
    open_pause
    mkfifo "$LIFELINE"
    exec 9<> "$LIFELINE"
    check_hosts
    echo "logs: $LOGS"
    fan_out attend "$LOGS"
    tail --pid=$$ -n +1 -F "$LOGS/${HOSTS[0]}.log" 2> /dev/null 8>&- 9>&- &
    console=$!
    await || ended=1
    [ "$ended" = 0 ] || end_all
    sleep 1 # the last lines
    kill "$console" 2> /dev/null || true
    wait "$console" 2> /dev/null || true
    tell_end "$ended"
}

main "$@"; exit
