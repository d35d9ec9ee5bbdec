"""Meshes and shardings, and equal results on every mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from hyper_t5 import model, runs
from hyper_t5.bench.steps import Shapes, random_batch
from hyper_t5.hypermodels import BACKBONE, SYSTEMS
from hyper_t5.parallel import sharding
from hyper_t5.training import step as step_lib
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs


def placement(**fields: Any) -> sharding.Placement:
    config = tiny_runs.make_config(backbone__path="x")
    config.mesh.update(fields)
    return sharding.make_placement(config.mesh)


def test_meshes(capsys: pytest.CaptureFixture[str]) -> None:
    for sizes, shape in {
        (1, -1, 1): (1, 8, 1),
        (1, 2, -1): (1, 2, 4),
        (2, -1, 2): (2, 2, 2),
        (1, 8, 1): (1, 8, 1),
    }.items():
        mesh = placement(slices=sizes[0], data=sizes[1], model=sizes[2]).mesh
        assert mesh.devices.shape == shape
        assert mesh.axis_names == sharding.AXES
    for fields in ({"data": 16}, {"data": -1, "model": 3}, {"data": 0}):
        with pytest.raises(UserError, match="do not multiply to the 8 devices"):
            placement(**fields)
    with pytest.raises(UserError, match=r"mesh\.rules: 'heads=x' must be NAME=AXIS"):
        placement(rules=("heads=x",))
    assert placement(data=3).mesh.devices.size == 3
    assert "3 of 8 devices" in capsys.readouterr().out
    sharding.check_batch(8, 2, placement(data=4, model=2))
    with pytest.raises(UserError, match=r"tasks_per_batch=12 cannot be split .* multiple of 8"):
        sharding.check_batch(12, 2, placement(data=4, model=2))


MESHES = {"8x1": (1, 8, 1), "2x4": (1, 2, 4), "1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}


@pytest.mark.parametrize(
    ("system", "meshes"),
    [
        ("hyper_prefix", ["2x2x2"]),
        pytest.param("hyper_prefix", ["8x1", "2x4", "1x8"], marks=pytest.mark.slow),
        pytest.param("hyperdecoder", [*MESHES], marks=pytest.mark.slow),
        pytest.param("hyper_lora_plus", [*MESHES], marks=pytest.mark.slow),
        pytest.param("hint", [*MESHES], marks=pytest.mark.slow),
    ],
)
def test_any_mesh_computes_the_same_numbers(system: str, meshes: list[str]) -> None:
    """Losses and counts, gradients, and decoded ids; with microbatches and a remat policy."""
    config = tiny_runs.make_config(system=system, backbone__path="x", data__tasks_per_batch=16)
    config.backbone.path, config.train.microbatches, config.model.remat = "", 2, "minimal"
    config.mesh.data = 1
    m, _, trained, frozen = runs.init_run(config)
    # A hypermodel that emits zeros would decode alike on every mesh.
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype), trained)
    trained, frozen = jax.tree.map(np.asarray, (noisy, frozen))
    optimizer = optax.sgd(1.0)  # the change of the parameters is the gradient
    host_batch = random_batch(Shapes(16, 2, 12, 9, 5), m.sizes.vocab_size)
    outputs = {}
    for name, (slices, data, parts) in ({"1": (1, 1, 1)} | {k: MESHES[k] for k in meshes}).items():
        mesh = placement(slices=slices, data=data, model=parts)
        m = model.build_model(config, m.sizes, mesh)
        params = sharding.device_put({**frozen, **trained}, model.param_shardings(m))
        shardings = step_lib.state_shardings(m, optimizer, trained)
        state = step_lib.init_state(optimizer, {k: params[k] for k in trained}, shardings)
        step = step_lib.make_step(m, optimizer, config, shardings)
        batch = sharding.device_put_batch(host_batch, mesh)
        adapters = model.generate_adapters(m, params, batch["hyper_inputs"], batch["tasks"])
        rows = batch["inputs"][:, 0]
        ids = model.generate_tokens(m, params, adapters, rows, batch["tasks"], steps=6)
        state, sums = step(state, {k: params[k] for k in frozen}, batch, jax.random.key(0))
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        outputs[name] = jax.device_get((sums, state["params"], ids))
    sums, params, ids = outputs.pop("1")
    grads = jax.tree.map(np.subtract, trained, params)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    for name, (other_sums, other_params, other_ids) in outputs.items():
        for key in sums:
            label = f"{name} {key}"
            np.testing.assert_allclose(other_sums[key], sums[key], rtol=1e-5, err_msg=label)
        other_grads = jax.tree.map(np.subtract, trained, other_params)
        for x, y in zip(*map(jax.tree.leaves, (grads, other_grads)), strict=True):
            np.testing.assert_allclose(y, x, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_array_equal(other_ids, ids, err_msg=name)


def test_a_parameter_without_a_rule_is_named() -> None:
    config = tiny_runs.make_config(system="hint", backbone__path="x")
    rules = tuple(rule for rule in config.mesh.rules if not rule.startswith("joined_kv"))
    m = model.build_model(config, tiny_runs.SIZES, placement(data=2, model=4, rules=rules))
    with pytest.raises(UserError, match=r"the axis joined_kv of parameter \S+/\S+/kernel; add"):
        model.param_shardings(m)


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh uses."""

    id: int
    process_index: int
    platform: str = "cpu"


