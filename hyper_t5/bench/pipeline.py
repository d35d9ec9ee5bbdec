"""Benchmark of the data pipeline alone against what a training step uses up."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import data as data_lib
from hyper_t5.bench import Options, measure
from hyper_t5.bench.steps import Shapes, TrainingStep, make_config, random_backbone, where

PIPELINE, STEP = "pipeline", "training step"


def data(options: Options) -> measure.Result:
    """Episodes and real tokens a second out of SeqIO, against the training step's."""
    result = measure.Result(
        "data",
        "the pipeline alone against what the step needs",
        [
            f"{measure.machine()}; {where()}",
            "real tokens are those that are no padding, of conditioning, inputs and targets",
        ],
    )
    config = config_lib.load("configs/quickstart.py")
    if options.tiny:
        config.data.tasks_per_batch = 2
    _add(result, "embedded suite", config, options)
    if not options.sni_dir:
        result.notes.append("Super-NaturalInstructions: not measured, give --sni-dir")
        return result
    shapes = Shapes(2, 2, 64, 32, 8) if options.tiny else Shapes(2, 4, 256, 256, 64)
    config = make_config(
        "hyper_prefix",
        shapes,
        data__mixture="sni",
        data__sni_dir=options.sni_dir,
        data__vocab=options.vocab,
        data__on_missing_task="skip",
        data__on_long_instruction="truncate",
    )
    config_lib.use_preset(config, "tiny" if options.tiny else "small")
    _add(result, "Super-NaturalInstructions", config, options)
    return result


def _add(result: measure.Result, what: str, config: ConfigDict, options: Options) -> None:
    started = perf_counter()
    vocab = data_lib.mixture_vocab(config.data)
    sampler = data_lib.make_sampler(config, vocab)
    ready = perf_counter() - started
    sizes = config_lib.t5_config(config)
    step = TrainingStep(config, sizes, random_backbone(sizes), sampler.batch(0))
    count = 4 if options.tiny else 64
    made: Counter[str] = Counter()

    def make() -> None:
        for _ in range(count):
            batch = sampler.batch(made["batches"])
            made["batches"] += 1
            made["tokens"] += data_lib.real_tokens(batch)

    seconds = measure.in_turns({PIPELINE: make, STEP: step}, 2 if options.tiny else 5)
    tokens, tasks = made["tokens"] / made["batches"], config.data.tasks_per_batch
    for unit, each in {"episodes/s": tasks, "real tokens/s": tokens}.items():
        amounts = {PIPELINE: float(each * count), STEP: float(each)}
        result.rows.append(measure.rate_row(what, unit, seconds, amounts, PIPELINE, STEP))
    result.notes.append(
        f"{what}: ready after {ready:.1f} s, imports included; batches of {tasks} episodes with "
        f"{config.data.examples_per_task} rows each, {tokens:,.0f} real tokens; the step trains "
        f"{config.system} on a T5 of width {sizes.emb_dim} and "
        f"{sizes.num_encoder_layers}+{sizes.num_decoder_layers} layers"
    )
