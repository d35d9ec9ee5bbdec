"""Hypermodels: initial adapters, dependence on the text, one forward pass per task."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import hypermodels, model, t5
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.hypermodels.hypertuning import HyperT5
from hyper_t5.hypermodels.parts.heads import LoraHeads
from hyper_t5.hypermodels.parts.readers import QueryReader
from hyper_t5.model import Model
from hyper_t5.t5 import attention, network
from hyper_t5.utils.errors import UserError
from tests.support.tiny_model import CONFIG, EVERY_TARGET, ids, off, params

LENGTH, GISTS, RANK = 7, 3, 4
# Two tasks of two rows each; texts, inputs and targets of ragged length.
BATCH: dict[str, Any] = {
    "hyper_inputs": ids(2, LENGTH, seed=2),
    "inputs": ids(4, 6).reshape(2, 2, 6),
    "targets": ids(4, 5, seed=1).reshape(2, 2, 5),
    "tasks": np.arange(2, dtype=np.int32),
}
TEXTS_AND_ROWS = [np.asarray(BATCH[k]) for k in ("hyper_inputs", "inputs", "targets")]
# At padding the decoder attends to nothing, so its output there has no meaning.
REAL = np.asarray(BATCH["targets"]).reshape(4, 5) > 0

LORA: dict[str, Any] = {
    "system": "hyper_lora",
    "adapter__lora_targets": ("enc_self.query", "enc_mlp.wo", "dec_self.out", "dec_cross.value"),
    "adapter__lora_bias": True,
}
QUERIES: dict[str, Any] = {"hypermodel__reader": "decoder_queries"}
KINDS: dict[str, dict[str, Any]] = {
    "prefix-text": {},
    "prefix-gists": {"hypermodel__gist_tokens": GISTS},
    "prefix-queries": QUERIES | {"adapter__prefix_sites": ad.ATTENTION_SITES},
    "lora-gists": LORA,
    "lora-fewer-gists": LORA | {"hypermodel__gist_tokens": 2},
    "lora-queries": LORA | QUERIES,
    "hint": {"system": "hint", "adapter__prefix_sites": ad.ATTENTION_SITES}
    | {"adapter__bottleneck_sizes": (3,), "adapter__position_bias": "zero"},
    "hyperdecoder": {"system": "hyperdecoder", "adapter__bottleneck_sizes": (3, 2)},
    "text_to_lora": LORA | {"system": "text_to_lora"},
    "cached": {"system": "cached"},
    "fid_icl": {"system": "fid_icl"},
}
HYPER_T5 = [kind for kind in KINDS if kind.startswith(("prefix", "lora"))]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_hyper_t5 = pytest.mark.parametrize("kind", HYPER_T5)


def build(*, sizes: t5.T5Config = CONFIG, **fields: Any) -> Model:
    """Build a system on this backbone; a field's dot is written as two underscores."""
    config = config_lib.defaults()
    small = {"data__hyper_length": LENGTH, "adapter__lora_rank": RANK, "adapter__prefix_length": 5}
    for field, value in (small | fields).items():
        section, _, name = field.rpartition("__")
        (config[section] if section else config)[name] = value
    return model.build_model(config, sizes)


@functools.cache
def fresh(kind: str, copied: bool = True) -> tuple[Model, Any]:
    """Return a system and its initial parameters; do not change them."""
    m = build(**KINDS[kind])
    assert m.hypermodel is not None
    source = params() if copied else None
    hypermodel_params = hypermodels.init_params(m.hypermodel, jax.random.key(1), source)
    return m, {"backbone": params(), "hypermodel": hypermodel_params}


@functools.cache
def moved(kind: str) -> tuple[Model, Any]:
    """Return a system as if trained: no parameter is zero."""
    m, start = fresh(kind)
    rng = np.random.default_rng(0)

    def move(leaf: jax.Array) -> np.ndarray:
        return np.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), np.float32)

    return m, start | {"hypermodel": jax.tree.map(move, start["hypermodel"])}


