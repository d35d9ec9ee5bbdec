"""Every system by the same commands: train, evaluate, adapt, predict, export."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import export, model, pipeline, runs, t5, weights
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.data.batch import CONCAT
from hyper_t5.evaluation import evaluate
from hyper_t5.hypermodels import BACKBONE, SYSTEMS, System
from hyper_t5.inference import predict_files, predictor
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

every_system = pytest.mark.parametrize("system", tiny_runs.marked(SYSTEMS))
# Part of the message -> systems whose adapters PEFT has no format for.
REFUSED = {
    "bottleneck adapters": ("hint", "shared_bottleneck", "task_bottleneck"),
    "memory to T5's decoder": ("fid_icl", "cached"),
    "in front of every input": ("concat", "hyperdecoder"),
    "self-attention only": ("hyper_prefix", "hyper_prefix_plus", "shared_prefix", "task_prefix"),
    "these adapters are empty": ("none",),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a backbone and tasks in a folder for the runs."""
    folder = tmp_path_factory.mktemp("systems")
    tiny_runs.save_backbone(folder / "backbone")
    tiny_runs.save_sni(folder / "sni")
    return folder


@functools.cache
def trained(root: Path, name: str) -> Path:
    """Train a system for four steps, if it trains anything; return the workdir.

    `name` is the system's, or that and a template: "concat:tk_instruct".
    """
    system, _, template = name.partition(":")
    fields: dict[str, Any] = {
        "system": system,
        "backbone__path": str(root / "backbone"),
        "data__sni_dir": str(root / "sni"),
        "data__shots": (1, 1),
        "adapter__bottleneck_sizes": (3,),
        "eval__max_rows_per_task": 3,
    }
    if system.startswith("task_"):
        fields |= {"stage": "peft", "adapter__task_slots": 2}
    if system == "hint":
        fields |= {"adapter__prefix_sites": ad.ATTENTION_SITES, "adapter__position_bias": "zero"}
    if system == "fid_icl":
        fields["seed"] = 1  # with 0 all its outputs are empty
    if template:
        fields |= {"data__template": template, "data__variant": "def_pos_1"}
        fields |= {"data__hyper_length": 200, "data__input_length": 80}
    config, folder = tiny_runs.make_config(**fields), root / name
    if SYSTEMS[system].trains:
        tiny_runs.run(config, folder)
    else:
        tiny_runs.workdir.write_or_check_config(folder, config)
    return folder


@functools.cache
def evaluated(root: Path, system: str) -> dict[str, Any]:
    return evaluate.evaluate_workdir(trained(root, system))


def backbone_of(root: Path, system: str) -> Path:
    """Return the backbone that predict loads: of the run, if it trains one."""
    trains = SYSTEMS[system.partition(":")[0]].trains
    return trained(root, system) if BACKBONE in trains else root / "backbone"


@functools.cache
def adapted(root: Path, system: str) -> list[Path]:
    """Return native folders of the two held-out tasks."""
    folder = root / f"{system}_adapters"
    files = [root / "sni" / "tasks" / f"{name}.json" for name in tiny_runs.HELD_OUT]
    return [
        predictor.adapt(runs.open(trained(root, system)), file, folder / file.stem)
        for file in files
    ]


@every_system
def test_checkpoints_hold_what_a_system_trains(root: Path, system: str) -> None:
    folder, trains = trained(root, system), SYSTEMS[system].trains
    if not trains:
        with pytest.raises(UserError, match=f"system={system} has nothing to train"):
            tiny_runs.run(workdir.load_config(folder), root / f"{system}_again")
        return
    held = {
        leaf.split("/")[1] for leaf in tiny_runs.leaves(folder, 4) if leaf.startswith("params/")
    }
    assert held == set(trains)
    first, last = (checkpoint.load_subtree(folder / "checkpoints" / s, "params")[0] for s in "24")
    changed = {k: any(map(np.any, _differences(first[k], last[k]))) for k in trains}
    assert all(changed.values())
    assert (folder / "backbone").is_dir() == (BACKBONE in trains)
    if BACKBONE in trains:
        _, left, _ = weights.load_backbone(folder / "backbone")
        assert not any(map(np.any, _differences(left, last["backbone"])))


def _differences(first: Any, second: Any) -> list[np.ndarray]:
    return jax.tree.leaves(jax.tree.map(lambda x, y: np.asarray(x) != np.asarray(y), first, second))


