"""Checkpoints: bit-exact, whole or not counted, and a failure to save loses nothing."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization

from hyper_t5 import checkpoint, optim
from hyper_t5.errors import UserError

pytestmark = pytest.mark.smoke

META = {"seed": 3, "adapter": {"lora": {"targets": ["enc_self.query"], "rank": 4}}}


def make_state(seed: int = 0) -> dict[str, Any]:
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


def assert_same(left: Any, right: Any) -> None:
    paths = [jax.tree_util.tree_leaves_with_path(tree) for tree in (left, right)]
    for (path, one), (other_path, other) in zip(*paths, strict=True):
        assert path == other_path
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def folder_of(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    state, special = make_state(), jnp.array([jnp.nan, -0.0, 1e-40], jnp.bfloat16)
    state["params"]["half"] = state["params"]["half"].at[:3].set(special)
    checkpoint.save(tmp_path, 7, state, META)
    restored, meta = checkpoint.restore(tmp_path, None, state)
    assert_same(restored, state)
    assert meta == checkpoint.read_meta(tmp_path) == {**META, "step": 7}
    shapes = jax.eval_shape(lambda: state)
    assert_same(checkpoint.restore(tmp_path, 7, shapes)[0], state)


@pytest.mark.parametrize("make", [optim.adafactor, optax.adamw])
def test_resume_at_every_step_equals_the_unbroken_run(tmp_path: Path, make: Any) -> None:
    optimizer = make(0.1)

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


def test_the_state_of_the_call_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller goes on at once, and may overwrite the buffers it saved."""
    write, go_on = serialization.async_serialize_from_host, threading.Event()

    async def late(*args: Any, **kwargs: Any) -> None:
        assert go_on.wait(30)
        await write(*args, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", late)
    state: dict[str, Any] = {"params": np.ones(4, np.float32), "on_device": jnp.ones(4)}
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, META)
        state["params"][:] = 5
        after = jax.jit(lambda x: x + 1, donate_argnums=0)(state.pop("on_device"))
        assert jax.jit(lambda x: x * 7, donate_argnums=0)(after).tolist() == [14] * 4
        assert checkpoint.latest_step(tmp_path) is None
        go_on.set()
    restored, _ = checkpoint.load_subtree(tmp_path, "params")
    assert restored.tolist() == [1, 1, 1, 1]
    assert checkpoint.load_subtree(tmp_path, "on_device")[0].tolist() == [1, 1, 1, 1]


