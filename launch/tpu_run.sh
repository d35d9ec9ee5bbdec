#!/usr/bin/env bash
# One command on every worker of a Cloud TPU, which is made, or reused, for it.
#
#   bash launch/tpu_run.sh --name NAME --accelerator v5p-64 [flags] -- train --config ... --workdir gs://...
#   bash launch/tpu_run.sh --name NAME --stop         ends the job on all workers, and its stale lock
#
#   --zone Z --project P      default: those of `gcloud config`
#   --accelerator v5p-64      or --topology v5p:4x4x2, as in `hyper-t5 plan`; needed to make a TPU
#   --runtime_version V       of the TPU's image (default: the one that Google names for its kind)
#   --spot                    at the price, and the risk, of spare capacity
#   --queued_resource         waits in line for capacity; --slices N: several slices, in one such request
#   --reuse                   never makes or deletes: NAME must be there
#   --keep | --delete         at the end (default: what was made here is deleted after success)
#   --restarts N              most restarts after preemptions (default: 20)
#   --grace S                 seconds that other workers, or a stopped job, have to end (default: 120)
#   --env NAME=VALUE          in the job's environment; may be repeated
#   --with_changes            takes uncommitted changes along, which are refused otherwise
#   --create_flag F, --connect_flag F   passed on to gcloud's create, and to its ssh and scp
#   --logs DIR                one file a worker (default: runs/tpu/NAME-TIME)
#   --poll S                  seconds between two looks at a TPU that is not ready (default: 15)
#   --dry_run                 prints each command, one a line, and contacts nothing
#
# Each worker gets this commit, by scp, and its requirements; what comes after -- goes to
# `python -m hyper_t5` as it is, on all of them at once. Worker 0's log is shown with the prefix "[0] ".
# Losing this terminal does not end the job: the same command line goes on watching it. Ctrl-C ends it,
# after a checkpoint. Exit codes are the job's: 0 done, 2 a mistake in what was given, 1 it failed,
# 75 preempted once too often, 130 interrupted; 1 too if Google has no TPU to give.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
inbox="hyper_t5.tar.gz" # in a worker's home folder
worker_script="hyper_t5_run/code/launch/tpu_worker.sh"

name="" zone="" project="" accelerator="" topology="" runtime_version="" logs=""
spot=false queued_resource=false reuse=false keep=false delete=false stop=false
dry_run=false with_changes=false
slices=1 restarts=20 grace=120 poll=15
job_env=() create_flag=() connect_flag=() job=()

workers="" # of one slice
made=false # whether this run made the TPU
state="" archive="" commit="" what="" outcome=0
running=false finished=false
culprit="" first_to_fail="" # workers
groups=() # process groups of what runs in the background

say() { printf 'tpu: %s\n' "$*" >&2; }
die() { # die CODE TEXT...
  say "error: ${*:2}"
  exit "$1"
}

# ---------------------------------------------------------------------------------------- arguments

read_arguments() {
  local word flag
  while (($#)); do
    word="$1"
    shift
    [[ "$word" == -- ]] && job=("$@") && break
    [[ "$word" == -* ]] || die 2 "'$word' is no flag; what the job is given comes after --"
    flag="${word%%=*}"
    flag="${flag//-/_}"
    flag="${flag#__}"
    case "$flag" in
      _h | help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit 0 ;;
      spot | queued_resource | reuse | keep | delete | stop | dry_run | with_changes)
        [[ "$word" != *=* ]] || die 2 "--$flag takes no value"
        printf -v "$flag" true
        continue
        ;;
      name | zone | project | accelerator | topology | runtime_version | logs) ;;
      slices | restarts | grace | poll | env | create_flag | connect_flag) ;;
      *) die 2 "unknown flag ${word%%=*} (see --help); what the job is given comes after --" ;;
    esac
    if [[ "$word" == *=* ]]; then
      word="${word#*=}"
    else
      (($#)) || die 2 "--$flag needs a value"
      word="$1"
      shift
    fi
    set_flag "$flag" "$word"
  done
}

set_flag() { # set_flag FLAG VALUE
  case "$1" in
    env)
      [[ "$2" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die 2 "--env takes NAME=VALUE, got '$2'"
      job_env+=("$2")
      ;;
    create_flag) create_flag+=("$2") ;;
    connect_flag) connect_flag+=("$2") ;;
    slices | restarts | grace | poll)
      [[ "$2" =~ ^[0-9]{1,6}$ ]] || die 2 "--$1 takes a whole number, got '$2'"
      printf -v "$1" '%s' "$((10#$2))"
      ;;
    *) printf -v "$1" '%s' "$2" ;;
  esac
}

