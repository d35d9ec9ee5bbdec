"""Meshes: where parameters lie, and that any mesh trains to the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import runs

from hyper_t5 import model, optim, sharding, train
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
    "one": (1, 1, 1),
    "8x1": (1, 8, 1),
    "2x4": (1, 2, 4),
    "1x8": (1, 1, 8),
    "2x2x2": (2, 2, 2),
}


@pytest.mark.parametrize("system", ["hyper_prefix", "hyper_lora_plus", "hint", "hyperdecoder"])
def test_any_mesh_trains_to_the_same_numbers(system: str) -> None:
    fields: dict[str, Any] = {"system": system, "backbone__path": "x", "optimizer__clip_norm": 1.0}
    config = runs.make_config(**fields, data__tasks_per_batch=8, optimizer__name="adafactor")
    config.optimizer.min_dim_size_to_factor = 8
    config.backbone.path = ""
    _, _, trained, frozen = model.start(config)
    trained, frozen = jax.tree.map(np.asarray, (trained, frozen))
    optimizer = optim.make_optimizer(config.optimizer, 3)
    batch = random_batch(Shapes(8, 2, 12, 9, 5), runs.SIZES.vocab_size)
    found = {}
    for name, (slices, parts, cut) in MESHES.items():
        place = placement(slices=slices, data=parts, model=cut)
        m = model.build(config, runs.SIZES, place)
        placed = train.place_state(m, optimizer, trained)
        state = train.start_state(optimizer, trained, placed)
        still = sharding.put(frozen, {k: model.placements(m)[k] for k in frozen})
        step = train.make_step(m, optimizer, config, placed)
        sums = []
        for _ in range(2):
            at = sharding.put_batch(batch, place)
            state, made = step(state, still, at, jax.random.key(0))
            sums.append(jax.device_get(made))
        assert jax.tree.map(lambda x: x.sharding, state) == placed
        found[name] = (sums, jax.device_get(state["params"]))
    for name in found:
        for one, other in zip(found["one"][0], found[name][0], strict=True):
            for key in one:
                label = f"{name} {key}"
                np.testing.assert_allclose(other[key], one[key], rtol=1e-4, err_msg=label)
        for x, y in zip(*(jax.tree.leaves(found[n][1]) for n in ("one", name)), strict=True):
            np.testing.assert_allclose(y, x, atol=2e-5, err_msg=name)


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
