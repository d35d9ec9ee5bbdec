"""Training, both stages: what it learns, what it may not touch, and that nothing ends it badly."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

import runs
from hyper_t5 import checkpoint, cli, distributed, guard, model, train, watch, weights
from hyper_t5.errors import UserError
from hyper_t5.vocab import ByteVocabulary

STEPS = 6
DROPOUT = {
    "adamw": {"optimizer__name": "adamw"},
    "adafactor": {"optimizer__name": "adafactor", "optimizer__min_dim_size_to_factor": 8},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


@pytest.fixture(scope="module")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_sni(tmp_path_factory.mktemp("sni") / "official")


@pytest.fixture(scope="module")
def make(backbone: Path, sni: Path) -> Callable[..., ConfigDict]:
    """A config on this backbone and these tasks; the baseline of one adapter compiles fastest."""

    def make_config(**fields: Any) -> ConfigDict:
        here = {"backbone__path": str(backbone), "data__sni_dir": str(sni)}
        shorter = {"system": "shared_lora", "train__steps": STEPS, "train__save_every": 1}
        shorter |= {"adapter__lora_targets": ("enc_self.query", "dec_cross.value", "dec_mlp.wo")}
        return runs.make_config(**here | shorter | fields)

    return make_config


@pytest.fixture(scope="module")
def unbroken(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    runs.run(make(), folder)
    return folder


def files(folder: Path) -> dict[str, str]:
    """Path -> digest of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------------------- both stages


@pytest.mark.parametrize("system", ["concat", "hyper_prefix", "hyper_lora"])
def test_both_stages_on_the_embedded_suite(make: Any, tmp_path: Path, system: str) -> None:
    common: dict[str, Any] = {"system": system, "data__mixture": "synthetic"}
    common |= {"data__hyper_length": 72, "data__input_length": 8, "data__target_length": 8}
    common |= {"data__tasks_per_batch": 4, "optimizer__learning_rate": 3e-3}
    common |= {"train__steps": 30, "train__log_every": 15, "train__save_every": 30}
    first, second = tmp_path / "hyperpretrain", tmp_path / "mtf"
    runs.run(make(stage="hyperpretrain", **common), first)
    path = "backbone__path" if system == "concat" else "hypermodel__path"
    config = make(stage="mtf", **common | {path: str(first)})

    # What the second stage starts from is what the first one ended with, bit for bit.
    kind = "backbone" if system == "concat" else "hypermodel"
    _, _, started, _ = model.start(config)
    ended, _ = checkpoint.load_subtree(first, f"params/{kind}")
    jax.tree.map(np.testing.assert_array_equal, started[kind], ended)

    runs.run(config, second)
    for folder in (first, second):
        before, after = runs.lines(folder)
        assert after["loss"] < before["loss"]
        assert checkpoint.latest_step(folder) == 30
    assert before["data/episodes"] >= 60
    names = runs.leaves(second, 30)
    assert any(name.startswith(f"params/{kind}/") for name in names)
    if system != "concat":
        assert not any("backbone" in name for name in names)
    shutil.rmtree(first)  # a finished run needs nothing of the one it started from
    _, _, _, params = model.load_run(second)
    ended, _ = checkpoint.load_subtree(second, f"params/{kind}")
    jax.tree.map(np.testing.assert_array_equal, params[kind], ended)


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "hyper_prefix", "hypermodel__reader": "decoder_queries"},
        {"system": "hyper_prefix", "hypermodel__gist_tokens": 3},
        {"system": "hyper_lora", "hypermodel__reader": "decoder_queries"},
        {"system": "shared_prefix"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_other_system_learns(make: Any, tmp_path: Path, fields: dict[str, Any]) -> None:
    runs.run(make(train__steps=30, train__log_every=10, train__save_every=30, **fields), tmp_path)
    lines = runs.lines(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_frozen_weights_are_nowhere(make: Any, backbone: Path, tmp_path: Path) -> None:
    # Random, since a copy of the backbone is what the hypermodel starts from otherwise.
    config = make(system="hyper_lora", hypermodel__init="random", train__steps=2)
    before = files(backbone)
    runs.run(config, tmp_path)
    assert files(backbone) == before

    # As Orbax finds it on the disk, whatever our own record says.
    folder = tmp_path / "checkpoints" / "2" / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        found = orbax.metadata(folder.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
        tree = orbax.restore(folder.absolute(), restore_args=as_numpy)
        state = traverse_util.flatten_dict(tree, sep="/")
    assert set(state) == set(runs.leaves(tmp_path, 2))
    assert not [name for name in state if "backbone" in name]
    frozen = weights.load_backbone(backbone)[1]
    contents = {np.asarray(x).tobytes() for x in jax.tree.leaves(frozen)}
    assert not [name for name, x in state.items() if np.asarray(x).tobytes() in contents]
    assert not (tmp_path / "backbone").exists()
    # Two moments a parameter, and the counts: nothing else is in the optimizer's state.
    sizes = {name: np.size(x) for name, x in state.items()}
    trained = sum(size for name, size in sizes.items() if name.startswith("params/"))
    moments = sum(size for name, size in sizes.items() if name.startswith("opt_state/"))
    assert 2 * trained <= moments <= 2 * trained + 4


def test_gradients_reach_every_leaf_of_the_hypermodel(make: Any, tmp_path: Path) -> None:
    config = make(system="hyper_lora", train__steps=2, adapter__lora_bias=True)
    _, _, before, _ = model.start(config)
    runs.run(config, tmp_path)
    after, _ = checkpoint.load_subtree(tmp_path, "params")
    same = jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == b)), before, after)
    assert not [k for k, v in traverse_util.flatten_dict(same, sep="/").items() if v]


