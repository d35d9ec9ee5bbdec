#!/usr/bin/env bash
# On a worker of a TPU: what launch/tpu_run.sh asks for over ssh. It can be typed there by hand too.
#
#   bash tpu_worker.sh prepare ARCHIVE              puts the archive's code in place and installs it
#   bash tpu_worker.sh start RUN WHAT ARGUMENT...   starts hyper_t5, or finds it started, and shows its log
#   bash tpu_worker.sh stop SECONDS                 ends it: SIGTERM, SIGKILL after so many seconds
#
# The job does not hang on the connection: it writes to a file, and `start` with the same RUN shows that
# file again. gcloud repeats a command whose connection broke, so this must not start a second job.
# WHAT says which code and arguments these are; a later RUN of the same WHAT watches the job that it
# finds. The last line shown is "@@hyper_t5 exit CODE"; without it, it was the connection that ended.
set -euo pipefail

base="$HOME/hyper_t5_run"
code="$base/code"
lock="${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}"

say() { printf 'worker: %s\n' "$*"; }
die() { # die CODE TEXT...
  say "${@:2}"
  exit "$1"
}

# Ids of the living processes of the run in a folder, or of all runs. A mark in the environment, unlike a
# stored id, goes to every child, and never names a stranger after a reboot.
processes() {
  grep -lszF "HYPER_T5_RUN=${1:-$base/runs/}" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true
}
folder_of() { tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | sed -n 's/^HYPER_T5_RUN=//p'; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The images of TPU VMs are Ubuntu 22.04, whose Python is 3.10; uv brings another.
find_python() {
  [[ -z "${PYTHON:-}" && ! -x "$code/.venv/bin/python" ]] || return 0
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if is_new_enough "$name"; then
      export PYTHON="$name"
      return
    fi
  done
  say "no Python 3.11 or later here: getting one with uv"
  export PATH="$HOME/.local/bin:$PATH"
  uv --version >/dev/null 2>&1 || python3 -m pip install --quiet --user uv
  uv python install --quiet 3.12
  PYTHON="$(uv python find 3.12)"
  export PYTHON
}

prepare() { # prepare ARCHIVE
  local new="$base/code.new" name
  if [[ -n "$(processes)" ]]; then
    say "a job is running here: its code is left as it is"
    rm -f "$1"
    return
  fi
  rm -rf "$new"
  mkdir -p "$new" "$base/runs"
  tar -xzf "$1" -C "$new"
  rm -f "$1"
  # An environment knows its path, which stays the same; installing again takes minutes.
  for name in .venv .venv.lock; do
    if [[ -e "$code/$name" || -L "$code/$name" ]]; then mv "$code/$name" "$new/"; fi
  done
  rm -rf "$code"
  mv "$new" "$code"
  find_python
  bash "$code/launch/setup.sh" --extra tpu </dev/null
}

# What runs apart from this connection. The signal that ends the job reaches this shell as well, which
# stays to write down the job's exit code.
# shellcheck disable=SC2016  # expanded by that shell
job='
trap : TERM INT
cd "$0" && .venv/bin/python -m hyper_t5 "$@"
echo $? >"$HYPER_T5_RUN/exit.part"
mv "$HYPER_T5_RUN/exit.part" "$HYPER_T5_RUN/exit"
'

begin() { # begin FOLDER WHAT ARGUMENT...
  local folder="$1" what="$2" old
  shift 2
  # shellcheck disable=SC2012  # we named them: letters, digits, hyphens
  ls -1t "$base/runs" | tail -n +10 | while IFS= read -r old; do rm -rf "${base:?}/runs/$old"; done
  mkdir "$folder"
  printf '%s\n' "$what" >"$folder/what"
  : >"$folder/log"
  HYPER_T5_RUN="$folder" PYTHONUNBUFFERED=1 nohup setsid bash -c "$job" "$code" "$@" \
    >"$folder/log" 2>&1 </dev/null &
}

start() { # start RUN WHAT ARGUMENT...
  local folder="$base/runs/$1" what="$2" lines=+1 pid="" other
  pid="$(processes | head -n 1)"
  if [[ -d "$folder" ]]; then
    lines=20
  elif [[ -z "$pid" ]]; then
    begin "$folder" "${@:2}"
  else
    other="$(folder_of "$pid")"
    if [[ "$(cat "$other/what" 2>/dev/null)" != "$what" ]]; then
      say "another job is running here, in $other; end it with --stop first"
      printf '@@hyper_t5 exit 2\n'
      return
    fi
    say "this very job is running here already: watching it"
    folder="$other" lines=20
  fi
  follow "$folder" "$lines"
}

follow() { # follow FOLDER LINES
  local exit_code
  { until has_ended "$1"; do sleep 0.3; done; } &
  tail -n "$2" -s 0.2 --pid=$! -f "$1/log"
  if [[ -n "$(tail -c 1 "$1/log")" ]]; then printf '\n'; fi
  if [[ -e "$1/stopped" ]]; then
    exit_code=143
  elif ! exit_code="$(cat "$1/exit" 2>/dev/null)"; then
    say "the job is gone and left no exit code: this machine was restarted"
    exit_code=75
  fi
  printf '@@hyper_t5 exit %s\n' "$exit_code"
}

has_ended() { # has_ended FOLDER
  [[ -e "$1/exit" ]] && return
  [[ -z "$(processes "$1")" ]] && sleep 1 # between the fork and the mark, or the end and the file
  [[ -e "$1/exit" || -z "$(processes "$1")" ]]
}

stop() { # stop SECONDS
  local pid signal=TERM deadline=$((SECONDS + $1))
  for pid in $(processes); do touch "$(folder_of "$pid")/stopped" 2>/dev/null || true; done
  while [[ -n "$(processes)" ]]; do
    if [[ -n "$signal" ]]; then
      say "SIG$signal to the job"
      # shellcheck disable=SC2046  # a list of numbers
      kill -"$signal" $(processes) 2>/dev/null || true
    fi
    signal=""
    if ((SECONDS >= deadline)); then signal=KILL; fi
    sleep 0.2
  done
  # Left behind by a killed job, or by another user, whose file we cannot open.
  rm -f "$lock" 2>/dev/null || sudo -n rm -f "$lock" || say "cannot remove $lock"
}

case "${1:-}" in
  prepare | start | stop) "$@" ;;
  *) die 2 "usage: bash tpu_worker.sh prepare ARCHIVE | start RUN WHAT ARGUMENT... | stop SECONDS" ;;
esac
