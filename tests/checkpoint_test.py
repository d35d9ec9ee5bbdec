"""Checkpoints: bit-exact, whole or not counted, and a failure to save loses nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
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
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization

import bucket
import procs
from hyper_t5 import checkpoint, files, optim, workdir
from hyper_t5 import config as config_lib
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


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    state = {"x": jnp.ones(2)}
    with checkpoint.Checkpointer(tmp_path, keep=2, keep_period=4) as checkpointer:
        for step in range(11):
            checkpointer.save(step, state, META)
    kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [0, 4, 8, 9, 10]
    with checkpoint.Checkpointer(tmp_path, keep=0, keep_period=5) as checkpointer:
        checkpointer.save(11, state, META)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


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
    assert "Traceback" not in done.stderr
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


def test_a_bucket_is_a_workdir(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No rename, no lock, no flush: a step there counts when its record is there."""
    run, old, new = "gs://bucket/my run", make_state(1), make_state(2)
    with bucket.served(monkeypatch) as objects:
        with workdir.hold(run):
            assert workdir.check_resume(run, config_lib.defaults()) == []
            changed = config_lib.defaults()
            changed.seed = 5
            with checkpoint.Checkpointer(run, keep=2) as checkpointer:
                for step, state in enumerate((old, old, old, new)):
                    checkpointer.save(step, state, META)
            with pytest.raises(UserError, match="another config"):
                workdir.check_resume(run, changed)
        assert workdir.load_config(Path(run)).seed == 0  # pathlib makes one slash of two
        steps = {name.split("/")[5] for name in objects if "/checkpoints/" in name}
        assert steps == {"2", "3"}
        assert_same(checkpoint.restore(run, None, new)[0], new)
        assert checkpoint.load_subtree(f"{run}/checkpoints/3", "step")[0] == 2

        data = [name for name in objects if "/3/state/ocdbt.process_0/d/" in name]
        largest = max(data, key=lambda name: len(objects[name]))
        half = len(objects[largest]) // 2
        flipped = bytes([objects[largest][half] ^ 16])
        objects[largest] = objects[largest][:half] + flipped + objects[largest][half + 1 :]
        assert_same(checkpoint.restore(run, None, old)[0], old)
        assert "gs://bucket/my run/checkpoints/3 is damaged: leaf params/" in caplog.text

        del objects[f"{run}/checkpoints/3/COMMITTED.json"]  # as if killed in the midst of a save
        assert checkpoint.latest_step(run) == 2
        checkpoint.save(run, 4, new, META)
        assert not any("/checkpoints/3/" in name for name in objects)
        assert_same(checkpoint.restore(run, None, new)[0], new)

        with files.replaced_folder(f"{run}/backbone", ("a.json", "b")) as folder:
            (folder / "a.json").write_text('{"b": 1}')
            (folder / "b").write_bytes(b"12345678" * 2)
        assert files.read_json(f"{run}/backbone/a.json") == {"b": 1}
        assert list(objects)[-2:] == [f"{run}/backbone/b", f"{run}/backbone/a.json"]


# ----------------------------------------------------------------------------- meshes and processes