check_arguments() {
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die 2 "--name takes the TPU's name, of small letters, digits and hyphens, got '$name'"
  $stop || ((${#job[@]})) ||
    die 2 "give the job after --, as in: -- train --config configs/mtf.py:size=xl --workdir gs://..."
  [[ -z "$accelerator" || -z "$topology" ]] || die 2 "give --accelerator or --topology, not both"
  [[ -z "$topology" || "$topology" =~ ^v[0-9a-z]+:[0-9]+(x[0-9]+){1,2}$ ]] ||
    die 2 "--topology takes KIND:SIZES as in v5p:4x4x2, got '$topology'"
  [[ -z "$accelerator" || "$accelerator" =~ ^v[0-9a-z]+-[0-9]+$ ]] ||
    die 2 "--accelerator takes KIND-SIZE as in v5p-64, got '$accelerator'"
  # Google's name of v5e.
  accelerator="${accelerator/#v5e-/v5litepod-}" topology="${topology/#v5e:/v5litepod:}"
  ! $reuse || { ! $keep && ! $delete; } || die 2 "--reuse neither makes nor deletes a TPU"
  ! $keep || ! $delete || die 2 "give --keep or --delete, not both"
  ((slices >= 1)) || die 2 "--slices takes 1 or more"
  ((slices == 1)) || queued_resource=true
  $dry_run || command -v gcloud >/dev/null ||
    die 2 "gcloud is not on PATH: install it, https://cloud.google.com/sdk/docs/install"
  [[ -n "$project" ]] || project="$(configured core/project CLOUDSDK_CORE_PROJECT)" ||
    die 2 "give --project, or set one: gcloud config set project PROJECT"
  [[ -n "$zone" ]] || zone="$(configured compute/zone CLOUDSDK_COMPUTE_ZONE)" ||
    die 2 "give --zone, or set one: gcloud config set compute/zone ZONE"
  [[ -n "$logs" ]] || logs="$root/runs/tpu/$name-$(date +%Y%m%d-%H%M%S)"
  [[ -n "$runtime_version" ]] || choose_runtime_version
}

configured() { # configured PROPERTY VARIABLE
  local value="${!2:-}"
  if [[ -z "$value" ]] && command -v gcloud >/dev/null; then
    value="$(gcloud config get-value "$1" 2>/dev/null)"
  fi
  [[ -n "$value" && "$value" != "(unset)" ]] && printf '%s' "$value"
}

choose_runtime_version() { # https://cloud.google.com/tpu/docs/runtimes
  case "$accelerator$topology" in
    v6e*) runtime_version=v2-alpha-tpuv6e ;;
    v5p*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod*) runtime_version=v2-alpha-tpuv5-lite ;;
    *) runtime_version=tpu-ubuntu2204-base ;;
  esac
}

