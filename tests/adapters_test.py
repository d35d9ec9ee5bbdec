"""Effect of adapters on the frozen T5: equivalences, isolation of tasks, specs and shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import export, t5
from hyper_t5.adapters import Adapters, AdapterSpec, BottleneckSpec, LoraSpec, PrefixSpec
from hyper_t5.t5 import attention, network
from hyper_t5.utils.errors import UserError
from tests.support.tiny_model import (
    BOTTLENECK,
    CONFIG,
    EVERY_TARGET,
    EVERYTHING,
    LORA,
    PREFIX,
    TIED,
    ids,
    logits,
    map_leaves,
    off,
    params,
    random_adapters,
    with_mask,
)

pytestmark = pytest.mark.smoke

# Two tasks of two rows each.
INPUTS, TARGETS = ids(4, 7), ids(4, 5, seed=1)
# At padding the decoder attends to nothing, so its output there has no meaning.
REAL = np.asarray(TARGETS) > 0
run = functools.partial(logits, weights=params())


# --------------------------------------------------------------------------------- no effect


def test_zero_adapters_equal_none() -> None:
    plain = run(INPUTS, TARGETS)
    np.testing.assert_array_equal(run(INPUTS, TARGETS, ad.zeros(LORA, CONFIG, 2)), plain)
    everything = ad.zeros(EVERYTHING["hf"], CONFIG, 2)
    assert off(run(INPUTS, TARGETS, everything)[REAL], plain[REAL]) < 1e-6
    assert off(run(INPUTS, TARGETS, random_adapters(EVERYTHING["hf"], 2)), plain) > 0.1


def test_masked_slots_have_no_effect() -> None:
    adapters = with_mask(random_adapters(EVERYTHING["hf"], 2), masked=1)

    def poison(path: str, leaf: np.ndarray) -> np.ndarray:
        if ("prefix" in path or "memory" in path) and "mask" not in path:
            leaf[:, :, 0] = 100.0
        return leaf

    expected = run(INPUTS, TARGETS, adapters)
    np.testing.assert_array_equal(run(INPUTS, TARGETS, map_leaves(adapters, poison)), expected)
    # They do not move the other slots: with 'hf' positions count back from the row's first token.
    prefix = dataclasses.replace(PREFIX.prefix or PrefixSpec((), 0), length=2)
    shorter = map_leaves(adapters, lambda path, leaf: leaf[:, :, 1:] if "prefix" in path else leaf)
    shorter = Adapters(shorter.tree, dataclasses.replace(shorter.spec, prefix=prefix))
    assert off(run(INPUTS, TARGETS, shorter)[REAL], expected[REAL]) < 1e-5


# ------------------------------------------------------------------------------------ effect


def test_merged_lora_equals_applied_lora() -> None:
    spec = AdapterSpec(lora=LoraSpec(EVERY_TARGET, rank=2, alpha=3.0))
    adapters = random_adapters(spec, 1)
    applied = run(INPUTS, TARGETS, adapters)
    merged = logits(INPUTS, TARGETS, weights=export.merge_lora(params(), adapters))
    assert off(merged, applied) < 1e-4
    assert off(run(INPUTS, TARGETS), applied) > 0.1


def test_lora_of_cross_attention_applies_to_shared_memory() -> None:
    targets = tuple(t for t in EVERY_TARGET if t.startswith("dec_cross"))
    spec = AdapterSpec(lora=LoraSpec(targets, rank=2, alpha=3.0), memory=4)
    adapters = random_adapters(spec, 1)
    memory = Adapters({ad.MEMORY: adapters.tree[ad.MEMORY]}, AdapterSpec(memory=4))
    lora = Adapters(
        {site: leaves for site, leaves in adapters.tree.items() if site != ad.MEMORY},
        AdapterSpec(lora=spec.lora),
    )
    applied = run(INPUTS, TARGETS, adapters)
    merged = export.merge_lora(params(), lora)
    assert off(logits(INPUTS, TARGETS, memory, weights=merged), applied) < 1e-4
    assert off(run(INPUTS, TARGETS, memory), applied) > 0.1


def test_lora_bias_is_added_and_scaled() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, CONFIG.emb_dim))
    leaf = {k: v[0] for k, v in random_adapters(LORA, 2).tree["enc_mlp"]["wi_0"].items()}
    expected = [
        (x[row] @ leaf["a"][row // 2]) @ leaf["b"][row // 2] + leaf["bias"][row // 2]
        for row in range(4)
    ]
    assert off(jax.jit(attention.lora_delta)(x, leaf), np.stack(expected)) < 1e-5
    # The scale is multiplied into b and bias, as in PEFT's lora_B.
    scaled = network.stack_adapters(random_adapters(LORA, 2), {"mlp": "enc_mlp"})["mlp"]["wi_0"]
    assert LORA.lora is not None
    np.testing.assert_array_equal(scaled["bias"][0], leaf["bias"] * 1.5)
    np.testing.assert_array_equal(scaled["b"][0], leaf["b"] * 1.5)
    np.testing.assert_array_equal(scaled["a"][0], leaf["a"])


@pytest.mark.parametrize("kind", ["normed", "raw"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_bottleneck_is_parallel_to_the_mlp(kind: str, activation: str) -> None:
    spec = dataclasses.replace(BOTTLENECK, activation=activation, input=kind)
    adapters = random_adapters(AdapterSpec(bottleneck=spec), 2)
    rng = np.random.default_rng(0)
    x, normed = (rng.normal(size=(4, 3, CONFIG.emb_dim)).astype(np.float32) for _ in range(2))
    (leaf,) = (network.stack_adapters(adapters, {"mlp": "dec_mlp"})["mlp"],)
    layer = jax.tree.map(lambda y: y[1], leaf)
    delta = jax.jit(network.bottleneck_delta)(x, normed, layer)
    w = {k: v[1] for k, v in adapters.tree["dec_mlp"]["bottleneck"].items()}
    act = getattr(jax.nn, activation)
    for row in range(4):
        t = row // 2
        hidden = act((normed if kind == "normed" else x)[row] @ w["down"][t] + w["down_bias"][t])
        assert off(delta[row], hidden @ w["up"][t] + w["up_bias"][t]) < 1e-5
    # It is added to the MLP's output: all zero, except for the last bias.
    plain, zero = run(INPUTS, TARGETS), ad.zeros(AdapterSpec(bottleneck=spec), CONFIG, 2)
    np.testing.assert_array_equal(run(INPUTS, TARGETS, zero), plain)
    for site in ad.MLP_SITES:
        biased = ad.zeros(AdapterSpec(bottleneck=spec), CONFIG, 2)
        biased.tree[site]["bottleneck"]["up_bias"] += 1.0
        assert off(run(INPUTS, TARGETS, biased), plain) > 1e-3, site


def test_memory_is_appended_to_the_encoder_output() -> None:
    adapters = random_adapters(AdapterSpec(memory=4), 2)
    actual = run(INPUTS, TARGETS, adapters)
    apply = functools.partial(t5.T5(CONFIG).apply, {"params": params()})
    encoded = apply(INPUTS, method="encode")
    shared = np.repeat(adapters.tree[ad.MEMORY]["states"][0], 2, 0)
    real = np.concatenate([np.tile([False, True, True, True], (4, 1)), INPUTS > 0], 1)
    decoded = t5.Decoder(CONFIG).apply(
        {"params": params()["decoder"]},
        params()["token_embedder"]["embedding"][network.shift_right(TARGETS)],
        jnp.concatenate([shared, encoded], 1),
        attention.pair_mask(TARGETS, TARGETS),
        jnp.broadcast_to(real[:, None], (4, 5, real.shape[1])),
    )
    expected = decoded @ params()["decoder"]["logits_dense"]["kernel"]
    assert off(actual[REAL], expected[REAL]) < 1e-5
    assert off(actual[REAL], run(INPUTS, TARGETS)[REAL]) > 1e-2


def test_memory_can_replace_the_inputs() -> None:
    """An empty input with its encoding as memory, one task per row, as a Hyperdecoder emits."""
    states = t5.T5(CONFIG).apply({"params": params()}, INPUTS, method="encode")
    tree = {ad.MEMORY: {"states": states[None], "mask": INPUTS[None] > 0}}
    actual = run(INPUTS[:, :0], TARGETS, Adapters(tree, AdapterSpec(memory=INPUTS.shape[1])))
    assert off(actual[REAL], run(INPUTS, TARGETS)[REAL]) < 1e-5


def test_attention_to_a_prefix_is_attention_to_more_keys() -> None:
    tasks, rows, length, slots, heads, width = 2, 3, 4, 5, 2, 6
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    query, key, value = (normal(tasks * rows, length, heads, width) for _ in range(3))
    bias, prefix_bias = normal(tasks * rows, heads, length, length), normal(heads, length, slots)
    prefix = {name: normal(tasks, slots, heads, width) for name in ("key", "value")}
    mask = rng.random((tasks, slots)) < 0.5
    attend = jax.jit(attention.attend)
    actual = attend(query, key, value, bias, prefix | {"mask": mask}, prefix_bias)

    per_row = {name: np.repeat(leaf, rows, 0) for name, leaf in prefix.items()}
    mask_bias = np.where(np.repeat(mask, rows, 0), 0.0, attention.MASKED)[:, None, None]
    expected = attend(
        query,
        np.concatenate([per_row["key"], key], 1),
        np.concatenate([per_row["value"], value], 1),
        np.concatenate([prefix_bias + mask_bias, bias], -1),
    )
    assert off(actual, expected) < 1e-5


def prefix_at(site: str, key: Any, value: Any, position_bias: str = "hf") -> Adapters:
    spec = AdapterSpec(prefix=PrefixSpec((site,), key.shape[2], position_bias))
    return Adapters({site: {"prefix": {"key": key, "value": value}}}, spec)


@jax.jit
def cache_of(inputs: Any, tokens: jax.Array) -> Any:
    """Decode the given tokens [B, L]; return the decoder's keys and values [N, B, L, H, K]."""
    apply = functools.partial(t5.T5(CONFIG).apply, {"params": params()})
    encoded = apply(inputs, method="encode")
    state = apply(encoded, inputs, None, tokens.shape[1], method="init_cache")

    def body(state: t5.DecoderCache, token: jax.Array) -> tuple[t5.DecoderCache, None]:
        return apply(token, state, None, method="step")[1], None

    return jax.lax.scan(body, state, tokens.T)[0].self_kv


