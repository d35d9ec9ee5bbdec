"""Lanes: padded adapters have the same effect, and rows are independent of their neighbours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5.adapters import AdapterSpec, LoraSpec
from tests.support.tiny_model import (
    CONFIG,
    EVERYTHING,
    LORA,
    ids,
    logits,
    off,
    params,
    random_adapters,
)

lane = pytest.importorskip("hyper_t5.serving.lane")


@pytest.mark.parametrize("bias", ["hf", "zero"])
def test_padded_adapters_have_the_same_effect(bias: str) -> None:
    own = EVERYTHING[bias]
    wide = ad.AdapterSpec(
        **{
            field: getattr(ad._composed_spec(own, 3), field)
            for field in ("lora", "prefix", "bottleneck", "memory")
        }
    )
    adapters = random_adapters(own, 1)
    empty = jax.device_get(ad.zeros(wide, CONFIG, 1))
    padded = lane.pad_adapters(adapters, empty)
    ad.check(padded, CONFIG, "padded")
    inputs, targets = ids(2, 7), ids(2, 5, seed=1)
    plain = logits(inputs, targets, adapters, weights=params())
    real = np.asarray(targets) > 0
    assert off(logits(inputs, targets, padded, weights=params())[real], plain[real]) < 1e-5


def test_a_scale_of_another_lane_is_kept() -> None:
    own = AdapterSpec(lora=LoraSpec(("enc_self.query", "dec_mlp.wo"), 2, 6.0))
    wide = AdapterSpec(lora=LoraSpec(("enc_self.query", "dec_cross.key", "dec_mlp.wo"), 5, 4.0))
    assert lane.fits(own, wide)
    assert not lane.fits(wide, own)
    adapters = random_adapters(own, 1)
    padded = lane.pad_adapters(adapters, jax.device_get(ad.zeros(wide, CONFIG, 1)))
    inputs, targets = ids(2, 7), ids(2, 5, seed=1)
    outputs = [logits(inputs, targets, x, weights=params()) for x in (adapters, padded)]
    real = np.asarray(targets) > 0
    assert off(outputs[0][real], outputs[1][real]) < 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(lora=LoraSpec(("enc_self.out",), 1, 1.0)),  # another target
        AdapterSpec(lora=LoraSpec(("enc_self.query",), 99, 1.0)),  # a larger rank
        AdapterSpec(memory=1),
    ],
)
def test_what_does_not_fit_a_lane(spec: AdapterSpec) -> None:
    wide = AdapterSpec(lora=LoraSpec(("enc_self.query",), 4, 1.0))
    assert not lane.fits(spec, wide)
    assert lane.fits(AdapterSpec(), wide)


def make_lane(**sizes: Any) -> Any:
    return lane.Lane(CONFIG, params(), LORA, **{"slots": 3, "input_length": 12, **sizes})


def decode(served: Any, rows: list[Any], slots: list[int], steps: int) -> np.ndarray:
    served.insert(rows, slots)
    return np.stack([served.step().tokens[slots] for _ in range(steps)], 1)


def test_a_row_does_not_depend_on_its_neighbours_or_slot() -> None:
    adapters = [random_adapters(LORA, 1), None]
    served = make_lane(output_length=6)
    rows = [
        lane.LaneRow([5, 6, 7, 1], served.pad(adapters[0]), 0.0, 1.0, 0),
        lane.LaneRow([9, 3, 1], served.pad(adapters[1]), 0.0, 1.0, 0),
    ]
    alone = [decode(served, [row], [0], 5)[0] for row in rows]
    together = decode(served, rows, [2, 1], 5)
    np.testing.assert_array_equal(together, alone)
    # A row that joins later has the same tokens, and does not disturb the one that runs.
    served.insert(rows[:1], [0])
    first = [served.step().tokens[0] for _ in range(2)]
    served.insert(rows[1:], [2])
    later = [served.step().tokens[[0, 2]] for _ in range(3)]
    np.testing.assert_array_equal([*first, *(x[0] for x in later)], alone[0])
    np.testing.assert_array_equal([x[1] for x in later], alone[1][:3])


def test_sampling_depends_on_the_seed_of_the_row_alone() -> None:
    served = make_lane(output_length=6)
    row = lane.LaneRow([5, 6, 7, 1], served.pad(None), 1.5, 1.0, 7)
    first = decode(served, [row], [0], 6)[0]
    again = decode(served, [row._replace(seed=8), row], [0, 2], 6)
    np.testing.assert_array_equal(again[1], first)
    assert not np.array_equal(again[0], first)
    greedy = decode(served, [row._replace(temperature=0.0)], [1], 6)[0]
    nearly = decode(served, [row._replace(top_p=1e-6)], [1], 6)[0]
    np.testing.assert_array_equal(greedy, nearly)
