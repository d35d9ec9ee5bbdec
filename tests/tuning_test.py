"""Stage peft: where the adapters of each task start, and that nothing else is tuned."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import runs
from hyper_t5 import adapters as ad
from hyper_t5 import checkpoint, cli, data, evaluate, model, serve, train, tuning, weights
from hyper_t5 import config as config_lib
from hyper_t5.errors import UserError
from hyper_t5.overrides import Override

JUDGED = 3  # rows of each task; the other three are trained on


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, tasks, and runs that are as if trained: what emits adapters."""
    folder = tmp_path_factory.mktemp("tuning")
    runs.save_backbone(folder / "backbone")
    runs.save_sni(folder / "sni")
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
        runs.untrained_run(_config(folder, **{"system": name, **more}), folder / name)
    return folder


def _config(root: Path, **fields: Any) -> Any:
    return runs.make_config(
        **{
            "backbone__path": str(root / "backbone"),
            "data__sni_dir": str(root / "sni"),
            "data__shots": (1, 1),
            "adapter__lora_bias": True,
            "eval__max_rows_per_task": JUDGED,
            **fields,
        }
    )


def _tuned(init: Path, *more: str, **fields: Any) -> Any:
    """The config of configs/peft.py for what is there, made small."""
    small = {"train.steps": 4, "train.log_every": 2, "train.save_every": 2, "mesh.data": 1}
    overrides = [Override(k, repr(v), "test") for k, v in (small | fields).items()]
    argument = ",".join([f"init={init}", *more])
    config = config_lib.load(f"configs/peft.py:{argument}", overrides)
    config_lib.validate(config)
    return config


def _at_start(config: Any) -> tuple[Any, Any, Any, Any]:
    m, backbone, trained, frozen = model.start(config)
    return m, backbone, tuning.start(config, m, backbone, trained), frozen


def _predictions(config: Any, m: Any, backbone: Any, params: Any, names: Any = ()) -> list[Any]:
    return evaluate.evaluate(config, m, backbone, params, names)[1]


@pytest.mark.parametrize(
    "name",
    [
        "hyper_lora",
        "hyper_prefix",
        pytest.param("hyper_prefix_queries", marks=pytest.mark.slow),
    ],
)
def test_it_starts_as_what_the_hypermodel_makes(root: Path, name: str) -> None:
    config = _tuned(root / name)
    m, backbone, trained, frozen = _at_start(config)
    assert m.system == ("task_lora" if name == "hyper_lora" else "task_prefix")
    expected = _predictions(*model.load_run(root / name))
    assert _predictions(config, m, backbone, {**frozen, **trained}, runs.HELD_OUT) == expected
    plain = _predictions(config, m, backbone, {**frozen, **model.start(config)[2]}, runs.HELD_OUT)
    assert [row["prediction"] for row in plain] != [row["prediction"] for row in expected]
    # Each task's are its own, and the logits agree to the last bit that a batch allows.
    made = m.adapters({**frozen, **trained}, np.ones((2, 4), int), np.array([1, 0]))
    found = tuning.adapters_of(str(root / name), config, backbone)
    for one, other in zip(*map(jax.tree.leaves, (made.tree, found.tree)), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other)[:, ::-1])
        assert one.dtype == bool or np.any(other[:, 0] != other[:, 1])


def test_a_shared_adapter_is_the_start_of_every_task(root: Path) -> None:
    config = _tuned(root / "shared_lora", "start=shared")
    _, _, trained, _ = _at_start(config)
    shared, _ = checkpoint.load_subtree(root / "shared_lora", "params/hypermodel")
    for name, value in trained["hypermodel"].items():
        for task in range(2):
            np.testing.assert_array_equal(value[:, task], shared[name])


def test_random_starts_are_pefts(root: Path) -> None:
    config = _tuned(root / "hyper_lora", "start=random")
    assert config.peft.init == ""
    params = model.start(config)[2]["hypermodel"]
    a, b = params["enc_self.query.a"], params["enc_self.query.b"]
    width = runs.SIZES.emb_dim
    assert not np.any(b)
    # Kaiming-uniform with slope sqrt(5): uniform within 1/sqrt(inputs).
    assert 0.95 < np.abs(a).max() * width**0.5 <= 1
    assert 0.9 < np.std(a) * (3 * width) ** 0.5 < 1.1
    config = _tuned(root / "hyper_prefix_queries", "start=random")
    key = model.start(config)[2]["hypermodel"]["dec_self.prefix.key"]
    assert 0.9 < np.std(key) < 1.1
    assert config.adapter.prefix_sites == ("enc_self", "dec_self")