def test_decoder_prefix_equals_real_past_tokens() -> None:
    inputs, tokens = ids(2, 7), ids(2, 8, shortest=8)
    expected = run(inputs, jnp.ones_like(tokens), None, tokens)[:, 3:]
    key, value = cache_of(inputs, tokens[:, :3])
    targets, rest = jnp.ones((2, 5), jnp.int32), tokens[:, 3:]
    assert off(run(inputs, targets, prefix_at("dec_self", key, value), rest), expected) < 1e-5
    zero = prefix_at("dec_self", key, value, "zero")
    assert off(run(inputs, targets, zero, rest), expected) > 1e-3


def test_encoder_prefix_equals_real_past_tokens() -> None:
    """With a mask under which the past does not attend to the rest."""
    past, length = 3, 8
    x = jax.random.normal(jax.random.key(0), (2, length, CONFIG.emb_dim))
    mask = np.ones((2, length, length), bool)
    mask[:, :past, past:] = False
    variables = {"params": params()["encoder"]}
    observed = jax.jit(functools.partial(t5.Encoder(CONFIG).apply, collect=True))
    whole, (key, value, _) = observed(variables, x, mask)
    adapters = prefix_at("enc_self", key[:, :, :past], value[:, :, :past])
    rest = jax.jit(t5.Encoder(CONFIG).apply)(
        variables, x[:, past:], mask[:, past:, past:], adapters
    )
    assert off(rest, whole[:, past:]) < 1e-5


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
    assert off(apply(x, memory[:, 3:], mask[:, :, :4], mask[:, :, 3:], adapters), whole) < 1e-5


