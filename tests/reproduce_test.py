"""The reproduction kits: every row has a run that validates, is cited, traces, and takes a step."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

import runs
from hyper_t5 import chips, cli, documents, reproduce, t5
from hyper_t5 import config as config_lib
from hyper_t5.errors import UserError
from hyper_t5.files import read_json
from hyper_t5.kits import NOT_FOUND, SOURCES, STAGES, TABLES
from hyper_t5.overrides import flatten
from hyper_t5.tasks.synthetic import VOCAB_FILE

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reproduce.md"
ROWS = reproduce.read_rows(DOCUMENT.parent / reproduce.PUBLISHED)
every_stage = pytest.mark.parametrize("name", STAGES)
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no TPU compiler; pip install libtpu"
)


# ------------------------------------------------------------------------------------ what is said


def test_every_row_has_its_columns_and_its_stage() -> None:
    assert {row.table for row in ROWS} == set(TABLES)
    for row in ROWS:
        assert len(row.published.split()) == len(TABLES[row.table].columns), row
        assert row.stage in STAGES
    used = {row.stage for row in ROWS}
    assert used | {STAGES[name].after for name in used} - {""} == set(STAGES)


def test_published_means_are_those_of_the_tasks() -> None:
    """What a paper prints as the mean is its row's, within a rounding: a slip of copying shows."""
    checked = 0
    for row in ROWS:
        *each, mean = row.published.split()
        if each and "-" not in each:
            values = [sum(map(float, x.split("/"))) / len(x.split("/")) for x in each]
            assert float(mean) == pytest.approx(sum(values) / len(values), abs=0.11), row.label
            checked += 1
    assert checked == 12


@every_stage
def test_a_stage_is_a_config_that_validates_and_is_cited(name: str) -> None:
    stage = STAGES[name]
    config = reproduce.config_of(stage)
    config_lib.validate(config, needs_backbone=False)
    assert set(reproduce.chosen(stage)) <= set(SOURCES[stage.kind])
    _, shape = chips.parse_topology(stage.topology)
    parts = math.prod(shape) // config.mesh.model
    assert config.data.tasks_per_batch % (parts * config.train.microbatches) == 0
    size = next(size for size in ("base", "large", "xl", "xxl") if f"_{size}_" in name)
    assert config.model.emb_dim == t5.preset(size).emb_dim
    assert f"t5_1_1_lm100k_{size}" in reproduce.commands(name) or STAGES[name].after


@every_stage
def test_a_stage_starts_from_one_that_it_fits(name: str) -> None:
    """The same hypermodel: system, sizes, and adapters; the first stage is on text."""
    stage = STAGES[name]
    config = flatten(reproduce.config_of(stage))
    if not stage.after:
        assert config["stage"] == "hyperpretrain" or not stage.kind.startswith(("mtf", "hint"))
        return
    before = flatten(reproduce.config_of(STAGES[stage.after]))
    assert before["stage"] == "hyperpretrain"
    assert before["system"] == config["system"].removesuffix("_plus")
    for field in config:
        if field.startswith(("adapter.", "hypermodel.", "model.")) and "dropout" not in field:
            assert config[field] == before[field], field


def test_a_program_that_is_shared_is_the_same() -> None:
    """Nothing that a step computes differs from the stage whose plan is taken."""
    shared = [name for name, stage in STAGES.items() if stage.plan]
    assert len(shared) > 5
    for name in shared:
        stage = STAGES[name]
        one, other = (reproduce.config_of(s) for s in (stage, STAGES[stage.plan]))
        assert config_lib.differences(one, other, allowed=["data.variant"]) == []
        assert stage.topology == STAGES[stage.plan].topology


@every_stage
def test_its_commands_parse(name: str) -> None:
    text = reproduce.commands(name).replace("\\\n", " ")
    made = [shlex.split(line) for line in text.splitlines()]
    for words in made:
        assert words[:2] == ["bash", "launch/tpu_run.sh"]
        assert re.fullmatch("[a-z][-a-z0-9]*", words[words.index("--name") + 1])
        args = cli._parse(words[words.index("--") + 1 :])
        if args.command == "train":
            config = config_lib.load(args.config, args.gin)
            config_lib.validate(config)
            assert config.backbone.path.startswith("gs://")
            assert bool(config.hypermodel.path) == bool(STAGES[name].after)
            assert bool(config.data.text) == (config.stage == "hyperpretrain")
    assert len(made) == (1 if STAGES[name].kind == "caclm" or "hyperpretrain" in name else 2)


