#!/usr/bin/env bash
# Runs one hyper_t5 command on every worker of a Cloud TPU, which it creates as a queued resource.
#
#   bash launch/tpu_run.sh --name NAME --accelerator v5p-64 -- train --config ... --workdir gs://...
#   bash launch/tpu_run.sh --name NAME --stop    stops the job on all workers
#
#   --zone Z, --project P     default: those of `gcloud config`
#   --accelerator v5p-64      or --topology v5p:4x4x2, as in `hyper-t5 plan`; needed to create a TPU
#   --runtime_version V       TPU software (default: the version that Google documents for the type)
#   --spot                    spot capacity: cheaper, may be preempted
#   --slices N                number of slices (default: 1)
#   --keep | --delete         at the end (default: deletes a TPU that it created, after success)
#   --restarts N              most restarts after preemptions (default: 20)
#   --grace S                 seconds that a stopped job has to save and end (default: 120)
#   --env NAME=VALUE          environment variable of the job; repeatable
#   --with_changes            includes uncommitted changes, which are refused otherwise
#   --create_flag F, --connect_flag F   for gcloud's create, and for its ssh and scp; repeatable
#   --logs DIR                default: runs/tpu/NAME-TIME
#   --poll S                  seconds between two queries of the TPU's state (default: 30)
#
# Each worker receives the current commit and installs it. The arguments after -- go unchanged to
# `python -m hyper_t5` on all workers at once. Worker 0's log is printed with the prefix "[0] "; DIR
# has the logs of all. The job outlives this terminal: the same command line attaches to it again.
# Ctrl-C stops it, after a checkpoint. The exit code is the job's: 0 success, 2 invalid input, 75
# preempted more than --restarts times; 130 after Ctrl-C, and 1 if gcloud fails.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
worker_script="hyper_t5_run/code/launch/tpu_worker.sh"

name="" zone="" project="" accelerator="" topology="" runtime_version="" logs=""
spot=false keep=false delete=false stop=false with_changes=false
slices=1 restarts=20 grace=120 poll=30
job_env=() create_flag=() connect_flag=() job=()

nodes=()      # names of the TPU VMs, one for each slice
state=""      # of the TPU: READY, ABSENT, UNKNOWN, or another state that gcloud reports
created=false # by this command
connection="" # process group of gcloud while it runs a command on the workers
step=""       # folder of that command's logs
job_id="" partial_line="" outcome=0

say() { printf 'tpu: %s\n' "$*" >&2; }
die() { # die CODE TEXT...
  say "error: ${*:2}"
  exit "$1"
}

read_arguments() {
  while (($#)) && [[ "$1" != -- ]]; do
    case "$1" in
      --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit 0 ;;
      --spot | --keep | --delete | --stop | --with_changes)
        printf -v "${1#--}" true
        shift
        continue
        ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case "$1" in
      --slices | --restarts | --grace | --poll)
        [[ "${2-}" =~ ^(0|[1-9][0-9]*)$ ]] || die 2 "$1 takes a whole number, got '${2-}'"
        printf -v "${1#--}" '%s' "$2"
        ;;
      --name | --zone | --project | --accelerator | --topology | --runtime_version | --logs)
        printf -v "${1#--}" '%s' "${2-}"
        ;;
      --env) job_env+=("${2-}") ;;
      --create_flag) create_flag+=("${2-}") ;;
      --connect_flag) connect_flag+=("${2-}") ;;
      *) die 2 "unknown flag $1 (see --help); the job comes after --" ;;
    esac
    shift 2 || die 2 "$1 needs a value"
  done
  job=("${@:2}")
}

check_arguments() {
  local i
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die 2 "--name takes lower-case letters, digits and hyphens, got '$name'"
  $stop || ((${#job[@]})) ||
    die 2 "no job; write it after --, as in: -- train --config configs/mtf.py --workdir gs://..."
  command -v gcloud >/dev/null ||
    die 2 "gcloud is not on PATH; install it: https://cloud.google.com/sdk/docs/install"
  logs="${logs:-$root/runs/tpu/$name-$(date +%Y%m%d-%H%M%S)}"
  nodes=("$name")
  for ((i = 0; slices > 1 && i < slices; i++)); do nodes[i]="$name-$i"; done
  # Names in gcloud; versions of https://cloud.google.com/tpu/docs/runtimes
  accelerator="${accelerator/#v5e-/v5litepod-}" topology="${topology/#v5e:/v5litepod:}"
  [[ -n "$runtime_version" ]] || case "$accelerator$topology" in
    v6e*) runtime_version=v2-alpha-tpuv6e ;;
    v5p*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod*) runtime_version=v2-alpha-tpuv5-lite ;;
    *) runtime_version=tpu-ubuntu2204-base ;;
  esac
}

