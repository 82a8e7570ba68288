#!/usr/bin/env bash
# Submit a job and, after it, one that draws the figures and tables of what it has brought:
# RUNS_ROOT/report_of_JOB. It waits for the end of all that the job is, requeues included, and
# reports what is there, whether the job has succeeded or failed. From the repository root:
#
#   slurm/submit_with_report.sh [options of sbatch] slurm/SCRIPT.sh [arguments of the script]
#   slurm/submit_with_report.sh --array=0-9 slurm/seeds.sh configs/cifar10_vit.yaml
set -euo pipefail

if [ ! -f slurm/job.sh ]; then
    echo "$PWD/slurm/job.sh: not found; start this script from the repository root" >&2
    exit 2
fi
if [ $# -eq 0 ]; then # sbatch would wait for a script from the terminal
    echo "usage: slurm/submit_with_report.sh [options of sbatch] slurm/SCRIPT.sh [arguments]" >&2
    exit 2
fi
job=$(sbatch --parsable "$@")
job=${job%%;*} # of a cluster among several
report=$(sbatch --parsable "--dependency=afterany:$job" slurm/report.sh "$job")
echo "job $job, and after it job ${report%%;*}: the report, in report_of_$job beside the runs"
