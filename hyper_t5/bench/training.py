"""Benchmarks of training: a frozen backbone, and several examples per hypermodel call."""

from __future__ import annotations

from hyper_t5 import t5
from hyper_t5.bench import Options, measure, steps

FULL = "full fine-tuning"


def frozen(options: Options, result: measure.Result) -> None:
    """Compare training adapters of a frozen T5 with fine-tuning the whole T5.

    All arms read the same rows. Full fine-tuning reads no conditioning, so the cost of the
    hypermodel counts against hypertuning.
    """
    size, rounds, shapes = "small", 5, steps.Shapes(2, 4, 256, 256, 64)
    if options.tiny:
        size, rounds, shapes = "tiny", 2, steps.Shapes(2, 2, 8, 8, 4)
    reader = {"hypermodel__reader": "decoder_queries"}
    configs = {
        FULL: steps.make_config("concat", shapes),
        "HyperT5-Prefix": steps.make_config("hyper_prefix", shapes),
        "HyperT5-Prefix, decoder queries": steps.make_config("hyper_prefix", shapes, **reader),
        "HyperT5-LoRA": steps.make_config("hyper_lora", shapes),
        "one shared LoRA": steps.make_config("shared_lora", shapes),
    }
    sizes = t5.preset(size)
    backbone, batch = steps.random_backbone(sizes), steps.random_batch(shapes, sizes.vocab_size)
    arms = {name: steps.TrainingStep(c, sizes, backbone, batch) for name, c in configs.items()}
    result.notes += [
        f"T5 1.1 {size}, hypermodels of the same size with default adapters; {shapes}",
        "parameters trained: " + ", ".join(f"{name} {arm.trained:,}" for name, arm in arms.items()),
        "a step is loss, gradient and AdamW; memory is the compiler's layout of the step: "
        "parameters, optimizer state, batch, gradients, activations",
    ]
    result.add("time of a step", "s", measure.time_arms(arms, rounds), FULL)
    result.add_memory("memory of a step", {name: arm.memory for name, arm in arms.items()}, FULL)


def examples(options: Options, result: measure.Result) -> None:
    """Compare training with G = 1, 4, 16 examples per hypermodel call.

    A batch always has 16 rows: 16 tasks with G = 1, one task with G = 16.
    """
    size, rounds, lengths = ("tiny", 2, (16, 8, 4)) if options.tiny else ("small", 5, (256, 64, 32))
    sizes = t5.preset(size)
    backbone = steps.random_backbone(sizes)
    result.notes.append(f"T5 1.1 {size}; with G = 1 {steps.Shapes(16, 1, *lengths)}")
    for system in ("hyper_prefix", "hyper_lora"):
        arms = {}
        for count in (1, 4, 16):
            shapes = steps.Shapes(16 // count, count, *lengths)
            config, batch = (
                steps.make_config(system, shapes),
                steps.random_batch(shapes, sizes.vocab_size),
            )
            arms[f"G = {count}"] = steps.TrainingStep(config, sizes, backbone, batch)
        seconds = measure.time_arms(arms, rounds)
        result.add(system, "examples/s", seconds, "G = 1", dict.fromkeys(arms, 16))
