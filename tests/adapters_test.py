"""What adapters do to the frozen T5, what they must not do, and their folder on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import export, t5
from hyper_t5.adapters import Adapters, AdapterSpec, LoraSpec, PrefixSpec
from hyper_t5.errors import UserError
from tiny import (
    BOTTLENECK,
    CONFIG,
    EVERY_TARGET,
    EVERYTHING,
    LORA,
    PREFIX,
    TIED,
    ids,
    logits,
    off,
    params,
    random_adapters,
)

pytestmark = pytest.mark.smoke

# Two tasks of two rows each.
INPUTS, TARGETS = ids(4, 7), ids(4, 5, seed=1)
# At padding a decoder sees nothing, which is everything alike: what stands there has no meaning.
REAL = np.asarray(TARGETS) > 0
run = functools.partial(logits, weights=params())


def with_mask(adapters: Adapters, hidden: int) -> Adapters:
    """The same prefixes with the first ``hidden`` slots masked, at every site."""
    tree = {site: dict(leaves) for site, leaves in adapters.tree.items()}
    for leaves in tree.values():
        if "prefix" in leaves:
            key = leaves["prefix"]["key"]
            mask = np.broadcast_to(np.arange(key.shape[2]) >= hidden, key.shape[:3])
            leaves["prefix"] = leaves["prefix"] | {"mask": mask}
    return Adapters(tree, adapters.spec)


def change(adapters: Adapters, make: Callable[[str, Any], Any]) -> Adapters:
    """``make(path, copy of the leaf)`` in the place of every leaf."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: make(jax.tree_util.keystr(path), np.array(leaf)), adapters.tree
    )
    return Adapters(tree, adapters.spec)


# ------------------------------------------------------------------------------- no effect


def test_zero_adapters_equal_none() -> None:
    plain = run(INPUTS, TARGETS)
    np.testing.assert_array_equal(run(INPUTS, TARGETS, ad.zeros(LORA, CONFIG, 2)), plain)
    everything = ad.zeros(EVERYTHING["hf"], CONFIG, 2)
    assert off(run(INPUTS, TARGETS, everything)[REAL], plain[REAL]) < 1e-6
    assert off(run(INPUTS, TARGETS, random_adapters(EVERYTHING["hf"], 2)), plain) > 0.1


def test_masked_slots_have_no_effect() -> None:
    adapters = with_mask(random_adapters(EVERYTHING["hf"], 2), hidden=1)

    def poison(path: str, leaf: np.ndarray) -> np.ndarray:
        if ("prefix" in path or "memory" in path) and "mask" not in path:
            leaf[:, :, 0] = 100.0
        return leaf

    found = run(INPUTS, TARGETS, adapters)
    np.testing.assert_array_equal(run(INPUTS, TARGETS, change(adapters, poison)), found)
    # Nor do they move the others: with 'hf' slots count back from the row's first token.
    prefix = dataclasses.replace(PREFIX.prefix or PrefixSpec((), 0), length=2)
    shorter = change(adapters, lambda path, leaf: leaf[:, :, 1:] if "prefix" in path else leaf)
    shorter = Adapters(shorter.tree, dataclasses.replace(shorter.spec, prefix=prefix))
    assert off(run(INPUTS, TARGETS, shorter)[REAL], found[REAL]) < 1e-5


# ------------------------------------------------------------------------------ their effect


def test_merged_lora_equals_applied_lora() -> None:
    spec = AdapterSpec(lora=LoraSpec(EVERY_TARGET, rank=2, alpha=3.0))
    adapters = random_adapters(spec, 1)
    applied = run(INPUTS, TARGETS, adapters)
    merged = logits(INPUTS, TARGETS, weights=export.merge_lora(params(), adapters))
    assert off(merged, applied) < 1e-4
    assert off(run(INPUTS, TARGETS), applied) > 0.1