def test_partial_steps_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = make_state(1), make_state(2)
    assert checkpoint.latest_step(tmp_path) is None
    checkpoint.save(tmp_path, 3, old, META)
    checkpoint.save(tmp_path, 5, new, META)
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
    assert_same(checkpoint.restore(tmp_path, None, old)[0], old)

    checkpoint.save(tmp_path, 5, new, META)
    assert not (tmp_path / "checkpoints" / "8.tmp").exists()
    assert_same(checkpoint.restore(tmp_path, None, new)[0], new)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "first byte": lambda path: flip(path, 0.0),
    "middle byte": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1.0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_never_gives_wrong_numbers(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = make_state(1), make_state(2)
    checkpoint.save(tmp_path, 1, old, META)
    checkpoint.save(tmp_path, 2, new, META)
    whole = tmp_path / "whole"
    shutil.move(folder_of(tmp_path, 2), whole)
    files = [f.relative_to(whole) for f in whole.rglob("*") if f.is_file() and f.stat().st_size]
    fell_back = []
    for file in files:
        shutil.rmtree(folder_of(tmp_path, 2), ignore_errors=True)
        shutil.copytree(whole, folder_of(tmp_path, 2))
        DAMAGE[damage](folder_of(tmp_path, 2) / file)
        caplog.clear()
        restored, meta = checkpoint.restore(tmp_path, None, old)
        assert_same(restored, {1: old, 2: new}[meta["step"]])
        if meta["step"] == 1:
            fell_back.append(file.as_posix())
            assert "checkpoints/2" in caplog.text
    assert {"COMMITTED.json", "meta.json"} <= set(fell_back)
    assert any("state/" in file and "/d/" in file for file in fell_back)


def test_nothing_undamaged_is_left(tmp_path: Path) -> None:
    state = make_state()
    with pytest.raises(UserError, match=r"no usable checkpoint at .*there is none"):
        checkpoint.restore(tmp_path, None, state)
    checkpoint.save(tmp_path, 1, state, META)
    checkpoint.save(tmp_path, 2, state, META)
    shutil.rmtree(folder_of(tmp_path, 2) / "state")
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged"):
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


def test_the_newest_are_kept(tmp_path: Path) -> None:
    state = {"x": jnp.ones(2)}
    checkpoint.save(tmp_path, 50, state, META)  # of a future that was given up
    with checkpoint.Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (8, 9, 10, 11):
            checkpointer.save(step, state, META)
    kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [10, 11, 50]


def poll_on(checkpointer: checkpoint.Checkpointer) -> None:
    for _ in range(1000):
        checkpointer.poll()
        time.sleep(0.01)


def save_and_stumble(checkpointer: checkpoint.Checkpointer, state: Any) -> None:
    checkpointer.save(2, state, META)
    raise KeyError("the first error is the one to see")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make_state(1), make_state(2)
    checkpoint.save(tmp_path, 1, old, META)

    def full(orbax: Any, folder: Path, arrays: Any) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_start_writing", full)
        checkpointer.save(2, new, META)
        with pytest.raises(UserError, match=r"checkpoints/2: .*No space left.*make room"):
            poll_on(checkpointer)
        checkpointer.save(2, new, META)
        with pytest.raises(UserError, match="No space left"):
            checkpointer.save(3, new, META)
        with pytest.raises(KeyError, match="the first error is the one to see"), checkpointer:
            save_and_stumble(checkpointer, new)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert_same(checkpoint.restore(tmp_path, None, old)[0], old)
    checkpoint.save(tmp_path, 2, new, META)
    assert_same(checkpoint.restore(tmp_path, None, old)[0], new)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoints: .*Not a directory"):
        checkpoint.Checkpointer(tmp_path / "file")


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """Like a full disk, but below Orbax: no file may grow past 64 KiB."""
    code = """
        import resource, sys
        import numpy as np
        from hyper_t5 import checkpoint
        from hyper_t5.errors import UserError
        small, large = np.zeros(10), np.random.default_rng(0).random(100_000)
        checkpoint.save(sys.argv[1], 1, {"x": small}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            checkpoint.save(sys.argv[1], 2, {"x": large}, {})
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoints/2" in done.stdout
    assert "earlier checkpoints are kept" in done.stdout
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["1"]
    restored, _ = checkpoint.restore(tmp_path, None, {"x": np.zeros(10)})
    assert_same(restored, {"x": np.zeros(10)})


def test_restored_leaves_go_where_the_target_is(tmp_path: Path) -> None:
    """Sharded as asked, and an uncommitted scalar still enters a jit over the whole mesh."""
    size = jax.device_count()
    mesh = jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state = {
        "table": jax.device_put(np.ones((size, 2), np.float32), rows),
        "scalar": jnp.float32(2),
        "count": jax.device_put(np.int32(3), whole),
    }
    checkpoint.save(tmp_path, 1, state, META)
    shapes = {
        "table": jax.ShapeDtypeStruct((size, 2), jnp.float32, sharding=rows),
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    }
    for target in (state, shapes):
        back, _ = checkpoint.restore(tmp_path, None, target)
        assert (back["table"].sharding, back["count"].sharding) == (rows, whole)
        total = jax.jit(lambda s: s["table"].sum() * s["scalar"] + s["count"])(back)
        assert total == 2 * size * 2 + 3
