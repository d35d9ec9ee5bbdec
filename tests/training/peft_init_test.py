"""Stage peft: initial adapters of each task; only adapters are tuned."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import cli, pipeline, runs, weights
from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import checkpoint
from hyper_t5.data import episodes
from hyper_t5.evaluation import evaluate
from hyper_t5.export import native
from hyper_t5.inference import predictor
from hyper_t5.runs import Run
from hyper_t5.training import peft_init, step
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import Override
from tests.support import tiny_runs

EVALUATED = 3  # rows of each task; the other three are trained on


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a backbone, tasks, and runs as if trained."""
    folder = tmp_path_factory.mktemp("tuning")
    tiny_runs.save_backbone(folder / "backbone")
    tiny_runs.save_sni(folder / "sni")
    for name, more in {
        "hyper_lora": {},
        "hyper_prefix": {},
        "shared_lora": {},
        "hyper_prefix_queries": {
            "system": "hyper_prefix",
            "hypermodel__reader": "decoder_queries",
            "adapter__prefix_sites": ("enc_self", "dec_self"),
        },
    }.items():
        tiny_runs.untrained_run(_config(folder, **{"system": name, **more}), folder / name)
    return folder


def _config(root: Path, **fields: Any) -> Any:
    return tiny_runs.make_config(
        **{
            "backbone__path": str(root / "backbone"),
            "data__sni_dir": str(root / "sni"),
            "data__shots": (1, 1),
            "adapter__lora_bias": True,
            "eval__max_rows_per_task": EVALUATED,
            **fields,
        }
    )


def _tuned(init: Path, *more: str, **fields: Any) -> Any:
    """Load configs/peft.py for this init, with a few steps."""
    small = {"train.steps": 4, "train.log_every": 2, "train.save_every": 2, "mesh.data": 1}
    overrides = [Override(k, repr(v), "test") for k, v in (small | fields).items()]
    argument = ",".join([f"init={init}", *more])
    config = config_lib.load(f"configs/peft.py:{argument}", overrides)
    config_lib.validate(config)
    return config


def _at_start(config: Any) -> tuple[Any, Any, Any, Any]:
    m, backbone, trained, frozen = runs.init_run(config)
    return m, backbone, peft_init.init_adapters(config, m, backbone, trained), frozen


def _predictions(config: Any, m: Any, backbone: Any, params: Any, names: Any = ()) -> list[Any]:
    return evaluate.evaluate(Run("", config, m, backbone, params, tasks=tuple(names)))[1]


@pytest.mark.parametrize(
    "name",
    [
        "hyper_lora",
        "hyper_prefix",
        pytest.param("hyper_prefix_queries", marks=pytest.mark.slow),
    ],
)
def test_initial_adapters_are_the_generated_ones(root: Path, name: str) -> None:
    config = _tuned(root / name)
    m, backbone, trained, frozen = _at_start(config)
    assert m.system.name == ("task_lora" if name == "hyper_lora" else "task_prefix")
    expected = evaluate.evaluate(runs.open(root / name))[1]
    assert _predictions(config, m, backbone, {**frozen, **trained}, tiny_runs.HELD_OUT) == expected
    plain = _predictions(
        config, m, backbone, {**frozen, **runs.init_run(config)[2]}, tiny_runs.HELD_OUT
    )
    assert [row["prediction"] for row in plain] != [row["prediction"] for row in expected]
    # Each task has its own adapters, bit for bit.
    emitted = m.adapters({**frozen, **trained}, np.ones((2, 4), int), np.array([1, 0]))
    loaded = peft_init.load_adapters(str(root / name), config, backbone)
    for leaf, expected_leaf in zip(*map(jax.tree.leaves, (emitted.tree, loaded.tree)), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(expected_leaf)[:, ::-1])
        assert leaf.dtype == bool or np.any(expected_leaf[:, 0] != expected_leaf[:, 1])


def test_a_shared_adapter_is_the_start_of_every_task(root: Path) -> None:
    config = _tuned(root / "shared_lora", "start=shared")
    _, _, trained, _ = _at_start(config)
    shared, _ = checkpoint.load_subtree(root / "shared_lora", "params/hypermodel")
    for name, value in trained["hypermodel"].items():
        for task in range(2):
            np.testing.assert_array_equal(value[:, task], shared[name])


