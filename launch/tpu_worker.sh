#!/usr/bin/env bash
# Commands that launch/tpu_run.sh runs over ssh on every worker of a TPU.
#
#   bash tpu_worker.sh prepare ARCHIVE             unpacks the code in an archive and installs it
#   bash tpu_worker.sh start RUN JOB ARGUMENT...   starts hyper_t5 and shows its log until it ends
#   bash tpu_worker.sh stop SECONDS                sends SIGTERM to it, and SIGKILL after SECONDS
#
# The job outlives the connection. gcloud repeats a command whose connection broke, so `start`
# attaches to an existing RUN, and also to a running job with the same JOB, a hash of code and
# arguments. Each command ends with the line "@@exit CODE TIME"; without it, the connection broke.
set -euo pipefail

base="$HOME/hyper_t5_run"
code="$base/code"
host="$(hostname)" # t1v-n-0123abcd-w-3
ended=""           # "CODE TIME" of the job

say() { printf 'worker %s (%s): %s\n' "${host##*-w-}" "$host" "$*"; }
at_exit() { printf '@@exit %s\n' "${ended:-$? $(date +%s.%N)}"; }

# Prints the process ids of the run in a folder, or of all runs. All children inherit the mark in
# the environment, and no other process has it after a reboot.
processes() { # processes [FOLDER]
  grep -lszF "HYPER_T5_RUN=${1:-$base/runs/}" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true
}
folder_of() { tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | sed -n 's/^HYPER_T5_RUN=//p'; }

prepare() { # prepare ARCHIVE
  if [[ -n "$(processes)" ]]; then
    say "a job is running; its code stays"
    return
  fi
  mkdir -p "$code" "$base/runs"
  # The environment stays, because a new one takes minutes.
  find "$code" -mindepth 1 -maxdepth 1 ! -name '.venv*' -exec rm -rf {} +
  tar -xzf "$1" -C "$code"
  [[ -n "${PYTHON:-}" || -x "$code/.venv/bin/python" ]] || find_python
  bash "$code/launch/setup.sh" --extra tpu </dev/null
}

find_python() { # sets PYTHON; TPU VM images may have only Python 3.10
  export PYTHON PATH="$HOME/.local/bin:$PATH"
  for PYTHON in python3.13 python3.12 python3.11; do
    ! command -v "$PYTHON" >/dev/null || return 0
  done
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  uv python install --quiet 3.12
  PYTHON="$(uv python find 3.12)"
}

# The shell around the job survives SIGTERM, to write the exit code of the job.
# shellcheck disable=SC2016  # expanded by that shell
job='
trap : TERM INT
cd "$0" && .venv/bin/python -m hyper_t5 "$@"
echo "$? $(date +%s.%N)" >"$HYPER_T5_RUN/exit.part"
mv "$HYPER_T5_RUN/exit.part" "$HYPER_T5_RUN/exit"
'

start() { # start RUN JOB ARGUMENT...
  local folder="$base/runs/$1" lines=20 pid
  pid="$(processes | head -n 1)"
  if [[ ! -d "$folder" && -n "$pid" ]]; then
    folder="$(folder_of "$pid")"
    if [[ "$(cat "$folder/job")" != "$2" ]]; then
      say "another job is running in $folder; end it with --stop first"
      exit 2
    fi
    say "this job is already running; attaching to it"
  elif [[ ! -d "$folder" ]]; then
    lines=+1
    mkdir "$folder"
    printf '%s\n' "$2" >"$folder/job"
    : >"$folder/log"
    HYPER_T5_RUN="$folder" PYTHONUNBUFFERED=1 nohup setsid bash -c "$job" "$code" "${@:3}" \
      >"$folder/log" 2>&1 </dev/null &
  fi
  { while sleep 0.2 && ! has_ended "$folder"; do :; done; } &
  tail -n "$lines" -s 0.2 --pid=$! -f "$folder/log"
  if [[ -n "$(tail -c 1 "$folder/log")" ]]; then printf '\n'; fi
  report "$folder"
}

has_ended() { # has_ended FOLDER; a process that has just started has no mark yet
  [[ -e "$1/exit" ]] || { [[ -z "$(processes "$1")" ]] && sleep 1 && [[ -z "$(processes "$1")" ]]; }
}

report() { # report FOLDER: one line on a job that did not succeed
  local resume="run the same command again to resume from the newest checkpoint"
  [[ -e "$1/exit" || -e "$1/stopped" ]] || say "the machine was restarted during the job"
  ended="$(cat "$1/exit" 2>/dev/null || echo "75 $(date +%s.%N)")"
  if [[ -e "$1/stopped" ]]; then ended="143 ${ended#* }"; fi
  case "${ended% *}" in
    0) ;;
    2) say "the job ended with code 2 (invalid input); correct what its error names" ;;
    75) say "the job was preempted (code 75); it resumes from the newest checkpoint" ;;
    134) say "the job ended with code 134 (aborted); another worker may have been lost:" \
      "see the first worker that failed; $resume" ;;
    137) say "the job ended with code 137 (killed); the machine may be out of memory; $resume" ;;
    143) say "the job was stopped (code 143); $resume" ;;
    *) say "the job ended with code ${ended% *} (failed); see its error, or the first worker that" \
      "failed; $resume" ;;
  esac
  exit "${ended% *}"
}

stop() { # stop SECONDS
  local pid deadline=$((SECONDS + $1)) lock="${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}"
  for pid in $(processes); do touch "$(folder_of "$pid")/stopped" 2>/dev/null || true; done
  processes | xargs -r kill 2>/dev/null || true
  while [[ -n "$(processes)" ]]; do
    ((SECONDS < deadline)) || processes | xargs -r kill -KILL 2>/dev/null || true
    sleep 0.2
  done
  # A killed job leaves this file, perhaps as another user.
  rm -f "$lock" 2>/dev/null || sudo -n rm -f "$lock" || say "cannot remove $lock"
}

case "${1:-}" in
  prepare | start | stop) trap at_exit EXIT && "$@" ;;
  *) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p;}' "$0" && exit 2 ;;
esac