tpus() {
  gcloud compute tpus "$@" ${zone:+"--zone=$zone"} ${project:+"--project=$project"} --quiet
}
tpus_or_die() { tpus "$@" >"$logs/gcloud.log" 2>&1 || die_of_gcloud; }
die_of_gcloud() { die 1 "$(tail -n 5 "$logs/gcloud.log" | tr -s '\n ' ' ')"; }

look() { # sets `state`
  local node
  query queued-resources describe "$name" '--format=value(state.state)'
  [[ "$state" == ACTIVE ]] || return 0
  for node in "${nodes[@]}"; do
    query tpu-vm describe "$node" '--format=value(state)'
    state="${state/ABSENT/PREEMPTED}"
    [[ "$state" == READY ]] || return 0
  done
}

query() { # query COMMAND...
  state="$(tpus "$@" 2>"$logs/gcloud.log")" && return
  state=UNKNOWN
  if grep -q NOT_FOUND "$logs/gcloud.log"; then state=ABSENT; fi
}

tpu_is_lost() { [[ "$state" != READY && "$state" != UNKNOWN ]]; }

ensure_ready() { # creates the TPU, and waits until it is READY
  local last=""
  while :; do
    look
    [[ "$state" == "$last" ]] || say "$name: $state"
    case "$state" in
      READY) return ;;
      ABSENT | PREEMPTED | TERMINATED | SUSPENDED | FAILED) create_tpu ;;
      UNKNOWN) [[ -n "$last" ]] || die_of_gcloud ;;
    esac
    last="$state"
    sleep "$poll"
  done
}

create_tpu() { # replaces what remains of an earlier one
  local command=(queued-resources create "$name" "--runtime-version=$runtime_version")
  [[ -n "$accelerator$topology" ]] ||
    die 2 "no usable TPU named $name; use --accelerator or --topology to create it"
  ! $created || [[ "$state" != FAILED ]] ||
    die 1 "the request failed; see: gcloud compute tpus queued-resources describe $name"
  [[ "$state" == ABSENT ]] || delete_tpu
  if [[ -n "$accelerator" ]]; then command+=("--accelerator-type=$accelerator"); fi
  if [[ -n "$topology" ]]; then command+=("--type=${topology%:*}" "--topology=${topology#*:}"); fi
  if ((slices == 1)); then command+=("--node-id=$name"); else command+=("--node-count=$slices"); fi
  if $spot; then command+=(--spot); fi
  say "creating $name: takes minutes, or until there is capacity"
  tpus_or_die "${command[@]}" ${create_flag[@]+"${create_flag[@]}"}
  created=true
}

delete_tpu() {
  say "deleting $name"
  tpus_or_die queued-resources delete "$name" --force
  created=false
}

# Archives the working files, as git would commit them, through an index of its own; sets `job_id`.
pack() {
  local changes index tree
  changes="$(git -C "$root" status --porcelain 2>/dev/null)" || die 2 "$root is not a git checkout"
  [[ -z "$changes" ]] || $with_changes ||
    die 2 "uncommitted files, the first: ${changes%%$'\n'*}; commit them, or use --with_changes"
  index="$(mktemp -d)/index"
  GIT_INDEX_FILE="$index" git -C "$root" add --all
  tree="$(GIT_INDEX_FILE="$index" git -C "$root" write-tree)"
  rm -r "${index%/*}"
  git -C "$root" archive --format=tar.gz "--output=$logs/hyper_t5.tar.gz" "$tree"
  job_id="$tree-$(with_env "${job[@]}" | cksum | tr ' ' '-')"
}

with_env() { # with_env COMMAND...: prints it as a line of shell, with the environment of the job
  printf '%q ' env ${job_env[@]+"${job_env[@]}"} "$@"
}

# Runs a command to its end on all workers, shows worker 0's log, and sets `outcome`. gcloud itself
# reconnects to a worker up to ten times.
run_on_workers() { # run_on_workers STEP COMMAND
  local try log
  for try in 1 2 3 4 5; do
    step="$1-$try"
    log="$logs/$step/${nodes[0]}/0.log"
    set -m # a process group of its own, which Ctrl-C does not reach
    ssh_all "$2" &
    connection=$!
    disown
    set +m
    until [[ -e "$log" ]]; do sleep 0.1; done
    exec 3<"$log"
    while kill -0 "$connection" 2>/dev/null; do
      show_log
      sleep 0.2
    done
    connection=""
    show_log
    look
    ! tpu_is_lost || break
    [[ "$(exit_codes | cut -d ' ' -f 2 | sort -u | xargs)" =~ ^(0\ )?lost$ ]] || break
    say "no connection to a worker, see $logs/$step; connecting again"
    sleep "$poll"
  done
  judge
}

