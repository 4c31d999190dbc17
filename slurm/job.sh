# shellcheck shell=bash
# A SLURM job: submitted from a login node, then checked and run in its allocation. Sourced by gpu.sbatch and npu.sbatch.
# shellcheck source=slurm/cluster.sh
. "$ROOT/slurm/cluster.sh"

# A signal to a task that is just starting would kill it before it can ignore the signal.
START_SECONDS=10
FORWARD_SECONDS=10

job_main() { # ARGUMENTS...
    read_arguments "--site --nodes" "$@"
    read_site "${OPTION[--site]}"
    if [ -n "${SLURM_JOB_ID:-}" ] && [ "$PRINT" = no ]; then run_job; else submit_job "$@"; fi
}

seconds_of() { # TIME in a form of SLURM: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S
    local days=0 a b c
    IFS=: read -r a b c <<< "${1#*-}"
    if [[ $1 == *-* ]]; then days=${1%%-*}; elif [ -z "$b" ]; then b=$a a=0; elif [ -z "$c" ]; then c=$b b=$a a=0; fi
    echo $((10#$days * 86400 + 10#$a * 3600 + 10#${b:-0} * 60 + 10#${c:-0}))
}

check_time() { # a job that must save as soon as it starts would be requeued forever
    local limit
    limit=$(seconds_of "${SITE[TIME_LIMIT]:-0}") # 0: no limit
    [ "$limit" = 0 ] || [ "$limit" -gt "${SITE[SAVE_SECONDS]:-300}" ] ||
        refuse "TIME_LIMIT=${SITE[TIME_LIMIT]} is $limit s, of which SAVE_SECONDS (${SITE[SAVE_SECONDS]:-300}) leaves none to train. Raise it, or lower SAVE_SECONDS."
}

set_job_options() { # set SBATCH and SRUN, the options of each, and NODE, the command of a node
    local option name mounts
    SBATCH=(
        "--job-name=$(basename "$RUN" | sed 's/\.[^.]*$//')" "--nodes=$NODES" --ntasks-per-node=1 --exclusive --mem=0 --requeue --open-mode=append
        "--signal=B:USR1@${SITE[SAVE_SECONDS]:-300}" "--output=%x-%j.out" "--export=ALL,SORTED_ROOT=$ROOT"
    )
    if [ "$KIND" = gpu ]; then option="--gpus-per-node=$DEVICES"; else option="--gres=npu:$DEVICES"; fi
    option=${SITE[DEVICE_REQUEST]:-$option}
    # shellcheck disable=SC2206 # values of the site file are split into words
    [ "$option" = none ] || SBATCH+=($option)
    for name in PARTITION:--partition ACCOUNT:--account TIME_LIMIT:--time; do
        option=${SITE[${name%%:*}]:-}
        [ -z "$option" ] || SBATCH+=("${name#*:}=$option")
    done
    # shellcheck disable=SC2206
    SBATCH+=(${SITE[SBATCH_OPTIONS]:-})
    # shellcheck disable=SC2206
    SRUN=("--nodes=$NODES" "--ntasks=$NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 ${SITE[SRUN_OPTIONS]:-})
    NODE=("$ROOT/slurm/node.sh")
    if [ -n "${SITE[CONTAINER_IMAGE]:-}" ]; then
        # the run file may be in another directory
        mounts=$(printf '%s\n' "$ROOT" "$PWD" "$(dirname "$RUN")" | awk '!seen[$0]++ { print $0 ":" $0 }' | paste -sd ,)
        # variables of the image override those of the host that are not named here
        SRUN+=(
            "--container-image=${SITE[CONTAINER_IMAGE]}" "--container-mounts=$mounts${SITE[CONTAINER_MOUNTS]:+,${SITE[CONTAINER_MOUNTS]}}"
            "--container-workdir=$PWD" "--container-env=$(printf '%s\n' "${NODE_ENV[@]%%=*}" | paste -sd ,)"
        )
    elif [ -n "${SITE[CONTAINER_COMMAND]:-}" ]; then
        # shellcheck disable=SC2206
        NODE=(${SITE[CONTAINER_COMMAND]} "${NODE[@]}")
    fi
}

submit_job() { # ARGUMENTS...: check as much as possible here, then submit the job with the same arguments
    set_size "${OPTION[--nodes]:-}" "--nodes"
    check_time
    check_run_here
    LAUNCH=JOB set_environment FIRST_NODE "${SITE[MASTER_PORT]:-PORT}"
    set_job_options
    if [ "$PRINT" = yes ]; then
        echo "# here:"
        printf '%q ' sbatch "${SBATCH[@]}" "$ROOT/slurm/$KIND.sbatch" --site "${OPTION[--site]}" "$RUN" "${RUN_ARGUMENTS[@]:2}"
        echo
        echo "# in the job:"
        printf '%q ' srun "${SRUN[@]}" "${NODE[@]}" train slurm "${RUN_ARGUMENTS[@]}"
        echo
        print_node_command
        return
    fi
    type sbatch > /dev/null 2>&1 ||
        refuse "there is no command sbatch here. Run this on a login node of SLURM; for hosts without a scheduler, use slurm/launch_hosts.sh."
    sbatch "${SBATCH[@]}" "$ROOT/slurm/$KIND.sbatch" "$@"
}

run_job() { # run in the allocation, on its first node; a warning must not end this shell
    warned=no
    trap 'warned=yes' USR1
    local first address hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts[0]}
    set_size "${#hosts[@]}" "of job $SLURM_JOB_ID"
    # Other nodes reach the first one by its NodeAddr; its host name may not resolve. With localhost every node would be its own world.
    address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    refuse_loopback "$address" "NodeAddr of $first"
    LAUNCH=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    # below 32768, where the kernel's ports for outgoing connections begin
    set_environment "$address" "${SITE[MASTER_PORT]:-$((20000 + SLURM_JOB_ID % 12000))}"
    set_job_options
    export "${NODE_ENV[@]}"
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $NODES x $DEVICES ${KIND}s, first node $first ($SORTED_MASTER_ADDR:$SORTED_MASTER_PORT)"
    check_nodes "${hosts[@]}"
    train
}

check_nodes() { # HOSTS...
    local reports
    reports=$(mktemp)
    timeout --foreground 900 srun "${SRUN[@]}" --kill-on-bad-exit=0 "${NODE[@]}" check slurm "${RUN_ARGUMENTS[@]}" > "$reports" || true
    print_noise < "$reports"
    judge_nodes "$reports" "$@" || { rm -f "$reports"; exit 1; }
    rm -f "$reports" "${FACT[save]:-$PWD}/.launch_token"
    export SORTED_TIMEOUT_SECONDS=${FACT[timeout_seconds]}
    [ -z "${FACT[save]}" ] || [ "${FACT[resumes]}" = yes ] ||
        echo "note: --finetune starts from the weights in --save itself, so a stopped run is not requeued: it could not start again."
}

train() {
    local step status=0 next=$((SECONDS + START_SECONDS))
    open_pause
    srun "${SRUN[@]}" "${NODE[@]}" train slurm "${RUN_ARGUMENTS[@]}" 8>&- &
    step=$!
    trap 'kill -TERM "$step" 2> /dev/null' TERM INT
    while kill -0 "$step" 2> /dev/null; do
        # repeated, because a warning before the workers listen would be lost; a second one is harmless
        if [ "$warned" = yes ] && [ "$SECONDS" -ge "$next" ]; then
            scancel --signal=USR1 "$SLURM_JOB_ID" 2> /dev/null || true
            next=$((SECONDS + FORWARD_SECONDS))
        fi
        pause 1
    done
    wait "$step" || status=$?
    if [ "$status" != 0 ]; then
        echo "error: the run ended with status $status. See the first error above." >&2
        exit "$status"
    fi
    requeue_if_stopped
}

requeue_if_stopped() {
    local file="${FACT[save]}/stopped.json"
    [ -n "${FACT[save]}" ] && [ -e "$file" ] || return 0
    if grep -q -- '"--exit-interval' "$file" || [ "${FACT[resumes]}" = no ]; then
        echo "stopped early, not requeued: $(cat "$file")"
        return 0
    fi
    echo "stopped early, requeueing: $(cat "$file")"
    scontrol requeue "$SLURM_JOB_ID" || { echo "error: job $SLURM_JOB_ID cannot be requeued. Submit the same command again: it resumes." >&2; exit 75; }
    sleep 60 # the requeue ends this shell
}