@pytest.mark.parametrize(
    "system",
    [
        *tiny_runs.marked(SYSTEMS),
        "concat:tk_instruct",
        pytest.param("hyper_lora:tk_instruct", marks=pytest.mark.slow),
        pytest.param("hyper_prefix:metaicl", marks=pytest.mark.slow),
    ],
)
def test_predict_equals_evaluate(root: Path, system: str, tmp_path: Path) -> None:
    evaluated(root, system)
    (step,) = (trained(root, system) / "eval").iterdir()
    lines = (step / "predictions.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines]
    assert len(expected) == 6
    rows = [{"input": r["input"], "adapter": r["task"]} for r in expected]
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict_files.predict(
        rows_file,
        tmp_path / "out.jsonl",
        predictor.GenerationConfig(batch=4, max_decode_length=4),
        backbone=backbone_of(root, system),
        adapters=adapted(root, system),
    )
    predicted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["output"] for row in predicted] == [row["prediction"] for row in expected]
    assert any(row["output"] for row in predicted)


@every_system
def test_export_to_peft_or_a_refusal(root: Path, system: str, tmp_path: Path) -> None:
    reason = [words for words, systems in REFUSED.items() if system in systems]
    folder, backbone = adapted(root, system)[0], backbone_of(root, system)
    task = root / "sni" / "tasks" / f"{tiny_runs.HELD_OUT[0]}.json"
    if reason:
        with pytest.raises(UserError, match=reason[0]):
            export.export(folder, tmp_path / "peft", "peft", backbone)
        with pytest.raises(UserError, match=reason[0]):
            predictor.adapt(runs.open(trained(root, system)), task, tmp_path / "other", "peft")
        assert not (tmp_path / "peft").exists()
        return
    exported = export.export(folder, tmp_path / "peft", "peft", backbone)
    assert (exported / "adapter_config.json").is_file()
    predictor.adapt(runs.open(trained(root, system)), task, tmp_path / "other", "peft")


@every_system
def test_adapters_differ_by_task(root: Path, system: str) -> None:
    """Systems that read no text emit the same for every task."""
    (adapters, meta, hyper), (other_adapters, other_meta, _) = (
        export.native.load(f) for f in adapted(root, system)
    )
    same = not any(map(np.any, _differences(adapters.tree, other_adapters.tree)))
    assert same == system.startswith(("shared_", "none", "concat", "hyperdecoder"))
    assert ("text" in meta) == (meta.get("text") != other_meta.get("text"))
    assert ("text" in meta) == (SYSTEMS[system].layout.in_inputs)
    assert (hyper is not None) == (system == "hyperdecoder")


def test_per_task_adapters_are_for_known_tasks_alone(root: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "task9_other.json"
    stranger.write_text(json.dumps(tiny_runs.sni_task("task9_other")))
    with pytest.raises(UserError, match="task9_other: task_lora has adapters of the 2 tasks"):
        predictor.adapt(runs.open(trained(root, "task_lora")), stranger, tmp_path / "out")
    config = workdir.load_config(trained(root, "task_lora"))
    config.adapter.task_slots = 1
    with pytest.raises(UserError, match=r"adapter.task_slots=1, but there are 2 tasks"):
        tiny_runs.run(config, tmp_path / "run")
    config.adapter.task_slots = 0
    with pytest.raises(UserError, match=r"adapter.task_slots=0: task_lora keeps adapters for each"):
        tiny_runs.run(config, tmp_path / "run2")


def test_hyperdecoder_on_glue_without_conditioning(root: Path, tmp_path: Path) -> None:
    """A Hyperdecoder as published: GLUE in its text format, and no text in front of it."""
    for split, rows in (("train", 4), ("validation", 3)):
        for task in ("rte", "cola"):
            names = ("sentence1", "sentence2") if task == "rte" else ("sentence",)
            data = [
                {**dict.fromkeys(names, f"a b {'cdef'[i]}"), "label": i % 2} for i in range(rows)
            ]
            file = tmp_path / "glue" / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in data))
    config = tiny_runs.make_config(
        system="hyperdecoder",
        backbone__path=str(root / "backbone"),
        data__mixture="glue",
        data__glue_dir=str(tmp_path / "glue"),
        data__on_missing_task="skip",
        data__use_instruction=False,
        data__shots=(0, 0),
        data__hyper_length=1,
        data__input_length=40,
        eval__shots=0,
    )
    batch = pipeline.make_sampler(config, tiny_runs.vocabulary(), CONCAT).batch(0)
    assert (
        tiny_runs.vocabulary()
        .decode(batch["inputs"][0, 0].tolist())
        .startswith(("rte sen", "cola"))
    )
    tiny_runs.run(config, tmp_path / "run")
    report = evaluate.evaluate_workdir(tmp_path / "run")["splits"]["validation"]
    assert report["rows"] == 6
    (tmp_path / "any.json").write_text(json.dumps({"instruction": "not read", "examples": []}))
    predictor.adapt(runs.open(tmp_path / "run"), tmp_path / "any.json", tmp_path / "adapter")
    (step,) = (tmp_path / "run" / "eval").iterdir()
    expected = [json.loads(x) for x in (step / "predictions.jsonl").read_text().splitlines()]
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text("".join(json.dumps({"input": row["input"]}) + "\n" for row in expected))
    options = predictor.GenerationConfig(max_decode_length=4)
    folders = [tmp_path / "adapter"]
    predict_files.predict(
        rows_file, tmp_path / "out", options, backbone=root / "backbone", adapters=folders
    )
    outputs = [json.loads(line)["output"] for line in (tmp_path / "out").read_text().splitlines()]
    assert outputs == [row["prediction"] for row in expected]


