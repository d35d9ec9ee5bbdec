"""FLOPs of each system relative to the task's text in front of every input: docs/compute.md.

    python -m hyper_t5.experiments.flops_tables --sni_dir natural-instructions \
        --vocab spiece.model --doc docs/compute.md

Lengths are measured on the test tasks of Super-NaturalInstructions. FLOPs are those of XLA's cost
analysis (`flops.system_flops`) and of the closed form by which Ivison et al. 2023 compare systems
(`flops.closed_form`). No model runs. The command rewrites the tables of the document, and
compute.json and compute.png beside it.
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
from hyper_t5 import flops, t5
from hyper_t5.data import templates
from hyper_t5.data.task_rows import read_sni_task
from hyper_t5.data.vocab import SentencePieceVocabulary, Vocabulary
from hyper_t5.experiments import doc_tables
from hyper_t5.flops import Lengths
from hyper_t5.utils import files, plots
from hyper_t5.utils.errors import handle_errors
from hyper_t5.utils.paths import expanded_path

JSON, PLOT = "compute.json", "compute.png"
VARIANTS = {"def": "definition", "def_pos_2": "definition and two examples"}
EXAMPLES = 100  # per task, as in the published comparison; also the size of the test tasks
ROWS = 32  # rows of a task in a batch, as config.eval.batch
TEMPLATE, MAX_TEXT, MAX_OUTPUT = "tk_instruct", 1024, 256  # lengths in tokens


READER = "hypermodel.reader=decoder_queries"
SITES = "adapter.prefix_sites=enc_self,dec_self"
SYSTEMS = {  # config and overrides
    "text concatenated": ("configs/baselines.py:system=concat,size={}",),
    "HINT": ("configs/hint.py:size={}",),
    "HyperT5-LoRA": ("configs/mtf.py:system=hyper_lora,size={}", READER),
    "HyperT5-Prefix": ("configs/mtf.py:system=hyper_prefix,size={}", READER, SITES),
    "Hyperdecoder": ("configs/hyperdecoder.py:size={}",),
}
# Average relative FLOPs, Liao et al. 2024, table 2.
PUBLISHED = {"text concatenated": 1.0, "HINT": 0.37, "HyperT5-LoRA": 0.34, "HyperT5-Prefix": 0.34}


# ------------------------------------------------------------------------------------ measurements


def measure_lengths(sni_dir: Path, vocab: Vocabulary) -> dict[str, list[float]]:
    """Measure the available test tasks in tokens, as Tk-Instruct formats and truncates them.

    Returns:
      {task: [definition, two examples, mean input, mean output]}; inputs and outputs include EOS.

    Raises:
      UserError: the list of test tasks is missing, or all of their files.
    """
    from hyper_t5.tasks import super_ni

    tasks = super_ni.split_files(str(sni_dir), "test", skip_missing=True)
    return {name: _measure_task(file, vocab) for name, file in tasks.items()}


def _measure_task(file: Path, vocab: Vocabulary) -> list[float]:
    task = read_sni_task(file, max_rows=EXAMPLES, on_empty="keep")
    definition = templates.TEMPLATES[TEMPLATE].instruction(task.instruction)
    shown = [templates.format_example(e, i, TEMPLATE) for i, e in enumerate(task.examples[:2])]
    text = [len(ids) for ids in vocab.encode_batch([definition, *shown])]
    definition_length = min(text[0], MAX_TEXT)
    means = [
        statistics.fmean(min(len(ids) + 1, limit) for ids in vocab.encode_batch(texts))
        for texts, limit in (
            ([row.input for row in task.rows], MAX_TEXT),
            ([row.outputs[0] for row in task.rows], MAX_OUTPUT),
        )
    ]
    examples_length = min(sum(text), MAX_TEXT) - definition_length
    return [definition_length, examples_length, *(round(mean, 2) for mean in means)]


def task_lengths(tasks: Mapping[str, Sequence[float]], variant: str) -> list[Lengths]:
    """Convert measured tasks to Lengths, with ``def`` or ``def_pos_2`` as the text."""
    examples = variant == "def_pos_2"
    return [Lengths(d + examples * e, i, o) for d, e, i, o in tasks.values()]


def mean_lengths(lengths: Sequence[Lengths]) -> Lengths:
    """Average over tasks."""
    return Lengths(*map(statistics.fmean, zip(*map(dataclasses.astuple, lengths), strict=True)))


def count_flops(
    size: str, lengths: Lengths, names: Sequence[str] = tuple(SYSTEMS)
) -> dict[str, dict[str, float]]:
    """Count XLA's FLOPs of each system at rounded lengths, as `flops.system_flops` returns them."""
    text, inputs, outputs = map(round, dataclasses.astuple(lengths))
    overrides = [f"data.hyper_length={text}", f"data.input_length={inputs}"]
    overrides.append(f"data.target_length={outputs}")
    counts = {}
    for name in names:
        config_name, *fields = SYSTEMS[name]
        config = config_lib.load(config_name.format(size), [*fields, *overrides])
        counts[name] = flops.system_flops(config, t5.preset(size), ROWS)
    return counts


