#!/bin/bash
# Train on hosts that are reached by ssh, without a scheduler: one command, on one of them or elsewhere.   docs/clusters.md
#   slurm/launch_hosts.sh [--print] gpu|npu --hosts FILE|A,B,C [--site FILE] [--logs DIR] RUN.yaml [settings that override it]
# DIR gets a log of each host. The first failure ends all hosts; so do Ctrl-C and any end of this script: the processes of a host live
# as long as the standard input of its ssh, which this script alone holds open.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=slurm/cluster.sh
. "$ROOT/slurm/cluster.sh"
STOP_SECONDS=60  # torchrun gives its ranks 30 s to save, node.sh gives torchrun 40 s
NO_DIRECTORY=91  # status of a host that lacks the directory of the run
UNREACHABLE=255  # status of ssh when it cannot log in
NOT_FOUND=127    # status of env when the program is missing
stopped_by=

read_hosts() { # FILE|A,B,C: set HOSTS and HOSTS_FROM
    local host seen=" " nofile=""
    [ -n "$1" ] || refuse "--hosts is missing. Give a file with one host on each line, the first node first, or their names separated by commas."
    HOSTS_FROM=--hosts
    if [ -f "$1" ]; then read -r -d '' -a HOSTS < <(sed 's/#.*//' "$1" | tr -d '\r') || true; else
        IFS=, read -r -a HOSTS <<< "$1"
        [[ $1 == *,* ]] || nofile="there is no file $1"
        [ -z "$nofile" ] || HOSTS_FROM="--hosts; $nofile, so it names a host"
    fi
    [ ${#HOSTS[@]} -gt 0 ] || refuse "--hosts $1: names no host. Write one on each line."
    for host in "${HOSTS[@]}"; do
        # a name that begins with - would be an option of ssh
        [[ $host =~ ^[A-Za-z0-9_:][A-Za-z0-9_@.:-]*$ ]] ||
            refuse "--hosts $1: ${nofile:+$nofile, and }'$host' is not the name of a host. Give names, one on each line or separated by commas."
        [[ $seen != *" $host "* ]] || refuse "--hosts $1: $host is named twice. A host runs one launcher for all its devices; leave one out."
        seen+="$host "
    done
}

choose_remote_shell() { # set REMOTE_SHELL and SSH, which is exported for the processes that pdsh starts
    REMOTE_SHELL=${SITE[REMOTE_SHELL]:-}
    if [ -z "$REMOTE_SHELL" ]; then if type pdsh > /dev/null 2>&1; then REMOTE_SHELL=pdsh; else REMOTE_SHELL=ssh; fi; fi
    type ssh > /dev/null 2>&1 || refuse "there is no command ssh here. Install it (openssh-client)."
    type "$REMOTE_SHELL" > /dev/null 2>&1 || refuse "REMOTE_SHELL is $REMOTE_SHELL, which is not installed here. Install it, or leave the line out of the site file."
    export SSH="ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 ${SITE[SSH_OPTIONS]:-}"
    [ -z "${SITE[CONTAINER_IMAGE]:-}" ] || refuse "CONTAINER_IMAGE needs pyxis, a part of SLURM. Give CONTAINER_COMMAND, such as 'apptainer exec --nv IMAGE'."
}

remote_command() { # MODE: print the command of a host, with @HOST@ for its name. In bash, since the user's own shell may differ.
    local arguments
    arguments=$(printf '%q ' "${NODE_ENV[@]}" "$ROOT/slurm/node.sh" "$1" listed "${RUN_ARGUMENTS[@]}")
    printf 'bash -c %q' "cd $(printf %q "$PWD") || exit $NO_DIRECTORY; exec ${SITE[CONTAINER_COMMAND]:-} env SORTED_HOST=@HOST@ $arguments"
}

run_on_host() { # HOST: run REMOTE there, and append its status to OUT/ended
    local status=0
    trap '' INT TERM HUP # signals are for the launcher, which ends the hosts in order; ssh inherits that they are ignored
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
    if [ "$REMOTE_SHELL" = pdsh ]; then
        # in its own session, since Ctrl-C would make it end all hosts; with numbers, since it interprets USER@ and : in names
        export -f run_on_host
        # shellcheck disable=SC2016
        setsid pdsh -R exec -f "$NODES" -w "$(seq -s , 1 "$NODES")" bash -c 'run_on_host "${@:$1+1:1}"' run_on_host %h "${HOSTS[@]}" 8>&- 9>&- &
        CLIENTS=($!)
    else
        CLIENTS=()
        for host in "${HOSTS[@]}"; do
            run_on_host "$host" 8>&- 9>&- &
            CLIENTS+=($!)
        done
    fi
}

all_ended() { # without programs, like everything that is repeated while hosts work (see pause)
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

wait_a_moment() { # fail if the processes that run ssh have died
    if kill -0 "${CLIENTS[@]}" 2> /dev/null || all_ended; then pause 0.3; else
        echo "error: $REMOTE_SHELL ended before the hosts did. See its output above; REMOTE_SHELL=ssh in the site file avoids pdsh." >&2
        exit 1
    fi
}

await() { # wait until all hosts have ended; return 1 if one has failed or this script is stopped
    while [ -z "$stopped_by" ]; do
        ! one_failed || return 1
        ! all_ended || return 0
        wait_a_moment
    done
    return 1
}

end_all() { # close the pipe that keeps the hosts running, and wait until they have ended
    local until=$((SECONDS + STOP_SECONDS)) host
    exec 9>&-
    while ! all_ended && [ "$SECONDS" -lt "$until" ]; do pause 0.3; done
    for host in "${HOSTS[@]}"; do
        grep -q "^$host " "$OUT/ended" || echo "error: $host did not answer within $STOP_SECONDS s; look there for remaining processes." >&2
    done
}

check_hosts() {
    local host status reason
    fan_out check "$LOGS/check"
    while [ -z "$stopped_by" ] && ! all_ended; do wait_a_moment; done
    if [ -n "$stopped_by" ]; then
        echo "stopped by $stopped_by before training" >&2
        exit 130
    fi
    while read -r host status; do
        reason=
        case $status in
            "$UNREACHABLE") reason="cannot be reached: $(tail -n 1 "$OUT/$host.log" | sed 's/[.[:space:]]*$//'). Make \"$SSH $host true\" work, or leave the host out." ;;
            "$NO_DIRECTORY") reason="has no directory $PWD, the run's working directory. Start the run in one that all hosts share, or create it there." ;;
            "$NOT_FOUND") reason="lacks a program (above). The project, $ROOT, and CONTAINER_COMMAND must exist on every host." ;;
        esac
        [ -z "$reason" ] || printf 'error\t%s\tfirst\t%s\n' "$host" "$reason" >> "$OUT/$host.log"
    done < "$OUT/ended"
    for host in "${HOSTS[@]}"; do print_noise < "$OUT/$host.log" | sed "s|^|$host: |"; done
    for host in "${HOSTS[@]}"; do cat "$OUT/$host.log"; done > "$OUT/all"
    judge_nodes "$OUT/all" "${HOSTS[@]}" || exit 1
    rm -f "${FACT[save]:-$PWD}/.launch_token"
    NODE_ENV+=("SORTED_TIMEOUT_SECONDS=${FACT[timeout_seconds]}")
}