def test_tuning_learns_and_only_adapters_change(root: Path, tmp_path: Path) -> None:
    fields = {"train.steps": 12, "train.log_every": 12, "train.save_every": 6}
    before = weights.digest(weights.load_backbone(root / "backbone")[1])
    config = _tuned(root / "hyper_prefix", **{**fields, "optimizer.learning_rate": 0.05})
    m, backbone, first, frozen = _at_start(config)
    tasks = data.load_peft_tasks(config, backbone.vocab)
    batch = data.EpisodeSampler(tasks, backbone.vocab, config.data, 0).batch(99)
    runs.run(config, tmp_path / "run")
    assert checkpoint.read_meta(tmp_path / "run")["tasks"] == list(runs.HELD_OUT)
    last, _ = checkpoint.load_subtree(tmp_path / "run", "params")
    losses = [train.loss_sums(m, p, frozen, batch, None)[0] for p in (first, last)]
    assert losses[1] < 0.9 * losses[0]
    # What lies on disk: adapters and their optimizer, and nothing of the backbone.
    leaves = runs.leaves(tmp_path / "run", 12)
    assert {k.split("/")[1] for k in leaves if k.startswith("params/")} == {"hypermodel"}
    sizes = {tuple(leaf["shape"][2:]) for leaf in leaves.values()}
    assert sizes <= {(), *(x.shape[2:] for x in jax.tree.leaves(first))}
    assert weights.digest(weights.load_backbone(root / "backbone")[1]) == before
    # Slots that the start leaves out stay out, and are the only leaves without a change.
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
def test_it_goes_on_bit_by_bit(root: Path, tmp_path: Path) -> None:
    config = _tuned(root / "hyper_lora")
    runs.run(config, tmp_path / "whole")
    again = runs.part_of(tmp_path / "whole", tmp_path / "again", 2)
    runs.run(config, again)
    assert runs.leaves(again, 4) == runs.leaves(tmp_path / "whole", 4)


# ------------------------------------------------------------------------------ one's own task


@pytest.fixture(scope="module")
def task(root: Path) -> Path:
    pairs = [{"input": f"{x} {y}", "output": x} for x in "abcd" for y in "efgh"]
    file = root / "mine.json"
    file.write_text(json.dumps({"instruction": "Give the first letter.", "examples": pairs}))
    return file