# ------------------------------------------------------------------------- new systems, stages


class Seventh(nn.Module):
    """A system that the package does not know: one row of memory, the mean of the text's ids."""

    config: t5.T5Config

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed",))
        table = self.param("table", init, (self.config.emb_dim,))
        states = (jnp.mean(ids, -1)[:, None] * table)[None, :, None]
        tree = {ad.MEMORY: {"states": states, "mask": jnp.ones(states.shape[:3], bool)}}
        return ad.Adapters(tree, ad.AdapterSpec(memory=1))


def test_a_new_system_is_a_file_and_a_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seventh = System(
        "seventh",
        "Seventh",
        "generated",
        lambda config, sizes: Seventh(sizes),
        ("hypermodel",),
        options={"width": 3},
    )
    monkeypatch.setitem(SYSTEMS, "seventh", seventh)
    for name in ("mtf", "hyperpretrain", "quickstart"):
        config = config_lib.load(f"configs/{name}.py:system=seventh", ["backbone.path=somewhere"])
        config_lib.validate(config)
        assert (config.system, config.seventh.width) == ("seventh", 3)
    evaluated(root, "seventh")
    test_checkpoints_hold_what_a_system_trains(root, "seventh")
    test_predict_equals_evaluate(root, "seventh", tmp_path)
    test_adapters_differ_by_task(root, "seventh")


def test_a_system_is_at_most_150_lines(repo_root: Path) -> None:
    files = list((repo_root / "hyper_t5" / "hypermodels").glob("*.py"))
    assert len(files) >= 8
    for file in files:
        if file.stem != "__init__":  # the registry
            assert len(file.read_text().splitlines()) <= 150, file.name


def test_a_generator_of_another_size_is_refused(root: Path, tmp_path: Path) -> None:
    _, meta, hyper = export.native.load(adapted(root, "hyperdecoder")[0])
    meta["config"]["hyperdecoder"]["generator_size"] = 7
    none = ad.Adapters({}, ad.AdapterSpec())
    folder = export.native.save(tmp_path / "other", none, meta, hyper)
    with pytest.raises(UserError, match=r"other: decoder_generator/.* of its hypermodel is"):
        export.export(folder, tmp_path / "out", "merged", root / "backbone")
    config = workdir.load_config(trained(root, "fid_icl"))
    config.hypermodel.path = str(tmp_path)
    with pytest.raises(UserError, match=r"hypermodel\.path: system=fid_icl trains no hypermodel"):
        tiny_runs.run(config, tmp_path / "run")


def test_a_folder_with_old_field_names_loads(root: Path, tmp_path: Path) -> None:
    adapters, meta, hyper = export.native.load(adapted(root, "hyperdecoder")[0])
    for section, old, new in (("eval", "how", "method"), ("data", "encoding", "template")):
        meta["config"][section][old] = meta["config"][section].pop(new)
    folder = export.native.save(tmp_path / "old", adapters, meta, hyper)
    predictor.load_with(root / "backbone", [folder])
    exported = export.export(folder, tmp_path / "exported", "native", root / "backbone")
    assert export.native.load(exported)[1] == meta


@pytest.mark.parametrize(
    "system", [pytest.param("hint", marks=pytest.mark.slow), "hyper_prefix_plus"]
)
def test_second_stage_loads_backbone_and_hypermodel(
    root: Path, tmp_path: Path, system: str
) -> None:
    """Where the backbone is trained too, both are loaded from the first stage."""
    fields = {"system": system, "data__sni_dir": str(root / "sni"), "train__steps": 2}
    fields |= {"adapter__bottleneck_sizes": (3,), "adapter__prefix_sites": ("enc_self",)}
    three = {"data__text_split": "three_way", "data__chunk_length": 24, "data__input_length": 24}
    three |= {"data__target_length": 24, "stage": "hyperpretrain"}
    first = tiny_runs.make_config(backbone__path=str(root / "backbone"), **fields, **three)
    tiny_runs.run(first, tmp_path / "first")
    both = {"backbone__path": str(tmp_path / "first"), "hypermodel__path": str(tmp_path / "first")}
    second = tiny_runs.make_config(**fields, **both)
    _, _, begun, _ = runs.init_run(second)
    left, _ = checkpoint.load_subtree(tmp_path / "first", "params")
    assert not any(map(np.any, _differences(begun, left)))
    tiny_runs.run(second, tmp_path / "second")
    opened = runs.open(tmp_path / "second")
    m, params = opened.model, opened.params
    assert model.trained_parameters(m, params) == model.count_parameters(left)
    assert any(map(np.any, _differences(params, left)))