# Machines of one slice; nothing for a kind that is not known. Up to v5p an accelerator's number counts
# cores, two a chip; of v5e and v6e it counts chips, up to eight of which share one machine.
expected_workers() {
  local kind="${accelerator%-*}" number="${accelerator##*-}" chips
  if [[ -n "$topology" ]]; then
    kind="${topology%:*}" number="${topology##*:}"
    chips=$((${number//x/ * }))
  elif [[ "$kind" == v[2345] || "$kind" == v5p ]]; then
    chips=$((number / 2))
  else
    chips=$((number))
  fi
  case "$kind" in
    v2 | v3 | v4 | v5p) printf '%s' $(((chips + 3) / 4)) ;;
    v5litepod | v6e) printf '%s' $((chips <= 8 ? 1 : chips / 4)) ;;
  esac
}

# --------------------------------------------------------------------------------------- the cloud

show_command() { # as a line to copy and paste
  local word line="" quote="'\\''"
  for word in "$@"; do
    case "$word" in
      *$'\n'*) printf -v word '%q' "$word" ;;
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quote}'" ;;
    esac
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

cloud() { # cloud COMMAND...: gcloud compute tpus, for this project and zone
  local all=(gcloud compute tpus "$@" "--zone=$zone" "--project=$project" --quiet)
  if $dry_run; then show_command "${all[@]}"; else "${all[@]}"; fi
}

nodes() { # the TPU VMs: one a slice
  local i
  if ((slices == 1)); then printf '%s\n' "$name" && return; fi
  for ((i = 0; i < slices; i++)); do printf '%s\n' "$name-$i"; done
}

node_of() { # node_of WORKER, counted through all slices
  if ((slices == 1)); then printf '%s' "$name"; else printf '%s' "$name-$(($1 / workers))"; fi
}

all_workers() { seq 0 $((slices * workers - 1)); }

remote() { # remote WORKER COMMAND
  cloud tpu-vm ssh "$(node_of "$1")" "--worker=$(($1 % workers))" --strict-host-key-checking=no \
    "--ssh-flag=-oConnectTimeout=30 -oServerAliveInterval=15" \
    ${connect_flag[@]+"${connect_flag[@]}"} "--command=$2"
}

# What gcloud's words mean, in one line, with its own at the end.
explain() { # explain FILE
  local text meaning="gcloud refused"
  text="$(grep -m 1 -A 2 'ERROR' "$1" || tail -n 1 "$1")"
  text="$(printf '%s' "$text" | tr -s '[:space:]' ' ')"
  if grep -qiE 'quota' "$1"; then
    meaning="project $project has no quota left for this in $zone: ask for more at \
https://console.cloud.google.com/iam-admin/quotas, or try another --zone or --spot"
  elif out_of_capacity "$1"; then
    meaning="$zone has none to give now: try another --zone, wait in line with --queued_resource, or --spot"
  elif grep -qiE 'active account|auth login|reauthenticat|invalid_grant' "$1"; then
    meaning="log in first: gcloud auth login"
  elif grep -qE 'PERMISSION_DENIED|SERVICE_DISABLED|has not been used in project' "$1"; then
    meaning="project $project does not let you: it needs the API (gcloud services enable \
tpu.googleapis.com) and you need the role TPU Admin"
  fi
  printf '%s (%s)' "$meaning" "$text"
}
out_of_capacity() { grep -qiE 'no more capacity|insufficient .*capacity|stockout|RESOURCE_EXHAUSTED' "$1"; }

# Sets `state`: ABSENT, READY, or another word of Google's; UNKNOWN when it cannot be asked. One that is
# READY has its `workers` known.
look() {
  local node count kind
  if $queued_resource; then
    ask queued-resources describe "$name" --format='value(state.state)'
    [[ "$state" == ACTIVE ]] || return 0
  fi
  for node in $(nodes); do
    ask tpu-vm describe "$node" \
      --format='value(state,networkEndpoints.len(),acceleratorType.basename())'
    IFS=$'\t' read -r state count kind <<<"$state"
    [[ "$state" == READY ]] || return 0
    workers="$count"
    [[ -z "$accelerator" || -z "$kind" || "$kind" == "$accelerator" ]] ||
      die 2 "$node is a $kind, not a $accelerator: take another --name, or leave out --accelerator"
  done
}

ask() { # ask COMMAND...
  state="$(cloud "$@" 2>"$logs/gcloud.log")" && return
  state=UNKNOWN
  if grep -q NOT_FOUND "$logs/gcloud.log"; then state=ABSENT; fi
}

