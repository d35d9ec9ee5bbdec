r"""Our SeqIO Tasks for programs that know Tasks alone: importing this module registers them.

Which ones says the environment, in fields of the config's section "data":

    HYPER_T5_DATA="mixture=sni sni_dir=FOLDER vocab=spiece.model" \
    seqio_cache_tasks --module_import=hyper_t5.seqio_tasks --tasks='sni_.*' --min_shards=1 \
      --output_cache_dir=DIR

Registered are all splits of `mixture`, or `text`, or both where both are given. Each Task is cached
as it is behind its tokenizer, so for one vocabulary and for any lengths; it is read again with
`seqio.add_global_cache_dirs([DIR])` and `get_dataset(..., use_cached=True)`. A mistake ends the
program with one line.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from hyper_t5 import data
from hyper_t5.build import ENVIRONMENT, config_of_environment
from hyper_t5.errors import UserError


def register(data_config: Any, mixture: str, text: str) -> list[str]:
    """Registers the Tasks and Mixtures of `mixture` and `text`, '' for none; returns their names.

    Raises:
        UserError: neither is given, or what is wrong with the config or the data.
    """
    if not (mixture or text):
        raise UserError("give mixture=NAME or text=FILES")
    splits = ("train", *data.held_out_splits(mixture)) if mixture else ()
    vocab = data.mixture_vocab(data_config)
    names = []
    if mixture:
        module = importlib.import_module(data.MIXTURES[mixture])
        names += [module.register(data_config, split, vocab) for split in splits]
    if text:
        module = importlib.import_module("hyper_t5.tasks.text")
        names.append(module.register(text, vocab, data_config.on_bad_row))
    return names


def _register_from_environment() -> None:
    try:
        config = config_of_environment()
        section = config.data
        register(section, section.mixture, section.text)
    except UserError as error:
        sys.exit(f"{ENVIRONMENT}: {error}")


_register_from_environment()