def test_random_initialization_is_pefts(root: Path) -> None:
    config = _tuned(root / "hyper_lora", "start=random")
    assert config.peft.init == ""
    params = runs.init_run(config)[2]["hypermodel"]
    a, b = params["enc_self.query.a"], params["enc_self.query.b"]
    width = tiny_runs.SIZES.emb_dim
    assert not np.any(b)
    # Kaiming-uniform with slope sqrt(5): uniform within 1/sqrt(inputs).
    assert 0.95 < np.abs(a).max() * width**0.5 <= 1
    assert 0.9 < np.std(a) * (3 * width) ** 0.5 < 1.1
    config = _tuned(root / "hyper_prefix_queries", "start=random")
    key = runs.init_run(config)[2]["hypermodel"]["dec_self.prefix.key"]
    assert 0.9 < np.std(key) < 1.1
    assert config.adapter.prefix_sites == ("enc_self", "dec_self")


def test_tuning_learns_and_only_adapters_change(root: Path, tmp_path: Path) -> None:
    fields = {"train.steps": 12, "train.log_every": 12, "train.save_every": 6}
    before = weights.digest(weights.load_backbone(root / "backbone")[1])
    config = _tuned(root / "hyper_prefix", **{**fields, "optimizer.learning_rate": 0.05})
    m, backbone, first, frozen = _at_start(config)
    tasks = pipeline.load_peft_tasks(config, backbone.vocab)
    batch = episodes.EpisodeSampler(tasks, backbone.vocab, config.data, 0).batch(99)
    tiny_runs.run(config, tmp_path / "run")
    assert checkpoint.read_meta(tmp_path / "run")["tasks"] == list(tiny_runs.HELD_OUT)
    last, _ = checkpoint.load_subtree(tmp_path / "run", "params")
    losses = [step.loss_sums(m, p, frozen, batch, None)[0] for p in (first, last)]
    assert losses[1] < 0.9 * losses[0]
    # The checkpoint holds adapters and their optimizer, and nothing of the backbone.
    leaves = tiny_runs.leaves(tmp_path / "run", 12)
    assert {k.split("/")[1] for k in leaves if k.startswith("params/")} == {"hypermodel"}
    sizes = {tuple(leaf["shape"][2:]) for leaf in leaves.values()}
    assert sizes <= {(), *(x.shape[2:] for x in jax.tree.leaves(first))}
    assert weights.digest(weights.load_backbone(root / "backbone")[1]) == before
    # Masked slots stay masked; the masks are the only leaves that do not change.
    for name, value in last["hypermodel"].items():
        same = np.array_equal(value, first["hypermodel"][name])
        assert same == name.endswith("mask")
    assert not np.all(last["hypermodel"]["enc_self.prefix.mask"])
    for name in ("key", "value"):  # a masked slot has no gradient either
        moved = (
            last["hypermodel"][f"enc_self.prefix.{name}"]
            != first["hypermodel"][f"enc_self.prefix.{name}"]
        )
        out = last["hypermodel"]["enc_self.prefix.mask"][:, :2] == 0
        assert not moved[:, :2][out].any()


@pytest.mark.slow
def test_resume_is_bit_exact(root: Path, tmp_path: Path) -> None:
    config = _tuned(root / "hyper_lora")
    tiny_runs.run(config, tmp_path / "whole")
    again = tiny_runs.part_of(tmp_path / "whole", tmp_path / "again", 2)
    tiny_runs.run(config, again)
    assert tiny_runs.leaves(again, 4) == tiny_runs.leaves(tmp_path / "whole", 4)


# ------------------------------------------------------------------------------ a task file


@pytest.fixture(scope="module")
def task(root: Path) -> Path:
    pairs = [{"input": f"{x} {y}", "output": x} for x in "abcd" for y in "efgh"]
    file = root / "mine.json"
    file.write_text(json.dumps({"instruction": "Give the first letter.", "examples": pairs}))
    return file


