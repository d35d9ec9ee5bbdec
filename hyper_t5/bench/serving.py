"""Benchmark of use: a task's text in front of every input, against adapters generated once a task.

A task of n inputs costs ``generation + n * row`` with adapters and ``n * longer row`` with the text
in front of each, so that adapters are cheaper from ``generation / (longer row - row)`` inputs on,
the break-even.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import cost, hypermodels, model, t5
from hyper_t5.bench import Options, measure
from hyper_t5.bench.steps import Shapes, make_config, random_backbone, where
from hyper_t5.decoding import decode
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL

TEXT = "text in front"
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "HyperT5-LoRA": ("hyper_lora", {}),
    "HyperT5-Prefix": ("hyper_prefix", {}),
    "HyperT5-Prefix, 32 gists": ("hyper_prefix", {"hypermodel__gist_tokens": 32}),
    "HINT": ("hint", {}),
}
COUNTS = (1, 10, 100)  # inputs a task
ROWS = 10  # of a batch
NO_EOS = -1  # no id, so that no row ends early


@dataclasses.dataclass(frozen=True)
class Setting:
    """A backbone, and the tokens of a task's text, an input, an output."""

    sizes: t5.T5Config
    text: int
    inputs: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is timed, with the inputs of a call.

    ``flops`` are an example's, with its part of the generation. ``memory`` is bytes at once: all
    parameters, the adapters, and what the larger program adds.
    """

    run: Callable[[], None]
    examples: int
    flops: float
    memory: int


def serving(options: Options) -> measure.Result:
    """Examples/s, FLOPs and memory for 1, 10 and 100 inputs a task, and where adapters break even.

    A batch has ten rows: of ten tasks with 1 input each, of one task with 10, or a tenth of one
    task's 100. No row ends early, so that all arms decode as many tokens.
    """
    size, lengths = ("tiny", (32, 8, 2)) if options.tiny else ("mini", (256, 64, 16))
    setting = Setting(t5.preset(size), *lengths)
    backbone = random_backbone(setting.sizes)
    result = measure.Result(
        "serving",
        "a task's text in front of every input, against adapters generated once",
        [
            f"{measure.machine()}; {where()}",
            f"T5 1.1 {size}, float32, hypermodels of the same size; batches of {ROWS} rows "
            f"of {setting.inputs} tokens, {setting.steps} tokens decoded greedily, no padding",
            "the adapters' arms generate once a task, which is counted; FLOPs are XLA's, an "
            "example's output given; memory is what the compiler laid out for the larger program",
        ],
    )
    names, rounds = (list(SYSTEMS)[:2], 2) if options.tiny else (list(SYSTEMS), 3)
    for text in (setting.text, 4 * setting.text)[: rounds - 1]:
        _compare(result, dataclasses.replace(setting, text=text), backbone, names, rounds)
    return result


def _compare(
    result: measure.Result, setting: Setting, backbone: Any, names: Sequence[str], rounds: int
) -> None:
    """Add the rows, curves and break-even points for one length of text."""
    front = _System(setting, backbone).arm(ROWS)
    systems = {name: _System(setting, backbone, name) for name in names}
    arms = {(name, n): systems[name].arm(n) for name in names for n in COUNTS}
    named = {TEXT: front, **{f"{name} {n}": arm for (name, n), arm in arms.items()}}
    seconds = measure.in_turns({k: arm.run for k, arm in named.items()}, rounds)
    rows: dict[str, list[measure.Row]] = {"time": [], "FLOPs": [], "memory": []}
    for (name, n), arm in arms.items():
        what = f"{setting.text} tokens of text, {n} input{'s' * (n > 1)} a task"
        pair = {name: arm, TEXT: front}
        times = {name: seconds[f"{name} {n}"], TEXT: seconds[TEXT]}
        examples = {k: float(a.examples) for k, a in pair.items()}
        flops = {k: a.flops / 1e9 for k, a in pair.items()}
        memory = {k: a.memory for k, a in pair.items()}
        rows["time"].append(measure.rate_row(what, "examples/s", times, examples, name, TEXT))
        rows["FLOPs"].append(measure.exact_row(what, "GFLOP/example", flops, name, TEXT))
        rows["memory"].append(measure.memory_row(what, memory, name, TEXT))
    result.rows += [row for kind in rows.values() for row in kind]
    each = {k: np.array(v) / named[k].examples for k, v in seconds.items()}
    for name, system in systems.items():
        curve = _curve(setting, name, each, system.costs)
        result.curves.append(curve)
        result.notes.append(_told(curve))


def _curve(
    setting: Setting, name: str, each: Mapping[str, np.ndarray], costs: Mapping[str, float]
) -> measure.Curve:
    """Seconds an example by inputs a task, and from where on they are less than the text's.

    ``each``: seconds an example [rounds] of each arm. What one generation takes follows from the
    arms of 1 and of 100 inputs a task.
    """
    one, many, front = each[f"{name} {COUNTS[0]}"], each[f"{name} {COUNTS[-1]}"], each[TEXT]
    generation = np.maximum(one - many, 0.0) / (1 / COUNTS[0] - 1 / COUNTS[-1])
    row = many - generation / COUNTS[-1]
    saved = front - row
    points = [g / s if s > 0 else None for g, s in zip(generation, saved, strict=True)]
    found = [p for p in points if p is not None]
    flops = costs["concatenated"] - costs["per_example"]
    return measure.Curve(
        panel=f"{setting.text} tokens of text",
        arm=name,
        baseline=TEXT,
        counts=list(COUNTS),
        seconds=[float(np.median(each[f"{name} {n}"])) for n in COUNTS],
        baseline_seconds=float(np.median(front)),
        break_even=statistics.median(found) if len(found) == len(points) else None,
        low=min(found, default=None),
        high=max(found) if len(found) == len(points) else None,
        by_flops=costs["per_task"] / flops if flops > 0 else None,
    )


def _told(curve: measure.Curve) -> str:
    def number(x: float | None) -> str:
        return "never" if x is None else f"{x:.2f}"

    return (
        f"break-even of {curve.arm} at {curve.panel}, in inputs a task: "
        f"{number(curve.break_even)} ({number(curve.low)} to {number(curve.high)}), by FLOPs "
        f"{number(curve.by_flops)}"
    )


class _System:
    """A system at one length of text; ``costs`` is what ``cost.flops`` says of it."""

    def __init__(self, setting: Setting, backbone: Any, name: str = TEXT) -> None:
        system, fields = SYSTEMS.get(name, ("none", {}))
        shapes = Shapes(1, ROWS, setting.text, setting.inputs, setting.steps)
        config = make_config(system, shapes, **fields)
        self._setting, self._model = setting, model.build(config, setting.sizes)
        self._params = {BACKBONE: backbone}
        if self._model.hypermodel is not None:
            made = hypermodels.init_params(self._model.hypermodel, jax.random.key(0), backbone)
            self._params[HYPERMODEL] = made
        self.costs = cost.flops(config, setting.sizes)
        self._batch = functools.cache(self._make_batch)  # by its number of tasks

    def arm(self, count: int) -> Arm:
        """All that is done for ``count`` inputs a task, in one batch or several."""
        generate, answer, memory = self._batch(max(1, ROWS // count))
        calls = max(1, count // ROWS)

        def run() -> None:
            adapters = generate() if generate else None
            for _ in range(calls):
                made = answer(adapters)
            jax.block_until_ready(made)

        flops = self.costs["per_example"] + self.costs["per_task"] / count
        if self._model.hypermodel is None:
            flops = self.costs["concatenated"]
        return Arm(run, calls * ROWS, flops, memory)

    def _make_batch(self, tasks: int) -> tuple[Callable[[], Any] | None, Callable[[Any], Any], int]:
        """(adapters of the tasks, if any; the answers of ROWS inputs with them; bytes at most)."""
        m, params, c = self._model, self._params, self._setting
        rng = np.random.default_rng(0)

        def ids(*shape: int) -> jax.Array:
            return jnp.asarray(rng.integers(3, c.sizes.vocab_size, shape, np.int32))

        numbers, text = jnp.zeros(tasks, jnp.int32), ids(tasks, c.text)
        rows = ids(ROWS, c.inputs + (c.text if m.hypermodel is None else 0))
        generate: Callable[[], Any] | None = None
        programs: list[Any] = []
        adapters = None
        if m.hypermodel is not None:
            generation = model.generate.lower(m, params, text, numbers).compile()
            generate = functools.partial(generation, params, text, numbers)
            adapters, programs = generate(), [generation]
        how = {"steps": c.steps, "eos_id": NO_EOS}
        answer = decode.lower(c.sizes, params[BACKBONE], rows, adapters, **how).compile()
        kept = sum(x.nbytes for x in jax.tree.leaves((params, adapters)))
        memory = kept + max(map(_temporary, [*programs, answer]))
        return generate, functools.partial(answer, params[BACKBONE], rows), memory


def _temporary(program: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and what it returns."""
    return int(program.memory_analysis().temp_size_in_bytes)