# gcloud writes the output of worker W of a slice to STEP/NODE/W.log. (`queued-resources ssh` writes
# no such files, and connects to at most 64 workers at a time.)
ssh_all() { # ssh_all COMMAND
  local flags=(--worker=all --strict-host-key-checking=no ${connect_flag[@]+"${connect_flag[@]}"})
  local node folder
  for node in "${nodes[@]}"; do
    folder="$logs/$step/$node"
    mkdir -p "$folder"
    : >"$folder/0.log"
    {
      [[ "$step" != setup-* ]] || tpus tpu-vm scp "$logs/hyper_t5.tar.gz" "$node:" "${flags[@]}"
      tpus tpu-vm ssh "$node" "${flags[@]}" "--output-directory=$folder" "--command=$1" \
        "--ssh-flag=-oConnectTimeout=10 -oServerAliveInterval=15"
    } </dev/null >"$folder/gcloud.log" 2>&1 &
  done
  wait
}

show_log() { # prints the new lines of the log that is open as 3
  local line
  while IFS= read -r line <&3; do
    [[ "$line" == @@exit* ]] || printf '[0] %s\n' "$partial_line$line"
    partial_line=""
  done
  partial_line+="$line"
}

# Prints "TIME CODE NODE/WORKER" for each worker, in the order of time. The code is "lost" if the
# worker's log does not end with one.
exit_codes() {
  local log end
  for log in "$logs/$step"/*/[0-9]*.log; do
    end="$(tail -n 5 "$log" | sed -n 's/^@@exit //p' | tail -n 1)"
    end="${end:-lost 9999999999}"
    log="${log#"$logs/$step/"}"
    printf '%s %s %s\n' "${end#* }" "${end% *}" "${log%.log}"
  done | sort -n
}

judge() { # sets `outcome`; invalid input and preemption outrank the first failure
  local codes code worker log
  codes="$(exit_codes)"
  read -r _ code worker < <(grep ' 2 ' <<<"$codes" || grep -v ' 0 ' <<<"$codes") || code=0
  outcome="${code/lost/1}"
  ((outcome != 0)) || return 0
  if ((outcome != 2)) && { tpu_is_lost || [[ "$codes" == *" 75 "* ]]; }; then
    outcome=75
    return
  fi
  log="$logs/$step/$worker.log"
  [[ "$code" != lost ]] || log="${log%/*}/gcloud.log"
  [[ "$log" == "$logs/$step/${nodes[0]}/0.log" ]] ||
    tail -n 15 "$log" | sed -e '/^@@exit/d' -e "s/^/[${worker#*/}] /" >&2
  say "error: worker $worker failed first, with code $code; logs: $logs/$step"
}

stop_job() {
  say "stopping the job on all workers; it has $grace s to save a checkpoint"
  step=stop
  ssh_all "bash $worker_script stop $grace"
  judge
}

finish() {
  if $delete || { $created && ! $keep && ((outcome == 0)); }; then delete_tpu; fi
}

at_exit() {
  [[ -z "$connection" ]] || kill -- "-$connection" 2>/dev/null || true
  ! $created || say "$name is kept and billed; to delete it: \
gcloud compute tpus queued-resources delete $name --force"
}

interrupted() {
  trap 'say "the same command attaches to the job, --stop stops it"; exit 130' INT TERM
  if [[ -n "$connection" && "$step" == job-* ]]; then
    stop_job
    sleep 2 # until the end of the log arrives
    show_log
  fi
  outcome=130
  finish
  exit 130
}

run_job() { # run_job ATTEMPT; sets `outcome`
  say "installing the code on all workers (takes minutes the first time); logs: $logs"
  run_on_workers "setup-$1" "tar -xzOf hyper_t5.tar.gz launch/tpu_worker.sh >hyper_t5.sh && \
$(with_env bash hyper_t5.sh prepare hyper_t5.tar.gz)"
  ((outcome == 0)) || return 0
  run_on_workers "job-$1" \
    "$(with_env bash "$worker_script" start "$(date +%s)-$1" "$job_id" "${job[@]}")"
}

main() {
  local attempt
  read_arguments "$@"
  check_arguments
  mkdir -p "$logs"
  trap at_exit EXIT
  trap interrupted INT TERM
  if $stop; then
    look
    [[ "$state" == READY ]] || die 1 "$name is $state"
    stop_job
    return "$outcome"
  fi
  pack
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    ((attempt == 0)) || say "restart $attempt of at most $restarts, from the newest checkpoint"
    ensure_ready
    run_job "$attempt"
    ((outcome == 75)) || break
    say "preempted"
    sleep "$poll" # the TPU's state may be late
  done
  finish
  return "$outcome"
}

main "$@"