def test_a_task_file_from_the_command_line(root: Path, task: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    argument = f"configs/peft.py:init={root / 'hyper_lora'},task={task}"
    small = ["--gin.train.steps=2", "--gin.mesh.data=1", "--gin.eval.batch=8"]
    assert cli.main(["train", f"--config={argument}", f"--workdir={run}", *small]) == 0
    assert cli.main(["adapt", f"--workdir={run}", f"--task={task}", f"--out={tuned}"]) == 0
    adapters, meta, _ = native.load(tuned)
    assert adapters.num_tasks == 1
    assert meta["system"] == "task_lora"
    assert adapters.spec == _spec(root / "hyper_lora")
    assert evaluate.evaluate_workdir(run)["splits"]["test"]["rows"] == 8
    peft = tmp_path / "peft"
    argv = ["export", f"--adapter={tuned}", f"--backbone={root / 'backbone'}", f"--out={peft}"]
    assert cli.main([*argv, "--format=peft"]) == 0
    # The tuned folder can be a start too.
    fields = {"backbone.path": str(root / "backbone")}
    config = _tuned(tuned, f"task={task}", **fields)
    trained = _at_start(config)[2]["hypermodel"]
    last, _ = checkpoint.load_subtree(run, "params/hypermodel")
    assert all(np.array_equal(trained[name], last[name]) for name in last)
    _, backbone, _, _ = runs.init_run(config)
    names = [t.name for t in pipeline.load_peft_tasks(config, backbone.vocab)]
    assert names == ["mine"]


def _spec(run: Path) -> ad.AdapterSpec:
    emitted = runs.open(run).model.hypermodel
    assert emitted is not None
    return emitted.spec


def test_initial_adapters_equal_those_of_adapt(root: Path, task: Path, tmp_path: Path) -> None:
    """The text has no examples: those that `adapt` shows may be evaluated rows here."""
    run = tmp_path / "zero_shot"
    shutil.copytree(root / "hyper_lora", run)
    config = config_lib.from_json((run / "config.json").read_text())
    config.data.shots = (0, 0)
    (run / "config.json").write_text(config_lib.to_json(config))
    adapted, _, _ = native.load(predictor.adapt(runs.open(run), task, tmp_path / "adapter"))
    tuned = _tuned(run, f"task={task}")
    _, backbone, _, _ = runs.init_run(tuned)
    loaded = peft_init.load_adapters(str(run), tuned, backbone)
    for leaf, expected in zip(*map(jax.tree.leaves, (adapted.tree, loaded.tree)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7)


def test_files_of_several_tasks(root: Path, task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    shutil.copy(task, folder / "b.json")
    (folder / "a.json").write_text(json.dumps(tiny_runs.sni_task("a", rows=12)))
    config = _tuned(root / "hyper_lora", f"task={folder}")
    assert config.adapter.task_slots == 2
    _, backbone, _, _ = runs.init_run(config)
    tasks = pipeline.load_peft_tasks(config, backbone.vocab)
    assert [(t.name, len(t.rows)) for t in tasks] == [("a", 4), ("b", 8)]


# ---------------------------------------------------------------------------------- mistakes


def _refused(config: Any) -> str:
    m, backbone, trained, _ = runs.init_run(config)
    with pytest.raises(UserError) as error:
        peft_init.init_adapters(config, m, backbone, trained)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_spec_is_refused(root: Path) -> None:
    init = root / "hyper_lora"
    assert "its lora has rank=2, this run 3; take sizes" in _refused(
        _tuned(init, **{"adapter.lora_rank": 3})
    )
    assert "its lora has bias=True, this run False" in _refused(
        _tuned(init, **{"adapter.lora_bias": False})
    )
    assert "it has lora, and this run tunes no lora" in _refused(_tuned(init, system="task_prefix"))
    masked = root / "hyper_prefix"
    assert "its prefixes have masked slots" in _refused(
        _tuned(masked, **{"adapter.prefix_mask": False})
    )


def test_another_backbone_is_refused(root: Path, task: Path, tmp_path: Path) -> None:
    other = tiny_runs.save_backbone(tmp_path / "other", seed=1)
    folder = predictor.adapt(runs.open(root / "hyper_lora"), task, tmp_path / "adapter")
    wide = tiny_runs.save_backbone(tmp_path / "wide", sizes=tiny_runs.replace(mlp_dim=32))
    for init in (root / "hyper_lora", folder):
        fields = {"backbone.path": str(other)}
        message = _refused(_tuned(init, f"task={task}", **fields))
        assert "other weights" in message
        assert str(init) in message
        fields = {"backbone.path": str(wide)}
        assert "mlp_dim=24" in _refused(_tuned(init, f"task={task}", **fields))


def test_other_tasks_are_refused(root: Path, task: Path, tmp_path: Path) -> None:
    config = _tuned(root / "hyper_lora", **{"adapter.task_slots": 1})
    assert "adapter.task_slots=1, but there are 2 tasks" in _refused(config)
    # A folder of three tasks' adapters is not for two.
    adapters, meta, _ = native.load(
        predictor.adapt(runs.open(root / "hyper_lora"), task, tmp_path / "one")
    )
    three = native.save(tmp_path / "three", ad.take(adapters, [0, 0, 0]), meta)
    config = _tuned(root / "hyper_lora", **{"peft.init": str(three)})
    assert "holds adapters of 3 tasks, and this run tunes 2" in _refused(config)


@pytest.mark.slow
def test_a_tuned_run_is_the_start_of_its_own_tasks_alone(
    root: Path, task: Path, tmp_path: Path
) -> None:
    tiny_runs.run(_tuned(root / "hyper_lora"), tmp_path / "first")
    again = _tuned(tmp_path / "first", "start=tuned", f"task={task}")
    assert "task mine: task_lora has adapters of the 2 tasks" in _refused(again)
    config = _tuned(tmp_path / "first", "start=tuned")
    trained = _at_start(config)[2]["hypermodel"]
    last, _ = checkpoint.load_subtree(tmp_path / "first", "params/hypermodel")
    assert all(np.array_equal(trained[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("init={root}/no", "init={root}/no: neither the workdir of a run nor a native adapter"),
        ("init={root}/hyper_lora,start=shared", "holds is generated"),
        ("init={root}/hyper_lora,system=task_prefix", "is of task_lora; leave it"),
        ("init={root}/hyper_lora,mixture=p3", "decides it; leave it"),
        ("init={root}/hyper_lora,task={root}/no.json", "no such task file"),
        ("start=generated", "start=generated needs init=DIR"),
        ("start=generatd", "the nearest is 'generated'"),
    ],
)
def test_arguments_that_contradict(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    argv = ["train", f"--config=configs/peft.py:{argument.format(root=root)}"]
    line = tiny_runs.fails(capsys, *argv, f"--workdir={tmp_path / 'run'}")
    assert message.format(root=root) in line
    assert not (tmp_path / "run").exists()


def test_init_is_for_this_stage_alone(root: Path) -> None:
    config = _config(root, system="hyper_lora")
    config.peft.init = str(root / "hyper_lora")
    with pytest.raises(UserError, match=r"peft\.init is the start of each task"):
        config_lib.validate(config)
    config = _tuned(root / "hyper_lora")
    config.hypermodel.path = str(root / "hyper_lora")
    with pytest.raises(UserError, match="a run starts once"):
        config_lib.validate(config)


def test_systems_that_emit_nothing_tunable_are_refused(root: Path, tmp_path: Path) -> None:
    for system, message in {"none": "emits no task adapters", "cached": "memory"}.items():
        folder = tmp_path / system
        folder.mkdir()
        config = _config(root, system=system)
        (folder / "config.json").write_text(config_lib.to_json(config))
        with pytest.raises(UserError, match=message):
            peft_init.config_for(str(folder))


def test_several_ranks_are_refused(root: Path, task: Path, tmp_path: Path) -> None:
    adapters, meta, _ = native.load(
        predictor.adapt(runs.open(root / "hyper_lora"), task, tmp_path / "adapter")
    )
    assert adapters.spec.lora is not None
    lora = dataclasses.replace(adapters.spec.lora, rank_pattern=(("enc_self.query", 2),))
    native.save(tmp_path / "patterned", ad.Adapters(adapters.tree, ad.AdapterSpec(lora=lora)), meta)
    with pytest.raises(UserError, match="has a rank_pattern or alpha_pattern"):
        peft_init.config_for(str(tmp_path / "patterned"))


def test_default_sizes_are_the_baselines() -> None:
    config = config_lib.load("configs/peft.py:system=task_prefix,size=base", ["backbone.path=x"])
    config_lib.validate(config)
    assert (config.stage, config.peft.init, config.model.emb_dim) == ("peft", "", 768)
    assert config.adapter.task_slots == 128
