"""The FLOPs of a task by each system, relative to its text in front of every input.

    python -m hyper_t5.flops_tables --sni_dir natural-instructions --vocab spiece.model \
        --doc docs/compute.md

Lengths are measured on the test tasks of Super-NaturalInstructions; FLOPs are XLA's (`cost.flops`)
and those of the estimate that the HINT paper compares systems by (`cost.closed_form`). Nothing is
run. Writes the document's tables, and compute.json and compute.png beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_t5 import config as config_lib
from hyper_t5 import cost, documents, files, plots, prompts, t5
from hyper_t5.cost import Lengths
from hyper_t5.errors import UserError, exit_code
from hyper_t5.taskfile import read_sni_task
from hyper_t5.vocab import SentencePieceVocabulary, Vocabulary

JSON, PLOT = "compute.json", "compute.png"
VARIANTS = {"def": "definition", "def_pos_2": "definition and two examples"}
EXAMPLES = 100  # of a task: the published comparison's, and as many as its tests have
ROWS = 32  # of a task in a batch, config.eval.batch
LIMIT, MOST_OUTPUT = 1024, 256  # tokens: HINT's and Tk-Instruct's, of text and of an input


@dataclasses.dataclass(frozen=True)
class System:
    """What is compared; ``published`` is the average that [TAGI, table 2] prints, 0 for none."""

    config: str
    overrides: tuple[str, ...] = ()
    published: float = 0.0


QUERIES = "hypermodel.reader=decoder_queries"
SYSTEMS = {
    "text concatenated": System("configs/baselines.py:system=concat,size={size}", (), 1.0),
    "HINT": System("configs/hint.py:size={size}", (), 0.37),
    "HyperT5-LoRA": System("configs/mtf.py:system=hyper_lora,size={size}", (QUERIES,), 0.34),
    "HyperT5-Prefix": System(
        "configs/mtf.py:system=hyper_prefix,size={size}",
        (QUERIES, "adapter.prefix_sites=enc_self,dec_self"),
        0.34,
    ),
    "Hyperdecoder": System("configs/hyperdecoder.py:size={size}"),
}


# ------------------------------------------------------------------------------------ what it costs


def measure(sni_dir: Path, vocab: Vocabulary) -> dict[str, list[float]]:
    """Mean tokens of each test task that is there: definition, two examples, input, output.

    As Tk-Instruct writes them, each cut where its models cut; input and output end in EOS.

    Raises:
        UserError: no list of test tasks, or none of their files.
    """
    listing = sni_dir / "splits" / "default" / "test_tasks.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except OSError as e:
        raise UserError(f"--sni_dir: {listing}: {e.strerror}; it holds tasks/ and splits/") from e
    found = {}
    for name in names:
        file = sni_dir / "tasks" / f"{name}.json"
        if file.is_file():
            found[name] = _measure_task(file, vocab)
    if not found:
        raise UserError(f"--sni_dir: none of the {len(names)} tasks of {listing} is there")
    return found


def _measure_task(file: Path, vocab: Vocabulary) -> list[float]:
    task = read_sni_task(file, max_rows=100, on_empty="keep")
    definition = prompts.ENCODINGS["tk_instruct"].instruction(task.instruction)
    shown = [
        prompts.example_text(example, place, "tk_instruct")
        for place, example in enumerate(task.examples[:2])
    ]
    text = [len(ids) for ids in vocab.encode_batch([definition, *shown])]
    first = min(text[0], LIMIT)
    inputs = [min(len(x) + 1, LIMIT) for x in vocab.encode_batch([r.input for r in task.rows])]
    outputs = vocab.encode_batch([row.outputs[0] for row in task.rows])
    wrote = [min(len(ids) + 1, MOST_OUTPUT) for ids in outputs]
    means = statistics.fmean(inputs), statistics.fmean(wrote)
    return [first, min(sum(text), LIMIT) - first, *(round(mean, 2) for mean in means)]


def lengths_of(tasks: Mapping[str, Sequence[float]], variant: str) -> list[Lengths]:
    """Of each task, with ``def`` or ``def_pos_2`` as its text."""
    both = variant == "def_pos_2"
    return [Lengths(d + both * e, i, o) for d, e, i, o in tasks.values()]


def mean_lengths(lengths: Sequence[Lengths]) -> Lengths:
    """The mean task's."""
    means = (
        statistics.fmean(column) for column in zip(*map(dataclasses.astuple, lengths), strict=True)
    )
    return Lengths(*means)


