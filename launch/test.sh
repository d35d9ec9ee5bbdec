#!/usr/bin/env bash
# Installs what the tests need, then runs them on two cores, without those marked `slow` or `soak`.
# One worker has all tests of a file, which share what takes long to make.
#
#   bash launch/test.sh [pytest's arguments]
#   bash launch/test.sh -m 'not soak'      (what CI runs)
#   bash launch/test.sh -m ''              (all)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/launch/setup.sh" --extra test
cd "$root"
exec .venv/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not soak' "$@"