# Makes it, starts it, or waits for it, whatever it needs to be READY.
ensure_ready() {
  local last="" waits=0
  while :; do
    look
    [[ "$state" == "$last" ]] || say "$name in $zone: $state"
    [[ "$state" != READY ]] || break
    $reuse && [[ "$state" == ABSENT || "$state" == PREEMPTED || "$state" == TERMINATED ]] &&
      die 2 "$name is $state, and --reuse makes none"
    case "$state" in
      ABSENT) create ;;
      STOPPED)
        cloud tpu-vm start "$name" >>"$logs/gcloud.log" 2>&1 || die 1 "$(explain "$logs/gcloud.log")"
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        plan_creation # before anything is deleted
        delete_tpu
        ;;
      FAILED) give_up_request ;;
      UNKNOWN)
        if [[ -z "$last" ]] || ((++waits > 20)); then die 1 "$(explain "$logs/gcloud.log")"; fi
        sleep "$poll"
        ;;
      *) sleep "$poll" ;;
    esac
    last="$state"
  done
}

creation=()
plan_creation() { # sets `creation`, the command that makes the TPU
  if $queued_resource; then
    creation=(queued-resources create "$name" "--runtime-version=$runtime_version")
    if ((slices == 1)); then creation+=("--node-id=$name"); else creation+=("--node-count=$slices"); fi
  else
    creation=(tpu-vm create "$name" "--version=$runtime_version")
  fi
  if [[ -n "$accelerator" ]]; then
    creation+=("--accelerator-type=$accelerator")
  elif [[ -n "$topology" ]]; then
    creation+=("--type=${topology%:*}" "--topology=${topology#*:}")
  else
    die 2 "there is no usable TPU $name in $zone: give --accelerator or --topology to make it"
  fi
  if $spot; then creation+=(--spot); fi
  creation+=(${create_flag[@]+"${create_flag[@]}"})
}

create() {
  local told=false
  plan_creation
  say "making $name (minutes)"
  until cloud "${creation[@]}" 2>"$logs/gcloud.log"; do
    # A pod that was taken away is worth waiting for; a first one may be better asked for elsewhere.
    if ! $made || ! out_of_capacity "$logs/gcloud.log"; then die 1 "$(explain "$logs/gcloud.log")"; fi
    $told || say "$zone has none to give now: trying again every $((4 * poll)) s"
    told=true
    sleep $((4 * poll))
  done
  made=true
}

delete_command() {
  if $queued_resource; then
    cloud queued-resources delete "$name" --force
  else
    cloud tpu-vm delete "$name"
  fi
}

delete_tpu() {
  say "deleting $name"
  delete_command >>"$logs/gcloud.log" 2>&1 || die 1 "$(explain "$logs/gcloud.log")"
}

# A request that failed stays in the list. An old one makes room for ours; ours says why.
give_up_request() {
  $made || { delete_tpu && return; }
  ask queued-resources describe "$name" --format='value(state.failedData.error.message)'
  printf 'ERROR: %s\n' "$state" >"$logs/gcloud.log"
  die 1 "$(explain "$logs/gcloud.log")"
}

# ------------------------------------------------------------------------- this commit on each worker

pack() { # sets `archive` and `commit`
  local tree=HEAD changed count
  changed="$(git -C "$root" status --porcelain 2>/dev/null)" ||
    die 2 "$root is not a git checkout, whose commit could be sent"
  if [[ -n "$changed" ]]; then
    count="$(printf '%s\n' "$changed" | wc -l | tr -d ' ')"
    $with_changes || $dry_run || die 2 "$count files are not committed, the first: ${changed%%$'\n'*}; \
commit them, or take them along with --with_changes"
    if $with_changes; then tree="$(tree_with_changes)"; fi
  fi
  commit="$(git -C "$root" rev-parse --short=12 "$tree")"
  archive="$logs/hyper_t5-$commit.tar.gz"
  local all=(git -C "$root" archive --format=tar.gz "--output=$archive" "$commit")
  if $dry_run; then show_command "${all[@]}"; else "${all[@]}"; fi
}

