"""Reproduction kits: published tables, the config of each row, and what a pod needs for it.

    python -m hyper_t5.reproduce --doc docs/reproduce.md

Writes the document's tables, of three files: `hyper_t5.kits`, the runs; published.tsv beside the
document, the results; reproduce.json, which ``--trace`` writes anew (seconds a stage) and to which
``--plans DIR`` adds what `hyper-t5 plan` said. ``--compile STAGE`` plans into that folder (minutes
each).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import documents, files, plan, plan_tables
from hyper_t5.chips import GIB
from hyper_t5.errors import UserError, exit_code
from hyper_t5.kits import NOT_FOUND, SOURCES, STAGES, TABLES, UNCITED, Stage
from hyper_t5.overrides import choose, flatten

JSON, PUBLISHED = "reproduce.json", "published.tsv"  # beside the document
BUCKET = "gs://my-bucket"


@dataclasses.dataclass(frozen=True)
class Row:
    """A published result; ``published`` has a word a column of its table, - where none is found."""

    table: str
    label: str
    stage: str
    published: str
    source: str


def read_rows(file: Path) -> list[Row]:
    """All rows of all tables, as published.tsv has them.

    Raises:
        UserError: no such file, or a line without its five fields.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}; it lies beside --doc") from e
    found = []
    for number, cells in enumerate(csv.reader(lines, delimiter="\t"), 1):
        if len(cells) != 5:
            raise UserError(f"{file}:{number}: {len(cells)} fields instead of 5, cut by tabs")
        found.append(Row(*cells))
    return found[1:]


def config_of(stage: Stage) -> ConfigDict:
    """Its config, overrides applied."""
    return config_lib.load(stage.config, stage.overrides)


def chosen(stage: Stage) -> dict[str, Any]:
    """The fields that a paper, or we, chose: those that are not as by default, and all cited."""
    config, plain = flatten(config_of(stage)), flatten(config_lib.defaults())
    cited = SOURCES[stage.kind]
    return {
        field: value
        for field, value in config.items()
        if field in cited or (value != plain[field] and not UNCITED.fullmatch(field))
    }


# ------------------------------------------------------------------------------------- commands


def commands(name: str) -> str:
    """What to type for a stage, those before it not included: training, and judging at the end."""
    stage, config = STAGES[name], config_of(STAGES[name])
    size = re.search(r"size=(\w+)", stage.config)
    start = f"{BUCKET}/t5_1_1_lm100k_{size[1] if size else 'large'}"
    given = [*stage.overrides, f"data.vocab={BUCKET}/spiece.model"]
    after = f"{BUCKET}/runs/{stage.after}"
    text = config.stage == "hyperpretrain"
    if stage.after:
        given.append(f"hypermodel.path={after}")
    given.append(f"backbone.path={after if stage.after and config.system == 'hint' else start}")
    if text:
        given.append("data.text=tfds:c4/en:3.1.0")
    else:
        given.append(f"data.store={BUCKET}/data/hyper_t5/{config.data.mixture}/1.0.0")
    pod = f"bash launch/tpu_run.sh --name {name.replace('_', '-')} --topology {stage.topology}"
    env = f" --env TFDS_DATA_DIR={BUCKET}/tfds" if text else ""
    run = f"--workdir {BUCKET}/runs/{name}"
    words = [f"{pod}{env} --", f"    train --config {stage.config} {run}"]
    words += [f"    --gin.{field}" for field in given]
    lines = " \\\n".join(words)
    return lines if text else f"{lines}\n{pod} -- \\\n    evaluate {run}"


# ------------------------------------------------------------------------------------- the document