logits = jax.jit(Model.logits, static_argnums=0)


def plain(batch: dict[str, Any] = BATCH) -> jax.Array:
    """Return logits of the backbone without adapters."""
    return logits(build(system="none"), {"backbone": params()}, batch)


generate_adapters = jax.jit(model.generate_adapters, static_argnums=0)


def emit(m: Model, params: Any, texts: Any) -> ad.Adapters | None:
    """Return adapters of texts [T, L]."""
    return generate_adapters(m, params, jnp.asarray(texts), jnp.arange(len(texts)))


def leaves(adapters: ad.Adapters | None) -> dict[str, np.ndarray]:
    assert adapters is not None
    flat = traverse_util.flatten_dict(adapters.tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


# --------------------------------------------------------------------------------- the start


@jax.jit
def read_in_the_input(text: jax.Array, extra: jax.Array, batch: Any) -> jax.Array:
    """Return logits of the backbone with a task's text (no padding) before every input.

    text [L], ``extra`` [P, D] embeddings behind it; the text does not attend to what follows. With
    P above 0 what follows attends to these P positions instead of the text.
    """
    table, (inputs, targets) = params()["token_embedder"]["embedding"], batch
    rows, read = inputs.shape[0], len(text) + len(extra)
    x = jnp.concatenate([table[text], extra])
    x = jnp.concatenate([jnp.broadcast_to(x, (rows, *x.shape)), table[inputs]], 1)
    real = jnp.concatenate([jnp.ones((rows, read), bool), inputs > 0], 1)
    position = np.arange(x.shape[1])
    shown = position >= (len(text) if len(extra) else 0)
    sees = np.where(position[:, None] < read, position < read, shown)
    encoded = t5.Encoder(CONFIG).apply(
        {"params": params()["encoder"]}, x, sees & real[:, None] & real[:, :, None]
    )
    memory = jnp.broadcast_to((shown & real)[:, None], (rows, targets.shape[1], x.shape[1]))
    decoded = t5.Decoder(CONFIG).apply(
        {"params": params()["decoder"]},
        table[network.shift_right(targets)],
        encoded,
        attention.pair_mask(targets, targets),
        memory,
    )
    return decoded @ params()["decoder"]["logits_dense"]["kernel"]


@pytest.mark.parametrize("kind", ["prefix-text", "prefix-gists", "cached"])
def test_layerwise_starts_as_the_backbone_reading_the_text(kind: str) -> None:
    m, start = fresh(kind)
    reader = start["hypermodel"].get("reader", {})
    extra = reader.get("gists", jnp.zeros((0, CONFIG.emb_dim)))
    expected = [
        read_in_the_input(text[text > 0], extra, (inputs, targets))
        for text, inputs, targets in zip(*TEXTS_AND_ROWS, strict=True)
    ]
    actual = logits(m, start, BATCH)
    assert off(actual[REAL], np.concatenate(expected)[REAL]) < 1e-5
    assert off(actual[REAL], plain()[REAL]) > 0.01


@pytest.mark.parametrize("kind", ["lora-gists", "lora-queries", "text_to_lora"])
def test_lora_starts_without_effect(kind: str) -> None:
    m, start = fresh(kind)
    np.testing.assert_array_equal(logits(m, start, BATCH), plain())
    emitted = leaves(emit(m, start, BATCH["hyper_inputs"]))
    assert all(np.any(leaf) == name.endswith("/a") for name, leaf in emitted.items())
    assert off(logits(*moved(kind), BATCH)[REAL], plain()[REAL]) > 0.01


def test_query_prefixes_start_with_zero_values() -> None:
    m, start = fresh("prefix-queries")
    emitted = leaves(emit(m, start, BATCH["hyper_inputs"]))
    assert len(emitted) == 6
    for name, leaf in emitted.items():  # such slots take a share of the attention and add zero
        assert 0 < np.abs(leaf).max() < 0.2 if name.endswith("key") else not leaf.any()


@every_hyper_t5
def test_reader_starts_as_a_copy_of_the_backbone(kind: str) -> None:
    _, start = fresh(kind)
    mine = traverse_util.flatten_dict(start["hypermodel"]["reader"], sep="/")
    theirs = traverse_util.flatten_dict(params(), sep="/")
    own = {"queries"} if "queries" in kind else {"gists"} if kind != "prefix-text" else set()
    assert mine.keys() - theirs.keys() == own
    for name in mine.keys() - own:
        np.testing.assert_array_equal(mine[name], theirs[name])
    if "cross" in start["hypermodel"]:
        cross = params()["decoder"]["layers"]["encoder_decoder_attention"]
        for name in ("key", "value"):
            copy = start["hypermodel"]["cross"][name]["kernel"]
            np.testing.assert_array_equal(copy, cross[name]["kernel"])
    # Without the backbone nothing is copied.
    for other in jax.tree.leaves(fresh(kind, copied=False)[1]["hypermodel"]["reader"]):
        equal = [x.shape == other.shape and np.array_equal(x, other) for x in theirs.values()]
        assert not any(equal) or np.ptp(other) == 0  # norms start at 1 everywhere


# ------------------------------------------------------------------------------ text and tasks


@every_kind
def test_adapters_fit_the_backbone(kind: str) -> None:
    adapters = emit(*moved(kind), BATCH["hyper_inputs"])
    assert adapters is not None
    ad.check(adapters, CONFIG, kind)
    assert adapters.num_tasks == 2
    assert all(np.isfinite(leaf).all() for leaf in leaves(adapters).values())
    # Positions of the text are masked at padding; gists and queries have no mask.
    whole_text = not kind.startswith("lora") and kind not in ("prefix-gists", "prefix-queries")
    assert ("mask" in "".join(leaves(adapters))) == (whole_text and kind != "text_to_lora")


@every_kind
def test_padding_of_the_text_changes_nothing(kind: str) -> None:
    m, trained = moved(kind)
    read = "inputs" if m.system.conditioned_on == "input" else "hyper_inputs"
    wide = [(0, 0)] * (BATCH[read].ndim - 1) + [(0, 4)]
    wider = BATCH | {read: jnp.pad(BATCH[read], wide)}
    actual, expected = (logits(m, trained, batch) for batch in (wider, BATCH))
    assert off(actual[REAL], expected[REAL]) < 1e-5


@pytest.mark.smoke
@every_kind
def test_a_task_depends_on_its_own_text_only(kind: str) -> None:
    m, trained = moved(kind)
    three = ids(3, LENGTH, seed=3)
    whole = leaves(emit(m, trained, three))
    part = leaves(emit(m, trained, three[np.array([2, 0])]))
    for name, leaf in part.items():
        np.testing.assert_allclose(leaf, whole[name][:, [2, 0]], rtol=0, atol=1e-5)


@every_kind
def test_adapters_depend_on_every_token(kind: str) -> None:
    m, trained = moved(kind)
    text = np.asarray(ids(1, LENGTH, shortest=LENGTH))
    texts = np.repeat(text, LENGTH + 1, 0)
    for position in range(LENGTH):
        texts[position, position] = texts[position, position] % 50 + 2
    emitted = leaves(emit(m, trained, texts))
    for position in range(LENGTH):
        changes = [
            off(leaf[:, position], leaf[:, -1])
            for name, leaf in emitted.items()
            if "mask" not in name
        ]
        assert max(changes) > 1e-3


@every_kind
def test_an_empty_text_is_finite(kind: str) -> None:
    empty = BATCH | {"hyper_inputs": jnp.zeros((2, LENGTH), jnp.int32)}
    actual = logits(*moved(kind), empty)
    assert np.isfinite(actual).all()
    if kind == "prefix-text":
        assert off(actual[REAL], plain()[REAL]) < 1e-5


@pytest.mark.parametrize(
    ("use_instruction", "shots"), [(True, (0, 0)), (False, (2, 2)), (True, (2, 2))]
)
def test_instruction_examples_or_both_are_read(
    use_instruction: bool, shots: tuple[int, int]
) -> None:
    vocab = ByteVocabulary()
    data = config_lib.defaults().data
    data.update(use_instruction=use_instruction, shots=shots, hyper_length=80)
    data.update(tasks_per_batch=1, examples_per_task=2, input_length=8, target_length=8)
    examples = (("ab", "ba"), ("cd", "dc"))
    rows = tuple(TaskRow(str(i), f"{i}x", (f"x{i}",)) for i in range(3))
    task = TaskData("turn", ("Turn it.",), examples, rows)
    batch = EpisodeSampler([task], vocab, data, 0).batch(0)
    text = vocab.decode(batch["hyper_inputs"][0])
    assert ("Turn it." in text) == use_instruction
    assert ("dc" in text) == bool(shots[1])
    sizes = dataclasses.replace(CONFIG, vocab_size=vocab.size)
    m = build(sizes=sizes, data__hyper_length=80)
    assert m.hypermodel is not None
    hyper = hypermodels.init_params(m.hypermodel, jax.random.key(0), params(sizes))
    emitted = leaves(
        emit(m, {"hypermodel": hyper, "backbone": params(sizes)}, batch["hyper_inputs"])
    )
    # Every position of the text is visible, EOS included, and no other.
    assert emitted["enc_self/prefix/mask"].sum() == CONFIG.num_encoder_layers * (len(text) + 1)


# --------------------------------------------------------------------------------- once a task


@every_hyper_t5
def test_the_hypermodel_runs_once_a_task(kind: str) -> None:
    m, start = fresh(kind)
    seen: list[tuple[str, tuple[int, ...]]] = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        whole = isinstance(context.module, HyperT5 | t5.Encoder | t5.T5)
        if whole and context.method_name == "__call__":
            seen.append((type(context.module).__name__, args[0].shape))
        return call(*args, **kwargs)

    tasks, rows, width = 2, 3, CONFIG.emb_dim
    batch = BATCH | {k: jnp.ones((tasks, rows, 6), jnp.int32) for k in ("inputs", "targets")}
    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(m.logits), start, batch)
    read = LENGTH + (m.hypermodel.gist_tokens if isinstance(m.hypermodel, HyperT5) else 0)
    assert seen == [
        ("HyperT5", (tasks, LENGTH)),
        ("Encoder", (tasks, read, width)),
        ("T5", (tasks * rows, 6)),
        ("Encoder", (tasks * rows, 6, width)),
    ]


