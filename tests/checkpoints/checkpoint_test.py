"""Checkpoints are bit-exact, complete or not counted, and a failed save loses nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import serialization

from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import arrays, checkpoint, steps, workdir
from hyper_t5.training import optim
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from tests.support import fake_bucket
from tests.support.states import META, assert_same, flip_bit, folder_of, saved_steps

pytestmark = pytest.mark.smoke


def make_state(seed: int = 0) -> dict[str, Any]:
    """Create a training state of one device."""
    params = {
        "layers": {"w": jax.random.normal(jax.random.key(seed), (2, 4, 5))},
        # Large enough to be a block of its own in Orbax's files, which nothing there checks.
        "large": jax.random.normal(jax.random.key(seed + 2), (64, 64)),
        "half": jax.random.normal(jax.random.key(seed + 1), (300,), jnp.bfloat16),
    }
    return {
        "params": params,
        "opt_state": optim.adafactor(0.1, min_dim_size_to_factor=4).init(params),
        "step": jnp.int32(seed),
        "rng": jax.random.key_data(jax.random.key(seed)),
    }


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    state, special = make_state(), jnp.array([jnp.nan, -0.0, 1e-40], jnp.bfloat16)
    state["params"]["half"] = state["params"]["half"].at[:3].set(special)
    checkpoint.save(tmp_path, 7, state, META)
    restored, meta = checkpoint.restore(tmp_path, None, state)
    assert_same(restored, state)
    assert meta == checkpoint.read_meta(tmp_path) == {**META, "step": 7}
    shapes = jax.eval_shape(lambda: state)
    assert_same(checkpoint.restore(tmp_path, 7, shapes)[0], state)


@pytest.mark.parametrize("make_optimizer", [optim.adafactor, optax.adamw])
def test_resume_at_every_step_equals_the_unbroken_run(tmp_path: Path, make_optimizer: Any) -> None:
    optimizer = make_optimizer(0.1)

    @jax.jit
    def advance(state: dict[str, Any]) -> dict[str, Any]:
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state["step"]), (2, 3))
        grads = {"w": state["params"]["w"] * noise}
        updates, slots = optimizer.update(grads, state["slots"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "slots": slots, "step": state["step"] + 1}

    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    run: list[dict[str, Any]] = [
        {"params": params, "slots": optimizer.init(params), "step": jnp.int32(0)}
    ]
    for step in range(3):
        run.append(advance(run[-1]))
        checkpoint.save(tmp_path, step, run[-2], META)
    for step in range(3):
        state, _ = checkpoint.restore(tmp_path, step, run[0])
        for _ in range(3 - step):
            state = advance(state)
        assert_same(state, run[-1])


def test_save_writes_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller continues at once, and may overwrite or donate the saved buffers."""
    write, resumed = serialization.async_serialize_from_host, threading.Event()

    async def write_late(*args: Any, **kwargs: Any) -> None:
        assert resumed.wait(30)
        await write(*args, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", write_late)
    state: dict[str, Any] = {"params": np.ones(4, np.float32), "on_device": jnp.ones(4)}
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, META)
        state["params"][:] = 5
        after = jax.jit(lambda x: x + 1, donate_argnums=0)(state.pop("on_device"))
        assert jax.jit(lambda x: x * 7, donate_argnums=0)(after).tolist() == [14] * 4
        assert checkpoint.latest_step(tmp_path) is None
        resumed.set()
    for name in ("params", "on_device"):
        assert checkpoint.load_subtree(tmp_path, name)[0].tolist() == [1, 1, 1, 1]


def test_partial_steps_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = make_state(1), make_state(2)
    assert checkpoint.latest_step(tmp_path) is None
    assert checkpoint.digest(tmp_path) == ""
    checkpoint.save(tmp_path, 3, old, META)
    digest = checkpoint.digest(tmp_path)
    checkpoint.save(tmp_path, 5, new, META)
    assert checkpoint.digest(tmp_path) not in ("", digest)
    (folder_of(tmp_path, 5) / "COMMITTED.json").unlink()
    checkpoint.save(tmp_path, 6, new, META)
    record = folder_of(tmp_path, 6) / "COMMITTED.json"
    record.write_text(record.read_text().replace("params/half", "params/hats"))
    folder_of(tmp_path, 9).mkdir()
    (tmp_path / "checkpoints" / "8.tmp" / "state").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_step(tmp_path) == 3
    for step in (5, 6, 9):
        assert f"checkpoints/{step} does not count" in caplog.text
    assert checkpoint.digest(tmp_path) == digest
    assert_same(checkpoint.restore(tmp_path, None, old)[0], old)

    checkpoint.save(tmp_path, 5, new, META)
    assert not (tmp_path / "checkpoints" / "8.tmp").exists()
    assert_same(checkpoint.restore(tmp_path, None, new)[0], new)


