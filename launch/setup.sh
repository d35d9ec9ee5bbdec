#!/usr/bin/env bash
# Makes .venv at the root of the repository with the package and its pinned requirements, or finds
# that nothing has changed since it last did.
#
#   bash launch/setup.sh [--extra test|tpu|gpu|plan|beam]...
#
# PYTHON names the interpreter (default: that of an existing .venv, else python3). uv is used when it
# is there, else venv and pip. A stamp inside .venv says what was installed and from which files; an
# install that was cut short leaves a mark instead, and the next run starts from an empty .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/hyper_t5-installed"
mark="$venv/hyper_t5-installing"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# "3.11" for an interpreter that runs, nothing for one that does not.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
is_new_enough() { [[ "$1" =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 11)); }
has_uv() { uv --version >/dev/null 2>&1; }
contains() { [[ " $1 " == *" $2 "* ]]; }

# Of all that the environment depends on. Paths count, because an environment cannot be moved.
fingerprint() {
  "$venv/bin/python" - "$root" setup.py pyproject.toml constraints.txt <<'PY'
import hashlib, os, sys
root, *names = sys.argv[1:]
digest = hashlib.sha256(repr((root, sys.version)).encode())
for name in names:
    with open(os.path.join(root, name), "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PY
}

# Whether the .venv that is there, made by us or not, can be installed into.
is_usable() {
  local version
  version="$(version_of "$venv/bin/python")"
  [[ ! -e "$mark" ]] && is_new_enough "$version" &&
    [[ -z "${PYTHON:-}" || "$(version_of "$PYTHON")" == "$version" ]] &&
    { has_uv || "$venv/bin/python" -m pip --version >/dev/null 2>&1; }
}

make_venv() {
  local python="${PYTHON:-python3}" version
  version="$(version_of "$python")"
  [[ -n "$version" ]] || die "cannot run $python: set PYTHON to a Python 3.11 or later"
  is_new_enough "$version" ||
    die "$python is Python $version: set PYTHON to a Python 3.11 or later"
  if has_uv; then
    uv venv --quiet --clear --python "$python" "$venv"
  else
    "$python" -m venv --clear "$venv" ||
      die "$python cannot make $venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
}

install() { # install EXTRA...
  # Python compiles what is imported when it first is; compiling all that there is takes minutes.
  local list="$*" tool=pip how=("$venv/bin/python" -m pip install -qq --no-input --no-compile)
  local what="${list:+[${list// /,}]}"
  if has_uv; then
    tool=uv how=(uv pip install --quiet --python "$venv/bin/python")
  fi
  say "installing hyper_t5$what into $venv with $tool and Python" \
    "$(version_of "$venv/bin/python") (the first time takes minutes)"
  rm -f "$stamp"
  touch "$mark"
  trap 'exit 130' INT TERM # leaves the mark: no telling how far the installer had come
  # A refusal is different: what was installed by then is whole, and the next run goes on from it.
  "${how[@]}" --constraint "$root/constraints.txt" --editable "$root$what" || {
    rm -f "$mark"
    die "the installation failed; the lines above say why"
  }
  printf '%s %s\n' "$(fingerprint)" "$list" >"$mark"
  mv "$mark" "$stamp"
}

main() {
  local extras=()
  while (($#)); do
    [[ "$1" == --extra && "${2:-}" =~ ^(test|tpu|gpu|plan|beam)$ ]] ||
      die "cannot read '$*'; usage: bash launch/setup.sh [--extra test|tpu|gpu|plan|beam]..."
    extras+=("$2")
    shift 2
  done

  # One run at a time: a second one waits, then finds the work done. (macOS has no flock.)
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock 9
  fi

  local known="" had=""
  if [[ -e "$stamp" ]]; then read -r known had <"$stamp" || true; fi
  local all="$had" extra new=false
  for extra in ${extras[@]+"${extras[@]}"}; do
    if ! contains "$all" "$extra"; then
      all="${all:+$all }$extra"
      new=true
    fi
  done

  if ! is_usable; then
    make_venv
  elif ! $new && [[ "$known" == "$(fingerprint)" ]]; then
    say "$venv is up to date"
    return
  fi
  # shellcheck disable=SC2086  # a list of words
  install $all
}

main "$@"