@pytest.mark.parametrize("kind", ["prefix-text", "lora-gists"])
def test_examples_of_a_task_can_be_tasks_of_their_own(kind: str) -> None:
    m, trained = moved(kind)
    apart: dict[str, Any] = {k: BATCH[k].reshape(4, 1, -1) for k in ("inputs", "targets")}
    apart |= {k: jnp.repeat(BATCH[k], 2, 0) for k in ("hyper_inputs", "tasks")}
    actual, expected = (logits(m, trained, batch) for batch in (apart, BATCH))
    assert off(actual[REAL], expected[REAL]) < 1e-5


# --------------------------------------------------------------------------- readers and heads


def test_every_query_sees_the_others() -> None:
    """The reader's decoder has no causal mask: the first query attends to the last too."""
    reader = QueryReader(CONFIG, 4)
    variables = nn.unbox(jax.jit(reader.init)(jax.random.key(0), BATCH["hyper_inputs"]))
    apply = jax.jit(reader.apply)
    expected = apply(variables, BATCH["hyper_inputs"])
    assert expected.shape == (2, 4, CONFIG.emb_dim)
    for query in range(4):
        queries = variables["params"]["queries"]
        changed = {**variables["params"], "queries": queries.at[query].multiply(-1.0)}
        other = apply({"params": changed}, BATCH["hyper_inputs"])
        assert all(off(other[:, i], expected[:, i]) > 1e-3 for i in range(4))


