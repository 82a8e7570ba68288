#!/usr/bin/env bash
# Train one configuration with several seeds: a job array, whose indices are the seeds. Table and
# figures of all of them follow by slurm/submit_with_report.sh.
#
#   sbatch [--array=0-9] slurm/seeds.sh [CONFIG] [section.key=value ...]
#SBATCH --job-name=seeds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --array=0-4
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
if [ ! -f slurm/job.sh ]; then
    echo "$PWD/slurm/job.sh: not found; submit this script from the repository root" >&2
    exit 2
fi
source slurm/job.sh

choose_config configs/digits_vit.yaml "$@"
train seed "$config" "${overrides[@]}" "run.seed=$SLURM_ARRAY_TASK_ID"
