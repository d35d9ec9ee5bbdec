"""`hyper-t5 bench`: speed and memory, each number a ratio inside one run.

The two arms of a ratio are timed in turns in one process, after a warm-up, so that whatever else
the machine does falls on both; a table gives medians and, beside them, the spread of the ratio from
round to round. Each benchmark has a process of its own, for a heap and threads that no other one
has touched. A benchmark is one function, `(Options) -> Result`, and one line in BENCHES.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hyper_t5.bench import measure
from hyper_t5.errors import UserError
from hyper_t5.overrides import choose

# Name -> the module of this package and its function.
BENCHES = {
    "frozen": ("training", "frozen"),
    "torch": ("against_torch", "torch"),
    "examples": ("training", "examples"),
    "serving": ("serving", "serving"),
    "predict": ("against_peft", "predict"),
    "data": ("pipeline", "data"),
    "packing": ("pipeline", "packing"),
    "scaling": ("pipeline", "scaling"),
    "conversion": ("conversion", "conversion"),
    "ranking": ("ranking", "rank"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a benchmark may be told.

    Attributes:
      tiny: toy sizes and two rounds, to see that it runs; the numbers mean nothing.
      gin: overrides of the configs of the data benchmarks, which take each mixture whose folder is
        among them: ("data.sni_dir=...", "data.vocab=...").
    """

    tiny: bool = False
    gin: Sequence[str] = ()


def main(
    names: Sequence[str],
    out: str | Path | None = None,
    tiny: bool = False,
    gin: Sequence[str] = (),
) -> None:
    """Run the benchmarks (none named: all), print a table each, write them to ``out``.

    Writes bench.json, bench.md and bench.png, and break_even.png of what has curves. Raises
    UserError for an unknown name, or for what a benchmark has to say of the user's data.
    """
    from hyper_t5.files import write_json, write_text

    for name in names:
        choose("benchmark", name, BENCHES)
    options = Options(tiny, gin)
    results = []
    for name in names or BENCHES:
        print(f"{name} ...", flush=True)
        results.append(_in_own_process(name, options))
        print(measure.table(results[-1]), flush=True)
    if out is None:
        return
    folder = Path(out)
    write_json(folder / "bench.json", {"results": [dataclasses.asdict(r) for r in results]})
    write_text(folder / "bench.md", "# hyper-t5 bench\n\n" + "\n".join(map(measure.table, results)))
    print(f"wrote {folder / 'bench.json'}, {folder / 'bench.md'}", end="")
    from hyper_t5 import plots

    bars = {f"{row.what}: {row.arm}": row.ratio for r in results if not r.curves for row in r.rows}
    if bars:
        print(",", plots.ratios(bars, folder / "bench.png"), end="")
    if curves := [dataclasses.asdict(curve) for result in results for curve in result.curves]:
        print(",", plots.break_even(curves, folder / "break_even.png"), end="")
    print()


def _in_own_process(name: str, options: Options) -> measure.Result:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        order = json.dumps({"name": name, "answer": str(answer), **dataclasses.asdict(options)})
        ended = subprocess.run([sys.executable, "-m", __name__, order]).returncode
        if not answer.exists():
            raise UserError(
                f"bench {name} ended with exit code {ended} (-9: out of memory) and no result; "
                "what it said stands above"
            )
        content = json.loads(answer.read_text())
    if "error" in content:
        raise UserError(f"bench {name}: {content['error']}")
    return measure.Result.from_dict(content)