def measure(size: str, tasks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Compute the content of compute.json."""
    variants = {}
    for variant in VARIANTS:
        mean = mean_lengths(task_lengths(tasks, variant))
        variants[variant] = {"lengths": dataclasses.asdict(mean), "xla": count_flops(size, mean)}
    return {"size": size, "rows": ROWS, "variants": variants, "tasks": dict(tasks)}


# ----------------------------------------------------------------------------------------- ratios


def relative_flops(counts: Mapping[str, float], examples: float) -> float:
    """Divide the FLOPs of some examples of a task by those with its text in front of each."""
    return (counts["per_task"] / examples + counts["per_example"]) / counts["concatenated"]


def closed_form_ratios(content: Mapping[str, Any], variant: str) -> tuple[float, float]:
    """Return the closed form's relative FLOPs at mean lengths, and the mean of the tasks' own."""
    sizes, lengths = t5.preset(content["size"]), task_lengths(content["tasks"], variant)

    def ratio(lengths: Lengths) -> float:
        counts = flops.closed_form(sizes, lengths, EXAMPLES)
        return counts["adapters"] / counts["concat"]

    return ratio(mean_lengths(lengths)), statistics.fmean(map(ratio, lengths))


def xla_ratios(content: Mapping[str, Any], variant: str, name: str) -> tuple[float, float]:
    """Return XLA's relative FLOPs at mean lengths, and the mean of the tasks' own.

    The closed form extrapolates XLA's counts from the mean lengths to those of a task: encoding
    grows with the text, an example with input and output. The cost of generation stays the same.
    """
    counts = content["variants"][variant]["xla"][name]
    at_mean = relative_flops(counts, EXAMPLES)
    if not counts["per_task"]:  # the text is a part of every input
        return at_mean, at_mean
    sizes = t5.preset(content["size"])
    mean = _backbone_flops(sizes, Lengths(**content["variants"][variant]["lengths"]))

    def ratio(lengths: Lengths) -> float:
        task = _backbone_flops(sizes, lengths)
        scaled = {
            "per_task": counts["per_task"] + task["text"] - mean["text"],
            "per_example": counts["per_example"] * task["example"] / mean["example"],
            "concatenated": counts["concatenated"] * task["concat"] / mean["concat"],
        }
        return relative_flops(scaled, EXAMPLES)

    return at_mean, statistics.fmean(map(ratio, task_lengths(content["tasks"], variant)))


def _backbone_flops(sizes: t5.T5Config, lengths: Lengths) -> dict[str, float]:
    """Return the backbone's FLOPs of the text, of an example, and of both as one input."""
    text = flops.closed_form(sizes, lengths, 0, whole=True)["adapters"]
    task = flops.closed_form(sizes, lengths, 1, whole=True)
    return {"text": text, "example": task["adapters"] - text, "concat": task["concat"]}


# ----------------------------------------------------------------------------------------- tables


def lengths_table(content: Mapping[str, Any]) -> str:
    """Format mean lengths, and the FLOPs of the backbone with the text in front, by each count."""
    rows = []
    for variant, title in VARIANTS.items():
        lengths = Lengths(**content["variants"][variant]["lengths"])
        xla = content["variants"][variant]["xla"]["text concatenated"]["concatenated"]
        cells = [title, *(f"{x:.1f}" for x in dataclasses.astuple(lengths))]
        for whole in (False, True):
            value = flops.closed_form(t5.preset(content["size"]), lengths, 1, whole=whole)["concat"]
            cells.append(f"{value / 1e12:.3f} ({value / xla - 1:+.1%})")
        rows.append([*cells, f"{xla / 1e12:.3f}"])
    header = ["text", "text tokens", "input tokens", "output tokens"]
    header += ["closed form, TFLOPs", "with attention and logits, TFLOPs", "XLA, TFLOPs"]
    return doc_tables.markdown_table(header, rows)


def relative_table(content: Mapping[str, Any]) -> str:
    """Format published and counted relative FLOPs at EXAMPLES inputs per task."""
    ratios = {"closed form": [closed_form_ratios(content, v) for v in VARIANTS]}
    published = {"closed form": "0.34 to 0.37"}
    for name in SYSTEMS:
        ratios[f"{name}, XLA"] = [xla_ratios(content, v, name) for v in VARIANTS]
        published[f"{name}, XLA"] = f"{PUBLISHED[name]:.2f}" if name in PUBLISHED else "none"
    rows = []
    for name, values in ratios.items():
        columns = [[*pair, statistics.fmean(pair)] for pair in zip(*values, strict=True)]
        rows.append([name, published[name], *(f"{x:.2f}" for column in columns for x in column)])
    header = [f"{EXAMPLES} inputs per task", "published average"]
    for way in ("at mean lengths", "mean over tasks"):
        header += [f"Def, {way}", "Def+2Pos", "average"]
    return doc_tables.markdown_table(header, rows)


def parts_table(content: Mapping[str, Any]) -> str:
    """Format where the FLOPs of a hypermodel go, beyond those of the backbone."""
    rows = []
    for variant, title in VARIANTS.items():
        counts = content["variants"][variant]
        plain = _backbone_flops(t5.preset(content["size"]), Lengths(**counts["lengths"]))
        for name, xla in counts["xla"].items():
            if not xla["per_task"]:
                continue
            more = xla["per_task"] - plain["text"], xla["per_example"] - plain["example"]
            overhead = more[0] + EXAMPLES * more[1]
            overhead /= plain["text"] + EXAMPLES * plain["example"]
            parts = (plain["text"], more[0], plain["example"], more[1])
            cells = [f"{x / 1e9:,.1f}" for x in parts]
            rows.append([f"{name}, {title}", *cells, f"{overhead:+.1%}"])
    header = ["GFLOPs", "per task: encoding the text", "generating the adapters"]
    header += ["per example: input and output", "adapters and fusion"]
    return doc_tables.markdown_table([*header, f"overhead, {EXAMPLES} examples"], rows)


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Format the generated sections of docs/compute.md."""
    return {
        "lengths": lengths_table(content),
        "relative": relative_table(content),
        "parts": parts_table(content),
    }


def plot(content: Mapping[str, Any], path: Path) -> str | Path:
    """Draw relative FLOPs against inputs per task, a panel for each variant."""
    pyplot, sizes = plots.headless(), t5.preset(content["size"])
    inputs = [10 ** (k / 10) for k in range(31)]
    figure, panels = pyplot.subplots(1, len(VARIANTS), figsize=(11, 4.2), sharey=True)
    for axes, (variant, title) in zip(panels, VARIANTS.items(), strict=True):
        counts = content["variants"][variant]
        for name, xla in counts["xla"].items():
            axes.plot(inputs, [relative_flops(xla, n) for n in inputs], label=name)
        estimates = [flops.closed_form(sizes, Lengths(**counts["lengths"]), n) for n in inputs]
        ratios = [x["adapters"] / x["concat"] for x in estimates]
        axes.plot(inputs, ratios, "k--", linewidth=1, label="closed form")
        axes.set(title=title, xlabel="inputs per task", xscale="log", ylim=(0, 2))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("FLOPs, relative to the text in front of every input")
    panels[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return plots.save(figure, path)


@handle_errors("flops_tables")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.experiments.flops_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sni_dir", type=expanded_path, required=True, metavar="DIR")
    parser.add_argument("--vocab", type=expanded_path, required=True, metavar="FILE")
    parser.add_argument("--doc", type=expanded_path, required=True, metavar="FILE.md")
    parser.add_argument("--size", default="xl", choices=list(t5.PRESETS))
    args = parser.parse_args(argv)
    vocab = SentencePieceVocabulary(args.vocab)
    content = measure(args.size, measure_lengths(args.sni_dir, vocab))
    files.write_json(args.doc.parent / JSON, content)
    doc_tables.update_document(args.doc, tables(content))
    print(plot(content, args.doc.parent / PLOT))


if __name__ == "__main__":
    sys.exit(main())
