"""Benchmarks of the data: against a step's needs, packed against padded, by tasks and hosts."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import data as data_lib
from hyper_t5 import metrics
from hyper_t5.bench import Options, measure
from hyper_t5.bench.steps import TrainingStep, random_backbone, where

PIPELINE, STEP = "pipeline", "training step"
PACKED, PADDED = "packed", "padded"
FOLDERS = {"sni": "sni_dir", "p3": "p3_dir", "metaicl": "metaicl_dir"}


def data(options: Options) -> measure.Result:
    """Episodes and real tokens a second, against the training step's."""
    result = _result("data", "the pipeline alone against what the step needs")
    for what, config in _mixtures(options):
        sampler, ready = _start(config)
        sizes = config_lib.t5_config(config)
        step = TrainingStep(config, sizes, random_backbone(sizes), sampler.batch(0))
        count = 4 if options.tiny else 64
        made = _Drawn(sampler)
        pipeline = functools.partial(made.batches, count)
        seconds = measure.in_turns({PIPELINE: pipeline, STEP: step}, 2 if options.tiny else 5)
        tokens, tasks = made.tokens_a_batch(), config.data.tasks_per_batch
        for unit, each in {"episodes/s": tasks, "real tokens/s": tokens}.items():
            amounts = {PIPELINE: float(each * count), STEP: float(each)}
            result.rows.append(measure.rate_row(what, unit, seconds, amounts, PIPELINE, STEP))
        result.notes.append(
            f"{what}: ready after {ready:.1f} s, imports included; batches of {tasks} episodes "
            f"with {config.data.examples_per_task} rows each, {tokens:,.0f} real tokens; "
            f"{_step_note(config)}"
        )
    return result


def packing(options: Options) -> measure.Result:
    """Real tokens a second in training, with rows packed by task and with one example a row.

    Both arms have batches of one shape, and so steps of one price; each step of an arm has another
    batch.
    """
    result = _result("packing", "rows packed by task against one example a row")
    count, rounds = (2, 2) if options.tiny else (3, 3)
    for what, config in _mixtures(options, embedded=options.tiny):
        steps, tokens = {}, {}
        for arm in (PADDED, PACKED):
            config.data.pack = arm == PACKED
            sampler, _ = _start(config)
            batches = [sampler.batch(index) for index in range(count)]
            real = sum(map(data_lib.real_tokens, batches))
            size = sum(b[k].size for b in batches for k in ("hyper_inputs", "inputs", "targets"))
            rows = sum((b[k] > 0).sum() for b in batches for k in ("inputs", "targets"))
            wide = sum(b[k].size for b in batches for k in ("inputs", "targets"))
            tokens[arm] = float(real)
            result.notes.append(
                f"{what}, {arm}: {real / size:.1%} of the batch are real tokens, {rows / wide:.1%} "
                f"of the backbone's part; {sum(map(data_lib.examples_of, batches)) / count:.1f} "
                "examples a batch"
            )
            sizes = config_lib.t5_config(config)
            steps[arm] = _Steps(
                TrainingStep(config, sizes, random_backbone(sizes), batches[0]), batches
            )
        seconds = measure.in_turns(steps, rounds)
        result.rows.append(measure.rate_row(what, "real tokens/s", seconds, tokens, PACKED, PADDED))
        c = config.data
        result.notes.append(
            f"{what}: {c.tasks_per_batch} tasks of {c.examples_per_task} rows, {c.hyper_length} "
            f"tokens of conditioning, {c.input_length} of inputs, {c.target_length} of targets; "
            f"{_step_note(config)}"
        )
    return result


