"""Hypermodels for T5: read a task once, emit adapters, run the frozen backbone with them.

predictor = hyper_t5.load("runs/mtf")          # the workdir of a run, or a backbone's folder
adapter = predictor.adapt("task.json")         # or {"instruction": ..., "examples": [...]}
outputs = predictor.predict(["a b c", "d e"], adapter)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyper_t5.inference.predictor import Predictor

__version__ = "0.1.0"


def load(path: str | Path, dtype: str = "float32", overrides: Sequence[str] = ()) -> Predictor:
    """Load a run, which can adapt, or a backbone; see ``inference.predictor.load``."""
    # Here, so that `import hyper_t5` and the command line's --help load no JAX.
    from hyper_t5.inference import predictor

    return predictor.load(path, dtype, overrides)