# ------------------------------------------------------------------------------- the step


def random_batch(rng: np.random.Generator, tasks: int = 4, rows: int = 2) -> dict[str, np.ndarray]:
    """Rows of very different lengths, so that a mean of means is not the mean."""
    batch = {"tasks": np.arange(tasks, dtype=np.int32)}
    for name, shape in {
        "hyper_inputs": (tasks, 12),
        "inputs": (tasks, rows, 10),
        "targets": (tasks, rows, 8),
    }.items():
        ids = rng.integers(3, 800, shape)
        lengths = rng.integers(1, shape[-1] + 1, shape[:-1])
        batch[name] = np.where(np.arange(shape[-1]) < lengths[..., None], ids, 0).astype(np.int32)
    return batch


def test_microbatches_equal_the_whole_batch(make: Any) -> None:
    found = {}
    batch = random_batch(np.random.default_rng(0))
    for parts in (1, 2, 4):
        config = make(train__microbatches=parts, data__tasks_per_batch=4)
        m, _, trained, frozen = model.start(config)
        optimizer = optax.sgd(1.0)  # the change of the parameters is the gradient
        state = train.start_state(optimizer, trained)
        before = jax.tree.map(np.array, trained)
        state, sums = train.make_step(m, optimizer, config)(state, frozen, batch, jax.random.key(0))
        change = jax.tree.map(lambda a, b: np.asarray(a) - b, state["params"], before)
        found[parts] = (jax.device_get(sums), change)

    def assert_close(part: Any, whole: Any) -> None:
        # Sums in another order: a leaf's small numbers are as far off as its large ones. A mean of
        # the parts' means would be off by a tenth.
        np.testing.assert_allclose(part, whole, rtol=0, atol=1e-4 * np.abs(whole).max())

    for parts in (2, 4):
        jax.tree.map(assert_close, found[parts], found[1])


def test_padding_alone_has_loss_zero(make: Any) -> None:
    config = make(data__tasks_per_batch=4)
    m, _, trained, frozen = model.start(config)
    batch = random_batch(np.random.default_rng(0))
    batch["targets"][:] = 0
    state = train.start_state(optax.sgd(1.0), trained)
    before = jax.tree.map(np.array, trained)
    state, sums = train.make_step(m, optax.sgd(1.0), config)(
        state, frozen, batch, jax.random.key(0)
    )
    assert [float(sums[name]) for name in ("loss", "tokens", "grad_norm")] == [0, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, state["params"], before)