def results_table(name: str, rows: Sequence[Row]) -> str:
    """A published table's rows, with the stage that each of them ends in."""
    table = TABLES[name]
    head = ["row", *table.columns, "printed in", "stage"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in rows:
        if row.table == name:
            numbers = [NOT_FOUND if word == "-" else word for word in row.published.split()]
            lines.append(_line([row.label, *numbers, row.source, f"`{row.stage}`"]))
    return "\n".join([*lines, "", table.missing])


def stages_of(name: str, rows: Sequence[Row]) -> list[str]:
    """The stages of a table's rows, each after the one that it starts from."""
    found: dict[str, None] = {}
    for row in rows:
        if row.table == name:
            after = STAGES[row.stage].after
            found |= dict.fromkeys([after] if after else []) | {row.stage: None}
    return list(found)


def stages_table(names: Sequence[str], plans: Mapping[str, Any]) -> str:
    """What each of these stages needs: chips, memory, time."""
    head = ["stage", "starts from", "steps x rows", "chips", "weights, moments: GiB a chip"]
    head += ["peak GiB of HBM", "ms a step at peak FLOPs", "planned: at least", "hours"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for key in names:
        stage, config = STAGES[key], config_of(STAGES[key])
        rows = config.data.tasks_per_batch * config.data.examples_per_task
        cells = [f"`{key}`", f"`{stage.after}`" if stage.after else "T5 1.1, LM-adapted"]
        cells += [f"{config.train.steps:,} x {rows:,}", stage.topology]
        lines.append(_line([*cells, *_needs(plans.get(stage.plan or key, {}), config.train.steps)]))
    return "\n".join(lines)


def _needs(report: Mapping[str, Any], steps: int) -> list[str]:
    """Cells of what was traced and planned, where it was."""
    traced, planned = report.get("trace"), report.get("plan")
    cells = ["not traced", "not planned", "", "", ""]
    seconds = 0.0
    if traced:
        seconds = traced["seconds_at_peak"]
        cells[0] = f"{traced['arguments'] / GIB:.1f}"
        cells[2] = f"{seconds * 1e3:,.0f}"
    if planned:
        cells[1] = f"{planned['peak'] / GIB:.1f} of {planned['limit'] / GIB:.1f}"
        if not planned["fits"]:
            cells[1] += ": does not fit"
            return cells
        seconds = planned["step_seconds"]
        cells[3] = f"{seconds * 1e3:,.0f} ({planned['binds']})"
    if seconds:
        cells[4] = f"over {seconds * steps / 3600:.2g}"
    return cells


def sources_table(kinds: Sequence[str]) -> str:
    """Each field that is not as by default: its values, and where they are from."""
    lines = [_line(["runs", "field", "value", "from"]), "|---" * 4 + "|"]
    for kind in kinds:
        values: dict[str, dict[str, None]] = {}
        for stage in STAGES.values():
            if stage.kind == kind:
                for field, value in chosen(stage).items():
                    values.setdefault(field, {})[_shown(value)] = None
        for field, found in values.items():
            said = SOURCES[kind].get(field, "?")
            lines.append(_line([kind, f"`{field}`", "; ".join(found), said]))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sections(rows: Sequence[Row], plans: Mapping[str, Any]) -> dict[str, str]:
    """The document's generated parts by name."""
    found = {"sources": sources_table(list(SOURCES))}
    for name, table in TABLES.items():
        stages = stages_of(name, rows)
        typed = "\n\n".join(map(commands, stages))
        parts = (f"### {table.title}", results_table(name, rows), stages_table(stages, plans))
        found[name] = "\n\n".join((*parts, f"```bash\n{typed}\n```"))
    return found


# ------------------------------------------------------------------------------------- the command


def trace(stage: Stage) -> dict[str, Any]:
    """A stage's training step on its pod, traced and not compiled.

    Returns: ``arguments``, bytes a chip of weights, moments and batch; ``limit``, those there are;
      ``model_flops`` of a step; ``seconds_at_peak`` that these take where nothing else does.

    Raises:
        UserError: a config that no run could use, or a mesh that the pod or batch does not suit.
    """
    config = config_of(stage)
    config_lib.validate(config, needs_backbone=False)
    target = plan.make_target(config, stage.topology)
    program = plan.train_program(target)
    flops, chips = program.model_flops, len(target.devices)
    return {
        "arguments": sum(map(plan.shard_bytes, program.parts.values())),
        "limit": target.chip.limit,
        "model_flops": flops,
        "seconds_at_peak": flops / chips / target.chip.flops_per_device,
    }


def brief(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a plan: one program's memory and time a chip."""
    found = report["programs"]["train"]
    kept = {"config": report["config"], "topology": report["topology"], "mesh": report["mesh"]}
    kept |= {"rows": report["batch"]["rows"], "microbatches": report["batch"]["microbatches"]}
    kept |= {"parameters": report["parameters"], "versions": report["versions"]}
    kept |= {"fits": found["fits"], "peak": found["memory"]["peak"]}
    kept["limit"] = found["memory"]["limit"]
    for field in ("step_seconds", "binds", "utilisation", "flops", "hbm_bytes"):
        kept[field] = found.get(field)
    return kept


def compiled(names: Sequence[str], folder: Path | None) -> None:
    """Plans of these stages in ``folder``; those that are there are kept.

    Raises:
        UserError: no folder, or a stage that there is not.
    """
    if not names:
        return
    if folder is None:
        raise UserError("--compile needs --plans, the folder to write into")
    for name in names:
        stage = STAGES[choose("--compile", name, STAGES)]
        row = plan_tables.Row(name, stage.config, stage.topology, stage.overrides)
        plan_tables.compile_row(row, folder / name)


def gathered(kept: Mapping[str, Any], folder: Path | None, *, anew: bool) -> dict[str, Any]:
    """What is known of each stage with a program of its own: kept, traced anew, and planned."""
    found: dict[str, Any] = {}
    for name, stage in STAGES.items():
        if stage.plan:
            continue
        found[name] = dict(kept.get(name, {}))
        if anew:
            found[name]["trace"] = trace(stage)
            print(name, found[name]["trace"], flush=True)
        if folder and (folder / name / plan.JSON).exists():
            found[name]["plan"] = brief(files.read_json(folder / name / plan.JSON))
    return found


@exit_code("reproduce")
def main(argv: Sequence[str] | None = None) -> None:
    """Take in plans, and write the document's tables anew."""
    parser = argparse.ArgumentParser(prog="python -m hyper_t5.reproduce", description=__doc__)
    parser.add_argument("--doc", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--trace", action="store_true", help="all stages anew")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="of STAGE/plan.json")
    parser.add_argument("--compile", nargs="*", default=[], metavar="STAGE", help="into --plans")
    args = parser.parse_args(argv)
    file = args.doc.parent / JSON
    rows = read_rows(args.doc.parent / PUBLISHED)
    compiled(args.compile, args.plans)
    kept = files.read_json(file) if file.exists() else {}
    found = gathered(kept, args.plans, anew=args.trace)
    text = documents.fill(args.doc.read_text(encoding="utf-8"), sections(rows, found))
    files.write_json(file, found)
    files.write_text(args.doc, text)


if __name__ == "__main__":
    sys.exit(main())