@pytest.mark.parametrize("features", [1, 2, RANK])
def test_heads_are_shared_by_layers_and_split_by_feature(features: int) -> None:
    spec = ad.LoraSpec(EVERY_TARGET, RANK, 1.0, True)
    heads = LoraHeads(spec, CONFIG)
    rng = np.random.default_rng(0)

    def normal(layers: int) -> np.ndarray:
        return rng.normal(size=(layers, 2, features, CONFIG.emb_dim)).astype(np.float32)

    sites = (*ad.ATTENTION_SITES, *ad.MLP_SITES)
    states = {site: normal(ad.num_layers(site, CONFIG)) for site in sites}
    variables = nn.unbox(jax.jit(heads.init)(jax.random.key(0), states))
    variables = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), variables)
    apply = jax.jit(heads.apply)
    tree = apply(variables, states)
    ad.check(ad.Adapters(tree, ad.AdapterSpec(lora=spec)), CONFIG, "heads")
    # The layers' features in another order give the layers' adapters in that order.
    turned = apply(variables, {site: x[::-1] for site, x in states.items()})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[::-1], atol=1e-6), turned, tree)
    # Another last feature moves the last RANK / features components, and no other.
    other = {site: np.concatenate([x[:, :, :-1], -x[:, :, -1:]], 2) for site, x in states.items()}
    changed, kept = apply(variables, other), RANK - RANK // features
    for site, projection in (target.split(".") for target in EVERY_TARGET):
        a, b = (
            np.any(changed[site][projection][k] != tree[site][projection][k], axes)
            for k, axes in (("a", (0, 1, 2)), ("b", (0, 1, 3)))
        )
        assert list(a) == list(b) == [False] * kept + [True] * (RANK - kept)


