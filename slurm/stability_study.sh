#!/usr/bin/env bash
# Watch the bases of ResNet-RS 101 become stable in a full-rank training on ImageNet-2012, then draw
# the figures: RUNS_ROOT/stability_study-JOB/report.
#
#   sbatch slurm/stability_study.sh [section.key=value ...]
#SBATCH --job-name=stability-study
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

train stability_study configs/imagenet_resnetrs101.yaml \
    oialr.enabled=false stability.enabled=true "${imagenet[@]}" "$@"
"${WITHIN[@]}" python -m app.report "$run_dir"
