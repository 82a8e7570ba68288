#!/usr/bin/env bash
# Train ResNet-RS 101 on ImageNet-2012 with OIALR, one process per GPU. From the repository root:
#
#   sbatch slurm/oialr_resnet.sh [section.key=value ...]
#
# Options of sbatch given before the script win over those below. Two minutes before the time limit
# the training writes a checkpoint and leaves with exit code 75; the job is then requeued and goes on.
#SBATCH --job-name=oialr-resnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
if [ ! -f slurm/env.sh ]; then
    echo "$PWD/slurm/env.sh: not found; submit this script from the repository root" >&2
    exit 2
fi
# shellcheck disable=SC1091  # env.sh is checked on its own
source slurm/env.sh
set -euo pipefail # only now: modules and conda are not written for it

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch

if [[ " $* " == *" run.dir="* ]]; then
    echo "run.dir: named by this script, so that a requeued job finds it; set RUNS_ROOT instead" >&2
    exit 2
fi
run_dir="$RUNS_ROOT/oialr_resnet-$SLURM_JOB_ID" # a requeued job keeps its id
resume=()
if [ -f "$run_dir/config.yaml" ]; then
    resume=(--resume "$run_dir")
fi
command=(
    srun "--mpi=$SRUN_MPI"
    python -m app.train --config configs/imagenet_resnetrs101.yaml "${resume[@]}"
    "data.root=$DATA_ROOT" "run.dir=$run_dir" "$@"
)
echo "Job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-this node}, ${SLURM_NTASKS:-1} processes:"
printf '%q ' "${command[@]}"
echo

trap 'signalled=true; kill -USR1 "$!" || true' USR1
"${command[@]}" &
step=$!
signalled=true
while $signalled; do # a signal ends the wait, not the step
    signalled=false
    exit_code=0
    wait "$step" || exit_code=$?
done

if [ "$exit_code" -eq 75 ]; then
    echo "Stopped after a checkpoint; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || echo "Not requeued; the run can be resumed: $run_dir" >&2
fi
exit "$exit_code"
