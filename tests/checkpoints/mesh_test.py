"""Checkpoints between meshes, and between runs of one and of two processes."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hyper_t5.checkpoints import checkpoint, workdir
from tests.support import processes
from tests.support.states import (
    META,
    assert_same,
    flip_bit,
    folder_of,
    many_leaves,
    numpy_state,
    on_mesh,
    saved_steps,
)

pytestmark = pytest.mark.smoke

ROOT = str(Path(__file__).parents[2])


def test_restored_leaves_have_the_shardings_of_the_target(tmp_path: Path) -> None:
    """An uncommitted scalar can enter a jit over the whole mesh."""
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
        restored, _ = checkpoint.restore(tmp_path, None, target)
        assert (restored["table"].sharding, restored["count"].sharding) == (rows, whole)
        total = jax.jit(lambda s: s["table"].sum() * s["scalar"] + s["count"])(restored)
        assert total == 2 * size * 2 + 3


@pytest.mark.parametrize(("written", "read"), [(2, 1), (1, 2), (8, 4), (1, 8), (4, 4)])
def test_any_mesh_reads_a_checkpoint_of_another(tmp_path: Path, written: int, read: int) -> None:
    values = numpy_state()
    checkpoint.save(tmp_path, 1, on_mesh(values, written), META)
    target = on_mesh(numpy_state(1), read)
    restored, _ = checkpoint.restore(tmp_path, None, target)
    assert_same(restored, values)
    for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == like.sharding
    assert_same(checkpoint.load_subtree(tmp_path, "params")[0], values["params"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_damage_is_detected_on_another_mesh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, target = numpy_state(1), numpy_state(2), on_mesh(numpy_state(), 1)
    checkpoint.save(tmp_path, 1, on_mesh(old, 4), META)
    checkpoint.save(tmp_path, 2, on_mesh(new, 4), META)
    detected = 0
    for file in (folder_of(tmp_path, 2) / "state" / "ocdbt.process_0" / "d").iterdir():
        intact = file.read_bytes()
        for position in (0.1, 0.3, 0.5, 0.7, 0.9):
            flip_bit(file, position)
            caplog.clear()
            restored, meta = checkpoint.restore(tmp_path, None, target)
            assert_same(restored, {1: old, 2: new}[meta["step"]])
            detected += "checkpoints/2 is damaged: leaf " in caplog.text
            file.write_bytes(intact)
    assert detected > 3


def test_the_record_has_every_shard(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, on_mesh(numpy_state(), 2), META)
    record = json.loads((folder_of(tmp_path, 1) / "COMMITTED.json").read_text())
    leaves = record["record"]["leaves"]
    assert list(leaves["params/rows"]["shards"]) == ["0:4,0:1000", "4:8,0:1000"]
    assert len(leaves["params/both"]["shards"]) == 8
    assert leaves["params/whole"]["dtype"] == "float32"
    assert list(leaves["step"]["shards"]) == [""]


# Arguments: the repository, the run, and three workdirs to lock: own to process 0, own to process
# 1, locked by another run, free.
TWO = """
import errno, logging, sys

import jax
sys.path.insert(0, sys.argv[1])
import numpy as np
from hyper_t5.checkpoints import arrays, checkpoint, workdir
from hyper_t5.parallel import distributed
from hyper_t5.utils.errors import UserError
from tests.support.states import META, assert_same, numpy_state, on_mesh
logging.basicConfig(format="%(message)s")
distributed.initialize(heartbeat_timeout=20)
run, process = sys.argv[2], jax.process_index()

workdir.TOKEN_READS = 10
for folder in (sys.argv[3 + process], sys.argv[5], sys.argv[6]):
    try:
        with workdir.lock(folder):
            print("LOCKED", flush=True)
    except UserError as error:
        print("REFUSED", error, flush=True)

# One process of eight devices wrote steps 1 and 2; here are two of four.
target = on_mesh(numpy_state(), 4)
restored, meta = checkpoint.restore(run, None, target)
assert meta["step"] == 2
assert_same(restored, numpy_state(2))
assert_same(checkpoint.load_subtree(run, "params")[0], numpy_state(2)["params"])

# Both skip a checkpoint in which one of them detects damage.
read = arrays.read_leaves
def read_damaged(folder, *args):
    if process == 1 and folder.parent.name == "2":
        raise checkpoint.DamagedError("leaf params/rows does not match its checksum")
    return read(folder, *args)
