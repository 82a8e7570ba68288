# shellcheck shell=bash
# What the batch scripts share; each sources this file from the repository root.
#
#   choose_config DEFAULT [CONFIG] [section.key=value ...]   what a job was asked for
#   train NAME CONFIG [section.key=value ...]   a training, started or gone on with
#   supervise PROGRAM ...                       a step that may be stopped and requeued

# Slurm tells this shell of the time limit (--signal=B:USR1), at any moment; it would die of that.
stopped=false
trap 'stopped=true' USR1

source slurm/env.sh
set -euo pipefail # only now: modules and conda are not written for it

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch

# A requeued job keeps its id, an element of an array those of the array and its own. RUN_DIR lets
# another job go on with a run.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    RUN_DIR=
else
    job="$SLURM_JOB_ID"
fi

# The job may have come back with other nodes, which SLURM_NTASKS does not know of.
processes=$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] && [ "${SLURM_NTASKS:-$processes}" -ne "$processes" ]; then
    echo "Note: $processes processes, by --nodes and --ntasks-per-node; --ntasks=$SLURM_NTASKS is not used" >&2
fi

# All processes leave with 75 after a checkpoint, but not in the same instant: so the first to leave
# must not end the others (a site may have set that), unless they stay for long.
launch=(
    srun "--mpi=$SRUN_MPI" "--ntasks=$processes" --kill-on-bad-exit=0 --wait=60
    "${WITHIN[@]}" python -m
)

# Name the run's folder, so that a requeued job finds it: run_dir.
name_run() {
    local name=$1
    shift
    if [[ " $* " == *" run.dir="* ]]; then
        echo "run.dir: named by this script, so that a requeued job finds it; set RUN_DIR instead" >&2
        exit 2
    fi
    run_dir="${RUN_DIR:-$RUNS_ROOT/$name-$job}"
}

# Tell a script's configuration from the overrides behind it: config, overrides.
choose_config() {
    config=$1
    shift
    if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
        config=$1
        shift
    fi
    # shellcheck disable=SC2034  # read by the scripts
    overrides=("$@")
    if [ ! -f "$config" ]; then
        echo "${config:-CONFIG}: not found; name a configuration, such as configs/cifar10_vit.yaml" >&2
        exit 2
    fi
}

# Train in run_dir; a run that was started before has its configuration there, with a checkpoint.
train() {
    local name=$1 from=(--config "$2") data=("data.root=$DATA_ROOT")
    if [[ "$(basename "$2")" == imagenet_* ]]; then
        data=("data.root=$IMAGENET_ROOT" ${STAGE_TO:+"data.stage_to=$STAGE_TO"})
    fi
    shift 2
    name_run "$name" "$@"
    if [ -f "$run_dir/config.yaml" ]; then
        from=(--resume "$run_dir")
    fi
    supervise "${launch[@]}" app.train "${from[@]}" "${data[@]}" "$@" "run.dir=$run_dir"
}

# What the run has brought so far: checkpoints by their steps, or evaluations of a search, which
# count whatever they came to.
results() {
    find -H "$run_dir" -maxdepth 3 \
        \( -type d -path '*/checkpoints/step-*' -o -path '*/evaluations/*/recorded' \
        -o -path '*/evaluations/*/summary.json' \) 2>/dev/null |
        sed -E 's|(/step-[0-9]+)-[0-9]+$|\1|' | sort -u
}

# Where the run has been saved whose folder was moved or removed meanwhile: beside that, or beside
# what it leads to.
rescued() {
    local step
    for step in "$run_dir"-rescued*/checkpoints/step-* \
        "$(readlink -m "$run_dir")"-rescued*/checkpoints/step-*; do
        if [ -d "$step" ]; then
            readlink -m "$step/../.."
        fi
    done | sort -u
}

# Of what a command lists now, what it had not listed before; what is gone does not count.
#   new_of COMMAND LISTED_BEFORE
new_of() {
    local now
    now=$("$1" || true)
    comm -13 <(echo "$2") <(echo "$now")
}

# Run a step in run_dir to its end; return only if it is done, otherwise requeue the job or fail.
supervise() {
    echo "Job $job on ${SLURM_JOB_NODELIST:-this node}, $processes processes, restart ${SLURM_RESTART_COUNT:-0}:"
    printf '%q ' "$@"
    echo
    if $stopped; then
        requeue "Stopped before the start" 75
    fi
    local before rescued_before saved exit_code interrupted=true terminated=false
    before=$(results || true)
    rescued_before=$(rescued)
    # Slurm tells all processes by itself, and decides by itself whether the job is requeued.
    trap 'interrupted=true; terminated=true' TERM
    "$@" &
    local step=$!
    # srun hands the signal on to all processes.
    trap 'interrupted=true; stopped=true; kill -USR1 "$step" || true' USR1
    if $stopped; then # since the look above
        kill -USR1 "$step" || true
    fi
    while $interrupted; do # a signal ends the wait, not the step
        interrupted=false
        exit_code=0
        wait "$step" || exit_code=$?
    done
    trap 'stopped=true' USR1
    trap - TERM

    if [ "$exit_code" -eq 0 ]; then
        return
    fi
    saved=$(new_of rescued "$rescued_before")
    if [ -n "$saved" ]; then # where the run was it would begin with its first step
        echo "Failed (exit code $exit_code), and $run_dir is not what it was: the run is saved in" \
            "$saved; put that back, or let a job go on with it by RUN_DIR=$saved" >&2
        exit "$exit_code"
    elif [ "$exit_code" -eq 2 ] || $terminated; then
        exit "$exit_code"
    elif [ "$exit_code" -eq 75 ] || $stopped; then
        # A search's evaluation that is longer than a job would begin anew in each, for ever.
        local now in_vain="$run_dir/.stopped-in-vain"
        if [ ! -d "$run_dir" ]; then # stopped in the start, which may be as long
            in_vain="$(dirname "$run_dir")/.$(basename "$run_dir").stopped-in-vain"
        fi
        now="$SLURM_JOB_ID $(results || true)"
        if [ -n "$(new_of results "$before")" ]; then
            rm -f "$in_vain" || true
        elif [ "$(cat "$in_vain" 2>/dev/null)" = "$now" ]; then
            echo "Stopped (exit code $exit_code) for the second time without new results: give it" \
                "more time (--time), or --signal=B:USR1@SECONDS: $run_dir" >&2
            exit "$exit_code"
        else # what the next stop in vain is held against
            mkdir -p "$(dirname "$run_dir")" || true
            echo "$now" >"$in_vain" || true
        fi
        requeue "Stopped (exit code $exit_code)" "$exit_code"
    elif [ -n "$(new_of results "$before")" ]; then
        requeue "Failed (exit code $exit_code), after new results" "$exit_code"
    else # it would fail again
        echo "Failed (exit code $exit_code), without new results: $run_dir" >&2
        exit "$exit_code"
    fi
}

# Say why, requeue the job and leave.
requeue() {
    echo "$1; requeueing job $job"
    scontrol requeue "$SLURM_JOB_ID" || echo "Not requeued; the run can be resumed: $run_dir" >&2
    exit "$2"
}