def on_mesh(state: Any, rows: int) -> Any:
    """The state on ROWS x 8/ROWS devices, each leaf cut in another way."""
    mesh = jax.make_mesh((rows, 8 // rows), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    cuts = {"rows": ("data",), "both": ("data", "model"), "inner": (None, "model", "data")}

    def put(path: Any, leaf: Any) -> Any:
        spec = PartitionSpec(*cuts.get(path[-1].key, ()))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, NamedSharding(mesh, spec), lambda at: leaf[at]
        )

    return jax.tree_util.tree_map_with_path(put, state)


def cut_state(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "rows": rng.normal(size=(8, 1000)).astype(np.float32),
        "both": rng.normal(size=(64, 320)).astype(jnp.bfloat16),
        "inner": rng.normal(size=(3, 8, 800)).astype(np.float32),
        "whole": rng.normal(size=(1000,)).astype(np.float32),
    }
    return {"params": params, "step": np.int32(seed)}


@pytest.mark.parametrize(("written", "read"), [(2, 1), (1, 2), (8, 4), (1, 8), (4, 4)])
def test_any_mesh_reads_what_another_wrote(tmp_path: Path, written: int, read: int) -> None:
    values = cut_state()
    checkpoint.save(tmp_path, 1, on_mesh(values, written), META)
    like = on_mesh(cut_state(1), read)
    restored, _ = checkpoint.restore(tmp_path, None, like)
    assert_same(restored, values)
    for leaf, target in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == target.sharding
    inner = {"inner": like["params"]["inner"], "rows": like["params"]["rows"]}
    with pytest.raises(UserError, match="params/both is bfloat16"):
        checkpoint.load_subtree(tmp_path, "params", target=inner)
    params, meta = checkpoint.load_subtree(tmp_path, "params", target=like["params"])
    assert_same(params, values["params"])
    assert params["both"].sharding == like["params"]["both"].sharding
    assert meta["step"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_damage_is_found_on_another_mesh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new, like = cut_state(1), cut_state(2), on_mesh(cut_state(), 1)
    checkpoint.save(tmp_path, 1, on_mesh(old, 4), META)
    checkpoint.save(tmp_path, 2, on_mesh(new, 4), META)
    found = 0
    for file in (folder_of(tmp_path, 2) / "state" / "ocdbt.process_0" / "d").iterdir():
        whole = file.read_bytes()
        for place in (0.1, 0.3, 0.5, 0.7, 0.9):
            flip(file, place)
            caplog.clear()
            restored, meta = checkpoint.restore(tmp_path, None, like)
            assert_same(restored, {1: old, 2: new}[meta["step"]])
            found += "checkpoints/2 is damaged: leaf " in caplog.text
            file.write_bytes(whole)
    assert found > 3


def test_the_record_names_every_shard(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, on_mesh(cut_state(), 2), META)
    record = json.loads((folder_of(tmp_path, 1) / "COMMITTED.json").read_text())
    lines = record["record"]["leaves"]
    assert list(lines["params/rows"]["shards"]) == ["0:4,0:1000", "4:8,0:1000"]
    assert len(lines["params/both"]["shards"]) == 8
    assert lines["params/whole"]["dtype"] == "float32"
    assert list(lines["step"]["shards"]) == [""]


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    state = {"x": np.arange(6.0)}
    checkpoint.save(tmp_path, 1, state, META)
    file = folder_of(tmp_path, 1) / "COMMITTED.json"
    record = json.loads(file.read_text())["record"]
    line = record["leaves"]["x"]
    line["crc32"] = line.pop("shards")["0:6"]
    record["format"] = "hyper_t5.checkpoint/1"
    check = checkpoint._crc(checkpoint._json(record))
    file.write_text(json.dumps({"record": record, "crc32": check}))
    assert_same(checkpoint.restore(tmp_path, None, state)[0], state)


TWO = """
import errno, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from pathlib import Path
import logging
from hyper_t5 import checkpoint, distributed, workdir
from hyper_t5.errors import UserError
logging.basicConfig(format="%(message)s")
distributed.initialize(heartbeat=20)
import checkpoint_test as t
folder, me = Path(sys.argv[1]), distributed.index()

def same(restored, values):
    for leaf, want in zip(t.jax.tree.leaves(restored), t.jax.tree.leaves(values), strict=True):
        assert leaf.dtype == want.dtype
        for shard in leaf.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), np.asarray(want)[shard.index])

with workdir.hold(folder):
    # One process of eight devices wrote steps 1 and 2; here are two of four.
    like = t.on_mesh(t.cut_state(), 4)
    restored, meta = checkpoint.restore(folder, None, like)
    assert meta["step"] == 2
    same(restored, t.cut_state(2))
    params, _ = checkpoint.load_subtree(folder, "params")
    assert np.array_equal(params["both"], t.cut_state(2)["params"]["both"])

    # Damage that one process alone sees makes both go to the step before.
    read = checkpoint._read_leaf
    def damaged(step, *more):
        if me == 1 and step.name == "2":
            raise checkpoint._DamagedError("leaf params/rows is not as it was written")
        return read(step, *more)
    checkpoint._read_leaf = damaged
    restored, meta = checkpoint.restore(folder, None, like)
    assert meta["step"] == 1
    same(restored, t.cut_state(1))
    checkpoint._read_leaf = read

    saver = checkpoint.Checkpointer(folder, keep=10)
    saver.save(3, t.on_mesh(t.cut_state(3), 2), t.META)
    saver.wait()

    # A disk that is full on one of them ends the save on both.
    start = checkpoint._start_writing
    def full(*args):
        if me == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return start(*args)
    checkpoint._start_writing = full
    saver.save(4, t.on_mesh(t.cut_state(4), 2), t.META)
    try:
        saver.close()
    except UserError as error:
        print("ENDED", error, flush=True)
distributed.finish()
"""


def test_two_processes_and_one_read_each_other(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, on_mesh(cut_state(step), 1), META)
    tests = str(Path(__file__).parent)
    ended = procs.run_hosts(["-W", "ignore", "-c", TWO, str(tmp_path), tests])
    for one in ended:
        assert one.code == 0, one.stderr
        [line] = [line for line in one.stdout.splitlines() if line.startswith("ENDED")]
        assert "checkpoints/4: process 1: " in line
        assert "No space left" in line
        assert "Traceback" not in one.stderr
    warning = "checkpoints/2 is damaged: process 1: leaf params/rows"
    assert warning in ended[0].stderr
    assert warning not in ended[1].stderr
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == list("123")
    parts = {folder.name for folder in (folder_of(tmp_path, 3) / "state").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    for rows in (1, 2):
        restored, meta = checkpoint.restore(tmp_path, None, on_mesh(cut_state(), rows))
        assert meta["step"] == 3
        assert_same(restored, cut_state(3))
    # Orbax itself reads it: nothing in the folder is ours alone.
    with ocp.PyTreeCheckpointer() as orbax:
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), cut_state())
        plain = orbax.restore(folder_of(tmp_path, 3) / "state", restore_args=whole)
    assert np.array_equal(plain["params"]["inner"], cut_state(3)["params"]["inner"])


def test_a_resumed_run_may_change_its_mesh_and_what_it_keeps(tmp_path: Path) -> None:
    workdir.check_resume(tmp_path, config_lib.defaults())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    other = config_lib.defaults()
    other.mesh.model, other.train.keep_period = 4, 1000
    changes = ["mesh.model: 1 -> 4", "train.keep_period: 0 -> 1000"]
    assert workdir.check_resume(tmp_path, other) == changes
    other.train.microbatches = 2
    with pytest.raises(UserError, match=r"another config \(train.microbatches: 1 -> 2\)"):
        workdir.check_resume(tmp_path, other)


HOLD = """
import sys
from hyper_t5 import distributed, workdir
from hyper_t5.errors import UserError
distributed.initialize(heartbeat=20)
workdir.SEEN_SECONDS = 1.0
for folder in (sys.argv[1 + distributed.index()], sys.argv[3], sys.argv[4]):
    try:
        with workdir.hold(folder):
            print("HELD", flush=True)
    except UserError as error:
        print("REFUSED", error, flush=True)
distributed.finish()
"""


def test_processes_share_a_workdir(tmp_path: Path) -> None:
    """Folders of their own are found; another run's lock, and a free folder, are so for both."""
    names = ("own0", "own1", "taken", "free")
    folders = [str(tmp_path / name) for name in names]
    with workdir.hold(folders[2]):
        ended = procs.run_hosts(["-W", "ignore", "-c", HOLD, *folders])
    for one in ended:
        assert one.code == 0, one.stderr
        told = [x for x in one.stdout.splitlines() if x.startswith(("HELD", "REFUSED"))]
        assert re.match(r"REFUSED --workdir .*own[01]: process 1 \(.+\) does not see", told[0])
        assert re.match(r"REFUSED .*taken is being trained in by process \d+", told[1])
        assert told[2:] == ["HELD"]


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from hyper_t5 import checkpoint, distributed
distributed.initialize(heartbeat=5)
import checkpoint_test as t
saver = checkpoint.Checkpointer(sys.argv[1], keep=3)
step = (checkpoint.latest_step(sys.argv[1]) or 0)
print("FROM", step, flush=True)
while True:
    step += 1
    saver.save(step, t.on_mesh(t.large_state(step), 2), t.META)
    print("BEGUN", step, flush=True)
    saver.wait()
    print("SAVED", step, flush=True)
"""


def large_state(step: int) -> dict[str, Any]:
    """Tens of files a save, so that a kill comes in the midst of one."""
    rng = np.random.default_rng(step)
    params = {f"{i}": {"both": rng.normal(size=(64, 256)).astype(np.float32)} for i in range(20)}
    return {"params": params, "step": np.int32(step)}


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_kill_at_any_moment_loses_that_save_alone(tmp_path: Path, hosts: int) -> None:
    moments = np.random.default_rng(hosts)
    argv = ["-W", "ignore", "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    env = {} if hosts > 1 else {"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": ""}
    env |= {} if hosts > 1 else {"JAX_PROCESS_ID": ""}
    in_midst, last = 0, 0
    for _ in range(5):
        with procs.start_hosts(argv, hosts, 8 // hosts, env=env) as started:
            procs.wait_for(started[0], f"BEGUN {last + 3}")
            time.sleep(moments.uniform(0.0, 0.2))
            started[int(moments.integers(hosts))].send(signal.SIGKILL)
            ended = procs.join(started, 60)
        assert any(one.code == -signal.SIGKILL for one in ended)
        assert int(ended[0].stdout.split("FROM ")[1].split()[0]) == last
        said = [int(line.split()[1]) for line in ended[0].stdout.splitlines() if "SAVED" in line]
        begun = [int(line.split()[1]) for line in ended[0].stdout.splitlines() if "BEGUN" in line]
        last = checkpoint.latest_step(tmp_path) or 0
        assert max(said, default=last) <= last <= begun[-1] + 1
        in_midst += (folder_of(tmp_path, last + 1).with_suffix(".tmp")).exists()
        restored, meta = checkpoint.restore(tmp_path, None, on_mesh(large_state(0), 4))
        assert meta["step"] == last
        assert_same(restored, large_state(last))
    assert in_midst, "no kill came in the midst of a save"
