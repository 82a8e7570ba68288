# shellcheck shell=bash
# Settings of the site: the one file to edit before the first job. The batch scripts source it; what
# is already set in the environment wins. Source it before sbatch, too, if you set SBATCH_* here:
#
#   source slurm/env.sh && sbatch slurm/oialr_resnet.sh training.epochs=100

# Partition and account, read by sbatch in place of its options --partition and --account.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project

# The software: the site's modules and a conda environment, or the .venv of `make setup`. A batch
# shell has read no .bashrc, so that conda's shell hook comes before its activation.
# module load cuda mpich
# eval "$(conda shell.bash hook)" && conda activate oialr
if [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

# What python is started with: nothing, or a container (apptainer.def) with the folders it needs.
# WITHIN=(apptainer exec --nv --bind "$PWD" oialr.sif)
# shellcheck disable=SC2034  # read by job.sh
WITHIN=()

# How srun starts MPI processes (srun --mpi=list): pmi2 for MPICH and its relatives, pmix for Open MPI.
export SRUN_MPI="${SRUN_MPI:-pmi2}"

# The network between the nodes, where a node has several (ip -brief address): docs/cluster.md.
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0

# Folder of the data sets, each in its official layout, and that of ImageNet-2012 (train/ and val/),
# which the configurations take whose names begin with imagenet_.
export DATA_ROOT="${DATA_ROOT:-data}"
export IMAGENET_ROOT="${IMAGENET_ROOT:-$DATA_ROOT/imagenet}"

# Folder on each node's own disk to which ImageNet is copied before a training, if there is one.
# export STAGE_TO="$TMPDIR/imagenet"

# Folder of the run directories, on a file system that all nodes share, such as scratch.
export RUNS_ROOT="${RUNS_ROOT:-runs}"