# The working tree as git would commit it, through an index of its own: nothing of the user's is touched.
tree_with_changes() {
  local index
  index="$(mktemp -d)"
  GIT_INDEX_FILE="$index/index" git -C "$root" read-tree HEAD
  GIT_INDEX_FILE="$index/index" git -C "$root" add --all
  GIT_INDEX_FILE="$index/index" git -C "$root" write-tree
  rm -rf "$index"
}

copy_to() { # copy_to WORKER
  cloud tpu-vm scp "$archive" "$(node_of "$1"):$inbox" "--worker=$(($1 % workers))" \
    --strict-host-key-checking=no "--scp-flag=-oConnectTimeout=30" \
    ${connect_flag[@]+"${connect_flag[@]}"}
}

with_env() { # with_env COMMAND...: as a line for a remote shell
  local words=("$@")
  if ((${#job_env[@]})); then words=(env "${job_env[@]}" "$@"); fi
  show_command "${words[@]}"
}

# The worker's script comes out of the archive that it unpacks.
prepare_line() {
  printf 'tar -xzOf %s launch/tpu_worker.sh >hyper_t5.sh && %s' "$inbox" \
    "$(with_env bash hyper_t5.sh prepare "$inbox")"
}

prepare_worker() { # prepare_worker WORKER
  copy_to "$1" && remote "$1" "$(prepare_line)"
}

# -------------------------------------------------------------------------- things in the background

in_background() {
  set -m # a process group of its own: Ctrl-C passes it by, and it can be ended as a whole
  "$@" </dev/null &
  groups+=($!)
  disown
  set +m
}

end_background() {
  local group
  for group in ${groups[@]+"${groups[@]}"}; do kill -- "-$group" 2>/dev/null || true; done
  groups=()
}

step() { # step STEP WORKER COMMAND...: its output to STEP-WORKER.log, its exit code to STEP-WORKER.exit
  local code=0
  "${@:3}" >"$logs/$1-$2.log" 2>&1 || code=$?
  put "$1-$2.exit" "$code"
}
put() { printf '%s\n' "$2" >"$logs/$1.part" && mv "$logs/$1.part" "$logs/$1"; }
got=""
get() { # get FILE: its line into `got`, nothing if it is not there yet
  got=""
  { read -r got <"$logs/$1"; } 2>/dev/null || true
}

# Runs FUNCTION WORKER ARGUMENT... for all workers at once, for at most so many seconds; fails with the
# number of a worker that failed in `culprit`.
on_all() { # on_all STEP SECONDS FUNCTION ARGUMENT...
  local i deadline=$((SECONDS + $2))
  for i in $(all_workers); do
    rm -f "$logs/$1-$i.exit"
    in_background step "$1" "$i" "$3" "$i" "${@:4}"
  done
  for i in $(all_workers); do
    until [[ -e "$logs/$1-$i.exit" ]] || ((SECONDS >= deadline)); do sleep 0.2; done
  done
  culprit=""
  for i in $(all_workers); do
    get "$1-$i.exit"
    if [[ "$got" != 0 ]]; then culprit="$i" && return 1; fi
  done
}

show_tail() { # show_tail FILE PREFIX
  tail -n 15 "$logs/$1" 2>/dev/null | sed "s/^/[$2] /" >&2 || true
}

# ----------------------------------------------------------------------------------------- the job

prepare_workers() {
  say "commit $commit to $((slices * workers)) workers, and its requirements (the first time takes minutes)"
  # One connection first: gcloud makes and spreads its key, which several at once would do at once.
  step greet 0 remote 0 true
  get greet-0.exit
  if [[ "$got" != 0 ]]; then
    culprit=0
    show_tail greet-0.log 0
  elif on_all prepare 3600 prepare_worker; then
    return
  else
    show_tail "prepare-$culprit.log" "$culprit"
  fi
  look
  outcome=1
  if is_gone; then
    outcome=75
  else
    say "error: worker $culprit could not be prepared; the lines above say why"
  fi
  return 1
}

is_gone() { [[ "$state" != READY && "$state" != UNKNOWN ]]; }

start_line() { # start_line RUN
  with_env bash "$worker_script" start "$1" "$what" "${job[@]}"
}

# One worker's log to its file, the first one's to the screen too, and the exit code at its end.
show_log() { # show_log WORKER
  local line
  while IFS= read -r line || [[ -n "$line" ]]; do
    if [[ "$line" == "@@hyper_t5 exit "* ]]; then
      put "worker-$1.exit" "${line##* }"
      continue
    fi
    printf '%s\n' "$line" >&3
    (($1)) || printf '[0] %s\n' "$line"
  done 3>>"$logs/worker-$1.log"
}

# Comes back after a connection that broke: to ask for the same run again is to go on watching it.
watch_worker() { # watch_worker WORKER COMMAND
  local tries=0
  while :; do
    remote "$1" "$2" 2>>"$logs/worker-$1.gcloud" | show_log "$1" || true
    [[ ! -e "$logs/worker-$1.exit" ]] || return 0
    look
    if is_gone || ((++tries >= 8)); then break; fi
    say "worker $1: the connection ended; connecting again"
    sleep "$poll"
  done
  put "worker-$1.exit" lost
}

run_job() { # run_job RUN; sets `outcome`
  local i line
  line="$(start_line "$1")"
  say "starting on $((slices * workers)) workers; logs: $logs"
  running=true
  for i in $(all_workers); do
    rm -f "$logs/worker-$i.exit"
    in_background watch_worker "$i" "$line"
  done
  wait_for_job
  judge
  running=false
}

# Until all have ended, or one has failed and the others' time is over.
wait_for_job() {
  local i left deadline=0
  first_to_fail=""
  while :; do
    left=0
    for i in $(all_workers); do
      get "worker-$i.exit"
      if [[ -z "$got" ]]; then
        left=$((left + 1))
      elif [[ "$got" != 0 && -z "$first_to_fail" ]]; then
        first_to_fail="$i" deadline=$((SECONDS + grace))
        say "worker $i: $(meaning "$got")"
      fi
    done
    ((left)) || return 0
    if [[ -n "$first_to_fail" ]] && ((SECONDS >= deadline)); then break; fi
    sleep 0.2
  done
  say "$left other workers have not ended by themselves in $grace s: stopping them"
  stop_job 5
}

meaning() { # meaning CODE
  case "$1" in
    lost) printf 'cannot be reached' ;;
    75) printf 'preempted, saved (exit code 75)' ;;
    2) printf 'a mistake in what was given (exit code 2)' ;;
    137) printf 'killed (exit code 137): out of memory, if nobody did it' ;;
    143) printf 'stopped by hand (exit code 143)' ;;
    *) printf 'failed (exit code %s)' "$1" ;;
  esac
}

