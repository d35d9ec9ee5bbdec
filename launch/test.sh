#!/usr/bin/env bash
# Installs the test extra and runs the tests on two cores, without those marked `slow` or `soak`.
# The tests of a file run in one pytest worker, because they share fixtures that take long to build.
#
#   bash launch/test.sh [pytest's arguments]
#   bash launch/test.sh -m 'not soak'      (as in CI)
#   bash launch/test.sh -m ''              (all tests)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/launch/setup.sh" --extra test
cd "$root"
exec .venv/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not soak' "$@"
