#!/usr/bin/env bash
# Train any configuration, one process per GPU: as OIALR or as the keys behind it say.
#
#   sbatch slurm/train.sh CONFIG [section.key=value ...]
#   sbatch --nodes=1 --ntasks-per-node=1 --gres=gpu:1 slurm/train.sh configs/ettm2_autoformer.yaml
#
# Options of sbatch given before the script win over those below. Two minutes before the time limit
# the training writes a checkpoint and leaves with exit code 75; the job is then requeued and goes on.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
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

choose_config "" "$@"
train "$(basename "$config" .yaml)" "$config" "${overrides[@]}"
