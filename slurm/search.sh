#!/usr/bin/env bash
# Search for hyperparameters, several trainings side by side: the paper's space, or another one.
#
#   sbatch slurm/search.sh [CONFIG] [section.key=value ...]
#SBATCH --job-name=search
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

choose_config configs/search/cifar10_vit.yaml "$@"
name_run search "${overrides[@]}"
if [ -f "$run_dir/search.yaml" ]; then # with everything that it was started with
    supervise "${launch[@]}" app.search --resume "$run_dir"
else
    supervise "${launch[@]}" app.search --config "$config" \
        "data.root=$DATA_ROOT" "${overrides[@]}" "run.dir=$run_dir"
fi