def test_ones_own_task_from_the_command_line(root: Path, task: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    argument = f"configs/peft.py:init={root / 'hyper_lora'},task={task}"
    small = ["--gin.train.steps=2", "--gin.mesh.data=1", "--gin.eval.batch=8"]
    assert cli.main(["train", f"--config={argument}", f"--workdir={run}", *small]) == 0
    assert cli.main(["adapt", f"--workdir={run}", f"--task={task}", f"--out={tuned}"]) == 0
    made, meta, _ = ad.load(tuned)
    assert made.num_tasks == 1
    assert meta["system"] == "task_lora"
    assert made.spec == _spec(root / "hyper_lora")
    assert evaluate.evaluate_workdir(run)["splits"]["test"]["rows"] == 8
    peft = tmp_path / "peft"
    argv = ["export", f"--adapter={tuned}", f"--backbone={root / 'backbone'}", f"--out={peft}"]
    assert cli.main([*argv, "--format=peft"]) == 0
    # And on from there: the folder is a start like any other.
    fields = {"backbone.path": str(root / "backbone")}
    config = _tuned(tuned, f"task={task}", **fields)
    trained = _at_start(config)[2]["hypermodel"]
    last, _ = checkpoint.load_subtree(run, "params/hypermodel")
    assert all(np.array_equal(trained[name], last[name]) for name in last)
    _, backbone, _, _ = model.start(config)
    names = [t.name for t in data.load_peft_tasks(config, backbone.vocab)]
    assert names == ["mine"]


def _spec(run: Path) -> ad.AdapterSpec:
    emitted = model.load_run(run)[1].hypermodel
    assert emitted is not None
    return emitted.spec


def test_the_start_is_what_adapt_makes(root: Path, task: Path, tmp_path: Path) -> None:
    """Of a text that says no example: those that `adapt` shows may be judged rows here."""
    run = tmp_path / "zero_shot"
    shutil.copytree(root / "hyper_lora", run)
    config = config_lib.from_json((run / "config.json").read_text())
    config.data.shots = (0, 0)
    (run / "config.json").write_text(config_lib.to_json(config))
    made, _, _ = ad.load(serve.adapt(run, task, tmp_path / "adapter"))
    tuned = _tuned(run, f"task={task}")
    _, backbone, _, _ = model.start(tuned)
    found = tuning.adapters_of(str(run), tuned, backbone)
    for one, other in zip(*map(jax.tree.leaves, (made.tree, found.tree)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_files_of_several_tasks(root: Path, task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    shutil.copy(task, folder / "b.json")
    (folder / "a.json").write_text(json.dumps(runs.sni_task("a", rows=12)))
    config = _tuned(root / "hyper_lora", f"task={folder}")
    assert config.adapter.task_slots == 2
    _, backbone, _, _ = model.start(config)
    tasks = data.load_peft_tasks(config, backbone.vocab)
    assert [(t.name, len(t.rows)) for t in tasks] == [("a", 4), ("b", 8)]


# ---------------------------------------------------------------------------------- mistakes


def _refused(config: Any) -> str:
    m, backbone, trained, _ = model.start(config)
    with pytest.raises(UserError) as error:
        tuning.start(config, m, backbone, trained)
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
    assert "has lora, and this run tunes no such" in _refused(_tuned(init, system="task_prefix"))
    masked = root / "hyper_prefix"
    assert "its prefixes leave slots out" in _refused(
        _tuned(masked, **{"adapter.prefix_mask": False})
    )


def test_another_backbone_is_refused(root: Path, task: Path, tmp_path: Path) -> None:
    other = runs.save_backbone(tmp_path / "other", seed=1)
    folder = serve.adapt(root / "hyper_lora", task, tmp_path / "adapter")
    wide = runs.save_backbone(tmp_path / "wide", sizes=runs.replace(mlp_dim=32))
    for init in (root / "hyper_lora", folder):
        fields = {"backbone.path": str(other)}
        found = _refused(_tuned(init, f"task={task}", **fields))
        assert "other weights" in found
        assert str(init) in found
        fields = {"backbone.path": str(wide)}
        assert "mlp_dim=24" in _refused(_tuned(init, f"task={task}", **fields))


def test_other_tasks_are_refused(root: Path, task: Path, tmp_path: Path) -> None:
    config = _tuned(root / "hyper_lora", **{"adapter.task_slots": 1})
    assert "adapter.task_slots=1, but there are 2 tasks" in _refused(config)
    # A folder of three tasks' adapters is not for two.
    one, meta, _ = ad.load(serve.adapt(root / "hyper_lora", task, tmp_path / "one"))
    three = ad.save(tmp_path / "three", ad.take(one, [0, 0, 0]), meta)
    config = _tuned(root / "hyper_lora", **{"peft.init": str(three)})
    assert "holds adapters of 3 tasks, and this run tunes 2" in _refused(config)


@pytest.mark.slow
def test_an_earlier_tuning_knows_its_own_tasks_alone(
    root: Path, task: Path, tmp_path: Path
) -> None:
    runs.run(_tuned(root / "hyper_lora"), tmp_path / "first")
    again = _tuned(tmp_path / "first", "start=tuned", f"task={task}")
    assert "task mine: task_lora has adapters for each task" in _refused(again)
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
    found = runs.fails(capsys, *argv, f"--workdir={tmp_path / 'run'}")
    assert message.format(root=root) in found
    assert not (tmp_path / "run").exists()


def test_init_is_of_this_stage_alone(root: Path) -> None:
    config = _config(root, system="hyper_lora")
    config.peft.init = str(root / "hyper_lora")
    with pytest.raises(UserError, match=r"peft\.init is where stage=peft starts"):
        config_lib.validate(config)
    config = _tuned(root / "hyper_lora")
    config.hypermodel.path = str(root / "hyper_lora")
    with pytest.raises(UserError, match="a run starts once"):
        config_lib.validate(config)


def test_what_makes_no_adapters_of_a_task(root: Path, tmp_path: Path) -> None:
    for system, message in {"none": "makes no adapters", "cached": "memory"}.items():
        place = tmp_path / system
        place.mkdir()
        config = _config(root, system=system)
        (place / "config.json").write_text(config_lib.to_json(config))
        with pytest.raises(UserError, match=message):
            tuning.settings_of(str(place))


def test_what_has_several_ranks_is_refused(root: Path, task: Path, tmp_path: Path) -> None:
    made, meta, _ = ad.load(serve.adapt(root / "hyper_lora", task, tmp_path / "adapter"))
    assert made.spec.lora is not None
    lora = dataclasses.replace(made.spec.lora, rank_pattern=(("enc_self.query", 2),))
    ad.save(tmp_path / "patterned", ad.Adapters(made.tree, ad.AdapterSpec(lora=lora)), meta)
    with pytest.raises(UserError, match="another rank or alpha in some places"):
        tuning.settings_of(str(tmp_path / "patterned"))


def test_from_nothing_it_is_the_baselines_sizes() -> None:
    config = config_lib.load("configs/peft.py:system=task_prefix,size=base", ["backbone.path=x"])
    config_lib.validate(config)
    assert (config.stage, config.peft.init, config.model.emb_dim) == ("peft", "", 768)
    assert config.adapter.task_slots == 128