DAMAGE = {
    "first byte": lambda file: flip_bit(file, 0.0),
    "middle byte": lambda file: flip_bit(file, 0.5),
    "last byte": lambda file: flip_bit(file, 1.0),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_file_never_changes_values(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = make_state(1), make_state(2)
    checkpoint.save(tmp_path, 1, old, META)
    checkpoint.save(tmp_path, 2, new, META)
    intact = tmp_path / "intact"
    shutil.move(folder_of(tmp_path, 2), intact)
    names = [f.relative_to(intact) for f in intact.rglob("*") if f.is_file() and f.stat().st_size]
    detected = []
    for name in names:
        shutil.rmtree(folder_of(tmp_path, 2), ignore_errors=True)
        shutil.copytree(intact, folder_of(tmp_path, 2))
        DAMAGE[damage](folder_of(tmp_path, 2) / name)
        caplog.clear()
        restored, meta = checkpoint.restore(tmp_path, None, old)
        assert_same(restored, {1: old, 2: new}[meta["step"]])
        if meta["step"] == 1:
            detected.append(name.as_posix())
            assert "checkpoints/2" in caplog.text
    assert {"COMMITTED.json", "meta.json"} <= set(detected)
    assert any("state/" in name and "/d/" in name for name in detected)


def test_without_an_undamaged_checkpoint(tmp_path: Path) -> None:
    state = make_state()
    with pytest.raises(UserError, match=r"no usable checkpoint at .*there is none"):
        checkpoint.restore(tmp_path, None, state)
    checkpoint.save(tmp_path, 1, state, META)
    checkpoint.save(tmp_path, 2, state, META)
    shutil.rmtree(folder_of(tmp_path, 2) / "state")
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged: leaf opt_state/0"):
        checkpoint.restore(tmp_path, 2, state)
    shutil.rmtree(folder_of(tmp_path, 1) / "state")
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged"):
        checkpoint.restore(tmp_path, None, state)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("w", jnp.zeros((2, 9)), r"params/w is float32\[2, 3\], expected float32\[2, 9\]"),
        ("w", jnp.zeros((2, 3), jnp.bfloat16), r"params/w is .*expected bfloat16\[2, 3\]"),
        ("w", None, r"params/w is float32\[2, 3\], expected no such leaf"),
        ("x", jnp.zeros(2), r"params/x is no such leaf, expected float32\[2\]"),
    ],
)
def test_another_model_is_refused_by_leaf(
    tmp_path: Path, name: str, other: Any, message: str
) -> None:
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"params": params}, META)
    with pytest.raises(UserError, match=rf"checkpoints/2: {message}"):
        checkpoint.restore(tmp_path, None, {"params": {**params, name: other}})


def test_load_subtree(tmp_path: Path) -> None:
    state = make_state()
    checkpoint.save(tmp_path, 4, state, META)
    for path in (tmp_path, folder_of(tmp_path, 4)):
        params, meta = checkpoint.load_subtree(path, "params")
        assert_same(params, jax.tree.map(np.asarray, state["params"]))
        assert meta["step"] == 4
    layers, _ = checkpoint.load_subtree(tmp_path, "params/layers")
    assert_same(layers, jax.tree.map(np.asarray, state["params"]["layers"]))
    with pytest.raises(UserError, match="has no 'param'; it has: opt_state, params, rng, step"):
        checkpoint.load_subtree(tmp_path, "param")
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.load_subtree(folder_of(tmp_path, 5), "params")


@pytest.mark.parametrize(
    ("keep", "keep_period", "kept"),
    [
        (2, 4, ["0", "4", "8", "9", "10", "50"]),
        (2, 0, ["9", "10", "50"]),
        (0, 5, [*(str(step) for step in range(11)), "50"]),
    ],
)
def test_old_steps_are_removed(
    tmp_path: Path, keep: int, keep_period: int, kept: list[str]
) -> None:
    state = {"x": jnp.ones(2)}
    checkpoint.save(tmp_path, 50, state, META)  # later than the resumed step: abandoned
    with checkpoint.Checkpointer(tmp_path, keep, keep_period) as checkpointer:
        for step in range(11):
            checkpointer.save(step, state, META)
    assert saved_steps(tmp_path) == kept


def test_a_step_without_a_valid_record_is_not_one_of_those_kept(tmp_path: Path) -> None:
    state = {"x": jnp.ones(2)}
    with checkpoint.Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, META)
        checkpointer.wait()
        (folder_of(tmp_path, 2) / "COMMITTED.json").write_text("{}")
        checkpointer.save(3, state, META)
    assert saved_steps(tmp_path) == ["1", "2", "3"]


def poll_until_it_raises(checkpointer: checkpoint.Checkpointer) -> None:
    for _ in range(1000):
        checkpointer.poll()
        time.sleep(0.01)


