"""Run configurations for published results, and the tables of docs/reproduce.md.

    python -m hyper_t5.experiments.paper_runs --doc docs/reproduce.md
    python -m hyper_t5.experiments.paper_runs --doc docs/reproduce.md --plans runs/plans \
        --compile lora_xl_p3

The command rewrites the tables of the document from four files beside it:

    published.tsv          published results, and the run that reproduces each
    published_runs.tsv     the runs: config, overrides, TPU topology
    published_sources.tsv  the source of every hyperparameter, for groups of runs
    reproduce.json         plans of the runs

``--compile RUN`` plans runs with ``hyper-t5 plan`` (minutes each), and ``--plans DIR`` copies the
plans in DIR/RUN/plan.json to reproduce.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.experiments import doc_tables, plan_tables
from hyper_t5.parallel.accelerators import GIB, parse_topology
from hyper_t5.planning import plan
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError, handle_errors
from hyper_t5.utils.overrides import choose, flatten
from hyper_t5.utils.paths import expanded_path

JSON = "reproduce.json"
BUCKET = "gs://my-bucket"
UNKNOWN = "NOT FOUND"
P3_TASKS = ("ANLI", "HSwag", "CB", "COPA", "RTE", "WiC", "WSC", "WGD")
GLUE_TASKS = ("CoLA", "SST-2", "STS-B", "MRPC", "QQP", "MNLI", "QNLI", "RTE")
TABLES = {  # columns of the published tables
    "hyper_t5_p3": (*P3_TASKS, "mean"),
    "hyper_t5_sni": ("ROUGE-L",),
    "hint_sni": ("ROUGE-L",),
    "hint_p3": (*P3_TASKS, "StoryCloze", "mean"),
    "hyperdecoder_glue": (*GLUE_TASKS, "mean"),
}


class PaperRun(NamedTuple):
    """A line of published_runs.tsv: one training run.

    ``overrides`` are separated by spaces, without ``--gin.``. ``init_from`` is the run whose result
    it starts from, and ``plan_of`` another run that compiles to the same program.
    """

    run: str
    group: str
    config: str
    topology: str
    init_from: str
    plan_of: str
    overrides: str

    def load_config(self) -> ConfigDict:
        """Load the config with its overrides."""
        return config_lib.load(self.config, self.overrides.split())


class Result(NamedTuple):
    """A line of published.tsv; ``published`` has one word per column of its table, ? if unknown."""

    table: str
    row: str
    run: str
    published: str
    source: str


class Source(NamedTuple):
    """A line of published_sources.tsv."""

    group: str
    field: str
    source: str


class Published(NamedTuple):
    """The content of the three files."""

    results: list[Result]
    runs: dict[str, PaperRun]
    sources: list[Source]


def load_published(folder: Path) -> Published:
    """Read the three files of a folder.

    Raises:
      UserError: a file does not exist, or a line has a wrong number of fields.
    """
    runs: list[PaperRun] = doc_tables.read_tsv(folder / "published_runs.tsv", PaperRun)
    return Published(
        doc_tables.read_tsv(folder / "published.tsv", Result),
        {run.run: run for run in runs},
        doc_tables.read_tsv(folder / "published_sources.tsv", Source),
    )


def commands(run: PaperRun) -> str:
    """Format the commands that train a run, and evaluate it unless it is hyperpretraining."""
    config = run.load_config()
    size = re.search(r"size=(\w+)", run.config)
    t5 = f"{BUCKET}/t5_1_1_lm100k_{size[1] if size else 'large'}"
    first = f"{BUCKET}/runs/{run.init_from}"
    pretrain = config.stage == "hyperpretrain"
    fields = [*run.overrides.split(), f"data.vocab={BUCKET}/spiece.model"]
    if run.init_from:
        fields.append(f"hypermodel.path={first}")
    fields.append(f"backbone.path={first if run.init_from and config.system == 'hint' else t5}")
    store = f"data.store={BUCKET}/data/hyper_t5/{config.data.mixture}/1.0.0"
    fields.append("data.text=tfds:c4/en:3.1.0" if pretrain else store)
    pod = f"bash launch/tpu_run.sh --name {run.run.replace('_', '-')} --topology {run.topology}"
    env = f" --env TFDS_DATA_DIR={BUCKET}/tfds" if pretrain else ""
    workdir = f"--workdir {BUCKET}/runs/{run.run}"
    words = [f"{pod}{env} --", f"    train --config {run.config} {workdir}"]
    train = " \\\n".join([*words, *(f"    --gin.{field}" for field in fields)])
    return train if pretrain else f"{train}\n{pod} -- \\\n    evaluate {workdir}"


# ---------------------------------------------------------------------------------------- document


def results_table(name: str, results: Sequence[Result]) -> str:
    """Format published results with the runs that reproduce them."""
    rows = []
    for result in results:
        numbers = [UNKNOWN if word == "?" else word for word in result.published.split()]
        rows.append([result.row, *numbers, result.source, f"`{result.run}`"])
    return doc_tables.markdown_table(["row", *TABLES[name], "printed in", "run"], rows)


def runs_table(runs: Sequence[PaperRun], plans: Mapping[str, Any]) -> str:
    """Format the chips, memory and time of runs."""
    rows = []
    for run in runs:
        config = run.load_config()
        start = f"`{run.init_from}`" if run.init_from else "T5 1.1, LM-adapted"
        batch = config.data.tasks_per_batch * config.data.examples_per_task
        cells = [f"`{run.run}`", start, f"{config.train.steps:,} x {batch:,}", run.topology]
        needs = _needs(plans.get(run.plan_of or run.run), config.train.steps)
        rows.append([*cells, *needs])
    header = ["run", "initialized from", "steps x rows", "chips", "weights + moments, GiB a chip"]
    header += [
        "peak GiB of HBM",
        "ms a step at peak FLOPs",
        "planned ms a step, at least",
        "hours, at least",
    ]
    return doc_tables.markdown_table(header, rows)


def _needs(planned: Mapping[str, Any] | None, steps: int) -> list[str]:
    if not planned:
        return ["not planned", "", "", "", ""]
    cells = [f"{planned['arguments'] / GIB:.1f}"]
    cells.append(f"{planned['peak'] / GIB:.1f} of {planned['limit'] / GIB:.1f}")
    if not planned["fits"]:
        return [*cells, "", "does not fit", ""]
    chip, _ = parse_topology(planned["topology"])
    seconds = planned["step_seconds"]
    return [
        *cells,
        f"{planned['model_flops'] / chip.flops_per_device * 1e3:,.0f}",
        f"{seconds * 1e3:,.0f} ({planned['binds']})",
        f"{seconds * steps / 3600:.2g}",
    ]


def sources_table(published: Published) -> str:
    """Format the values and the source of each hyperparameter."""
    configs = {name: flatten(run.load_config()) for name, run in published.runs.items()}
    rows = []
    for group, field, source in published.sources:
        members = [name for name, run in published.runs.items() if run.group == group]
        values = dict.fromkeys(_format(configs[name][field]) for name in members)
        rows.append([group, f"`{field}`", "; ".join(values), source])
    return doc_tables.markdown_table(["runs", "field", "value", "source"], rows)


def _format(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def sections(published: Published, plans: Mapping[str, Any]) -> dict[str, str]:
    """Format the generated sections of docs/reproduce.md."""
    text = {"sources": sources_table(published)}
    for name in TABLES:
        results = [result for result in published.results if result.table == name]
        ends = [(published.runs[r.run].init_from, r.run) for r in results]
        names = dict.fromkeys(run for pair in ends for run in pair if run)
        runs = [published.runs[run] for run in names]
        typed = "\n\n".join(map(commands, runs))
        parts = (results_table(name, results), runs_table(runs, plans), f"```bash\n{typed}\n```")
        text[name] = "\n\n".join(parts)
    return text


# ------------------------------------------------------------------------------------------- plans


def summarize(report: Mapping[str, Any]) -> dict[str, Any]:
    """Select the part of plan.json that reproduce.json keeps."""
    costs, batch = report["programs"]["train"], report["batch"]
    memory = costs["memory"]
    summary = {k: report[k] for k in ("config", "topology", "mesh", "parameters", "versions")}
    summary |= {"rows": batch["rows"], "microbatches": batch["microbatches"], "fits": costs["fits"]}
    summary |= {"peak": memory["peak"], "limit": memory["limit"]}
    summary["arguments"] = sum(memory["arguments"].values())
    costs_kept = ("step_seconds", "binds", "utilisation", "flops", "model_flops", "hbm_bytes")
    return summary | {field: costs.get(field) for field in costs_kept}


@handle_errors("paper_runs")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.experiments.paper_runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--doc", type=expanded_path, required=True, metavar="FILE.md")
    parser.add_argument(
        "--plans", type=expanded_path, metavar="DIR", help="folder of RUN/plan.json"
    )
    parser.add_argument("--compile", nargs="+", default=[], metavar="RUN", help="into --plans")
    args = parser.parse_args(argv)
    if args.compile and not args.plans:
        raise UserError("--compile needs --plans, the folder for the plans")
    published = load_published(args.doc.parent)
    for name in args.compile:
        run = published.runs[choose("--compile", name, published.runs)]
        folder = args.plans / name
        plan_tables.compile_plan(run.config, run.topology, run.overrides, folder)
    file = args.doc.parent / JSON
    plans = files.read_json(file) if file.exists() else {}
    for name, run in published.runs.items():
        planned = args.plans / name / plan.JSON if args.plans else None
        if planned and planned.exists() and not run.plan_of:
            plans[name] = summarize(files.read_json(planned))
    doc_tables.update_document(args.doc, sections(published, plans))
    files.write_json(file, plans)


if __name__ == "__main__":
    sys.exit(main())