# -------------------------------------------------------------------------- tasks, rows, padding


def test_a_task_does_not_affect_the_rows_of_another() -> None:
    adapters = random_adapters(EVERYTHING["hf"], 2)

    def second_task(_: str, leaf: np.ndarray) -> np.ndarray:
        if leaf.dtype != bool:
            leaf[:, 1] *= -3.0
        return leaf

    other = map_leaves(adapters, second_task)
    first, second = run(INPUTS, TARGETS, adapters), run(INPUTS, TARGETS, other)
    np.testing.assert_array_equal(second[:2], first[:2])
    assert all(off(second[row], first[row]) > 0.1 for row in (2, 3))


def test_order_of_tasks_and_of_rows_changes_nothing() -> None:
    adapters = random_adapters(EVERYTHING["hf"], 2)
    order = np.array([3, 2, 0, 1])
    permuted = run(INPUTS[order], TARGETS[order], ad.take(adapters, [1, 0]))
    assert off(permuted, run(INPUTS, TARGETS, adapters)[order]) < 1e-6


def test_padding_changes_nothing() -> None:
    adapters = random_adapters(EVERYTHING["hf"], 2)
    wider = [jnp.pad(x, ((0, 0), (0, n))) for x, n in ((INPUTS, 4), (TARGETS, 3))]
    padded = run(*wider, adapters)[:, : TARGETS.shape[1]]
    assert off(padded[REAL], run(INPUTS, TARGETS, adapters)[REAL]) < 1e-5


