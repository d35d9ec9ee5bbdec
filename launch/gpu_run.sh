#!/usr/bin/env bash
# One command on the GPUs of SLURM's nodes, a process a GPU.
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@120 \
#     launch/gpu_run.sh train --config ... --workdir ...
#   salloc --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 bash launch/gpu_run.sh train ...
#
# The checkout and its environment (bash launch/setup.sh --extra gpu) lie where every node sees them:
# the folder that sbatch is typed in, or HYPER_T5_ROOT. JAX finds the address, count and index in what
# srun sets. Preemption, or the end of the time asked for, is SIGTERM to all processes (--signal), who
# save and exit with 75; a batch job then goes back into the queue, at most RESTARTS times (default 20).
set -euo pipefail

say() { printf 'gpu: %s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 2
}

# sbatch runs a copy of this file in a folder of its own.
root="${HYPER_T5_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)}}"
(($#)) || die "give the job, as in: train --config configs/mtf.py:size=xl --workdir DIR"
command -v srun >/dev/null || die "srun is not on PATH: this is for a SLURM cluster"
[[ -n "${SLURM_JOB_ID:-}" ]] || die "there is no allocation: start it by sbatch or salloc, as its head shows"
[[ -x "$root/.venv/bin/python" ]] ||
  die "there is no $root/.venv: run bash launch/setup.sh --extra gpu, or set HYPER_T5_ROOT"

cd "$root"
code=0
# The first to end leaves the others time to finish a save; who misses it ends by itself within 30 s.
srun --label --kill-on-bad-exit=0 --wait=120 .venv/bin/python -m hyper_t5 "$@" || code=$?
if ((code == 75)); then
  if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-20})); then
    say "preempted, and restarted $SLURM_RESTART_COUNT times already (RESTARTS)"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "preempted: back in the queue, to go on from the last checkpoint"
  else
    say "preempted: the same command goes on from the last checkpoint"
  fi
fi
exit "$code"