stop_worker() { remote "$1" "bash $worker_script stop $2"; } # stop_worker WORKER SECONDS

stop_job() { # stop_job SECONDS
  local tries=0
  on_all stop $(($1 + 90)) stop_worker "$1" ||
    say "worker $culprit could not be asked to stop: $logs/stop-$culprit.log"
  # What the job wrote last is still on its way.
  while $running && ((tries++ < 25)); do
    all_have_ended && return
    sleep 0.2
  done
}

all_have_ended() {
  local i
  for i in $(all_workers); do [[ -e "$logs/worker-$i.exit" ]] || return 1; done
}

judge() { # from the workers' exit codes to one
  local i codes=" "
  for i in $(all_workers); do
    get "worker-$i.exit"
    codes+="$got "
  done
  end_background
  outcome=0
  [[ -n "$first_to_fail" ]] || return 0
  outcome=75
  [[ "$codes" != *" 2 "* ]] || outcome=2
  if [[ "$codes" != *" 75 "* && $outcome == 75 ]]; then
    look
    if is_gone; then
      say "$name is $state: preempted"
      return
    fi
    get "worker-$first_to_fail.exit"
    outcome="${got/lost/1}"
  fi
  if ((outcome != 75)); then show_failures; fi
}

# The tails of the logs that were not on the screen; three tell as much as a hundred.
show_failures() {
  local i shown=0
  for i in "$first_to_fail" $(all_workers); do
    if ((i == 0)) || { ((shown)) && [[ "$i" == "$first_to_fail" ]]; }; then continue; fi
    get "worker-$i.exit"
    [[ "$got" != 0 ]] || continue
    if ((++shown > 3)); then break; fi
    show_tail "worker-$i.log" "$i"
    [[ "$got" != lost ]] || show_tail "worker-$i.gcloud" "$i"
  done
  say "worker $first_to_fail was the first to fail; logs: $logs"
}