@pytest.mark.parametrize("system", ["shared_lora", "shared_prefix", "shared_bottleneck"])
def test_a_shared_adapter_reads_nothing(system: str) -> None:
    m = build(system=system)
    assert m.hypermodel is not None
    own = hypermodels.init_params(m.hypermodel, jax.random.key(0))
    adapters = emit(m, {"hypermodel": own, "backbone": params()}, BATCH["hyper_inputs"])
    assert adapters is not None
    ad.check(adapters, CONFIG, system)
    for name, leaf in leaves(adapters).items():
        np.testing.assert_array_equal(leaf[:, 0], leaf[:, 1])
        assert leaf.any() != name.endswith(("/b", "_bias"))


# ------------------------------------------------------------------------- the other systems


def test_text_to_lora_starts_as_one_lora_for_all_tasks() -> None:
    start = leaves(emit(*fresh("text_to_lora"), ids(3, LENGTH, seed=3)))
    for name, leaf in start.items():
        np.testing.assert_array_equal(leaf[:, 0], leaf[:, 2])
        if name.endswith("/a"):  # LoRA's init: about one over the root of the input size
            assert 0.7 < leaf.std() * leaf.shape[2] ** 0.5 < 1.3
    trained = leaves(emit(*moved("text_to_lora"), ids(3, LENGTH, seed=3)))
    assert any(off(leaf[:, 0], leaf[:, 2]) > 1e-3 for leaf in trained.values())


