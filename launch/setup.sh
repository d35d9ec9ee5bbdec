#!/usr/bin/env bash
# Creates .venv at the root of the repository and installs the package with its pinned requirements.
# Does nothing if .venv is up to date.
#
#   bash launch/setup.sh [--extra test|tpu|gpu|plan|beam|gpt2]...
#
# PYTHON names the interpreter (default: that of an existing .venv, else python3). Uses uv if it is
# installed, else venv and pip. A stamp inside .venv records the extras and a hash of the packaging
# files. An interrupted installation leaves a mark instead, and the next run creates .venv anew.
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

# Prints "3.11" for a working interpreter, else nothing.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
is_new_enough() { [[ "$1" =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 11)); }
has_uv() { uv --version >/dev/null 2>&1; }

# Prints a hash of everything that the environment depends on. The path counts, because an
# environment cannot be moved.
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

# Whether an existing .venv, of this script or not, can be installed into.
is_usable() {
  local version
  version="$(version_of "$venv/bin/python")"
  [[ ! -e "$mark" ]] && is_new_enough "$version" &&
    [[ -z "${PYTHON:-}" || "$(version_of "$PYTHON")" == "$version" ]] &&
    { has_uv || "$venv/bin/python" -m pip --version >/dev/null 2>&1; }
}

create_venv() {
  local python="${PYTHON:-python3}" version
  version="$(version_of "$python")"
  [[ -n "$version" ]] || die "cannot run $python: set PYTHON to a Python 3.11 or later"
  is_new_enough "$version" ||
    die "$python is Python $version: set PYTHON to a Python 3.11 or later"
  if has_uv; then
    uv venv --quiet --clear --python "$python" "$venv"
  else
    "$python" -m venv --clear "$venv" ||
      die "$python cannot create $venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
}

install() { # install EXTRA...
  # --no-compile: Python compiles a module at its first import; compiling all takes minutes.
  local list="$*" tool=pip command=("$venv/bin/python" -m pip install -qq --no-input --no-compile)
  local extras="${list:+[${list// /,}]}"
  if has_uv; then
    tool=uv command=(uv pip install --quiet --python "$venv/bin/python")
  fi
  say "installing hyper_t5$extras into $venv with $tool and Python" \
    "$(version_of "$venv/bin/python") (takes minutes the first time)"
  rm -f "$stamp"
  touch "$mark"
  trap 'exit 130' INT TERM # leaves the mark: the environment may be incomplete
  # An error of the installer leaves complete packages, so the next run continues with them.
  "${command[@]}" --constraint "$root/constraints.txt" --editable "$root$extras" || {
    rm -f "$mark"
    die "the installation failed; see the lines above"
  }
  printf '%s %s\n' "$(fingerprint)" "$list" >"$mark"
  mv "$mark" "$stamp"
}

main() {
  local extras=() hash="" installed=""
  while (($#)); do
    [[ "$1" == --extra && "${2:-}" =~ ^(test|tpu|gpu|plan|beam|gpt2)$ ]] ||
      die "unknown arguments '$*'; usage: bash launch/setup.sh [--extra test|tpu|gpu|plan|beam|gpt2]..."
    extras+=("$2")
    shift 2
  done

  # One run at a time; a second one waits. (macOS has no flock.)
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock 9
  fi

  if [[ -e "$stamp" ]]; then read -r hash installed <"$stamp" || true; fi
  local all="$installed" extra
  for extra in ${extras[@]+"${extras[@]}"}; do
    [[ " $all " == *" $extra "* ]] || all="${all:+$all }$extra"
  done
  if ! is_usable; then
    create_venv
  elif [[ "$all" == "$installed" && "$hash" == "$(fingerprint)" ]]; then
    say "$venv is up to date"
    return
  fi
  # shellcheck disable=SC2086  # a list of words
  install $all
}

main "$@"