def test_lora_bias_is_added_and_scaled() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, CONFIG.emb_dim))
    leaf = {k: v[0] for k, v in random_adapters(LORA, 2).tree["enc_mlp"]["wi_0"].items()}
    expected = [
        (x[row] @ leaf["a"][row // 2]) @ leaf["b"][row // 2] + leaf["bias"][row // 2]
        for row in range(4)
    ]
    assert off(jax.jit(t5.lora_delta)(x, leaf), np.stack(expected)) < 1e-5
    # Its scale is inside b and bias, as in PEFT's lora_B.
    scaled = t5._stack_adapters(random_adapters(LORA, 2), {"mlp": "enc_mlp"})["mlp"]["wi_0"]
    assert LORA.lora is not None
    np.testing.assert_array_equal(scaled["bias"][0], leaf["bias"] * 1.5)
    np.testing.assert_array_equal(scaled["b"][0], leaf["b"] * 1.5)
    np.testing.assert_array_equal(scaled["a"][0], leaf["a"])


@pytest.mark.parametrize("kind", ["normed", "raw"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_bottleneck_stands_beside_the_mlp(kind: str, activation: str) -> None:
    spec = dataclasses.replace(BOTTLENECK, activation=activation, input=kind)
    adapters = random_adapters(AdapterSpec(bottleneck=spec), 2)
    rng = np.random.default_rng(0)
    x, normed = (rng.normal(size=(4, 3, CONFIG.emb_dim)).astype(np.float32) for _ in range(2))
    (leaf,) = (t5._stack_adapters(adapters, {"mlp": "dec_mlp"})["mlp"],)
    layer = jax.tree.map(lambda y: y[1], leaf)
    found = jax.jit(t5.bottleneck_delta)(x, normed, layer)
    w = {k: v[1] for k, v in adapters.tree["dec_mlp"]["bottleneck"].items()}
    act = getattr(jax.nn, activation)
    for row in range(4):
        t = row // 2
        hidden = act((normed if kind == "normed" else x)[row] @ w["down"][t] + w["down_bias"][t])
        assert off(found[row], hidden @ w["up"][t] + w["up_bias"][t]) < 1e-5
    # And that is where it is added: zero but for the last bias, which reaches every token.
    plain, zero = run(INPUTS, TARGETS), ad.zeros(AdapterSpec(bottleneck=spec), CONFIG, 2)
    np.testing.assert_array_equal(run(INPUTS, TARGETS, zero), plain)
    for site in ad.MLP_SITES:
        one = ad.zeros(AdapterSpec(bottleneck=spec), CONFIG, 2)
        one.tree[site]["bottleneck"]["up_bias"] += 1.0
        assert off(run(INPUTS, TARGETS, one), plain) > 1e-3, site


def test_memory_is_more_of_the_encoders_output() -> None:
    adapters, taught = random_adapters(AdapterSpec(memory=4), 2), ids(4, 5, seed=1)
    found = run(INPUTS, TARGETS, adapters)
    apply = functools.partial(t5.T5(CONFIG).apply, {"params": params()})
    encoded = apply(INPUTS, method="encode")
    shared = np.repeat(adapters.tree[ad.MEMORY]["states"][0], 2, 0)
    real = np.concatenate([np.tile([False, True, True, True], (4, 1)), INPUTS > 0], 1)
    decoded = t5.Decoder(CONFIG).apply(
        {"params": params()["decoder"]},
        params()["token_embedder"]["embedding"][t5.shift_right(taught)],
        jnp.concatenate([shared, encoded], 1),
        t5.pair_mask(taught, taught),
        jnp.broadcast_to(real[:, None], (4, 5, real.shape[1])),
    )
    expected = decoded @ params()["decoder"]["logits_dense"]["kernel"]
    assert off(found[REAL], expected[REAL]) < 1e-5
    assert off(found[REAL], run(INPUTS, TARGETS)[REAL]) > 1e-2


def test_inputs_may_be_read_elsewhere() -> None:
    """No input but memory of its encoding, a task a row: what a Hyperdecoder hands over."""
    states = t5.T5(CONFIG).apply({"params": params()}, INPUTS, method="encode")
    tree = {ad.MEMORY: {"states": states[None], "mask": INPUTS[None] > 0}}
    found = run(INPUTS[:, :0], TARGETS, Adapters(tree, AdapterSpec(memory=INPUTS.shape[1])))
    assert off(found[REAL], run(INPUTS, TARGETS)[REAL]) < 1e-5


def test_attention_to_a_prefix_is_attention_to_more_keys() -> None:
    tasks, rows, length, slots, heads, width = 2, 3, 4, 5, 2, 6
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    query, key, value = (normal(tasks * rows, length, heads, width) for _ in range(3))
    bias, prefix_bias = normal(tasks * rows, heads, length, length), normal(heads, length, slots)
    prefix = {name: normal(tasks, slots, heads, width) for name in ("key", "value")}
    seen = rng.random((tasks, slots)) < 0.5
    attend = jax.jit(t5.attend)
    found = attend(query, key, value, bias, prefix | {"mask": seen}, prefix_bias)

    each = {name: np.repeat(leaf, rows, 0) for name, leaf in prefix.items()}
    hidden = np.where(np.repeat(seen, rows, 0), 0.0, t5.MASKED)[:, None, None]
    expected = attend(
        query,
        np.concatenate([each["key"], key], 1),
        np.concatenate([each["value"], value], 1),
        np.concatenate([prefix_bias + hidden, bias], -1),
    )
    assert off(found, expected) < 1e-5


def prefix_at(site: str, key: Any, value: Any, position_bias: str = "hf") -> Adapters:
    spec = AdapterSpec(prefix=PrefixSpec((site,), key.shape[2], position_bias))
    return Adapters({site: {"prefix": {"key": key, "value": value}}}, spec)


@jax.jit
def cache_of(inputs: Any, tokens: jax.Array) -> Any:
    """The decoder's keys and values [N, B, L, H, K] of tokens [B, L] that it was fed."""
    apply = functools.partial(t5.T5(CONFIG).apply, {"params": params()})
    encoded = apply(inputs, method="encode")
    state = apply(encoded, inputs, None, tokens.shape[1], method="start")

    def body(state: t5.DecodeState, fed: jax.Array) -> tuple[t5.DecodeState, None]:
        return apply(fed, state, None, method="step")[1], None

    return jax.lax.scan(body, state, tokens.T)[0].self_kv


def test_decoder_prefix_equals_real_past_tokens() -> None:
    inputs, fed = ids(2, 7), ids(2, 8, shortest=8)
    whole = run(inputs, jnp.ones_like(fed), None, fed)
    key, value = cache_of(inputs, fed[:, :3])
    rest = jnp.ones((2, 5), jnp.int32), fed[:, 3:]
    found = run(inputs, rest[0], prefix_at("dec_self", key, value), rest[1])
    assert off(found, whole[:, 3:]) < 1e-5
    found = run(inputs, rest[0], prefix_at("dec_self", key, value, "zero"), rest[1])
    assert off(found, whole[:, 3:]) > 1e-3


def test_encoder_prefix_equals_real_past_tokens() -> None:
    """Where the past does not see what follows; what follows sees all."""
    past, length = 3, 8
    x = jax.random.normal(jax.random.key(0), (2, length, CONFIG.emb_dim))
    mask = np.ones((2, length, length), bool)
    mask[:, :past, past:] = False
    variables = {"params": params()["encoder"]}
    observed = jax.jit(functools.partial(t5.Encoder(CONFIG).apply, collect=True))
    whole, (key, value, _) = observed(variables, x, mask)
    adapters = prefix_at("enc_self", key[:, :, :past], value[:, :, :past])
    found = jax.jit(t5.Encoder(CONFIG).apply)(
        variables, x[:, past:], mask[:, past:, past:], adapters
    )
    assert off(found, whole[:, past:]) < 1e-5


def test_cross_attention_prefix_equals_more_memory() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 4, CONFIG.emb_dim))
    memory = jax.random.normal(jax.random.key(1), (2, 7, CONFIG.emb_dim))
    cross = params()["decoder"]["layers"]["encoder_decoder_attention"]
    key, value = (
        jnp.einsum("bmd,ndf->nbmf", memory[:, :3], cross[name]["kernel"]).reshape(3, 2, 3, 2, 6)
        for name in ("key", "value")
    )
    mask = np.ones((2, 4, 7), bool)
    apply = jax.jit(functools.partial(t5.Decoder(CONFIG).apply, {"params": params()["decoder"]}))
    whole = apply(x, memory, mask[:, :, :4], mask)
    adapters = prefix_at("dec_cross", key, value)
    found = apply(x, memory[:, 3:], mask[:, :, :4], mask[:, :, 3:], adapters)
    assert off(found, whole) < 1e-5


# -------------------------------------------------------------------------- tasks, rows, padding


def test_a_task_never_touches_the_rows_of_another() -> None:
    adapters = random_adapters(EVERYTHING["hf"], 2)

    def second_task(_: str, leaf: np.ndarray) -> np.ndarray:
        if leaf.dtype != bool:
            leaf[:, 1] *= -3.0
        return leaf

    other = change(adapters, second_task)
    first, second = run(INPUTS, TARGETS, adapters), run(INPUTS, TARGETS, other)
    np.testing.assert_array_equal(second[:2], first[:2])
    assert all(off(second[row], first[row]) > 0.1 for row in (2, 3))


def test_order_of_tasks_and_of_rows_changes_nothing() -> None:
    adapters = random_adapters(EVERYTHING["hf"], 2)
    found = run(INPUTS, TARGETS, adapters)
    order = np.array([3, 2, 0, 1])
    moved = run(INPUTS[order], TARGETS[order], ad.take(adapters, [1, 0]))
    assert off(moved, found[order]) < 1e-6


def test_padding_changes_nothing() -> None:
    adapters = random_adapters(EVERYTHING["hf"], 2)
    found = run(INPUTS, TARGETS, adapters)
    wider = [jnp.pad(x, ((0, 0), (0, n))) for x, n in ((INPUTS, 4), (TARGETS, 3))]
    padded = run(*wider, adapters)[:, : TARGETS.shape[1]]
    assert off(padded[REAL], found[REAL]) < 1e-5


def test_rows_of_one_task_may_come_together_or_apart() -> None:
    lora = LoraSpec(("enc_self.query", "dec_cross.out", "dec_mlp.wi_0"), rank=2, alpha=3.0)
    adapters = random_adapters(AdapterSpec(lora, PREFIX.prefix), 1)
    together = run(INPUTS, TARGETS, adapters)  # G = 4
    apart = run(INPUTS, TARGETS, ad.take(adapters, [0, 0, 0, 0]))  # G = 1
    assert off(apart, together) < 1e-5


def test_concatenate_puts_tasks_made_apart_in_one_batch() -> None:
    adapters = random_adapters(PREFIX, 3)
    parts = [ad.take(adapters, [0]), ad.take(adapters, [1, 2])]
    jax.tree.map(np.testing.assert_array_equal, ad.concatenate(parts).tree, adapters.tree)
    assert adapters.num_tasks == 3
    assert ad.parameters_per_task(adapters) == 2 * (2 + 3 + 3) * 3 * 2 * 6
    with pytest.raises(UserError, match="one AdapterSpec"):
        ad.concatenate([adapters, random_adapters(EVERYTHING["zero"], 1)])


# ------------------------------------------------------------------------------ specs and shapes


def test_targets_are_those_of_this_t5() -> None:
    assert len(EVERY_TARGET) == 3 * 4 + 2 * 3
    assert ad.targets_of(["dec_mlp"], TIED) == ("dec_mlp.wi", "dec_mlp.wo")
    sites = ("enc_self", "enc_mlp")
    assert ad.targets_of(sites, CONFIG, ("query", "wo")) == ("enc_self.query", "enc_mlp.wo")
    for target in ("enc_self.qeury", "enc_mlp.wi", "encoder.query"):
        with pytest.raises(UserError, match=rf"no projection '{target}'.*known"):
            ad.shapes(AdapterSpec(lora=LoraSpec((target,), 2, 1.0)), CONFIG, 1)
    with pytest.raises(UserError, match="prefix_sites: 'enc_mlp'"):
        ad.shapes(AdapterSpec(prefix=PrefixSpec(("enc_mlp",), 2)), CONFIG, 1)


def test_spec_survives_json() -> None:
    for spec in (EVERYTHING["zero"], LORA, PREFIX, AdapterSpec()):
        assert AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


PATTERN = AdapterSpec(
    lora=ad.lora_spec(
        {"enc_self.query": 2, "dec_cross.out": 5, "dec_mlp.wi_0": 2},
        {"enc_self.query": 3.0, "dec_cross.out": 3.0, "dec_mlp.wi_0": 8.0},
    )
)


def test_ranks_and_alphas_may_differ_by_target(tmp_path: Path) -> None:
    lora = PATTERN.lora
    assert lora
    assert (lora.rank, lora.alpha) == (2, 3.0)
    assert lora.rank_pattern == (("dec_cross.out", 5),)
    assert [lora.scale_of(t) for t in lora.targets] == [1.5, 0.6, 4.0]
    adapters = random_adapters(PATTERN, 2)
    assert adapters.tree["dec_cross"]["out"]["a"].shape == (3, 2, 12, 5)
    ad.check(adapters, CONFIG, "x")
    loaded, _, _ = ad.load(ad.save(tmp_path / "a", adapters, {}), CONFIG)
    assert loaded.spec == PATTERN
    assert hash(loaded.spec) == hash(PATTERN)

    # The effect is that of plain LoRA whose b has each target's own scale inside.
    plain = dataclasses.replace(lora, alpha=2.0, rank_pattern=(), alpha_pattern=())
    tree: dict[str, Any] = {}
    for target in lora.targets:
        site, _, projection = target.partition(".")
        leaf = adapters.tree[site][projection]
        padded = {
            "a": np.pad(leaf["a"], [(0, 0)] * 3 + [(0, 5 - leaf["a"].shape[3])]),
            "b": np.pad(leaf["b"], [(0, 0)] * 2 + [(0, 5 - leaf["b"].shape[2]), (0, 0)]),
        }
        padded["b"] = padded["b"] * lora.scale_of(target)
        tree.setdefault(site, {})[projection] = padded
    five = dataclasses.replace(plain, rank=5, alpha=5.0)
    found = run(INPUTS, TARGETS, adapters)
    assert off(run(INPUTS, TARGETS, Adapters(tree, AdapterSpec(lora=five))), found) < 1e-5
    assert off(run(INPUTS, TARGETS), found) > 0.1


def test_loading_for_a_backbone_reads_nothing_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ad.save(tmp_path / "a", random_adapters(LORA, 1), {})
    monkeypatch.setattr(ad.tensors.Tensor, "read", lambda self: pytest.fail("read"))
    wide = dataclasses.replace(CONFIG, emb_dim=24)
    with pytest.raises(UserError, match=r"needs \(\d, 1, 24, 2\)"):
        ad.load(folder, wide)


def test_a_cache_of_downloads_made_of_links_can_be_read(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    jax.tree.map(np.testing.assert_array_equal, ad.load(linked)[0].tree, ad.load(folder)[0].tree)


def test_check_names_what_does_not_fit() -> None:
    adapters = with_mask(random_adapters(EVERYTHING["hf"], 2), 1)
    ad.check(adapters, CONFIG, "x")
    with pytest.raises(UserError, match=r"x: adapter tensor dec_cross/key/a is \(3, 2, 16, 2\)"):
        ad.check(adapters, dataclasses.replace(CONFIG, emb_dim=24), "x")
    with pytest.raises(UserError, match=r"dec_cross/prefix/mask is \(3, 2, 2\).*needs \(3, 2, 3\)"):
        ad.check(change(adapters, lambda p, x: x[:, :, :2] if "mask" in p else x), CONFIG, "x")
    del adapters.tree["dec_mlp"]["wo"]["b"]
    with pytest.raises(UserError, match="dec_mlp/wo/b is missing"):
        ad.check(adapters, CONFIG, "x")


# --------------------------------------------------------------------------------------- on disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapters = with_mask(random_adapters(EVERYTHING["zero"], 2), 1)
    return ad.save(tmp_path / "adapter", adapters, {"task": "é", "numbers": [1, 2.5]})


def test_folder_round_trip_is_exact(folder: Path) -> None:
    adapters, meta, _ = ad.load(folder)
    expected = with_mask(random_adapters(EVERYTHING["zero"], 2), 1)
    assert adapters.spec == expected.spec
    assert meta == {"task": "é", "numbers": [1, 2.5]}
    jax.tree.map(np.testing.assert_array_equal, adapters.tree, expected.tree)
    types = jax.tree.map(lambda x, y: x.dtype == y.dtype, adapters.tree, expected.tree)
    assert all(jax.tree.leaves(types))
    assert sorted(p.name for p in folder.iterdir()) == sorted([ad.SPEC_FILE, ad.TENSOR_FILE])

    small = random_adapters(LORA, 1)
    ad.save(folder, small, {})
    jax.tree.map(np.testing.assert_array_equal, ad.load(folder)[0].tree, small.tree)
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_transposed_and_bfloat16_leaves_survive_the_disk(tmp_path: Path) -> None:
    leaf = jax.random.normal(jax.random.key(0), (2, 1, 2, 16), jnp.bfloat16)
    query = {"a": np.asarray(leaf).swapaxes(2, 3), "b": np.asarray(leaf)}
    spec = AdapterSpec(lora=LoraSpec(("enc_self.query",), 2, 1.0))
    saved, *_ = ad.load(ad.save(tmp_path / "a", Adapters({"enc_self": {"query": query}}, spec), {}))
    assert saved.tree["enc_self"]["query"]["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(saved.tree["enc_self"]["query"]["a"], leaf.swapaxes(2, 3))


def test_save_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds notes.txt"):
        ad.save(tmp_path, random_adapters(LORA, 1), {})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_failed_save_keeps_the_adapter_of_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ad.files, "write_json", full)
    with pytest.raises(UserError, match="No space left"):
        ad.save(folder, random_adapters(LORA, 1), {})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def damage(folder: Path, kind: str) -> None:
    spec, tensors = folder / ad.SPEC_FILE, folder / ad.TENSOR_FILE
    header = json.loads(spec.read_text())
    match kind:
        case "missing spec":
            spec.unlink()
        case "missing tensors":
            tensors.unlink()
        case "truncated tensors":
            tensors.write_bytes(tensors.read_bytes()[:-10])
        case "truncated spec":
            spec.write_text(spec.read_text()[:-20])
        case "other format":
            spec.write_text(json.dumps(header | {"format": "peft"}))
        case "unknown field":
            header["spec"]["lora"]["rnak"] = 3
            spec.write_text(json.dumps(header))
        case "scalar":
            spec.write_text("[1, 2]")
        case "huge rank":
            header["spec"]["lora"]["rank"] = 10**12
            spec.write_text(json.dumps(header))
        case "negative rank":
            header["spec"]["lora"]["rank_pattern"] = {"enc_self.query": -1}
            spec.write_text(json.dumps(header))
        case "infinite alpha":
            header["spec"]["lora"]["alpha"] = float("inf")
            spec.write_text(json.dumps(header))
        case "wrong type":
            header["spec"]["lora"]["targets"] = "enc_self.query"
            spec.write_text(json.dumps(header))
        case "unknown place":
            header["spec"]["prefix"]["sites"] = ["../../etc"]
            spec.write_text(json.dumps(header))
        case "unknown activation":  # which would be looked up by its name
            header["spec"]["bottleneck"]["activation"] = "__import__"
            spec.write_text(json.dumps(header))
        case "too long a number":
            spec.write_text('{"format": ' + "9" * 5000 + "}")
        case "too deep":
            spec.write_text("[" * 100_000)
        case "another rank":
            header["spec"]["lora"]["rank"] = 3
            spec.write_text(json.dumps(header))
        case "extra tensor":
            header["spec"]["lora"]["bias"] = False
            spec.write_text(json.dumps(header))
        case "other tensors":
            other = change(
                random_adapters(EVERYTHING["zero"], 2), lambda _, x: x if x.dtype == bool else x * 2
            )
            ad.save(folder.with_name("other"), with_mask(other, 1), {})
            (folder.with_name("other") / ad.TENSOR_FILE).replace(tensors)
        case "tensors are a pipe":
            tensors.unlink()
            os.mkfifo(tensors)
        case "spec is a device":
            spec.unlink()
            spec.symlink_to("/dev/zero")
        case "a link to nothing":
            tensors.unlink()
            tensors.symlink_to(folder / "gone")
        case "huge shape":
            content = {"dec_mlp/wo/a": {"dtype": "F32", "shape": [3, 2, 2**40, 2]}}
            content["dec_mlp/wo/a"]["data_offsets"] = [0, 3 * 2 * 2**40 * 2 * 4]
            text = json.dumps(content).encode()
            tensors.write_bytes(len(text).to_bytes(8, "little") + text)
        case "nan":
            adapters, meta, _ = ad.load(folder)
            ad.save(
                folder, change(adapters, lambda _, x: x * np.nan if x.dtype != bool else x), meta
            )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing spec", rf"{ad.SPEC_FILE}: no such file.*hyper-t5 adapt"),
        ("missing tensors", rf"{ad.TENSOR_FILE}: does not exist"),
        ("truncated tensors", rf"{ad.TENSOR_FILE}: is truncated"),
        ("truncated spec", rf"{ad.SPEC_FILE}, line \d+: is not valid JSON"),
        ("other format", rf"{ad.SPEC_FILE}: not an adapter spec"),
        ("unknown field", rf"{ad.SPEC_FILE}: not an adapter spec.*rnak"),
        ("scalar", rf"{ad.SPEC_FILE}: must hold a JSON object"),
        ("huge rank", r"spec.lora.rank is 1e\+12, not in 1..65536"),
        ("negative rank", r"rank_pattern\['enc_self.query'\] is -1, not in 1..65536"),
        ("infinite alpha", r"spec.lora.alpha is inf, no number"),
        ("wrong type", r"spec.lora.targets is 'enc_self.query', of another type"),
        ("unknown place", r"spec.prefix.sites: '../../etc' is none of enc_self"),
        ("unknown activation", r"spec.bottleneck.activation: '__import__' is none of gelu"),
        ("too long a number", rf"{ad.SPEC_FILE}: is no JSON that a program wrote"),
        ("too deep", rf"{ad.SPEC_FILE}: is no JSON that a program wrote"),
        ("another rank", r"dec_cross/key/a is \(3, 2, 16, 2\).* needs \(\*, 2, \*, 3\)"),
        ("extra tensor", r"dec_cross/key/bias is \(3, 2, 12\).* needs none of that name"),
        ("other tensors", rf"{ad.TENSOR_FILE}: is not the file that .* was written with"),
        ("tensors are a pipe", rf"{ad.TENSOR_FILE}: is no regular file"),
        ("spec is a device", rf"{ad.SPEC_FILE}: is no regular file"),
        ("a link to nothing", rf"{ad.TENSOR_FILE}: does not exist"),
        ("huge shape", rf"{ad.TENSOR_FILE}: "),
        ("nan", rf"{ad.TENSOR_FILE}: .* has non-finite numbers"),
    ],
)
def test_damaged_folder_is_named(folder: Path, kind: str, message: str) -> None:
    damage(folder, kind)
    with pytest.raises(UserError, match=message) as error:
        ad.load(folder)
    assert "\n" not in str(error.value)
