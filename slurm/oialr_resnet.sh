#!/usr/bin/env bash
# Train ResNet-RS 101 on ImageNet-2012 with OIALR, one process per GPU. From the repository root:
#
#   sbatch slurm/oialr_resnet.sh [section.key=value ...]
#
# It is slurm/train.sh with this configuration; what is said there holds here.
#SBATCH --job-name=oialr-resnet
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

train oialr_resnet configs/imagenet_resnetrs101.yaml "$@"
