"""A user's own task files, for tuning and evaluation.

``data.task_files`` is a task file in either form (`data.task_rows`), a folder of them, or a glob.
Each is a SeqIO Task ``task_files_<file>_<split>``. Every split has all files and all their rows,
since stage 'peft' divides rows (`pipeline.load_peft_tasks`): the first ``eval.max_rows_per_task``
rows are evaluated, the others trained on.
"""

from __future__ import annotations

import functools
from typing import Any

from hyper_t5.data.task_rows import read_task_data, task_paths
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load the tasks of ``data.task_files``.

    Raises:
      UserError: no such file.
    """
    del vocab
    c = data_config
    paths = task_paths(c.task_files)
    options = (c.on_bad_row, c.empty_targets)
    readers = {
        f"task_files_{path.stem}_{split}": functools.partial(read_task_data, path, *options)
        for path in paths
    }
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return TaskSet(f"task_files_{split}", readers, (stamps, options))