# ------------------------------------------------------------------------------------------ the end

finish() {
  finished=true
  if $delete || { $made && ! $keep && ((outcome == 0)); }; then
    delete_tpu
  elif $made; then
    tell_bill
  fi
}
tell_bill() {
  # shellcheck disable=SC2030,SC2031  # shown, not run, and only this once
  say "$name is kept, and billed; to end it: $(dry_run=true && delete_command)"
}

at_exit() {
  end_background
  rm -f "$archive"
  if $made && ! $finished; then tell_bill; fi
}

interrupted() {
  trap 'say "the job may be running still: the same command line watches it, --stop ends it"; exit 130' \
    INT TERM
  if $running; then
    say "stopping the job on all workers: it saves first, for at most $grace s; again: leave at once"
    stop_job "$grace"
  fi
  outcome=130
  finish
  exit 130
}

rehearse() { # the same commands, shown
  local i
  workers="$(expected_workers)"
  show_command mkdir -p "$logs"
  pack
  what="$commit-job"
  if [[ -z "$accelerator$topology" ]]; then
    printf '# %s is there already; its number of workers is not known here: shown for one\n' "$name"
    workers=1
  else
    printf '# unless it is there already:\n'
    plan_creation
    cloud "${creation[@]}"
    [[ -n "$workers" ]] || printf '# the number of workers of this kind is not known here: shown for one\n'
    workers="${workers:-1}"
  fi
  if $queued_resource; then cloud queued-resources describe "$name" '--format=value(state.state)'; fi
  for i in $(nodes); do cloud tpu-vm describe "$i" '--format=value(state)'; done
  printf '# on all workers at once:\n'
  for i in $(all_workers); do prepare_worker "$i"; done
  printf '# on all workers at once, until the job ends:\n'
  for i in $(all_workers); do remote "$i" "$(start_line RUN)"; done
  if ! $keep && ! $reuse; then
    printf '# at the end:\n'
    delete_command
  fi
}

main() {
  local attempt=0
  read_arguments "$@"
  check_arguments
  # shellcheck disable=SC2031
  if $dry_run; then
    rehearse
    return
  fi
  mkdir -p "$logs"
  trap at_exit EXIT
  trap interrupted INT TERM
  if $stop; then
    look
    [[ "$state" == READY ]] || die 1 "$name in $zone is $state"
    stop_job "$grace"
    return
  fi
  pack
  what="$commit-$(show_command "${job[@]}" | cksum | tr ' ' '-')"
  while :; do
    ensure_ready
    if prepare_workers; then run_job "$(date +%Y%m%d-%H%M%S)-$$-$attempt"; fi
    ((outcome == 75)) || break
    if ((++attempt > restarts)); then
      say "preempted, and restarted $restarts times already (--restarts)"
      break
    fi
    say "restart $attempt of at most $restarts: the job goes on from its last checkpoint"
    sleep "$poll" # so that a preemption shows in the TPU's state
  done
  finish
  exit "$outcome"
}

main "$@"
