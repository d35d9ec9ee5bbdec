"""Packed rows: what is put in comes out, computed as if each example had a row of its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs
import tiny
from hyper_t5 import config as config_lib
from hyper_t5 import data, losses, model, packing, t5, train
from hyper_t5.errors import UserError
from hyper_t5.taskfile import Row, TaskRows

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), max_size=20)


def ids(length: int, first: int) -> np.ndarray:
    return np.arange(first, first + length, dtype=np.int32)


@given(LENGTHS, st.integers(1, 3))
def test_what_is_packed_comes_out_again(lengths: list[tuple[int, int]], rows: int) -> None:
    bins = packing.Bins(rows, 16, 8)
    examples = [(ids(a, 100 * i + 2), ids(b, 100 * i + 52)) for i, (a, b) in enumerate(lengths)]
    kept = [example for example in examples if bins.add(*example)]
    batch = packing.empty(1, rows, 16, 8)
    bins.fill(batch, 0)
    batch["hyper_inputs"] = np.ones((1, 1), np.int32)
    assert packing.examples_of(batch) == len(kept)
    for side in packing.SIDES:
        found, segments = batch[f"{side}s"], batch[f"{side}_segments"]
        assert ((found > 0) == (segments > 0)).all()
        starts = np.diff(segments, axis=-1, prepend=0) > 0
        positions = batch[f"{side}_positions"]
        assert (positions[starts] == 0).all()
        inside = (segments > 0) & ~starts
        assert (positions[inside] == np.roll(positions, 1, -1)[inside] + 1).all()
    if not kept:
        return
    alone = packing.unpack(batch)
    assert alone["inputs"].shape == (1, len(kept), 16)
    pairs = {
        (tuple(x[x > 0]), tuple(y[y > 0]))
        for x, y in zip(alone["inputs"][0], alone["targets"][0], strict=True)
    }
    assert pairs == {(tuple(x), tuple(y)) for x, y in kept}


def packed_ids(seed: int = 0) -> dict[str, np.ndarray]:
    """Two tasks of two rows with several random examples each, of the tiny vocabulary."""
    rng = np.random.default_rng(seed)
    batch = packing.empty(2, 2, 14, 10)
    for task in range(2):
        bins = packing.Bins(2, 14, 10)
        for _ in range(6):
            made = [rng.integers(2, 60, rng.integers(1, n), dtype=np.int32) for n in (6, 4)]
            bins.add(*(np.append(x, np.int32(1)) for x in made))
        bins.fill(batch, task)
    return batch


@pytest.mark.parametrize("bias", tiny.EVERYTHING)
def test_every_adapter_does_the_same_packed(bias: str) -> None:
    batch = packed_ids()
    alone = packing.unpack(batch)
    spec = tiny.EVERYTHING[bias]
    adapters = tiny.random_adapters(spec, 2)

    def logits(batch: dict[str, np.ndarray]) -> np.ndarray:
        rows = {
            k: jnp.asarray(v.reshape(-1, v.shape[-1])) for k, v in batch.items() if k != "tasks"
        }
        apply = functools.partial(t5.T5(tiny.CONFIG).apply, {"params": tiny.params()})
        made = np.asarray(apply(adapters=adapters, **rows))
        return made.reshape(*batch["targets"].shape, -1)

    packed, unpacked = logits(batch), logits(alone)
    segments = batch["target_segments"]
    for task in range(2):
        example = 0
        for row in range(2):
            for segment in range(1, segments[task, row].max() + 1):
                found = packed[task, row][segments[task, row] == segment]
                wanted = unpacked[task, example][: len(found)]
                np.testing.assert_allclose(found, wanted, atol=2e-5)
                example += 1
        assert example > 3


def tasks() -> list[TaskRows]:
    """Four tasks whose examples differ in length, of words of the embedded suite."""
    words = "abcdefghijklmnopqrstuvwxyz"
    made = []
    for index, name in enumerate(("copy", "swap", "last", "first")):
        rows = []
        for i in range(12):
            text = " ".join(words[(i + j) % 26] for j in range(1 + (i * 5 + index) % 4))
            rows.append(Row(f"{i}", text, (text[-1] if i % 2 else f"{text[0]} {text[-1]}",)))
        made.append(TaskRows(name, (f"{name} the letters.",), (), tuple(rows)))
    return made


SYSTEMS: dict[str, dict[str, Any]] = {
    "hyper_prefix": {
        "hypermodel__reader": "decoder_queries",
        "adapter__prefix_sites": ("enc_self", "dec_self", "dec_cross"),
    },
    "hyper_lora_plus": {},
    "hint": {},
    "fid_icl": {},
    "concat": {"data__variant": "def_pos_1"},
    "shared_bottleneck": {},
}


@pytest.mark.parametrize("system", runs.marked(SYSTEMS))
def test_packed_and_unpacked_losses_and_gradients_agree(system: str) -> None:
    fields: dict[str, Any] = {
        "data__pack": True,
        "data__input_length": 24,
        "data__target_length": 12,
    }
    config = runs.make_config(
        system=system, backbone__path="elsewhere", **fields, **SYSTEMS[system]
    )
    config.backbone.path = ""  # at random
    m, backbone, trained, frozen = model.start(config)
    sampler = data.EpisodeSampler(tasks(), backbone.vocab, config.data, 0, m.choice.layout)
    batch = sampler.batch(0)
    alone = packing.unpack(batch)
    assert batch["inputs"].shape[1] == 2
    assert alone["inputs"].shape[1] > 4, "nothing was packed"

    def gradient(batch: Any) -> Any:
        def loss(trained: Any) -> Any:
            return train.loss_sums(m, trained, frozen, batch, None)

        return jax.jit(jax.grad(loss, has_aux=True))(trained)

    (packed, sums), (unpacked, wanted) = gradient(batch), gradient(alone)
    assert sums["tokens"] > 0
    for name in sums:
        np.testing.assert_allclose(sums[name], wanted[name], rtol=1e-5, err_msg=name)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(unpacked))
    for found, want in zip(jax.tree.leaves(packed), jax.tree.leaves(unpacked), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5 * largest)


def test_exact_is_by_example() -> None:
    """Of three examples in a packed row the second has a wrong token."""
    targets = jnp.array([[5, 1, 6, 1, 7, 1, 0]])
    segments = jnp.array([[1, 1, 2, 2, 3, 3, 0]])
    likeliest = jnp.array([[5, 1, 9, 1, 7, 1, 4]])
    logits = 20.0 * jax.nn.one_hot(likeliest, 10)
    sums = losses.token_loss(logits, targets, targets > 0, segments=segments)
    assert (int(sums["rows"]), int(sums["exact"]), int(sums["correct"])) == (3, 2, 5)


def test_rows_are_filled_and_nothing_shown_is_asked() -> None:
    config = runs.make_config(backbone__path="x", data__pack=True, data__input_length=24).data
    vocab = runs.vocabulary()
    sampler = data.EpisodeSampler(tasks(), vocab, config, 0)
    for step in range(20):
        batch = sampler.batch(step)
        alone = packing.unpack(batch)
        for slot in range(len(batch["tasks"])):
            shown = vocab.decode(batch["hyper_inputs"][slot].tolist())
            asked = [vocab.decode(row[row > 0].tolist()) for row in alone["inputs"][slot]]
            asked = [text for text in asked if text]
            assert len(asked) == len(set(asked)), "a row twice"
            for text in asked:
                assert f"Input: {text}\n" not in shown + "\n"
    assert sampler.stats["examples"] > 2.5 * sampler.stats["rows"]


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_what_is_counted_is_in_the_batch(layout: str) -> None:
    """Rows that are encoded and find no room count nothing."""
    fields: dict[str, Any] = {"data__pack": True, "data__target_length": 2, "data__input_length": 5}
    config = runs.make_config(backbone__path="x", **fields).data
    if layout == "concat":
        config.concat_length = 30
    sampler = data.EpisodeSampler(tasks(), runs.vocabulary(), config, 0, layout)
    found = sum(packing.examples_of(sampler.batch(step)) for step in range(10))
    stats = sampler.stats
    assert stats["examples"] == found
    assert 0 < stats["truncated_targets"] < found
    assert stats["shown_examples"] <= 2 * found


def test_what_cannot_be_packed_is_refused() -> None:
    for fields, message in (
        ({"system": "hyperdecoder"}, "has adapters for each example"),
        ({"stage": "hyperpretrain"}, "is for tasks"),
    ):
        config = runs.make_config(backbone__path="x", **fields)
        config.data.pack = True
        with pytest.raises(UserError, match=f"data.pack=True.*{message}"):
            config_lib.validate(config)
