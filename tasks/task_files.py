"""Task files of one's own as SeqIO Tasks: what `adapt` reads, to tune and to judge by.

`data.task_files` is a task file in either form (taskfile.py), a folder of them, or a glob. Each is
a SeqIO Task `task_files_<file>_<split>`; every split has all of them and all their rows, for who
holds rows out is stage 'peft' (`data.load_peft_tasks`): the first `eval.max_rows_per_task` rows are
judged, the others trained on.
"""

from __future__ import annotations

import functools
from typing import Any

from hyper_t5.taskfile import read_task_rows, task_paths
from hyper_t5.tasks.common import register_rows
from hyper_t5.vocab import Vocabulary

HELD_OUT = ("test",)


def register(data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Registers the files of `data_config.task_files`; returns the Mixture's name.

    Raises:
        UserError: no such file.
    """
    c = data_config
    paths = task_paths(c.task_files)
    how = (c.on_bad_row, c.empty_targets)
    readers = {path.stem: functools.partial(read_task_rows, path, *how) for path in paths}
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return register_rows("task_files", split, readers, (seen, how), vocab, c.max_instances_per_task)
