"""Benchmark of serving: a task's text in front of every input, or adapters generated once.

A task of n inputs costs ``generation + n * row`` with adapters, and ``n * longer_row`` with the
text in front of each input. They break even at ``generation / (longer_row - row)`` inputs.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import flops as flops_lib
from hyper_t5 import model, t5
from hyper_t5.bench import Options, measure, steps
from hyper_t5.t5.decoding import decode

TEXT = "text in front"
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    TEXT: ("concat", {}),
    "HyperT5-LoRA": ("hyper_lora", {}),
    "HyperT5-Prefix": ("hyper_prefix", {}),
    "HyperT5-Prefix, 32 gists": ("hyper_prefix", {"hypermodel__gist_tokens": 32}),
    "HINT": ("hint", {}),
}
COUNTS = (1, 10, 100)  # inputs per task
ROWS = 10  # in a batch
NO_EOS = -1  # not an id: all rows decode the same number of tokens


class Arm(NamedTuple):
    """A system at one number of inputs per task.

    ``run`` generates the adapters, if any, and decodes ``inputs`` inputs; ``flops`` are per input,
    with its share of the generation.
    """

    run: Callable[[], None]
    inputs: int
    flops: float


Arms = dict[tuple[str, int], Arm]  # by system and inputs per task
Costs = Mapping[tuple[str, int], Sequence[float]]  # per input [rounds]


def serving(options: Options, result: measure.Result) -> None:
    """Compare a task's text in front of every input with adapters generated once per task.

    A batch has ten rows: one input of ten tasks, ten inputs of one task, or a tenth of one task's
    hundred inputs.
    """
    size, rounds, names, lengths = "mini", 3, list(SYSTEMS), [(256, 64, 16), (1024, 64, 16)]
    if options.tiny:
        size, rounds, names, lengths = "tiny", 2, names[:3], [(32, 8, 2)]
    result.notes += [
        f"T5 1.1 {size}, float32, hypermodels of the same size; batches of {ROWS} rows of "
        f"{lengths[0][1]} tokens, {lengths[0][2]} tokens decoded greedily, no padding",
        "time includes the generation; FLOPs are XLA's count of a teacher-forced example",
    ]
    sizes = t5.preset(size)
    backbone = steps.random_backbone(sizes)
    for length in lengths:
        shapes = steps.Shapes(1, ROWS, *length)
        arms: Arms = {}
        for name in names:
            arms |= _arms(name, shapes, sizes, backbone)
        _compare(result, f"{shapes.hyper} tokens of text", names, arms, rounds)


def _compare(
    result: measure.Result, panel: str, names: Sequence[str], arms: Arms, rounds: int
) -> None:
    """Add the rows and curves of one length of text."""
    seconds = measure.time_arms({key: arm.run for key, arm in arms.items()}, rounds)
    costs = {key: [s / arms[key].inputs for s in times] for key, times in seconds.items()}
    flops = {key: [arm.flops] for key, arm in arms.items()}
    for n in COUNTS:  # the text in front costs the same for any number of inputs
        costs[TEXT, n], flops[TEXT, n] = costs[TEXT, ROWS], flops[TEXT, ROWS]
    for n in COUNTS:
        quantity = f"{panel}, {n} input{'s' * (n > 1)} per task"
        times = {name: costs[name, n] for name in names}
        result.add(quantity, "examples/s", times, TEXT, dict.fromkeys(names, 1))
        gflops = {name: [flops[name, n][0] / 1e9] for name in names}
        result.add(quantity, "GFLOP/example", gflops, TEXT)
    for name in names[1:]:
        curve = _curve(panel, name, costs, _break_even(name, flops)[0])
        result.curves.append(curve)
        values = (curve.break_even, curve.low, curve.high, curve.by_flops)
        median, low, high, by_flops = ("never" if x is None else f"{x:.2f}" for x in values)
        result.notes.append(
            f"break-even of {name} at {panel}, in inputs per task: {median} ({low} to {high}), by "
            f"FLOPs {by_flops}"
        )


def _curve(panel: str, name: str, costs: Costs, by_flops: float | None) -> measure.Curve:
    """Summarize the seconds per input of a system and its break-even."""
    points = _break_even(name, costs)
    finite = [point for point in points if point is not None]
    always = len(finite) == len(points)
    return measure.Curve(
        panel=panel,
        arm=name,
        baseline=TEXT,
        counts=list(COUNTS),
        seconds=[statistics.median(costs[name, n]) for n in COUNTS],
        baseline_seconds=statistics.median(costs[TEXT, ROWS]),
        break_even=statistics.median(finite) if always else None,
        low=min(finite, default=None),
        high=max(finite) if always else None,
        by_flops=by_flops,
    )


def _break_even(name: str, costs: Costs) -> list[float | None]:
    """Return from how many inputs per task adapters cost less, per round; None for never."""
    first, last = COUNTS[0], COUNTS[-1]
    points = []
    for first_cost, last_cost, text in zip(
        costs[name, first], costs[name, last], costs[TEXT, ROWS], strict=True
    ):
        generation = max(first_cost - last_cost, 0.0) / (1 / first - 1 / last)
        row = last_cost - generation / last
        points.append(generation / (text - row) if text > row else None)
    return points


def _arms(name: str, shapes: steps.Shapes, sizes: t5.T5Config, backbone: steps.Tree) -> Arms:
    """Build the arms of a system for all numbers of inputs per task."""
    system, fields = SYSTEMS[name]
    config = steps.make_config(system, shapes, **fields)
    m = model.build_model(config, sizes)
    params = steps.random_params(m, backbone)
    flops = flops_lib.system_flops(config, sizes)
    length = shapes.inputs + (shapes.hyper if name == TEXT else 0)
    rows = jnp.asarray(steps.random_ids(sizes.vocab_size, ROWS, length))
    options = {"steps": shapes.targets, "eos_id": NO_EOS}

    def serve(tasks: int, batches: int) -> None:
        text = steps.random_ids(sizes.vocab_size, tasks, shapes.hyper)
        adapters = model.generate_adapters(m, params, text, np.zeros(tasks, np.int32))
        for _ in range(batches):
            ids, _ = decode(sizes, backbone, rows, adapters, **options)
        jax.block_until_ready(ids)

    arms = {}
    for n in (ROWS,) if name == TEXT else COUNTS:
        run = functools.partial(serve, max(1, ROWS // n), max(1, n // ROWS))
        arms[name, n] = Arm(run, max(n, ROWS), flops["per_example"] + flops["per_task"] / n)
    return arms
