"""Meshes: where parameters lie, and that any mesh trains to the same numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import runs
from hyper_t5 import model, sharding, train
from hyper_t5.bench.steps import Shapes, random_batch
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import SYSTEMS


def placement(**fields: Any) -> sharding.Placement:
    config = runs.make_config(backbone__path="x")
    config.mesh.update(fields)
    return sharding.make_placement(config.mesh)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((1, 2, -1), (1, 2, 4)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 8, 1), (1, 8, 1)),
    ],
)
def test_a_mesh_has_all_devices(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    made = placement(slices=sizes[0], data=sizes[1], model=sizes[2]).mesh
    assert made.devices.shape == shape
    assert made.axis_names == sharding.AXES


def test_a_mesh_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for sizes in ({"data": 16}, {"data": -1, "model": 3}, {"data": 0}):
        with pytest.raises(UserError, match="do not make the 8 devices"):
            placement(**sizes)
    assert placement(data=3).mesh.devices.size == 3
    assert "3 of 8 devices" in capsys.readouterr().out


def test_a_batch_must_fit_the_mesh() -> None:
    wide = placement(data=4, model=2)
    sharding.check_batch(8, 2, wide)
    with pytest.raises(UserError, match=r"tasks_per_batch=12 cannot be cut .* multiple of 8"):
        sharding.check_batch(12, 2, wide)


MESHES = {
    "8x1": (1, 8, 1),
    "2x4": (1, 2, 4),
    "1x8": (1, 1, 8),
    "2x2x2": (2, 2, 2),
}


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
def test_any_mesh_makes_the_same_numbers(system: str, meshes: list[str]) -> None:
    """Losses and counts, gradients, and decodes; microbatches and a remat policy too."""
    config = runs.make_config(system=system, backbone__path="x", data__tasks_per_batch=16)
    config.backbone.path, config.train.microbatches, config.model.remat = "", 2, "minimal"
    config.mesh.data = 1
    m, _, trained, frozen = model.start(config)
    # A hypermodel that emits nothing would have every mesh decode the same.
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype), trained)
    trained, frozen = jax.tree.map(np.asarray, (noisy, frozen))
    optimizer = optax.sgd(1.0)  # what the parameters lose is the gradient
    batch = random_batch(Shapes(16, 2, 12, 9, 5), m.sizes.vocab_size)
    found = {}
    for name, (slices, parts, cut) in ({"one": (1, 1, 1)} | {k: MESHES[k] for k in meshes}).items():
        place = placement(slices=slices, data=parts, model=cut)
        m = model.build(config, m.sizes, place)
        params = sharding.put({**frozen, **trained}, model.placements(m))
        placed = train.place_state(m, optimizer, trained)
        state = train.start_state(optimizer, {k: params[k] for k in trained}, placed)
        still = {k: params[k] for k in frozen}
        step = train.make_step(m, optimizer, config, placed)
        at = sharding.put_batch(batch, place)
        rows = at["inputs"][:, 0]
        ids = model.generate(m, params, at["hyper_inputs"], at["tasks"])
        made = model.respond(m, params, ids, rows, at["tasks"], steps=6)
        state, sums = step(state, still, at, jax.random.key(0))
        assert jax.tree.map(lambda x: x.sharding, state) == placed
        found[name] = jax.device_get((sums, state["params"], made))
    sums, params, ids = found.pop("one")
    grads = jax.tree.map(np.subtract, trained, params)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    for name, (other_sums, other_params, other_ids) in found.items():
        for key in sums:
            label = f"{name} {key}"
            np.testing.assert_allclose(other_sums[key], sums[key], rtol=1e-5, err_msg=label)
        other_grads = jax.tree.map(np.subtract, trained, other_params)
        for x, y in zip(*map(jax.tree.leaves, (grads, other_grads)), strict=True):
            np.testing.assert_allclose(y, x, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_array_equal(other_ids, ids, err_msg=name)


def test_a_parameter_without_a_rule_is_named() -> None:
    config = runs.make_config(system="hint", backbone__path="x")
    rules = tuple(rule for rule in config.mesh.rules if not rule.startswith("joined_kv"))
    m = model.build(config, runs.SIZES, placement(data=2, model=4, rules=rules))
    with pytest.raises(UserError, match=r"the axis joined_kv of parameter \S+/\S+/kernel; add"):
        model.placements(m)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

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
    ],
)
def test_shares_of_hosts(owners: str, sizes: tuple[int, int], shares: list[str]) -> None:
    devices = np.array([Device(i, int(owner)) for i, owner in enumerate(owners)])
    place = sharding.Placement(Mesh(devices.reshape(1, *sizes), sharding.AXES), ())
    found = [sharding.share_of(place, process) for process in range(4)]
    assert [f"{share}/{count}" for share, count in found] == shares


def test_hosts_that_share_parts_unequally_are_refused() -> None:
    devices = np.array([Device(i, int(owner)) for i, owner in enumerate("0111")])
    place = sharding.Placement(Mesh(devices.reshape(1, 2, 2), sharding.AXES), ())
    with pytest.raises(UserError, match=r"no equal shares; choose mesh\.model"):
        sharding.share_of(place, 0)


def test_what_a_mesh_does_not_divide_is_known() -> None:
    config = runs.make_config(system="hyper_lora", backbone__path="x")
    place = placement(data=2, model=4)
    m = model.build(config, runs.SIZES, place)
    found = place.uneven(model.logical_axes(m), model.shapes_of(m))
    assert found["heads"] == runs.SIZES.num_heads == 2
    assert "mlp" not in found


def test_adapters_lie_with_their_tasks_and_heads() -> None:
    kinds = ("hyper_prefix", "hyper_lora", "hyperdecoder")
    place = placement(data=4, model=2)
    cut: dict[str, Any] = {}
    for system in kinds:
        config = runs.make_config(system=system, backbone__path="x")
        m = model.build(config, runs.SIZES, place)
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.shapes_of(m))
        params = sharding.put(params, model.placements(m))
        ids = sharding.put(np.ones((8, 12), np.int32), place.batch)
        made = model.generate(m, params, ids, sharding.put(np.zeros(8, np.int32), place.batch))
        assert made is not None
        leaves = jax.tree_util.tree_leaves_with_path(made.tree)
        cut |= {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in leaves}
    for name, x in cut.items():
        assert x.sharding.shard_shape(x.shape)[1] == x.shape[1] // 4, name
    whole, part = (f(cut["enc_self/prefix/key"]) for f in (np.shape, _shard))
    assert part[3] == whole[3] // 2  # heads
    assert _shard(cut["enc_self/query/b"])[3] == cut["enc_self/query/b"].shape[3] // 2
    assert _shard(cut["dec_mlp/bottleneck/down"])[2:] == cut["dec_mlp/bottleneck/down"].shape[2:]


def _shard(x: jax.Array) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_parameter_of_every_system_has_a_place(system: str) -> None:
    slots = 3 if system.startswith("task_") else 0
    config = runs.make_config(system=system, backbone__path="x", adapter__task_slots=slots)
    m = model.build(config, runs.SIZES, placement(data=2, model=4))
    shapes, placed = model.shapes_of(m), model.placements(m)
    for branch, tree in shapes.items():
        places = jax.tree.leaves(placed[branch])
        for array, where in zip(jax.tree.leaves(tree), places, strict=True):
            where.shard_shape(array.shape)  # raises where it does not divide
        if branch in m.choice.trains:
            assert any("data" in where.spec for where in places), "no ZeRO"
        else:
            assert not any("data" in where.spec for where in places)