def test_examples_of_a_task_can_be_tasks_of_their_own() -> None:
    lora = LoraSpec(("enc_self.query", "dec_cross.out", "dec_mlp.wi_0"), rank=2, alpha=3.0)
    adapters = random_adapters(AdapterSpec(lora, PREFIX.prefix), 1)
    one_task = run(INPUTS, TARGETS, adapters)  # G = 4
    four_tasks = run(INPUTS, TARGETS, ad.take(adapters, [0, 0, 0, 0]))  # G = 1
    assert off(four_tasks, one_task) < 1e-5


# ------------------------------------------------------------------------------- composition


def poisoned(adapters: Adapters, chunks: int) -> Adapters:
    """Return the adapters of T tasks as the last of C chunks each, the others not a number."""

    def widen(_: str, leaf: np.ndarray) -> np.ndarray:
        shape = (leaf.shape[0], leaf.shape[1], chunks, *leaf.shape[2:])
        wide = np.full(shape, True if leaf.dtype == bool else np.nan, leaf.dtype)
        wide[:, :, -1] = leaf
        return wide.reshape(leaf.shape[0], -1, *leaf.shape[2:])

    return map_leaves(adapters, widen)


@pytest.mark.parametrize("bias", ["hf", "zero"])
@pytest.mark.parametrize("masked", [0, 1])
def test_composing_one_chunk_changes_nothing(bias: str, masked: int) -> None:
    plain = random_adapters(EVERYTHING[bias], 2)
    if masked:
        plain = with_mask(plain, masked)
    composed = ad.compose(poisoned(plain, 3), jnp.array([[0.0, 0.0, 1.0]] * 2))
    ad.check(composed, CONFIG, "composed")
    assert off(run(INPUTS, TARGETS, composed)[REAL], run(INPUTS, TARGETS, plain)[REAL]) < 1e-5


def test_composed_lora_is_the_weighted_sum_of_products() -> None:
    chunks = random_adapters(dataclasses.replace(EVERYTHING["hf"], memory=0), 4)
    weights = jnp.array([[0.25, 0.75], [0.5, 0.5]])
    composed = ad.compose(chunks, weights)
    lora, own = composed.spec.lora, chunks.spec.lora
    assert lora
    assert own
    for target in own.targets:
        site, _, projection = target.partition(".")
        part, whole = chunks.tree[site][projection], composed.tree[site][projection]
        assert lora.scale_of(target) == pytest.approx(own.scale_of(target))
        products = np.einsum("ntir,ntro->ntio", part["a"], part["b"])
        products = products.reshape(len(products), 2, 2, *products.shape[2:])
        expected = np.einsum("ntcio,tc->ntio", products, weights)
        assert off(np.einsum("ntir,ntro->ntio", whole["a"], whole["b"]), expected) < 1e-6


def test_composed_prefixes_and_memories_are_side_by_side() -> None:
    chunks = random_adapters(EVERYTHING["hf"], 2)
    composed = ad.compose(chunks, jnp.array([[0.25, 0.75]]))
    prefix, states = chunks.tree["enc_self"]["prefix"], chunks.tree[ad.MEMORY]["states"]
    for name in ("key", "value"):
        expected = np.concatenate([prefix[name][:, :1], prefix[name][:, 1:]], 2)
        np.testing.assert_array_equal(composed.tree["enc_self"]["prefix"][name], expected)
    assert np.all(composed.tree["enc_self"]["prefix"]["mask"])
    expected = np.concatenate([states[:, :1], states[:, 1:]], 2)
    np.testing.assert_array_equal(composed.tree[ad.MEMORY]["states"], expected)


def test_concatenate_is_the_inverse_of_take() -> None:
    adapters = random_adapters(PREFIX, 3)
    parts = [ad.take(adapters, [0]), ad.take(adapters, [1, 2])]
    jax.tree.map(np.testing.assert_array_equal, ad.concatenate(parts).tree, adapters.tree)
    assert adapters.num_tasks == 3
    assert ad.parameters_per_task(adapters) == 2 * (2 + 3 + 3) * 3 * 2 * 6
    with pytest.raises(UserError, match="one AdapterSpec"):
        ad.concatenate([adapters, random_adapters(EVERYTHING["zero"], 1)])