def save_and_raise(checkpointer: checkpoint.Checkpointer, state: Any) -> None:
    checkpointer.save(2, state, META)
    raise KeyError("the first error")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make_state(1), make_state(2)
    checkpoint.save(tmp_path, 1, old, META)

    def fail(handler: Any, folder: Path, leaves: Any) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "start_write", fail)
        checkpointer.save(2, new, META)
        with pytest.raises(UserError, match=r"checkpoints/2: .*No space left.*make room"):
            poll_until_it_raises(checkpointer)
        checkpointer.save(2, new, META)
        with pytest.raises(UserError, match="No space left"):
            checkpointer.save(3, new, META)
        with pytest.raises(KeyError, match="the first error"), checkpointer:
            save_and_raise(checkpointer, new)
    assert saved_steps(tmp_path) == ["1"]
    assert_same(checkpoint.restore(tmp_path, None, old)[0], old)
    checkpoint.save(tmp_path, 2, new, META)
    assert_same(checkpoint.restore(tmp_path, None, old)[0], new)


def test_a_write_that_the_system_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Like a full disk, but below Orbax: no file may grow past 64 KiB."""
    state = {"x": np.random.default_rng(0).random(100_000)}
    checkpoint.save(tmp_path, 1, state, META)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(UserError, match=r"checkpoints/2: .*earlier checkpoints are kept"):
            checkpoint.save(tmp_path, 2, {"x": -state["x"]}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text == ""
    assert saved_steps(tmp_path) == ["1"]
    assert_same(checkpoint.restore(tmp_path, None, state)[0], state)


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoints: .*Not a directory"):
        checkpoint.Checkpointer(tmp_path / "file")


def test_a_bucket_is_a_workdir(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without rename, lock and flush, a step counts when it has a record."""
    run, old, new = "gs://bucket/my run", make_state(1), make_state(2)
    with fake_bucket.served(monkeypatch) as objects:
        with workdir.lock(run):
            assert workdir.write_or_check_config(run, config_lib.defaults()) == []
            changed = config_lib.defaults()
            changed.seed = 5
            with checkpoint.Checkpointer(run, keep=2) as checkpointer:
                for step, state in enumerate((old, old, old, new)):
                    checkpointer.save(step, state, META)
            with pytest.raises(UserError, match="another config"):
                workdir.write_or_check_config(run, changed)
        assert workdir.load_config(Path(run)).seed == 0  # pathlib makes one slash of two
        saved = {name.split("/")[5] for name in objects if "/checkpoints/" in name}
        assert saved == {"2", "3"}
        assert_same(checkpoint.restore(run, None, new)[0], new)
        assert checkpoint.load_subtree(f"{run}/checkpoints/3", "step")[0] == 2

        data = [name for name in objects if "/3/state/ocdbt.process_0/d/" in name]
        largest = max(data, key=lambda name: len(objects[name]))
        half = len(objects[largest]) // 2
        flipped = bytes([objects[largest][half] ^ 16])
        objects[largest] = objects[largest][:half] + flipped + objects[largest][half + 1 :]
        assert_same(checkpoint.restore(run, None, old)[0], old)
        assert "gs://bucket/my run/checkpoints/3 is damaged: leaf params/" in caplog.text

        del objects[f"{run}/checkpoints/3/COMMITTED.json"]  # as if killed during a save
        assert checkpoint.latest_step(run) == 2
        checkpoint.save(run, 4, new, META)
        assert not any("/checkpoints/3/" in name for name in objects)
        assert_same(checkpoint.restore(run, None, new)[0], new)

        with files.replaced_folder(f"{run}/backbone", ("a.json", "b")) as folder:
            (folder / "a.json").write_text('{"b": 1}')
            (folder / "b").write_bytes(b"12345678" * 2)
        assert files.read_json(f"{run}/backbone/a.json") == {"b": 1}
        assert list(objects)[-2:] == [f"{run}/backbone/b", f"{run}/backbone/a.json"]


@pytest.mark.parametrize("name", ["hyper_t5.checkpoint/1", "hyper_t5.checkpoints.checkpoint/2"])
def test_earlier_formats_are_read(tmp_path: Path, name: str) -> None:
    state = {"x": np.arange(6.0)}
    checkpoint.save(tmp_path, 1, state, META)
    file = folder_of(tmp_path, 1) / "COMMITTED.json"
    record = json.loads(file.read_text())["record"]
    assert record["format"] == "hyper_t5.checkpoint/2"
    record["format"] = name
    if name.endswith("1"):
        leaf = record["leaves"]["x"]
        leaf["crc32"] = leaf.pop("shards")["0:6"]
    content = {"record": record, "crc32": steps.crc32(steps.to_json(record))}
    file.write_bytes(steps.to_json(content))
    assert_same(checkpoint.restore(tmp_path, None, state)[0], state)

    record["format"] = "hyper_t5.checkpoint/9"
    content = {"record": record, "crc32": steps.crc32(steps.to_json(record))}
    file.write_bytes(steps.to_json(content))
    assert checkpoint.latest_step(tmp_path) is None