def scaling(options: Options) -> measure.Result:
    """How opening a mixture and making a batch grow with tasks, and a host's part with hosts."""
    result = _result("scaling", "more tasks, more hosts")
    rounds = 2 if options.tiny else 5
    for what, config in _mixtures(options):
        config.data.tasks_per_batch = 8 if options.tiny else 64
        vocab = data_lib.mixture_vocab(config.data)
        started = perf_counter()
        tasks = data_lib.load_tasks(config.data.mixture, config.data, "train", vocab)
        opened = perf_counter() - started
        samplers: dict[str, Callable[[], data_lib.Sampler]] = {}
        batches: dict[str, Callable[[], None]] = {}
        for part in (4, 2, 1):
            few = tasks[: max(1, len(tasks) // part)]
            open_ = functools.partial(data_lib.EpisodeSampler, few, vocab, config.data, config.seed)
            samplers[f"{len(few)} tasks"] = open_
            batches[f"{len(few)} tasks"] = functools.partial(_Drawn(open_()).batches, 4)
        every, first = f"{len(tasks)} tasks", next(iter(samplers))
        timed: dict[str, Any] = {"sampler": samplers, "4 batches": batches}
        for label, arms in timed.items():
            seconds = measure.in_turns(arms, rounds)
            result.rows.append(measure.time_row(f"{what}: {label}", seconds, every, first))
        sampler = samplers[every]()
        parts = {
            f"of {number} hosts": functools.partial(_Drawn(sampler, number).batches, 4)
            for number in (1, 2, 4, 8)
        }
        seconds = measure.in_turns(parts, rounds)
        for name in list(parts)[1:]:
            row = measure.time_row(f"{what}: 4 batches", seconds, name, "of 1 hosts")
            result.rows.append(row)
        result.notes.append(
            f"{what}: {len(tasks)} tasks, {sum(len(task.rows) for task in tasks):,} rows, opened "
            f"in {opened:.1f} s (imports included, where it is the first), batches of "
            f"{config.data.tasks_per_batch} episodes of {config.data.examples_per_task} rows; "
            f"so far the process has taken {metrics.peak_memory_mb():,.0f} MB at most"
        )
    return result


class _Drawn:
    """The last host's parts of batches in order, and how many real tokens they had."""

    def __init__(self, sampler: data_lib.Sampler, hosts: int = 1) -> None:
        self._sampler, self._hosts = sampler, hosts
        self._count: Counter[str] = Counter()

    def batches(self, count: int) -> None:
        for _ in range(count):
            batch = self._sampler.batch(self._count["batches"], self._hosts - 1, self._hosts)
            self._count["batches"] += 1
            self._count["tokens"] += data_lib.real_tokens(batch)

    def tokens_a_batch(self) -> float:
        return self._count["tokens"] / self._count["batches"]


class _Steps:
    """A training step on each of some batches."""

    def __init__(self, step: TrainingStep, batches: list[Any]) -> None:
        self._step, self._batches = step, batches

    def __call__(self) -> None:
        for batch in self._batches:
            self._step.batch = batch
            self._step()


def _result(name: str, title: str) -> measure.Result:
    notes = [
        f"{measure.machine()}; {where()}",
        "real tokens are those that are no padding, of conditioning, inputs and targets",
    ]
    return measure.Result(name, title, notes)


def _mixtures(options: Options, embedded: bool = True) -> Iterator[tuple[str, ConfigDict]]:
    """The embedded suite, and each mixture whose folder is given, at the published lengths."""
    if embedded:
        config = config_lib.load("configs/quickstart.py")
        if options.tiny:
            config.data.tasks_per_batch = 2
        yield "embedded suite", config
    for name, folder in FOLDERS.items():
        if not any(word.partition("=")[0] == f"data.{folder}" for word in options.gin):
            continue
        config = config_lib.load(f"configs/mtf.py:mixture={name},size=small", options.gin)
        config_lib.use_preset(config, "tiny" if options.tiny else "mini")
        c = config.data
        config.model.vocab_size = max(config.model.vocab_size, data_lib.mixture_vocab(c).size)
        config.model.dtype = "float32"  # CPUs have no bfloat16 to speak of
        c.hyper_length, c.input_length, c.target_length = (
            (64, 64, 16) if options.tiny else (1024, 1024, 256)
        )
        c.tasks_per_batch, c.examples_per_task = 2, 2
        yield name, config


def _start(config: ConfigDict) -> tuple[data_lib.Sampler, float]:
    """A config's sampler, and the seconds it took."""
    started = perf_counter()
    sampler = data_lib.make_sampler(config, data_lib.mixture_vocab(config.data))
    return sampler, perf_counter() - started


def _step_note(config: ConfigDict) -> str:
    m = config.model
    return (
        f"the step trains {config.system} on a T5 of width {m.emb_dim} and "
        f"{m.num_encoder_layers}+{m.num_decoder_layers} layers"
    )
