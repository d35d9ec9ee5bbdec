"""Super-NaturalInstructions (Wang et al. 2022), from the folder of its official release.

    FOLDER/tasks/<task>.json
    FOLDER/splits/default/{train,test}_tasks.txt     one task name per line
    FOLDER/splits/xlingual/{train,test}_tasks.txt    of the cross-lingual track

Each task is a SeqIO Task ``sni_<task>`` (hyphens become underscores). ``sni_train`` and
``sni_test`` are Mixtures of them, ``sni_xlingual_train`` and ``sni_xlingual_test`` those of the
cross-lingual track. As in Tk-Instruct every task has the same rate; with
``data.max_instances_per_task`` (100 there) T0's rule applies: the number of rows, capped.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyper_t5.data.task_rows import TaskData, parse_sni_task, read_sni_task
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.utils.errors import UserError

XLINGUAL = "xlingual_"
SPLITS = ("train", "test", f"{XLINGUAL}train", f"{XLINGUAL}test")


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load the tasks of one split of ``data.sni_dir``.

    Raises:
      UserError: no such folder or split, an empty split, or a split that names missing tasks.
    """
    del vocab
    files = split_files(data_config.sni_dir, split, data_config.on_missing_task == "skip")
    return sni_tasks("sni", split, files, data_config)


def split_files(sni_dir: str, split: str, skip_missing: bool = False) -> dict[str, Path]:
    """Return the task files of a split by name, in the split's order.

    Raises:
      UserError: names the split file, the task and the remedy.
    """
    if not sni_dir:
        raise UserError(
            "data.sni_dir is empty: set the folder that holds tasks/ and splits/ of "
            "Super-NaturalInstructions"
        )
    folder = Path(sni_dir).expanduser()
    track = "xlingual" if split.startswith(XLINGUAL) else "default"
    listing = folder / "splits" / track / f"{split.removeprefix(XLINGUAL)}_tasks.txt"
    try:
        names = listing.read_text(encoding="utf-8-sig").split()
    except OSError:
        raise UserError(
            f"{listing}: no such split file; data.sni_dir must hold tasks/ and splits/default/, "
            f"and the splits are {', '.join(SPLITS)}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{listing}: not UTF-8; save it as UTF-8, with one task name per line"
        ) from None
    if not names:
        raise UserError(f"{listing}: the list is empty; it must list one task name per line")
    files = {name: folder / "tasks" / f"{name}.json" for name in names}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing and not skip_missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{listing}: names {missing[0]}{others}, but {files[missing[0]]} is missing; add the "
            "file, remove the line, or set data.on_missing_task='skip'"
        )
    if len(missing) == len(names):
        raise UserError(f"{listing}: none of its {len(names)} tasks is in {folder / 'tasks'}")
    if missing:
        print(f"{listing}: skips {len(missing)} of {len(names)} tasks, without a file")
    return {name: file for name, file in files.items() if name not in set(missing)}


def sni_tasks(
    prefix: str, split: str, tasks: Mapping[str, Path | Mapping[str, Any]], data_config: Any
) -> TaskSet:
    """Return tasks in the form of Super-NaturalInstructions' files.

    Args:
      prefix: of the SeqIO names.
      split: 'train' (of any track) keeps ``data.max_instances_per_task`` random rows, any
        other split the first ones, which in the official files are balanced over labels.
      tasks: by name, a path or the parsed JSON object.
      data_config: ``config.data``.

    Raises:
      UserError: there are no tasks.
    """
    if not tasks:
        raise UserError(f"{prefix}: the {split} split has no tasks")
    c = data_config
    first = 0 if split.endswith("train") else c.max_instances_per_task
    options = (c.on_bad_row, first, c.empty_targets)
    readers = {
        f"{prefix}_{name}": functools.partial(_read, name, task, *options)
        for name, task in tasks.items()
    }
    content = [
        str(task) if isinstance(task, Path) else zlib.crc32(repr(task).encode())
        for task in tasks.values()
    ]
    rates = None if c.max_instances_per_task else dict.fromkeys(readers, 1.0)
    return TaskSet(f"{prefix}_{split}", readers, (content, options), rates)


def _read(name: str, task: Path | Mapping[str, Any], *options: Any) -> TaskData:
    if isinstance(task, Path):
        return read_sni_task(task, *options)
    return parse_sni_task(task, name, "", *options)