# ------------------------------------------------------------------------------ specs and shapes


def test_targets_depend_on_the_t5() -> None:
    assert len(EVERY_TARGET) == 3 * 4 + 2 * 3
    assert ad.targets_of(["dec_mlp"], TIED) == ("dec_mlp.wi", "dec_mlp.wo")
    sites = ("enc_self", "enc_mlp")
    assert ad.targets_of(sites, CONFIG, ("query", "wo")) == ("enc_self.query", "enc_mlp.wo")
    for target in ("enc_self.qeury", "enc_mlp.wi"):
        with pytest.raises(UserError, match=rf"no projection '{target}'.*known"):
            ad.shapes(AdapterSpec(lora=LoraSpec((target,), 2, 1.0)), CONFIG, 1)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (LoraSpec, (("encoder.query",), 2, 1.0), "target 'encoder' is not one of enc_self"),
        (LoraSpec, (("enc_self.query",), 0, 1.0), "a rank is not positive"),
        (LoraSpec, (("enc_self.query",), 2, np.inf), "an alpha is negative or not finite"),
        (PrefixSpec, (("enc_mlp",), 2), "prefix site 'enc_mlp' is not one of enc_self"),
        (PrefixSpec, (("enc_self",), 0), "length is not positive"),
        (PrefixSpec, (("enc_self",), 2, "HF"), "position_bias 'HF' is not one of hf, zero"),
        (BottleneckSpec, (("enc_self",), (2,)), "bottleneck site 'enc_self' is not one of enc_mlp"),
        (BottleneckSpec, (("enc_mlp",), (2, 3)), "sizes must be positive, one per site"),
        (BottleneckSpec, (("enc_mlp",), (2,), "elu"), "activation 'elu' is not one of gelu"),
        (AdapterSpec, (None, None, None, -1), "memory length is negative"),
    ],
)
def test_invalid_specs_are_refused(kind: type, values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*values)


PATTERN = AdapterSpec(
    lora=ad.lora_spec(
        {"enc_self.query": 2, "dec_cross.out": 5, "dec_mlp.wi_0": 2},
        {"enc_self.query": 3.0, "dec_cross.out": 3.0, "dec_mlp.wi_0": 8.0},
    )
)


def test_ranks_and_alphas_can_differ_by_target() -> None:
    lora = PATTERN.lora
    assert lora
    assert (lora.rank, lora.alpha) == (2, 3.0)
    assert lora.rank_pattern == (("dec_cross.out", 5),)
    assert [lora.scale_of(t) for t in lora.targets] == [1.5, 0.6, 4.0]
    adapters = random_adapters(PATTERN, 2)
    assert adapters.tree["dec_cross"]["out"]["a"].shape == (3, 2, 12, 5)
    ad.check(adapters, CONFIG, "x")

    # The effect equals that of plain LoRA with each target's scale multiplied into b.
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
    plain = AdapterSpec(lora=LoraSpec(lora.targets, rank=5, alpha=5.0))
    expected = run(INPUTS, TARGETS, Adapters(tree, plain))
    assert off(run(INPUTS, TARGETS, adapters), expected) < 1e-5
    assert off(run(INPUTS, TARGETS), expected) > 0.1


def test_check_names_the_tensor_that_does_not_fit() -> None:
    adapters = with_mask(random_adapters(EVERYTHING["hf"], 2), 1)
    ad.check(adapters, CONFIG, "x")
    with pytest.raises(UserError, match=r"x: adapter tensor dec_cross/key/a is \(3, 2, 16, 2\)"):
        ad.check(adapters, dataclasses.replace(CONFIG, emb_dim=24), "x")
    with pytest.raises(UserError, match=r"dec_cross/prefix/mask is \(3, 2, 2\).*needs \(3, 2, 3\)"):
        ad.check(map_leaves(adapters, lambda p, x: x[:, :, :2] if "mask" in p else x), CONFIG, "x")
    del adapters.tree["dec_mlp"]["wo"]["b"]
    with pytest.raises(UserError, match="dec_mlp/wo/b is missing"):
        ad.check(adapters, CONFIG, "x")
