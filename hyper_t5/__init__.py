"""Hypermodels for T5: read a task once, emit adapters, run the frozen backbone with them.

model = hyper_t5.load("runs/mtf")              # a run, or a backbone's folder
adapter = model.adapt("task.json")             # or {"instruction": ..., "examples": [...]}
outputs = model.predict(["a b c", "d e"], adapter)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyper_t5.serve import Model

__version__ = "0.1.0"


def load(path: str | Path, dtype: str = "float32") -> Model:
    """A run's folder, which can adapt too, or a backbone's; see ``serve.load``."""
    # Here, so that `import hyper_t5` and the command line's --help load no JAX.
    from hyper_t5 import serve

    return serve.load(path, dtype)