report_end() { # STATUS-OF-AWAIT
    local host status
    if [ -n "$stopped_by" ]; then
        ! all_ended || echo "stopped by $stopped_by; nothing is left running. The same command resumes from the last checkpoint." >&2
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

main() { # a function, so that a change of this file does not affect a running script
    local name host address console line ended=0 before=()
    while [ "${1:-}" = --print ]; do before=(--print) && shift; done
    case ${1:-} in gpu | npu) KIND=$1 ;; -h | --help) show_help ;; *) refuse "'${1:-}': the first argument is the device of the hosts, gpu or npu." ;; esac
    shift
    read_arguments "--site --hosts --logs" ${before[@]+"${before[@]}"} "$@"
    read_site "${OPTION[--site]}"
    read_hosts "${OPTION[--hosts]:-}"
    set_size ${#HOSTS[@]} "$HOSTS_FROM"
    choose_remote_shell
    # an ssh alias is not an address; with a loopback address every host would connect to itself
    # shellcheck disable=SC2086
    address=$($SSH -T -G "${HOSTS[0]}" | sed -n 's/^hostname //p') || refuse "ssh does not accept its options (above). Correct SSH_OPTIONS in the site file."
    refuse_loopback "$address" "the first of --hosts"
    check_run_here
    LAUNCH=$HOSTNAME.$$.$(date +%s)
    set_environment "$address" "${SITE[MASTER_PORT]:-29500}"
    NODE_ENV+=("SORTED_HOSTS=${HOSTS[*]}")
    if [ "$PRINT" = yes ]; then
        echo "# by $REMOTE_SHELL:"
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
        # shellcheck disable=SC2064 # the name is expanded now
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
    sleep 1 # for the last lines of the log
    kill "$console" 2> /dev/null || true
    wait "$console" 2> /dev/null || true
    report_end "$ended"
}

main "$@"; exit
