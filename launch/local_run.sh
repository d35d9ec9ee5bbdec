#!/usr/bin/env bash
# The whole path on this machine: trains, evaluates on unseen tasks, adapts, exports, and prints where
# each result is. Arguments go to the run as they are.
#
#   bash launch/local_run.sh [arguments]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/launch/setup.sh"
cd "$root"
# ---- the main job: this one line ----
exec .venv/bin/python -m hyper_t5 quickstart "$@"
