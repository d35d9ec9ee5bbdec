"""Runs for published results: each is valid, has sources, commands and a plan, and takes a step."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from hyper_t5 import cli, t5
from hyper_t5 import config as config_lib
from hyper_t5.experiments import doc_tables, paper_runs
from hyper_t5.parallel import accelerators
from hyper_t5.planning import plan
from hyper_t5.tasks.synthetic import VOCAB_FILE
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json
from hyper_t5.utils.overrides import flatten
from tests.support import tiny_runs
from tests.support.tpu import needs_libtpu

DOCS = Path(__file__).resolve().parents[2] / "docs"
PUBLISHED = paper_runs.load_published(DOCS)
RUNS, RESULTS = PUBLISHED.runs, PUBLISHED.results
PLANS = read_json(DOCS / paper_runs.JSON)
every_run = pytest.mark.parametrize("name", RUNS)
# Fields that no paper chooses: names, folders, T5's sizes, computation and logging.
UNCITED = re.compile(
    r"stage|system|data\.(mixture|text)|train\.(log_every|save_every|microbatches)|mesh\..*"
    r"|backbone\.dtype|model\.(?!dropout_rate).*"
)


# ------------------------------------------------------------------------------------- the files


def test_every_result_has_its_columns_and_its_run() -> None:
    assert {result.table for result in RESULTS} == set(paper_runs.TABLES)
    for result in RESULTS:
        assert len(result.published.split()) == len(paper_runs.TABLES[result.table]), result
    used = {result.run for result in RESULTS}
    assert used | {RUNS[name].init_from for name in used} - {""} == set(RUNS)


def test_published_means_are_those_of_the_tasks() -> None:
    checked = 0
    for result in RESULTS:
        *each, mean = result.published.split()
        if each and "?" not in each:
            values = [sum(map(float, x.split("/"))) / len(x.split("/")) for x in each]
            expected = pytest.approx(sum(values) / len(values), abs=0.11)  # a rounding
            assert float(mean) == expected, result.row
            checked += 1
    assert checked == 12


@every_run
def test_a_run_is_valid_and_every_chosen_field_has_a_source(name: str) -> None:
    run = RUNS[name]
    config, defaults = run.load_config(), flatten(config_lib.defaults())
    config_lib.validate(config, needs_backbone=False)
    sources = {s.field for s in PUBLISHED.sources if s.group == run.group}
    for field, value in flatten(config).items():
        assert value == defaults[field] or UNCITED.fullmatch(field) or field in sources, field
    _, shape = accelerators.parse_topology(run.topology)
    shards = math.prod(shape) // config.mesh.model
    assert config.data.tasks_per_batch % (shards * config.train.microbatches) == 0
    size = next(size for size in ("base", "large", "xl", "xxl") if f"_{size}_" in name)
    assert config.model.emb_dim == t5.preset(size).emb_dim
    assert f"t5_1_1_lm100k_{size}" in paper_runs.commands(run) or run.init_from


@every_run
def test_a_run_has_the_hypermodel_of_the_run_that_it_starts_from(name: str) -> None:
    run = RUNS[name]
    config = flatten(run.load_config())
    if not run.init_from:
        assert config["stage"] == "hyperpretrain" or not run.group.startswith(("hyper_t5", "hint"))
        return
    first = flatten(RUNS[run.init_from].load_config())
    assert first["stage"] == "hyperpretrain"
    assert first["system"] == config["system"].removesuffix("_plus")
    for field in config:
        if field.startswith(("adapter.", "hypermodel.", "model.")) and "dropout" not in field:
            assert config[field] == first[field], field


def test_runs_with_a_common_plan_compile_to_the_same_program() -> None:
    common = [run for run in RUNS.values() if run.plan_of]
    assert len(common) > 5
    for run in common:
        other = RUNS[run.plan_of]
        configs = run.load_config(), other.load_config()
        assert config_lib.differences(*configs, allowed=["data.variant"]) == []
        assert run.topology == other.topology


@every_run
def test_commands_parse(name: str) -> None:
    run = RUNS[name]
    lines = paper_runs.commands(run).replace("\\\n", " ").splitlines()
    for words in map(shlex.split, lines):
        assert words[:2] == ["bash", "launch/tpu_run.sh"]
        assert re.fullmatch("[a-z][-a-z0-9]*", words[words.index("--name") + 1])
        args = cli.parse_args(words[words.index("--") + 1 :])
        if args.command == "train":
            config = config_lib.load(args.config, args.gin)
            config_lib.validate(config)
            assert config.backbone.path.startswith("gs://")
            assert bool(config.hypermodel.path) == bool(run.init_from)
            assert bool(config.data.text) == (config.stage == "hyperpretrain")
    assert len(lines) == (1 if "hyperpretrain" in name else 2)


def test_the_document_is_generated_from_the_files() -> None:
    text = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    assert doc_tables.fill_sections(text, paper_runs.sections(PUBLISHED, PLANS)) == text
    assert set(PLANS) == {name for name, run in RUNS.items() if not run.plan_of}
    for name, planned in PLANS.items():
        assert (planned["topology"], planned["config"]) == (RUNS[name].topology, RUNS[name].config)
    unknown = [result for result in RESULTS if "?" in result.published]
    assert paper_runs.results_table("hint_p3", unknown).count("| NOT FOUND ") == 9
    unfit = dict(PLANS["hint_xl_p3"], fits=False, step_seconds=None)
    assert paper_runs._needs(unfit, 1)[2:] == ["", "does not fit", ""]


def test_invalid_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="beside --doc"):
        paper_runs.load_published(tmp_path)
    (tmp_path / "published_runs.tsv").write_text("run\tgroup\tconfig\nhint_sni\tHINT\n")
    with pytest.raises(UserError, match=r"published_runs.tsv:1: 3 fields instead of 7"):
        paper_runs.load_published(tmp_path)
    document = [f"--doc={DOCS / 'reproduce.md'}"]
    assert paper_runs.main([*document, "--compile", "lora_xl_p3"]) == 2
    assert "--compile needs --plans" in capsys.readouterr().err
    assert paper_runs.main([*document, f"--plans={tmp_path}", "--compile", "lora_xl_p4"]) == 2
    assert "the nearest is 'lora_xl_p3'" in capsys.readouterr().err


def test_generated_sections() -> None:
    text = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    filled = doc_tables.fill_sections(text, {"x": r"new \1"})
    assert filled == "a\n<!-- x -->\nnew \\1\n<!-- end x -->\nb\n"
    assert doc_tables.fill_sections(filled, {"x": r"new \1"}) == filled
    with pytest.raises(UserError, match="<!-- y -->"):
        doc_tables.fill_sections(text, {"y": ""})


# ------------------------------------------------------------------------------------------ plans

FAST = ("hyperdecoder_large_glue",)


@needs_libtpu
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in PLANS]
)
def test_a_plan_has_the_arguments_and_flops_of_the_traced_step(name: str) -> None:
    config, planned = RUNS[name].load_config(), PLANS[name]
    target = plan.make_target(config, RUNS[name].topology)
    program = plan.train_program(target)
    arguments = sum(map(plan.shard_bytes, program.parts.values()))
    assert arguments == pytest.approx(planned["arguments"], rel=1e-6)
    assert 0 < arguments < planned["limit"] == target.chip.limit
    model_flops = program.model_flops / target.placement.mesh.size
    assert model_flops == pytest.approx(planned["model_flops"], rel=1e-6)


# --------------------------------------------------------------------------------------- one step


def distinct_programs() -> dict[str, str]:
    """Return a run for each program that differs in more than sizes, rates and data."""
    runs: dict[str, str] = {}
    for name, run in RUNS.items():
        config = run.load_config()
        key = f"{config.system} {config.stage} {config.optimizer.name}"
        if config.system == "hyperdecoder":
            key += f" {config.hyperdecoder.decoder}"
        runs.setdefault(key, name)
    return runs


def tiny(config: ConfigDict, folder: Path) -> ConfigDict:
    """Shrink a run to toy sizes and tasks of a few rows; everything else stays."""
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
    """Return a folder with a backbone and tasks."""
    folder = tmp_path_factory.mktemp("paper_runs")
    tiny_runs.save_backbone(folder / "backbone", sizes=t5.preset("tiny", vocab_size=816))
    tiny_runs.save_sni(folder / "sni")
    return folder


FAST_STEPS = ("concat mtf adamw",)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(k, marks=[] if k in FAST_STEPS else [pytest.mark.slow])
        for k in distinct_programs()
    ],
)
def test_one_real_step(key: str, root: Path, tmp_path: Path) -> None:
    config = tiny(RUNS[distinct_programs()[key]].load_config(), root)
    metrics: dict[str, Any] = tiny_runs.run(config, tmp_path / "run")
    assert math.isfinite(metrics["loss"])
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_the_steps_cover_all_systems() -> None:
    programs = distinct_programs()
    assert {key.split()[0] for key in programs} >= {
        *("hyper_prefix", "hyper_lora", "hyper_lora_plus", "hint", "hyperdecoder"),
        *("concat", "shared_lora"),
    }
    assert set(FAST_STEPS) <= set(programs)
    assert len(programs) >= 12