def test_decoder_loras_of_text_to_lora_use_the_last_layer_embeddings() -> None:
    m, start = moved("text_to_lora")
    site = next(site for site in leaves(emit(m, start, ids(2, LENGTH))) if site.startswith("dec"))
    site = site.partition("/")[0]

    def total(embedding: jax.Array) -> jax.Array:
        own = start["hypermodel"] | {"layer_embedding": embedding}
        adapters = emit(m, start | {"hypermodel": own}, ids(2, LENGTH))
        assert adapters is not None
        return sum(leaf.sum() for leaf in jax.tree.leaves(adapters.tree[site]))

    gradient = np.abs(jax.grad(total)(jnp.asarray(start["hypermodel"]["layer_embedding"])))
    used = gradient.sum(1) > 0
    assert used.tolist() == [False] * CONFIG.num_encoder_layers + [True] * CONFIG.num_decoder_layers


def test_fid_icl_encodes_each_part_alone() -> None:
    parts = np.array([[5, 6, 7, 1], [8, 9, 1, 0], [10, 1, 0, 0]], np.int32)
    whole = np.array([[*parts[parts > 0], 0, 0]], np.int32)
    memory = emit(*fresh("fid_icl"), whole)
    assert memory is not None
    encode = jax.jit(functools.partial(t5.T5(CONFIG).apply, method="encode"))
    alone = encode({"params": params()}, parts)[parts > 0]
    states, mask = (memory.tree[ad.MEMORY][k][0, 0] for k in ("states", "mask"))
    assert off(states[mask], alone) < 1e-5
    assert mask.sum() == 9
    joint = encode({"params": params()}, whole)[0]
    assert off(states[mask], joint[mask]) > 1e-2


MODES = ("learned", "generated", "per_task", "none")


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        pytest.param(*pair, marks=[] if pair[0] == pair[1] else [pytest.mark.slow])
        for pair in itertools.product(MODES, MODES)
    ],
)
def test_every_mode_of_the_hyperdecoder_trains_all_parameters(encoder: str, decoder: str) -> None:
    """Every parameter has a gradient, except those of tasks that are not in the batch."""
    m = build(
        system="hyperdecoder",
        adapter__bottleneck_sizes=(3, 2),
        adapter__task_slots=3,
        hyperdecoder__encoder=encoder,
        hyperdecoder__decoder=decoder,
    )
    assert m.hypermodel is not None
    assert m.task_slots == (3 if "per_task" in (encoder, decoder) else 0)
    own = hypermodels.init_params(m.hypermodel, jax.random.key(0))
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), own)
    assert bool(own) == ({encoder, decoder} != {"none"})

    @jax.jit
    def loss(own: Any) -> jax.Array:
        logits = m.logits({"hypermodel": own, "backbone": params()}, BATCH)
        return jnp.sum(jnp.where(REAL[..., None], logits, 0.0) ** 2)

    for path, gradient in traverse_util.flatten_dict(jax.grad(loss)(own), sep="/").items():
        assert np.any(gradient), path
        stack, _, rest = path.partition("_")
        if rest.startswith("adapters") and {"encoder": encoder, "decoder": decoder}[stack] == (
            "per_task"
        ):
            assert np.any(gradient[:, 0])
            assert np.any(gradient[:, 1])
            assert not np.any(gradient[:, 2])  # the batch has tasks 0 and 1


def test_hyperdecoder_generates_adapters_once_for_all_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m, trained = moved("hyperdecoder")
    rows, calls = BATCH["inputs"].reshape(4, 6), []
    generate = model.generate_adapters

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[2].shape)
        return generate(*arguments)

    monkeypatch.setattr(model, "generate_adapters", counted)
    tokens = model.generate_tokens(m, trained, None, rows, jnp.zeros(4, jnp.int32), steps=5)
    assert calls == [(4, 6)]
    # It equals teacher forcing, each row with its own adapters.
    batch = {"inputs": rows[:, None], "targets": tokens[:, None]}
    batch |= {"hyper_inputs": rows[:, :1], "tasks": jnp.zeros(4, jnp.int32)}
    likeliest = np.argmax(logits(m, trained, batch), -1)
    np.testing.assert_array_equal(np.where(tokens > 0, likeliest, 0), tokens)