def count(
    size: str, lengths: Lengths, names: Sequence[str] = tuple(SYSTEMS)
) -> dict[str, dict[str, float]]:
    """{system: XLA's FLOPs ``per_task``, ``per_example``, ``concatenated``} at whole lengths."""
    found, sizes = {}, t5.preset(size)
    fields = ("hyper_length", "input_length", "target_length")
    given = [
        f"data.{field}={round(value)}"
        for field, value in zip(fields, dataclasses.astuple(lengths), strict=True)
    ]
    for name in names:
        system = SYSTEMS[name]
        config = config_lib.load(system.config.format(size=size), [*system.overrides, *given])
        found[name] = cost.flops(config, sizes, ROWS)
    return found


def report(size: str, tasks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What compute.json holds."""
    variants = {}
    for variant in VARIANTS:
        mean = mean_lengths(lengths_of(tasks, variant))
        variants[variant] = {"lengths": dataclasses.asdict(mean), "xla": count(size, mean)}
    return {"size": size, "rows": ROWS, "variants": variants, "tasks": dict(tasks)}


# ----------------------------------------------------------------------------------- what it says


def relative(found: Mapping[str, float], examples: float) -> float:
    """FLOPs of so many examples of a task, over those with its text in front of each."""
    made = found["per_task"] / examples + found["per_example"]
    return made / found["concatenated"]


def estimates(content: Mapping[str, Any], variant: str) -> tuple[float, float]:
    """The closed form's relative FLOPs: of all tasks together, and the mean of the tasks' own."""
    sizes = t5.preset(content["size"])

    def ratio(lengths: Lengths) -> float:
        found = cost.closed_form(sizes, lengths, EXAMPLES)
        return found["adapters"] / found["concat"]

    each = lengths_of(content["tasks"], variant)
    return ratio(mean_lengths(each)), statistics.fmean(map(ratio, each))


def lengths_table(content: Mapping[str, Any]) -> str:
    """Mean lengths, and the plain backbone's FLOPs by both counts."""
    sizes = t5.preset(content["size"])
    lines = [
        "| text in front of the input | text | input | output | closed form, T | with attention "
        "and output, T | XLA, T |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, words in VARIANTS.items():
        found = content["variants"][variant]
        lengths = Lengths(**found["lengths"])
        xla = found["xla"]["text concatenated"]["concatenated"]
        cells = [f"{x:.1f}" for x in dataclasses.astuple(lengths)]
        for whole in (False, True):
            value = cost.closed_form(sizes, lengths, 1, whole=whole)["concat"]
            cells.append(f"{value / 1e12:.3f} ({value / xla - 1:+.1%})")
        lines.append(f"| {words} | {' | '.join(cells)} | {xla / 1e12:.3f} |")
    return "\n".join(lines)


def carried(content: Mapping[str, Any], variant: str, name: str) -> float:
    """The mean of the tasks' own relative FLOPs, by XLA's counts at mean lengths.

    The closed form carries these counts to a task's lengths: reading grows as it says with the
    text, an example with input and output; what else is made once a task is as at the mean.
    """
    found = content["variants"][variant]["xla"][name]
    if not found["per_task"]:  # the text is read with every input: nothing to carry
        return relative(found, EXAMPLES)
    sizes = t5.preset(content["size"])
    mean = Lengths(**content["variants"][variant]["lengths"])

    def ratio(lengths: Lengths) -> float:
        read, example, concat = (
            new / old for new, old in zip(_plain(sizes, lengths), _plain(sizes, mean), strict=True)
        )
        moved = dict(found, per_example=found["per_example"] * example)
        moved["per_task"] += _plain(sizes, mean)[0] * (read - 1)
        moved["concatenated"] *= concat
        return relative(moved, EXAMPLES)

    return statistics.fmean(map(ratio, lengths_of(content["tasks"], variant)))


def _plain(sizes: t5.T5Config, lengths: Lengths) -> tuple[float, float, float]:
    """The plain backbone's FLOPs of a text, of an example, and of both as one input."""
    read = cost.closed_form(sizes, lengths, 0, whole=True)["adapters"]
    one = cost.closed_form(sizes, lengths, 1, whole=True)
    return read, one["adapters"] - read, one["concat"]


def relative_table(content: Mapping[str, Any]) -> str:
    """Relative FLOPs at EXAMPLES a task, published and counted."""
    head = f"| at {EXAMPLES} inputs a task | published, average |"
    for way in ("at mean lengths", "mean of the tasks' ratios"):
        head += f" Def, {way} | Def+2Pos | average |"
    rows = [("closed form", "0.34 to 0.37", [estimates(content, v) for v in VARIANTS])]
    for name, system in SYSTEMS.items():
        published = f"{system.published:.2f}" if system.published else "none"
        values = [
            (
                relative(content["variants"][v]["xla"][name], EXAMPLES),
                carried(content, v, name),
            )
            for v in VARIANTS
        ]
        rows.append((f"{name}, XLA", published, values))
    lines = [head, "|---" * 8 + "|"]
    for name, published, values in rows:
        ways = [[*way, statistics.fmean(way)] for way in zip(*values, strict=True)]
        cells = [f"{value:.2f}" for way in ways for value in way]
        lines.append(f"| {name} | {published} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(content: Mapping[str, Any]) -> str:
    """Where a system's FLOPs go: its text and inputs as in the plain backbone, and what is more."""
    sizes = t5.preset(content["size"])
    lines = [
        "| GFLOPs | a task: its text | what is made of it | an example: input and output "
        f"| adapters and fusion | of {EXAMPLES} examples, beside text, input and output |",
        "|---|---|---|---|---|---|",
    ]
    for variant, words in VARIANTS.items():
        found = content["variants"][variant]
        read, example, _ = _plain(sizes, Lengths(**found["lengths"]))
        for name in SYSTEMS:
            xla = found["xla"][name]
            if not xla["per_task"]:
                continue
            more = xla["per_task"] - read, xla["per_example"] - example
            whole = (more[0] + EXAMPLES * more[1]) / (read + EXAMPLES * example)
            cells = [f"{x / 1e9:,.1f}" for x in (read, more[0], example, more[1])]
            lines.append(f"| {name}, {words} | {' | '.join(cells)} | {whole:+.1%} |")
    return "\n".join(lines)


def draw(content: Mapping[str, Any], path: Path) -> str | Path:
    """Relative FLOPs against inputs per task, one picture a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [10 ** (k / 10) for k in range(31)]
    figure, places = pyplot.subplots(1, len(VARIANTS), figsize=(11, 4.2), sharey=True)
    for axes, (variant, words) in zip(places, VARIANTS.items(), strict=True):
        found = content["variants"][variant]["xla"]
        for name in SYSTEMS:
            values = [relative(found[name], n) for n in counts]
            axes.plot(counts, values, ":" if name == "Hyperdecoder" else "-", label=name)
        mean = Lengths(**content["variants"][variant]["lengths"])
        made = [cost.closed_form(t5.preset(content["size"]), mean, n) for n in counts]
        ratio = [x["adapters"] / x["concat"] for x in made]
        axes.plot(counts, ratio, "k--", linewidth=1, label="closed form: read once")
        axes.axvline(EXAMPLES, color="grey", linewidth=0.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 2)
        axes.set_title(words, fontsize=10)
        axes.set_xlabel("inputs per task")
        axes.spines[["top", "right"]].set_visible(False)
    places[0].set_ylabel("FLOPs, relative to the text in front of every input")
    places[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return plots.save(figure, path)


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/compute.md, by name."""
    return {
        "lengths": lengths_table(content),
        "relative": relative_table(content),
        "parts": parts_table(content),
    }


@exit_code("flops_tables")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, count, write."""
    parser = argparse.ArgumentParser(prog="python -m hyper_t5.flops_tables", description=__doc__)
    parser.add_argument("--sni_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab", type=Path, required=True, metavar="FILE")
    parser.add_argument("--doc", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--size", default="xl", choices=list(t5.PRESETS))
    args = parser.parse_args(argv)
    content = report(args.size, measure(args.sni_dir, SentencePieceVocabulary(args.vocab)))
    files.write_json(args.doc.parent / JSON, content)
    text = args.doc.read_text(encoding="utf-8")
    files.write_text(args.doc, documents.fill(text, tables(content)))
    print(draw(content, args.doc.parent / PLOT))


if __name__ == "__main__":
    sys.exit(main())
