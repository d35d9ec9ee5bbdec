"""`hyper-t5 bench`: speed and memory, each as a ratio inside one run.

A benchmark is a function ``(Options, Result) -> None`` and one line in BENCHES. It builds its arms
(name -> function), times them in alternation with ``measure.time_arms`` and adds rows to the
Result, whose title is the first line of the function's docstring.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from hyper_t5.bench import measure
from hyper_t5.utils import environment, plots
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import write_json, write_text
from hyper_t5.utils.overrides import choose

BENCHES = {  # name of the function -> module
    "frozen": "training",
    "torch": "against_torch",
    "examples": "training",
    "serving": "serving",
    "predict": "against_torch",
    "data": "pipeline",
    "packing": "pipeline",
    "conversion": "conversion",
    "ranking": "ranking",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of all benchmarks.

    Attributes:
      tiny: use toy sizes and two rounds, to test that a benchmark runs.
      gin: config overrides for ``data`` and ``packing``, which include each mixture whose folder
        is set: ("data.sni_dir=...", "data.vocab=...").
    """

    tiny: bool = False
    gin: Sequence[str] = ()


def main(
    names: Sequence[str],
    out: str | Path | None = None,
    tiny: bool = False,
    gin: Sequence[str] = (),
) -> None:
    """Run benchmarks (default: all), print a table of each and write all results to ``out``.

    Raises:
      UserError: a name is unknown, the data is invalid or a benchmark's process was killed.
    """
    for name in names:
        choose("benchmark", name, BENCHES)
    results = []
    for name in names or BENCHES:
        print(f"{name} ...", flush=True)
        try:  # in its own process: none inherits memory or threads from another
            results.append(measure.in_new_process(_run, name, Options(tiny, gin)))
        except UserError as error:
            raise UserError(f"bench {name}: {error}") from error
        except BrokenProcessPool:
            raise UserError(
                f"bench {name}: its process was killed, perhaps because memory ran out; free "
                "memory, or name other benchmarks"
            ) from None
        print(measure.table(results[-1]), flush=True)
    if out is not None:
        _write(results, Path(out))


def _run(name: str, options: Options) -> measure.Result:
    """Run one benchmark in this process."""
    environment.set_defaults()
    if BENCHES[name] == "against_torch":
        os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported
    bench = getattr(importlib.import_module(f"{__name__}.{BENCHES[name]}"), name)
    title = bench.__doc__.partition("\n")[0].rstrip(".")
    result = measure.Result(name, title, [measure.setting()])
    bench(options, result)
    return result


def _write(results: Sequence[measure.Result], folder: Path) -> None:
    content = [dataclasses.asdict(result) for result in results]
    write_json(folder / "bench.json", {"results": content})
    write_text(folder / "bench.md", "# hyper-t5 bench\n\n" + "\n".join(map(measure.table, results)))
    written: list[str | Path] = [folder / "bench.json", folder / "bench.md"]
    bars = {
        f"{row.quantity}: {row.arm}": row.ratio for r in results if not r.curves for row in r.rows
    }
    if bars:
        written.append(plots.ratios(bars, folder / "bench.png"))
    if curves := [curve for result in content for curve in result["curves"]]:
        written.append(plots.break_even(curves, folder / "break_even.png"))
    print("wrote " + ", ".join(map(str, written)))
