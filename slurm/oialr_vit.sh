#!/usr/bin/env bash
# Train ViT-B/16 on ImageNet-2012 with OIALR, one process per GPU.
#
#   sbatch slurm/oialr_vit.sh [section.key=value ...]
#SBATCH --job-name=oialr-vit
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

train oialr_vit configs/imagenet_vit_b16.yaml "${imagenet[@]}" "$@"