def test_the_document_is_what_the_rows_say() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = read_json(DOCUMENT.parent / reproduce.JSON)
    assert documents.fill(text, reproduce.sections(ROWS, found)) == text
    assert set(found) == {name for name, stage in STAGES.items() if not stage.plan}
    for name, report in found.items():
        if plan := report.get("plan"):
            assert plan["topology"] == STAGES[name].topology
            assert plan["config"] == STAGES[name].config
    assert all(row.label in text for row in ROWS)


def test_a_document_without_a_place_is_refused() -> None:
    text = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    made = documents.fill(text, {"x": r"new \1"})
    assert made == "a\n<!-- x -->\nnew \\1\n<!-- end x -->\nb\n"
    assert documents.fill(made, {"x": r"new \1"}) == made
    with pytest.raises(UserError, match="<!-- y -->"):
        documents.fill(text, {"y": ""})


def test_a_line_that_is_no_row_is_told(tmp_path: Path) -> None:
    file = tmp_path / reproduce.PUBLISHED
    with pytest.raises(UserError, match="beside --doc"):
        reproduce.read_rows(file)
    file.write_text("table\trow\tstage\tpublished\tprinted in\nhint_sni\tHINT\n")
    with pytest.raises(UserError, match=r"published.tsv:2: 2 fields instead of 5"):
        reproduce.read_rows(file)


def test_a_published_number_that_was_not_found_is_said() -> None:
    table = reproduce.results_table("hint_p3", ROWS)
    assert table.count(f"| {NOT_FOUND} ") == 9
    assert "| 60.3 |" in table


# ------------------------------------------------------------------------- traced for the chips


@needs_libtpu
def test_a_stage_traces_and_its_weights_fit() -> None:
    check_trace("hyperdecoder_large_glue")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in STAGES.items() if not s.plan])
def test_every_stage_traces_and_its_weights_fit(name: str) -> None:
    check_trace(name)


def check_trace(name: str) -> None:
    found = reproduce.trace(STAGES[name])
    assert 0 < found["arguments"] < found["limit"]
    kept = read_json(DOCUMENT.parent / reproduce.JSON)[name].get("trace", found)
    assert found == pytest.approx(kept, rel=1e-6)


# --------------------------------------------------------------------------------------- one step


def steps() -> dict[str, str]:
    """A stage for each program that differs in more than sizes, rates and data."""
    found: dict[str, str] = {}
    for name, stage in STAGES.items():
        config = reproduce.config_of(stage)
        key = f"{config.system} {config.stage} {config.optimizer.name}"
        if config.system == "hyperdecoder":
            key += f" {config.hyperdecoder.decoder}"
        found.setdefault(key, name)
    return found


def tiny(config: ConfigDict, folder: Path) -> ConfigDict:
    """The same run at toy size, on tasks of a few rows: all else stays as it is."""
    config_lib.use_preset(config, "tiny")
    config.model.vocab_size = 816
    config.backbone.path = str(folder / "backbone")
    data = config.data
    data.update(vocab=str(VOCAB_FILE), extra_ids=0, mixture="sni", sni_dir=str(folder / "sni"))
    data.update(text="synthetic" if config.stage == "hyperpretrain" else "", chunk_length=32)
    data.update(hyper_length=60, input_length=60, target_length=16)
    data.concat_length = min(data.concat_length, 60)
    data.tasks_per_batch = 2 * config.train.microbatches
    data.variant = "pos_1" if data.variant.startswith("pos") else data.variant
    sizes = [min(size, 4) for size in config.adapter.bottleneck_sizes]
    config.adapter.update(bottleneck_sizes=tuple(sizes), prefix_length=3)
    config.model.remat = "none"
    config.mesh.data, config.mesh.model = 1, 1
    config.train.steps = config.train.log_every = config.train.save_every = 1
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone and tasks."""
    folder = tmp_path_factory.mktemp("reproduce")
    runs.save_backbone(folder / "backbone", sizes=t5.preset("tiny", vocab_size=816))
    runs.save_sni(folder / "sni")
    return folder


@pytest.fixture
def compiled_quickly() -> Iterator[None]:
    """One step is run of a program that took many seconds to compile: it need not be a fast one."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


FAST = ("concat mtf adamw",)


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=[] if k in FAST else [pytest.mark.slow]) for k in steps()]
)
def test_one_real_step(key: str, root: Path, tmp_path: Path, compiled_quickly: None) -> None:
    config = tiny(reproduce.config_of(STAGES[steps()[key]]), root)
    found: dict[str, Any] = runs.run(config, tmp_path / "run")
    assert math.isfinite(found["loss"])
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_the_steps_are_of_all_systems() -> None:
    assert {key.split()[0] for key in steps()} >= {
        *("hyper_prefix", "hyper_lora", "hyper_lora_plus", "hint", "hyperdecoder"),
        *("concat", "shared_lora"),
    }
    assert set(FAST) <= set(steps())
    assert len(steps()) >= 12
