r"""SeqIO Tasks of a mixture or text, for ``seqio_cache_tasks``; an import registers them.

The environment variable HYPER_T5_DATA sets fields of the config's section ``data``:

    HYPER_T5_DATA="mixture=sni sni_dir=FOLDER vocab=spiece.model" \
    seqio_cache_tasks --module_import=hyper_t5.tools.seqio_tasks --tasks='sni_.*' --min_shards=1 \
      --output_cache_dir=DIR

All splits of ``mixture`` are registered, and ``text``. A Task is cached after tokenization, so a
cache is of one vocabulary and serves any lengths. To read it, call
``seqio.add_global_cache_dirs([DIR])`` and ``get_dataset(..., use_cached=True)``.
"""

from __future__ import annotations

import sys
from typing import Any

from hyper_t5 import pipeline
from hyper_t5.tasks import seqio_tasks
from hyper_t5.tasks import text as text_tasks
from hyper_t5.tools.build_dataset import ENVIRONMENT, config_of_environment
from hyper_t5.utils.errors import UserError


def register(data_config: Any, mixture: str, text: str) -> list[str]:
    """Register the Tasks and Mixtures of ``mixture`` and ``text`` ('' is none); return their names.

    Raises:
      UserError: neither is set, or an invalid config or data.
    """
    if not (mixture or text):
        raise UserError("no mixture and no text; set mixture=NAME or text=FILES")
    dataset = pipeline.dataset_of(mixture) if mixture else None
    vocab = pipeline.mixture_vocab(data_config)
    names = []
    if dataset is not None:
        for split in dict.fromkeys(("train", *dataset.held_out)):
            tasks = dataset.load_rows(data_config, split, vocab)
            names.append(seqio_tasks.register(tasks, data_config, split, vocab))
    if text:
        names.append(text_tasks.register(text, vocab, data_config.on_bad_row))
    return names


def _register_from_environment() -> None:
    try:
        data_config = config_of_environment().data
        register(data_config, data_config.mixture, data_config.text)
    except UserError as error:
        sys.exit(f"{ENVIRONMENT}: {error}")


_register_from_environment()
