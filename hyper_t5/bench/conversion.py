"""Benchmark of weight conversion: MB/s and peak memory, each conversion in its own process.

The converters import their libraries themselves: a process holds only what its converter needs.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyper_t5.bench import Options, measure
from hyper_t5.utils import memory

STREAMED, WHOLE, HF = "array by array", "whole tree", "transformers"


def conversion(options: Options, result: measure.Result) -> None:
    """Compare converting array by array with the whole tree in memory and with transformers."""
    from hyper_t5 import t5, weights
    from hyper_t5.bench import steps

    size, rounds = ("tiny", 2) if options.tiny else ("base", 3)
    arms = [STREAMED, WHOLE, *([HF] if importlib.util.find_spec("transformers") else [])]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks = dict.fromkeys(arms, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        sizes = t5.preset(size)
        weights.save_hf(source, sizes, steps.random_backbone(sizes))
        megabytes = sum(file.stat().st_size for file in source.iterdir()) / 1e6
        for arm in measure.alternate(arms, rounds):
            taken, peak = measure.in_new_process(CONVERTERS[arm], source, out)
            seconds[arm].append(taken)
            peaks[arm] = max(peaks[arm], peak)
            shutil.rmtree(out)
    result.notes.append(
        f"T5 1.1 {size}, float32, {megabytes:,.0f} MB; seconds without imports; {HF} does not "
        "verify what it wrote"
    )
    quantity = "Hugging Face's format to itself"
    for baseline in arms[1:]:
        pair = (STREAMED, baseline)
        times = {arm: seconds[arm] for arm in pair}
        result.add(quantity, "MB/s", times, baseline, dict.fromkeys(pair, megabytes))
        result.add_memory(quantity, {arm: peaks[arm] for arm in pair}, baseline)


def _streamed(source: Path, out: Path) -> tuple[float, float]:
    from hyper_t5 import weights

    return _timed(lambda: weights.convert(source, out, "hf"))


def _whole_tree(source: Path, out: Path) -> tuple[float, float]:
    from hyper_t5 import weights

    def convert() -> None:
        sizes, params, _ = weights.load_backbone(source)
        weights.save_hf(out, sizes, params)

    return _timed(convert)


def _transformers(source: Path, out: Path) -> tuple[float, float]:
    from transformers import T5ForConditionalGeneration as Model

    return _timed(lambda: Model.from_pretrained(source, dtype="auto").save_pretrained(out))


def _timed(convert: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of a call, and the peak memory of this process in bytes."""
    started = time.perf_counter()
    convert()
    return time.perf_counter() - started, memory.peak_memory_mb() * 1e6


CONVERTERS = {STREAMED: _streamed, WHOLE: _whole_tree, HF: _transformers}
