"""Benchmarks of training: what a frozen backbone saves, what sharing a hypermodel call saves."""

from __future__ import annotations

import functools

from hyper_t5 import t5
from hyper_t5.bench import Options, measure
from hyper_t5.bench.steps import (
    Shapes,
    TrainingStep,
    make_config,
    random_backbone,
    random_batch,
    where,
)

FULL = "full fine-tuning"


def frozen(options: Options) -> measure.Result:
    """Hypertuning a frozen T5, and one learned LoRA, against fine-tuning all of that T5.

    All arms read the same rows; fine-tuning has no conditioning to read, so whatever the
    hypermodel costs counts against hypertuning.
    """
    sizes = t5.preset("tiny" if options.tiny else "small")
    shapes = Shapes(2, 2, 8, 8, 4) if options.tiny else Shapes(2, 4, 256, 256, 64)
    reader = "hypermodel__reader"
    configs = {
        FULL: make_config("concat", shapes),
        "HyperT5-Prefix": make_config("hyper_prefix", shapes),
        "HyperT5-Prefix, decoder queries": make_config(
            "hyper_prefix", shapes, **{reader: "decoder_queries"}
        ),
        "HyperT5-LoRA": make_config("hyper_lora", shapes),
        "one shared LoRA": make_config("shared_lora", shapes),
    }
    backbone, batch = random_backbone(sizes), random_batch(shapes, sizes.vocab_size)
    steps = {name: TrainingStep(c, sizes, backbone, batch) for name, c in configs.items()}
    seconds = measure.in_turns(steps, 2 if options.tiny else 5)
    memory = {name: step.memory for name, step in steps.items()}
    trained = ", ".join(f"{name} {step.trained:,}" for name, step in steps.items())
    defaults = configs["HyperT5-LoRA"].adapter
    notes = [
        f"{measure.machine()}; {where()}",
        f"T5 1.1 {'tiny' if options.tiny else 'small'}, hypermodels of the same size; {shapes}",
        f"HyperT5-Prefix is the layerwise reader's {shapes.hyper} positions as prefixes, with "
        f"decoder queries {defaults.prefix_length}; LoRA rank {defaults.lora_rank} on "
        f"{', '.join(defaults.lora_targets)}",
        f"parameters trained: {trained}",
        "a step is loss, gradient and AdamW; memory is what the compiler laid out for it: "
        "parameters, optimizer state, batch, gradients, activations",
    ]
    result = measure.Result("frozen", "a frozen backbone against full fine-tuning", notes)
    for name in list(configs)[1:]:
        result.rows.append(measure.time_row("time of a step", seconds, name, FULL))
    for name in list(configs)[1:]:
        result.rows.append(measure.memory_row("memory of a step", memory, name, FULL))
    return result


def examples(options: Options) -> measure.Result:
    """Rows a second when one hypermodel call serves G examples of its task: G = 1, 4, 16.

    A batch has 16 rows throughout, so that G = 16 is one task and G = 1 sixteen.
    """
    sizes = t5.preset("tiny" if options.tiny else "small")
    lengths = (16, 8, 4) if options.tiny else (256, 64, 32)
    rows, counts = 16, (1, 4, 16)
    backbone = random_backbone(sizes)
    result = measure.Result(
        "examples",
        "examples a hypermodel call",
        [
            f"{measure.machine()}; {where()}",
            f"T5 1.1 {'tiny' if options.tiny else 'small'}, batches of {rows} rows, "
            f"{lengths[1]} + {lengths[2]} tokens each, {lengths[0]} tokens of conditioning a task; "
            "whole training steps, no padding",
        ],
    )
    arm = functools.partial("G = {}".format)
    for system in ("hyper_prefix", "hyper_lora"):
        steps = {}
        for count in counts:
            shapes = Shapes(rows // count, count, *lengths)
            steps[arm(count)] = TrainingStep(
                make_config(system, shapes), sizes, backbone, random_batch(shapes, sizes.vocab_size)
            )
        seconds = measure.in_turns(steps, 2 if options.tiny else 5)
        amounts = dict.fromkeys(steps, float(rows))
        for count in counts[1:]:
            result.rows.append(
                measure.rate_row(system, "examples/s", seconds, amounts, arm(count), arm(1))
            )
    return result