# ------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("fields", DROPOUT.values(), ids=DROPOUT)
def test_resume_is_bit_exact_and_compiles_once(
    make: Any,
    unbroken: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[Any] = []

    def remember(*args: Any) -> Any:
        steps.append(make_step(*args))
        return steps[-1]

    make_step = train.make_step
    monkeypatch.setattr(train, "make_step", remember)
    config = make(model__dropout_rate=0.3, **fields)
    whole = tmp_path / "whole"
    runs.run(config, whole)
    assert runs.leaves(whole, 1) != runs.leaves(unbroken, 1)  # there is dropout
    for step in (1, 4):
        part = runs.part_of(whole, tmp_path / f"from{step}", step)
        runs.run(config, part)
        assert runs.leaves(part, STEPS) == runs.leaves(whole, STEPS)
        ours, theirs = runs.lines(part), runs.lines(whole)
        assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
        for name in ("step", "loss", "accuracy", "grad_norm", "learning_rate"):
            assert [line[name] for line in ours] == [line[name] for line in theirs]
    # Each run compiled its step ahead, which then takes no other shapes: jit was never called.
    assert [step._cache_size() for step in steps] == [0, 0, 0]


def test_seeds_differ_and_repeat(make: Any, unbroken: Path, tmp_path: Path) -> None:
    runs.run(make(train__steps=1), tmp_path / "same")
    runs.run(make(train__steps=1, seed=1), tmp_path / "other")
    first = runs.leaves(unbroken, 1)
    assert runs.leaves(tmp_path / "same", 1) == first
    assert runs.leaves(tmp_path / "other", 1) != first


def test_a_finished_run_is_left_alone(make: Any, unbroken: Path) -> None:
    before = files(unbroken)
    assert runs.run(make(), unbroken) == {}
    assert files(unbroken) == before


def test_a_longer_run_goes_on(make: Any, unbroken: Path, tmp_path: Path) -> None:
    part = runs.part_of(unbroken, tmp_path / "part", STEPS)
    runs.run(make(train__steps=STEPS + 3, train__log_every=2, train__save_every=3), part)
    assert checkpoint.latest_step(part) == STEPS + 3
    assert [line["step"] for line in runs.lines(part)] == [1, 2, 3, 4, 5, 6, 8, 9]


def damage(checkpoints: Path, step: int) -> None:
    """Cut every file of a checkpoint's state in half: Orbax writes some numbers twice."""
    for file in (checkpoints / str(step) / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def test_a_truncated_checkpoint_falls_back(
    make: Any, unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = runs.part_of(unbroken, tmp_path / "part", 4)
    shutil.copytree(unbroken / "checkpoints" / "5", part / "checkpoints" / "5")
    damage(part / "checkpoints", 5)
    runs.run(make(), part)
    assert "checkpoints/5 is damaged" in caplog.text
    assert runs.leaves(part, STEPS) == runs.leaves(unbroken, STEPS)
    assert [line["step"] for line in runs.lines(part)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=[pytest.mark.soak] if name == "adafactor" else [])
        for name, fields in DROPOUT.items()
    ],
)
def test_kill_9_in_mid_save_and_resume(make: Any, tmp_path: Path, fields: dict[str, Any]) -> None:
    config = make(
        train__steps=60, train__save_every=5, train__keep=3, model__dropout_rate=0.3, **fields
    )
    runs.run(config, tmp_path / "whole")
    broken, kills = tmp_path / "broken", 0
    argv = [sys.executable, "-m", "hyper_t5", *runs.command(config, broken)]
    for least in (10, 30):
        with (tmp_path / f"log{least}").open("w") as log:
            child = subprocess.Popen(argv, stdout=log, stderr=log)
            while child.poll() is None:  # until a save is on its way
                saving = (broken / "checkpoints").glob("*.tmp")
                if any(int(p.name.split(".")[0]) >= least for p in saving):
                    child.send_signal(signal.SIGKILL)
                    kills += child.wait() == -signal.SIGKILL
    assert kills == 2
    assert 0 < (checkpoint.latest_step(broken) or 0) < 60
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert runs.leaves(broken, 60) == runs.leaves(tmp_path / "whole", 60)
    assert not list((broken / "checkpoints").glob("*.tmp"))
    logged = [line["step"] for line in runs.lines(broken)]
    assert logged == sorted(set(logged))
    assert logged[-1] == 60


# ------------------------------------------------------------------------- no number, no space


def test_no_number_is_kept(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The update is finite, the loss after it is not: LoRA's scale is 4, and 4e38 is infinite.
    config = make(optimizer__learning_rate=1e38, train__log_every=4, train__save_every=1)
    line = runs.fails(capsys, *runs.command(config, tmp_path / "a"), code=1)
    assert re.search(r" at step 2 on task\d.*the checkpoints before it are good", line)
    assert checkpoint.latest_step(tmp_path / "a") == 1
    last = runs.lines(tmp_path / "a")[-1]
    assert last["step"] == 2
    assert {last["loss"], last["grad_norm"]} & {"NaN", "Infinity"}

    # The first bad step is named, though nothing was looked at before the fourth.
    config = make(optimizer__learning_rate=1e38, train__log_every=4, train__save_every=4)
    assert " at step 2 on " in runs.fails(capsys, *runs.command(config, tmp_path / "b"), code=1)
    assert [line["step"] for line in runs.lines(tmp_path / "b")] == [4]
    assert checkpoint.latest_step(tmp_path / "b") is None

    # What that step was made of is kept: its batch, and the state before it, as the other run has
    # it after its first step. The folder of the state is a workdir, in which it fails again.
    replay = watch.load_replay(tmp_path / "b" / "replay" / "2")
    assert (replay.step, len(replay.tasks)) == (2, config.data.tasks_per_batch)
    assert set(replay.tasks) <= set(runs.TASKS)
    assert not np.isfinite([replay.loss, replay.grad_norm]).all()
    assert replay.state is not None
    state = Path(replay.state)
    assert runs.leaves(state, 1) == runs.leaves(tmp_path / "a", 1)
    argv = runs.command(config, tmp_path / "b")
    argv[argv.index("--workdir") + 1] = str(state)
    assert " at step 2 on " in runs.fails(capsys, *argv, "--gin.train.steps=2", code=1)

    # The loss is finite, the update is not.
    config = make(optimizer__learning_rate=1e38, optimizer__weight_decay=100.0)
    line = runs.fails(capsys, *runs.command(config, tmp_path / "c"), code=1)
    assert "a parameter or a moment is not finite at step 1" in line
    assert np.isfinite(runs.lines(tmp_path / "c")[0]["loss"])
    assert checkpoint.latest_step(tmp_path / "c") is None


def test_a_bad_step_may_be_skipped(make: Any, tmp_path: Path) -> None:
    plain = make(optimizer__name="adafactor", train__steps=3, train__save_every=1)
    runs.run(plain, tmp_path / "plain")
    # Against a mean of the first steps that is far below the losses every one is a spike.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "WARM", 2)
        config = make(
            optimizer__name="adafactor",
            train__steps=3,
            train__save_every=1,
            train__spike=0.5,
            train__on_bad_step="skip",
        )
        last = runs.run(config, tmp_path / "skips")
    assert last["skipped"] == 1
    before, after = (runs.leaves(tmp_path / "skips", step) for step in (2, 3))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"step", "guard/bad_step", "guard/mean", "guard/seen", "guard/skipped"}
    # The steps before it are those of a run without a guard, up to how two programs round.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    for part in ("params", "opt_state"):
        one, same = (
            checkpoint.load_subtree(tmp_path / name / "checkpoints" / "2", part)[0]
            for name in ("skips", "plain")
        )
        jax.tree.map(close, one, same)


@pytest.mark.parametrize("parts", [1, 2])
def test_sigterm_saves_and_another_start_ends_bit_exact(
    make: Any, tmp_path: Path, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(
        train__steps=6,
        train__save_every=100,
        train__microbatches=parts,
        mesh__data=-1,
        data__tasks_per_batch=8 * parts,
    )
    runs.run(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        ask = distributed.preempted

        def preempted(step: int) -> bool:
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            return ask(step)

        patch.setattr(distributed, "preempted", preempted)
        line = runs.fails(capsys, *runs.command(config, tmp_path / "a"), code=75)
    assert "preempted; saved at step 3" in line
    assert checkpoint.latest_step(tmp_path / "a") == 3
    assert cli.main(runs.command(config, tmp_path / "a")) == 0
    assert runs.leaves(tmp_path / "a", 6) == runs.leaves(tmp_path / "whole", 6)


@pytest.fixture
def little_space() -> Iterator[Callable[[], None]]:
    """Called, it makes the system refuse files over 12 kB, as a full disk would refuse them all."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_no_space_keeps_the_previous_checkpoint(
    make: Any,
    tmp_path: Path,
    little_space: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make(system="concat", train__steps=4)
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.run(config, whole)
    save, limit = checkpoint.Checkpointer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_until_full(self: Any, step: int, *args: Any) -> None:
        if step == 3:
            self.wait()
            little_space()
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save", save_until_full)
        line = runs.fails(capsys, *runs.command(config, run))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"could not save checkpoint {run}/checkpoints/3" in line
    assert "earlier checkpoints are kept" in line
    # TensorStore may still be at it when the folder is removed; the next start removes it then.
    left = {p.name for p in (run / "checkpoints").iterdir()}
    assert left - {"3.tmp"} == {"1", "2"}
    assert runs.leaves(run, 2) == runs.leaves(whole, 2)

    assert cli.main(runs.command(config, run)) == 0
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert runs.leaves(run, 4) == runs.leaves(whole, 4)
    assert files(run / "backbone") == files(whole / "backbone")


# ------------------------------------------------------------------------------- bad input


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=1))


TASK = f"tasks/{runs.TASKS[1]}.json"
TRAIN = "splits/default/train_tasks.txt"
BAD_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no definition": (
        lambda d: edit(d / TASK, lambda c: c.pop("Definition")),
        f"{TASK}: field Definition is missing",
    ),
    "no output": (
        lambda d: edit(d / TASK, lambda c: c["Instances"][3].pop("output")),
        f"{TASK}, line 42: Instances[3] lacks field output",
    ),
    "truncated": (
        lambda d: os.truncate(d / TASK, 200),
        f"{TASK}, line 15: not valid JSON",
    ),
    "empty split": (
        lambda d: (d / TRAIN).write_text("\n"),
        f"{TRAIN}: the list is empty",
    ),
    "missing task": (
        lambda d: (d / TASK).unlink(),
        f"{TRAIN}: names {runs.TASKS[1]}, but",
    ),
    "too long": (
        lambda d: edit(d / TASK, lambda c: c.update(Definition="much too long " * 50)),
        f"{runs.TASKS[1]}: the instruction alone is",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_one_line_and_can_be_mended(
    make: Any,
    sni: Path,
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, run = tmp_path / "sni", tmp_path / "run"
    shutil.copytree(sni, bad)
    spoil(bad)
    assert expected in runs.fails(capsys, *runs.command(make(data__sni_dir=str(bad)), run))
    assert not list(run.glob("checkpoints/*"))
    # The way out that the messages name, in the same workdir.
    monkeypatch.setattr(train, "train", lambda *args, **flags: {})
    mended = make(data__sni_dir=str(bad), data__on_long_instruction="truncate")
    assert cli.main(runs.command(mended, run)) == 0


def test_a_long_instruction_may_be_cut(make: Any, sni: Path, tmp_path: Path) -> None:
    long = tmp_path / "sni"
    shutil.copytree(sni, long)
    for name in runs.TASKS:
        file = long / "tasks" / f"{name}.json"
        edit(file, lambda c: c.update(Definition="much too long " * 50))
    config = make(data__sni_dir=str(long), data__on_long_instruction="truncate", train__steps=1)
    runs.run(config, tmp_path / "run")
    assert runs.lines(tmp_path / "run")[-1]["data/truncated_conditionings"] >= 2


def test_a_packed_run_from_a_store(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build, train from what was built without the source, and refuse what was altered."""
    config = make(data__pack=True, train__steps=2, train__save_every=2, data__input_length=32)
    gin = f"--gin.data.sni_dir={config.data.sni_dir}"
    more = ["--gin.data.vocab=bytes", "--gin.data.max_instances_per_task=0"]
    out = tmp_path / "built"
    assert cli.main(["build", "--mixture=sni", f"--out={out}", "--shards=2", gin, *more]) == 0
    store = out / "hyper_t5" / "sni" / "1.0.0"
    assert str(store) in capsys.readouterr().out
    config.data.store, config.data.sni_dir = str(store), ""
    runs.run(config, tmp_path / "run")
    line = runs.lines(tmp_path / "run")[-1]
    assert line["data/examples"] > 2 * line["data/rows"]
    shard = next(store.glob("*-train.tfrecord-00000-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    told = runs.fails(capsys, *runs.command(config, tmp_path / "again"))
    assert f"{shard.name}: altered" in told
    assert not list((tmp_path / "again").glob("checkpoints/*"))


def test_a_workdir_of_another_config_is_refused(
    make: Any, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(unbroken)
    line = runs.fails(capsys, *runs.command(make(adapter__lora_rank=4), unbroken))
    assert "adapter.lora_rank: 2 -> 4" in line
    assert "another --workdir" in line
    assert files(unbroken) == before


def test_checkpoints_of_another_model_are_refused(
    make: Any, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = runs.untrained_run(make(), tmp_path / "made")
    sizes, params, _ = weights.load_backbone(backbone)
    weights.save_native(tmp_path / "bytes", sizes, params, ByteVocabulary())
    wide = runs.save_backbone(tmp_path / "wide", 0, runs.replace(emb_dim=20))
    other = runs.save_backbone(tmp_path / "other", 1)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"adapter__lora_rank": 4},
            "dec_cross.value.a of its hypermodel is (3, 16, 2), this run needs (3, 16, 4)",
        ),
        ({"adapter__lora_bias": True}, "dec_cross.value.bias of its hypermodel is not there"),
        ({"system": "shared_prefix"}, "give the same system, reader and adapter sizes"),
        ({"backbone__path": str(wide)}, "made for a backbone with emb_dim=16, but backbone.path"),
        ({"backbone__path": str(other)}, "a backbone of this size with other weights"),
        ({"backbone__path": str(tmp_path / "bytes")}, "made for the vocabulary (sentencepiece"),
        ({"hypermodel__path": str(tmp_path)}, "no usable checkpoint at"),
    ]
    for fields, expected in cases:
        config = make(**{"hypermodel__path": str(made)} | fields)
        assert expected in runs.fails(capsys, *runs.command(config, tmp_path / "run"))


def test_a_backbone_that_changed_is_refused_at_resume(
    make: Any, backbone: Path, unbroken: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "t5"
    shutil.copytree(backbone, moved)
    part = runs.part_of(unbroken, tmp_path / "part", 3)
    config = make(backbone__path=str(moved))
    edit(part / "config.json", lambda c: c["backbone"].update(path=str(moved)))
    shutil.rmtree(moved)
    runs.save_backbone(moved, 1)
    with pytest.raises(UserError, match="with other weights"):
        runs.run(config, part)


# ------------------------------------------------------------------------------- quietness


def test_tensorflow_says_nothing() -> None:
    code = (
        "import sys\n"
        "from hyper_t5.tasks.common import tf\n"
        "print(tf.constant(1).numpy(), tf.config.get_visible_devices('GPU'))\n"
        "print('kept', file=sys.stderr)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert (run.stdout, run.stderr) == ("1 []\n", "kept\n")


def test_what_is_no_noise_comes_through(capfd: pytest.CaptureFixture[str]) -> None:
    from hyper_t5.tasks import common

    noise = "I0000 00:00:1795263331.93 6406 cudart_stub.cc:31] Could not find cuda drivers\n"
    with common._without_noise():
        os.write(2, (noise + "a library's complaint\n").encode())
    assert capfd.readouterr().err == "a library's complaint\n"

    def fail() -> None:
        with common._without_noise():
            os.write(2, noise.encode())
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert capfd.readouterr().err == noise
