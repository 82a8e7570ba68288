#!/usr/bin/env bash
# Draw the figures and tables of what a job has brought, all elements of an array in one report. It
# is submitted by slurm/submit_with_report.sh, which lets it wait for the job; or by hand, afterwards:
#
#   sbatch slurm/report.sh JOB [options of app.report ...]
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
if [ ! -f slurm/job.sh ]; then
    echo "$PWD/slurm/job.sh: not found; submit this script from the repository root" >&2
    exit 2
fi
source slurm/job.sh

of="${1:?name the job whose runs are reported}"
shift
shopt -s nullglob
runs=("$RUNS_ROOT"/*-"$of"_*)
if [ ${#runs[@]} -gt 0 ]; then # elements of an array have a folder each, whatever RUN_DIR says
    runs=("$RUNS_ROOT"/*-"$of" "${runs[@]}")
elif [ -n "${RUN_DIR:-}" ]; then # the job has gone on with this one
    runs=("$RUN_DIR")
else
    runs=("$RUNS_ROOT"/*-"$of")
fi
if [ ${#runs[@]} -eq 0 ]; then
    echo "$RUNS_ROOT: job $of has left no run here" >&2
    exit 1
fi
"${WITHIN[@]}" python -m app.report "${runs[@]}" --output "$RUNS_ROOT/report_of_$of" "$@"
