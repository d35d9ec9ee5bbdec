"""Benchmarks of the data: the pipeline against a training step, packed against padded rows."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline as data_lib
from hyper_t5.bench import Options, measure, steps
from hyper_t5.data.batch import example_count, real_tokens

PIPELINE, STEP = "pipeline", "training step"
PACKED, PADDED = "packed", "padded"
FIELDS = ("hyper_inputs", "inputs", "targets")
FOLDERS = {"sni": "sni_dir", "p3": "p3_dir", "metaicl": "metaicl_dir"}


def data(options: Options, result: measure.Result) -> None:
    """Compare the data pipeline alone with the training step that consumes it."""
    count, rounds = (4, 2) if options.tiny else (64, 5)
    for name, config in _mixtures(options, result):
        step, batches = _start(config)
        tokens: list[int] = []
        draw = functools.partial(_draw, batches, count, tokens)
        seconds = measure.time_arms({PIPELINE: draw, STEP: step}, rounds)
        per_batch = {"episodes/s": float(config.data.tasks_per_batch)}
        per_batch["real tokens/s"] = statistics.mean(tokens)
        for unit, items in per_batch.items():
            result.add(name, unit, seconds, STEP, {PIPELINE: items * count, STEP: items})


def packing(options: Options, result: measure.Result) -> None:
    """Compare training on rows packed by task with one example per row.

    The batches of both arms have the same shape, so their steps cost the same. Every step of an arm
    takes another batch.
    """
    count, rounds = (2, 2) if options.tiny else (3, 3)
    for name, config in _mixtures(options, result):
        arms, tokens = {}, {}
        for arm in (PADDED, PACKED):
            config.data.pack = arm == PACKED
            step, stream = _start(config)
            batches = list(itertools.islice(stream, count))
            arms[arm] = functools.partial(_train, step, batches)
            tokens[arm] = sum(map(real_tokens, batches))
            size = sum(batch[field].size for batch in batches for field in FIELDS)
            examples = sum(map(example_count, batches)) / count
            result.notes.append(
                f"{name}, {arm}: {tokens[arm] / size:.1%} of the batch are real tokens, "
                f"{examples:.1f} examples per batch"
            )
        result.add(name, "real tokens/s", measure.time_arms(arms, rounds), PADDED, tokens)


def _mixtures(options: Options, result: measure.Result) -> Iterator[tuple[str, ConfigDict]]:
    """Yield the embedded suite, and each mixture whose folder is set, at published lengths."""
    configs = {"embedded suite": config_lib.load("configs/quickstart.py")}
    if options.tiny:
        configs["embedded suite"].data.tasks_per_batch = 2
    fields = {override.partition("=")[0] for override in options.gin}
    for name, folder in FOLDERS.items():
        if f"data.{folder}" in fields:
            config = config_lib.load(f"configs/mtf.py:mixture={name},size=small", options.gin)
            config_lib.use_preset(config, "tiny" if options.tiny else "mini")
            c, vocab = config.data, data_lib.mixture_vocab(config.data)
            config.model.vocab_size = max(config.model.vocab_size, vocab.size)
            config.model.dtype = "float32"  # bfloat16 is slow on CPUs
            lengths = (64, 64, 16) if options.tiny else (1024, 1024, 256)
            c.hyper_length, c.input_length, c.target_length = lengths
            c.tasks_per_batch, c.examples_per_task = 2, 2
            configs[name] = config
    for name, config in configs.items():
        c, m = config.data, config.model
        result.notes.append(
            f"{name}: {c.tasks_per_batch} tasks of {c.examples_per_task} rows, {c.hyper_length} + "
            f"{c.input_length} + {c.target_length} tokens of conditioning, input and target; "
            f"{config.system} on a T5 of width {m.emb_dim}; real tokens are no padding"
        )
        yield name, config


def _start(config: ConfigDict) -> tuple[steps.TrainingStep, Iterator[steps.Tree]]:
    """Compile the training step of a config; return it with the endless stream of batches."""
    sampler = data_lib.make_sampler(config, data_lib.mixture_vocab(config.data))
    sizes = config_lib.t5_config(config)
    backbone = steps.random_backbone(sizes)
    step = steps.TrainingStep(config, sizes, backbone, sampler.batch(0))
    return step, map(sampler.batch, itertools.count())


def _draw(batches: Iterator[steps.Tree], count: int, tokens: list[int]) -> None:
    """Make batches and append their numbers of real tokens to ``tokens``."""
    tokens.extend(map(real_tokens, itertools.islice(batches, count)))


def _train(step: steps.TrainingStep, batches: Sequence[steps.Tree]) -> None:
    for batch in batches:
        step(batch)
