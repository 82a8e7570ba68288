#!/usr/bin/env bash
# Train Autoformer on ETTm2 with OIALR: a horizon of 96 steps, or another by an override.
#
#   sbatch slurm/autoformer.sh [section.key=value ...]
#SBATCH --job-name=autoformer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
if [ ! -f slurm/job.sh ]; then
    echo "$PWD/slurm/job.sh: not found; submit this script from the repository root" >&2
    exit 2
fi
source slurm/job.sh

train autoformer configs/ettm2_autoformer.yaml "data.root=$DATA_ROOT" "$@"