@pytest.mark.parametrize("system", ["hyper_lora", "text_to_lora", "shared_lora", "task_lora"])
@pytest.mark.parametrize("reader", ["layerwise", "decoder_queries"])
def test_ranks_that_differ_by_target_are_emitted(system: str, reader: str) -> None:
    pattern = "dec_cross=8,dec_cross.value=1,out=2"  # the first match counts
    fields = LORA | {"system": system, "adapter__task_slots": 2, "hypermodel__reader": reader}
    fields |= {"adapter__lora_rank_pattern": pattern, "adapter__lora_alpha_pattern": "wo=3.5"}
    m = build(**fields)
    emitter: Any = m.hypermodel
    texts, numbers = jnp.asarray(BATCH["hyper_inputs"]), jnp.arange(2)
    key = jax.random.key(0)
    adapters, _ = jax.eval_shape(lambda: emitter.init_with_output(key, texts, numbers))
    lora = adapters.spec.lora
    assert [lora.rank_of(t) for t in lora.targets] == [4, 4, 2, 8]
    assert [lora.alpha_of(t) for t in lora.targets] == [8.0, 3.5, 8.0, 8.0]
    ad.check(adapters, CONFIG, system)
    if system == "hyper_lora" and reader == "layerwise":
        assert isinstance(m.hypermodel, HyperT5)
        assert m.hypermodel.gist_tokens == 2  # divides every rank
        with pytest.raises(UserError, match=r"lora_rank=2 is not a multiple .*=4 at dec_self.out"):
            build(**fields, hypermodel__gist_tokens=4)


# ------------------------------------------------------------------------------- bad config

BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"adapter__prefix_sites": ("enc_self", "dec_self")},
        "adapter.prefix_sites: hypermodel.reader=layerwise has no keys and values for dec_self",
    ),
    (
        LORA | {"hypermodel__gist_tokens": 3},
        "adapter.lora_rank=4 is not a multiple of hypermodel.gist_tokens=3",
    ),
    (
        LORA | {"hypermodel__gist_tokens": 8},
        "adapter.lora_rank=4 is not a multiple of hypermodel.gist_tokens=8",
    ),
    ({"adapter__prefix_sites": ()}, "adapter.prefix_sites is empty"),
    (QUERIES | {"adapter__prefix_sites": ()}, "adapter.prefix_sites is empty"),
    (LORA | {"adapter__lora_targets": ()}, "adapter.lora_targets is empty"),
    ({"system": "shared_lora", "adapter__lora_targets": ()}, "adapter.lora_targets is empty"),
    ({"system": "hint", "adapter__bottleneck_sites": ()}, "adapter.bottleneck_sites is empty"),
    ({"system": "hint", "adapter__bottleneck_sizes": (2, 3)}, "adapter.bottleneck_sizes: system h"),
    (
        {"system": "shared_bottleneck", "adapter__bottleneck_sizes": (2, 3, 4)},
        "adapter.bottleneck_sizes has 3 sizes for 2 sites (enc_mlp, dec_mlp)",
    ),
    ({"system": "task_lora"}, "adapter.task_slots=0: task_lora keeps adapters for each task"),
    (
        {"system": "hyperdecoder", "hyperdecoder__encoder": "learnt"},
        "unknown hyperdecoder.encoder 'learnt', the nearest is 'learned'",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), BAD_CONFIGS)
def test_bad_configs_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        build(**fields)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_fields_of_other_systems_are_not_checked() -> None:
    build(system="shared_prefix", adapter__prefix_sites=("dec_self",), adapter__lora_targets=())
    build(**LORA, adapter__prefix_sites=())
    build(**LORA | QUERIES, adapter__prefix_sites=("dec_self",))
    build(**QUERIES, adapter__prefix_sites=("dec_self",))
    assert build(system="none", adapter__prefix_sites=()).hypermodel is None
