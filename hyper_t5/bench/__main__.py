"""One benchmark in a process of its own: `python -m hyper_t5.bench ORDER`, called by `main`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

from hyper_t5 import quiet
from hyper_t5.bench import BENCHES, Options
from hyper_t5.errors import UserError

TORCH_THREADS = 2


def run() -> None:
    """Read the order, run the benchmark, write its result or the user's mistake as JSON."""
    order = json.loads(sys.argv[1])
    name, answer = order.pop("name"), Path(order.pop("answer"))
    quiet.libraries()
    if name in ("torch", "predict"):
        # Both frameworks take as many threads as there are cores they may run on.
        os.environ["JAX_PLATFORMS"] = "cpu"
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:TORCH_THREADS])
    module, function = BENCHES[name]
    try:
        bench = getattr(importlib.import_module(f"hyper_t5.bench.{module}"), function)
        content = dataclasses.asdict(bench(Options(**order)))
    except UserError as error:
        content = {"error": str(error)}
    answer.write_text(json.dumps(content))


if __name__ == "__main__":
    run()
