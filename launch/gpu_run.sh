#!/usr/bin/env bash
# Runs one hyper_t5 command on the GPUs of SLURM nodes, with one process per GPU.
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@120 \
#     launch/gpu_run.sh train --config ... --workdir ...
#   salloc --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 bash launch/gpu_run.sh train ...
#
# The checkout and its environment (bash launch/setup.sh --extra gpu) must be visible to every node:
# the working directory of sbatch, or HYPER_T5_ROOT. JAX reads address, count and index from the
# variables of srun. Preemption and the time limit send SIGTERM to all processes (--signal), which
# save and exit with 75; a batch job is then requeued, at most RESTARTS times (default: 20).
set -euo pipefail

say() { printf 'gpu: %s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 2
}

# sbatch runs a copy of this file in another folder.
root="${HYPER_T5_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)}}"
(($#)) || die "no job; as in: train --config configs/mtf.py:size=xl --workdir DIR"
command -v srun >/dev/null || die "srun is not on PATH; this script needs a SLURM cluster"
[[ -n "${SLURM_JOB_ID:-}" ]] || die "no allocation; use sbatch or salloc, as its first lines show"
[[ -x "$root/.venv/bin/python" ]] ||
  die "no $root/.venv; run bash launch/setup.sh --extra gpu, or set HYPER_T5_ROOT"

cd "$root"
code=0
# After the first process ends, the others have time to finish a save.
srun --label --kill-on-bad-exit=0 --wait=120 .venv/bin/python -m hyper_t5 "$@" || code=$?
if ((code == 75)); then
  if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-20})); then
    say "preempted, and restarted $SLURM_RESTART_COUNT times already (RESTARTS)"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "preempted and requeued; the job resumes from the newest checkpoint"
  else
    say "preempted; run the same command again to resume from the newest checkpoint"
  fi
fi
exit "$code"
