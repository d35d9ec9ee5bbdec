"""Benchmark of conversions between formats: MB/s and memory, each run a process of its own.

Random weights of the shapes of T5 1.1 base (float32) and XL (bfloat16). Two other ways beside ours:
the same readers and writers with the whole tree in memory in between, and transformers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hyper_t5 import names, t5, weights
from hyper_t5.bench import Options, measure
from hyper_t5.weights import native

OURS, TREE, THEIRS = "array by array", "whole tree", "transformers"
DIRECTIONS = (("native", "hf"), ("hf", "t5x"), ("t5x", "native"))
# What each way does, after its imports; `source`, `out`, `to` are given.
CODE = {
    OURS: ("from hyper_t5 import weights", "weights.convert(source, out, to)"),
    TREE: (
        "from hyper_t5 import weights",
        "dtype = next(iter(weights.open_source(source).tensors.values())).dtype\n"
        "sizes, params, _ = weights.load_backbone(source, dtype=dtype)\n"
        "weights.save(out, to, sizes, params)",
    ),
    THEIRS: (
        "from transformers import T5ForConditionalGeneration",
        "model = T5ForConditionalGeneration.from_pretrained(source, dtype='auto')\n"
        "model.save_pretrained(out)",
    ),
}


@dataclasses.dataclass(frozen=True)
class _Model:
    """Which random weights, how often, and the room on disk that this takes."""

    what: str
    sizes: t5.T5Config
    dtype: str
    rounds: int

    @property
    def bytes(self) -> int:
        shapes = names.param_shapes(self.sizes).values()
        return sum(map(math.prod, shapes)) * weights.STORAGE_DTYPES[self.dtype].itemsize


def conversion(options: Options) -> measure.Result:
    """Each direction against the whole tree in memory; Hugging Face's format against its owner."""
    notes = [
        measure.machine(),
        "every conversion is a process of its own; seconds without imports, with the reading back",
        f"'{TREE}' reads all weights into memory and then writes them with the same code",
    ]
    result = measure.Result("conversion", "weights from format to format", notes)
    tiny = _Model("tiny, float32", t5.preset("tiny"), "float32", 1)
    large = [
        _Model("base, float32", t5.preset("base"), "float32", 3),
        _Model("xl, bfloat16", t5.preset("xl"), "bfloat16", 1),
    ]
    for model in [tiny] if options.tiny else large:
        with tempfile.TemporaryDirectory() as place:
            free = shutil.disk_usage(place).free
            if free < 4 * model.bytes:
                need = f"{4 * model.bytes / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free"
                notes.append(f"{model.what}: left out, it needs {need}")
                continue
            _measure(model, Path(place), result)
    return result


def _measure(model: _Model, place: Path, result: measure.Result) -> None:
    largest = max(
        math.prod(shape)
        for path, full in names.param_shapes(model.sizes).items()
        for shape in names.layer_paths(path, full).values()
    )
    size = largest * weights.STORAGE_DTYPES[model.dtype].itemsize
    result.notes.append(
        f"{model.what}: {model.bytes / 1e6:,.0f} MB, the largest array {size / 1e6:,.0f} MB; "
        f"{model.rounds} rounds"
    )
    _random(place / "native", model)
    for start, to in DIRECTIONS:
        _rows(f"{model.what}: {start} to {to}", model, place, (start, to), TREE, result)
        weights.convert(place / start, place / "made", to)
        shutil.rmtree(place / start)
        (place / "made").rename(place / to)
        if to == "hf" and importlib.util.find_spec("transformers"):
            _rows(f"{model.what}: hf to hf", model, place, ("hf", "hf"), THEIRS, result)


def _random(folder: Path, model: _Model) -> None:
    """A native folder of random weights, one layer in memory at a time."""
    rng, dtype = np.random.default_rng(0), weights.STORAGE_DTYPES[model.dtype]
    folder.mkdir()
    with native.writer(folder, model.sizes, lambda path: dtype, None) as put:
        for path, full in names.param_shapes(model.sizes).items():
            for name, shape in names.layer_paths(path, full).items():
                put(name, rng.standard_normal(shape, np.float32))


def _rows(
    what: str,
    model: _Model,
    place: Path,
    direction: tuple[str, str],
    other: str,
    result: measure.Result,
) -> None:
    """Speed and memory of one direction, ours against another way, in turns."""
    seconds: dict[str, list[float]] = {OURS: [], other: []}
    peaks: dict[str, int] = {}
    arms = [OURS, other]
    for index in range(model.rounds):
        for arm in arms[:: 1 if index % 2 == 0 else -1]:
            made = _child(arm, place / direction[0], place / "out", direction[1])
            seconds[arm].append(made["seconds"])
            peaks[arm] = max(peaks.get(arm, 0), int(made["peak"]))
            shutil.rmtree(place / "out")
            measure.tell(what, {arm: made["seconds"]})
    amounts = dict.fromkeys(arms, model.bytes / 1e6)
    result.rows.append(measure.rate_row(what, "MB/s", seconds, amounts, OURS, other))
    result.rows.append(measure.memory_row(what, peaks, OURS, other))


def _child(arm: str, source: Path, out: Path, to: str) -> Mapping[str, float]:
    """Seconds, and the most resident memory in bytes, of one conversion in a new process."""
    imports, work = CODE[arm]
    code = "\n".join(
        [
            "import json, sys, time",
            "from hyper_t5 import metrics",
            imports,
            "source, out, to = sys.argv[1:]",
            "started = time.perf_counter()",
            work,
            "seconds = time.perf_counter() - started",
            "peak = metrics.peak_memory_mb() * 1e6",
            "print(json.dumps({'seconds': seconds, 'peak': peak}))",
        ]
    )
    argv = [sys.executable, "-c", code, str(source), str(out), to]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arm} failed ({done.returncode}): {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
