"""The plans of docs/scaling.md: valid configs, and a table that agrees with scaling.json."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from hyper_t5 import config as config_lib
from hyper_t5.experiments import doc_tables, plan_tables
from hyper_t5.parallel import accelerators
from hyper_t5.utils.files import read_json

DOCS = Path(__file__).resolve().parents[2] / "docs"
REPORTS = read_json(DOCS / plan_tables.JSON)
RUNS = plan_tables.load_runs(DOCS)


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_is_valid(name: str) -> None:
    run = RUNS[name]
    config = config_lib.load(run.config, run.overrides.split())
    config_lib.validate(config, needs_backbone=False)
    _, shape = accelerators.parse_topology(run.topology)
    shards = math.prod(shape) // config.mesh.model
    assert config.data.tasks_per_batch % (shards * config.train.microbatches) == 0
    planned = REPORTS[name]
    assert (planned["config"], planned["topology"]) == (run.config, run.topology)
    assert planned["overrides"] == run.overrides.split()
    assert list(planned["programs"]) == run.steps.split()


def test_the_document_is_generated_from_the_plans() -> None:
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert doc_tables.fill_sections(text, {"plans": plan_tables.table(RUNS, REPORTS)}) == text
    costs = dict(REPORTS["hint_xl_v5p_64"]["programs"]["train"], fits=False)
    cells = plan_tables._cells("HINT", REPORTS["hint_xl_v5p_64"], costs)
    assert cells[8:] == ["does not fit", "", "", "", "", ""]


def test_the_command_adds_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("scaling.md", plan_tables.RUNS):
        shutil.copy(DOCS / file, tmp_path)
    folder = tmp_path / "plans" / "lora_xl_v5p_8"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(REPORTS["lora_xl_v5p_8"]))
    command = [f"--doc={tmp_path / 'scaling.md'}", f"--plans={tmp_path / 'plans'}", "--compile"]
    assert plan_tables.main([*command, "lora_xl_v5p_8"]) == 0  # exists: nothing is compiled
    assert read_json(tmp_path / "scaling.json") == {"lora_xl_v5p_8": REPORTS["lora_xl_v5p_8"]}
    table = (tmp_path / "scaling.md").read_text().partition("<!-- plans -->\n")[2]
    assert table.splitlines()[2].startswith("| HyperT5-LoRA XL | 8 v5p | 8x1 | 16 |")
    assert plan_tables.main([*command, "lora_xl"]) == 2
    assert "the nearest is" in capsys.readouterr().err
