"""Record of a bad step for analysis: its batch, metrics and config, and the state before it.

WORKDIR/replay/STEP has `batch.npz` (with N processes `batch.I-of-N.npz`: the rows of process I, in
the order of the global batch), `replay.json`, and `state/`, a workdir: training resumed there
repeats the step.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

FOLDER, BATCH, RECORD, STATE = "replay", "batch.npz", "replay.json", "state"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Replay:
    """A saved step.

    Attributes:
      step: its number, from 1.
      reason: why it was saved.
      seed: of the run.
      tasks: names of the batch's tasks.
      loss: per token, in nats; may be non-finite.
      grad_norm: may be non-finite.
      config: of the run.
      batch: name -> array.
      state: folder of the state before the step; None if it was not saved.
    """

    step: int
    reason: str
    seed: int
    tasks: list[str]
    loss: float
    grad_norm: float
    config: dict[str, Any]
    batch: dict[str, np.ndarray]
    state: epath.Path | None = None


def save_replay(
    workdir: str | os.PathLike[str],
    replay: Replay,
    save_state: Callable[[epath.Path], None] | None = None,
    process: int = 0,
    processes: int = 1,
) -> epath.Path | None:
    """Write a step to WORKDIR/replay/STEP. All processes of a run call it.

    Args:
      workdir: folder of the run, local or `gs://`.
      replay: the step; its batch has the rows of this process.
      save_state: saves the state before the step to a folder.
      process: index of this process.
      processes: their number.

    Returns:
      The folder. None if it could not be written, which is only logged: the run ends with the
      error of the bad step.
    """
    folder = files.as_path(workdir) / FOLDER / str(replay.step)
    try:
        content = io.BytesIO()
        np.savez(content, **dict[str, Any](replay.batch))
        files.write_bytes(folder / _batch_file(process, processes), content.getvalue())
        if save_state is not None:
            save_state(folder / STATE)
        if process == 0:  # written last: the folder is complete
            record = dataclasses.asdict(dataclasses.replace(replay, batch={}, state=None))
            record |= {"loss": str(replay.loss), "grad_norm": str(replay.grad_norm)}  # JSON: no NaN
            record |= {"processes": processes, "state": save_state is not None}
            record["arrays"] = _row_shapes(replay.batch)
            del record["batch"]
            files.write_json(folder / RECORD, record)
    except Exception as error:
        log.warning("%s: step %d could not be saved for replay: %s", folder, replay.step, error)
        return None
    return folder


def load_replay(folder: str | os.PathLike[str]) -> Replay:
    """Load a step; UserError if a file is missing or damaged."""
    path = files.as_path(folder)
    file = path / RECORD
    record = files.read_json(file)
    try:
        processes, shapes = record.pop("processes"), record.pop("arrays")
        record |= {name: float(record[name]) for name in ("loss", "grad_norm")}
        record["state"] = path / STATE if record["state"] else None
        if record["state"] and not record["state"].exists():
            raise ValueError(f"{STATE}/ is missing")
        replay, parts = Replay(**record, batch={}), []
        for process in range(processes):
            file = path / _batch_file(process, processes)
            # A zip has a checksum of each of its files.
            with np.load(io.BytesIO(files.read_bytes(file)), allow_pickle=False) as part:
                parts.append(dict(part))
            if _row_shapes(parts[-1]) != shapes:
                raise ValueError(f"its arrays are not those of {RECORD}")
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file}: cannot be read ({type(error).__name__}: {error}); use a folder "
            f"WORKDIR/{FOLDER}/STEP of a run"
        ) from error
    batch = {name: np.concatenate([part[name] for part in parts]) for name in shapes}
    return dataclasses.replace(replay, batch=batch)


def _batch_file(process: int, processes: int) -> str:
    return BATCH if processes == 1 else f"batch.{process}-of-{processes}.npz"


def _row_shapes(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Map each name to the shape of a row and the dtype."""
    return {name: [list(array.shape[1:]), str(array.dtype)] for name, array in batch.items()}
