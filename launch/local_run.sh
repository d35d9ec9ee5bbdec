#!/usr/bin/env bash
# Runs the quickstart on this machine: train, evaluate on held-out tasks, adapt, export. Prints a
# table of results and the path of every output. Arguments go unchanged to `hyper-t5 quickstart`.
#
#   bash launch/local_run.sh [arguments]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/launch/setup.sh"
cd "$root"
exec .venv/bin/python -m hyper_t5 quickstart "$@"