@pytest.mark.parametrize(
    ("owners", "sizes", "shares"),
    [
        ("00112233", (8, 1), ["0/4", "1/4", "2/4", "3/4"]),
        ("01012323", (8, 1), ["0/4", "1/4", "2/4", "3/4"]),
        ("00112233", (2, 4), ["0/2", "0/2", "1/2", "1/2"]),
        ("01012323", (4, 2), ["0/2", "0/2", "1/2", "1/2"]),
        ("00112233", (1, 8), ["0/1", "0/1", "0/1", "0/1"]),
        ("0111", (2, 2), None),
    ],
)
def test_shares_of_processes(owners: str, sizes: tuple[int, int], shares: list[str] | None) -> None:
    devices = np.array([Device(i, int(owner)) for i, owner in enumerate(owners)])
    mesh = sharding.Placement(Mesh(devices.reshape(1, *sizes), sharding.AXES), ())
    if shares is None:
        with pytest.raises(UserError, match=r"not equal shares; choose mesh\.model"):
            sharding.batch_share(mesh, 0)
        return
    pairs = [sharding.batch_share(mesh, process) for process in range(4)]
    assert [f"{index}/{count}" for index, count in pairs] == shares


def test_indivisible_axes() -> None:
    config = tiny_runs.make_config(system="hyper_lora", backbone__path="x")
    mesh = placement(data=2, model=4)
    m = model.build_model(config, tiny_runs.SIZES, mesh)
    sizes = mesh.indivisible_axes(model.logical_axes(m), model.param_shapes(m))
    assert sizes["heads"] == tiny_runs.SIZES.num_heads == 2
    assert "mlp" not in sizes


def test_adapters_are_sharded_by_task_and_head() -> None:
    mesh = placement(data=4, model=2)
    leaves: dict[str, Any] = {}
    for system in ("hyper_prefix", "hyper_lora", "hyperdecoder"):
        config = tiny_runs.make_config(system=system, backbone__path="x")
        m = model.build_model(config, tiny_runs.SIZES, mesh)
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.param_shapes(m))
        params = sharding.device_put(params, model.param_shardings(m))
        ids = sharding.device_put(np.ones((8, 12), np.int32), mesh.batch_sharding)
        tasks = sharding.device_put(np.zeros(8, np.int32), mesh.batch_sharding)
        adapters = model.generate_adapters(m, params, ids, tasks)
        assert adapters is not None
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters.tree):
            leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    shards = {name: x.sharding.shard_shape(x.shape) for name, x in leaves.items()}
    for name, x in leaves.items():
        assert shards[name][1] == x.shape[1] // 4, name
    heads = "enc_self/prefix/key", "enc_self/query/b"
    assert all(shards[name][3] == leaves[name].shape[3] // 2 for name in heads)
    narrow = "dec_mlp/bottleneck/down"
    assert shards[narrow][2:] == leaves[narrow].shape[2:]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_parameter_of_every_system_has_a_sharding(system: str) -> None:
    slots = 3 if system.startswith("task_") else 0
    config = tiny_runs.make_config(system=system, backbone__path="x", adapter__task_slots=slots)
    m = model.build_model(config, tiny_runs.SIZES, placement(data=2, model=4))
    shapes, shardings = model.param_shapes(m), model.param_shardings(m)
    for branch, tree in shapes.items():
        leaves, trained = jax.tree.leaves(shardings[branch]), branch in m.system.trains
        arrays = jax.tree.leaves(tree)
        # Raises where a shape does not divide.
        shards = [leaf.shard_shape(x.shape) for leaf, x in zip(leaves, arrays, strict=True)]
        # Trained branches alone are sharded over data (ZeRO).
        assert any("data" in leaf.spec for leaf in leaves) == trained
        # Nearly all of the backbone is sharded over model, most of a hypermodel over either.
        part = 0.55 if branch != BACKBONE else 0.27 / 2 if trained else 0.27
        assert sum(map(math.prod, shards)) <= part * sum(x.size for x in arrays), branch