arrays.read_leaves = read_damaged
restored, meta = checkpoint.restore(run, None, target)
assert meta["step"] == 1
assert_same(restored, numpy_state(1))

saver = checkpoint.Checkpointer(run, keep=10)
saver.save(3, on_mesh(numpy_state(3), 2), META)
saver.wait()

# A full disk of one process ends the save of both.
start = arrays.start_write
def fail(*args):
    if process == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return start(*args)
arrays.start_write = fail
saver.save(4, on_mesh(numpy_state(4), 2), META)
try:
    saver.wait()
except UserError as error:
    print("FAILED", error, flush=True)
"""


def test_two_processes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoint.save(run, step, on_mesh(numpy_state(step), 1), META)
    folders = [str(tmp_path / name) for name in ("own0", "own1", "taken", "free")]
    with workdir.lock(folders[2]):
        results = processes.run_processes(["-W", "ignore", "-c", TWO, ROOT, str(run), *folders])
    for result in results:
        assert result.code == 0, result.stderr
        own, taken, free, failed = [x for x in result.stdout.splitlines() if x.split()[0].isupper()]
        assert re.match(r"REFUSED --workdir .*own[01]: process 1 \(.+\) does not see", own)
        assert re.match(r"REFUSED .*taken is being trained in by process \d+", taken)
        assert free == "LOCKED"
        assert re.match(r"FAILED .*checkpoints/4: process 1: .*No space left", failed)
        assert "Traceback" not in result.stderr
    warning = "checkpoints/2 is damaged: process 1: leaf params/rows"
    assert warning in results[0].stderr
    assert warning not in results[1].stderr
    assert saved_steps(run) == ["1", "2", "3"]
    assert sorted(file.name for file in folder_of(run, 3).iterdir()) == [
        "COMMITTED.json",
        "meta.json",
        "state",
    ]
    parts = {folder.name for folder in (folder_of(run, 3) / "state").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    for rows in (1, 2):
        restored, meta = checkpoint.restore(run, None, on_mesh(numpy_state(), rows))
        assert meta["step"] == 3
        assert_same(restored, numpy_state(3))
    # Orbax itself can read it.
    with ocp.PyTreeCheckpointer() as orbax:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), numpy_state())
        plain = orbax.restore(folder_of(run, 3) / "state", restore_args=args)
    assert np.array_equal(plain["params"]["inner"], numpy_state(3)["params"]["inner"])


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from hyper_t5.checkpoints import checkpoint
from hyper_t5.parallel import distributed
from tests.support.states import META, many_leaves, on_mesh
distributed.initialize(heartbeat_timeout=5)
saver = checkpoint.Checkpointer(sys.argv[2], keep=3)
step = checkpoint.latest_step(sys.argv[2]) or 0
print("FROM", step, flush=True)
while True:
    step += 1
    saver.save(step, on_mesh(many_leaves(step), 2), META)
    print("BEGUN", step, flush=True)
    saver.wait()
    print("SAVED", step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_kill_at_any_moment_loses_that_save_alone(tmp_path: Path, count: int) -> None:
    moments = np.random.default_rng(count)
    argv = ["-W", "ignore", "-c", KILLED, ROOT, str(tmp_path)]
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    env = dict.fromkeys(names, "") if count == 1 else {}
    interrupted, last = 0, 0
    for _ in range(5):
        with processes.start_processes(argv, count, 8 // count, env=env) as started:
            processes.wait_for(started[0], f"BEGUN {last + 3}")
            time.sleep(moments.uniform(0.0, 0.2))
            started[int(moments.integers(count))].send_signal(signal.SIGKILL)
            results = processes.join(started, 60)
        assert any(result.code == -signal.SIGKILL for result in results)
        steps = {
            name: [int(step) for step in re.findall(rf"^{name} (\d+)$", results[0].stdout, re.M)]
            for name in ("FROM", "BEGUN", "SAVED")
        }
        assert steps["FROM"] == [last]
        last = checkpoint.latest_step(tmp_path) or 0
        assert max(steps["SAVED"], default=0) <= last <= steps["BEGUN"][-1] + 1
        interrupted += folder_of(tmp_path, last + 1).with_suffix(".tmp").exists()
        restored, meta = checkpoint.restore(tmp_path, None, on_mesh(many_leaves(0), 4))
        assert meta["step"] == last
        assert_same(restored, many_leaves(last))
    assert interrupted, "no kill interrupted a save"
