"""FLOP counts: of every system and of training steps, against closed forms and XLA."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import flops as flops_lib
from hyper_t5 import hypermodels, model, t5
from hyper_t5.checkpoints import workdir as workdir_lib
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.training import step

HYPER, INPUT, TARGET = 72, 8, 6
SIZES = t5.T5Config(
    vocab_size=800,
    emb_dim=96,
    num_heads=4,
    head_dim=16,
    mlp_dim=256,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
GATED: dict[str, Any] = {}
PLAIN: dict[str, Any] = {"mlp_activations": ("relu",), "logits_via_embedding": True}


def make_config(system: str, **fields: Any) -> ConfigDict:
    """Make a config of a system; a field's dot is written as two underscores."""
    config = config_lib.defaults()
    config.system = system
    config.data.update(hyper_length=HYPER, input_length=INPUT, target_length=TARGET)
    config.adapter.update(task_slots=5, bottleneck_sizes=(16,), lora_rank=8, prefix_length=10)
    if system == "hint":
        config.adapter.update(prefix_sites=ad.ATTENTION_SITES, position_bias="zero")
    for field, value in fields.items():
        section, _, name = field.partition("__")
        config[section][name] = value
    return config


def by_hand(c: t5.T5Config, length: int) -> float:
    """Return twice the multiply-adds of a T5's matrices and of its attention, for one example."""
    joined, kernels = c.num_heads * c.head_dim, len(c.mlp_activations) + 1
    attention, mlp = 4 * c.emb_dim * joined, kernels * c.emb_dim * c.mlp_dim
    encoder = length * (attention + mlp) + 2 * length * length * joined
    decoder = TARGET * (attention + mlp) + 2 * TARGET * TARGET * joined
    cross = (2 * TARGET + 2 * length) * c.emb_dim * joined + 2 * TARGET * length * joined
    layers = c.num_encoder_layers * encoder + c.num_decoder_layers * (decoder + cross)
    return 2.0 * (layers + TARGET * c.emb_dim * c.vocab_size)


@functools.cache
def flops(system: str) -> dict[str, float]:
    return flops_lib.system_flops(make_config(system), SIZES)


@pytest.mark.parametrize("changes", [GATED, PLAIN, {"num_encoder_layers": 5, "dtype": "bfloat16"}])
def test_plain_t5_equals_the_closed_form(changes: dict[str, Any]) -> None:
    sizes = dataclasses.replace(SIZES, **changes)
    counts = flops_lib.system_flops(make_config("none"), sizes)
    assert counts["per_example"] == pytest.approx(by_hand(sizes, INPUT), rel=0.03)
    assert counts["concatenated"] == pytest.approx(by_hand(sizes, HYPER + INPUT), rel=0.03)
    assert counts["per_task"] == 0


@pytest.mark.parametrize("system", ["hyper_prefix", "cached"])
def test_every_layer_is_counted(system: str) -> None:
    """XLA counts the body of a loop once: of the backbone, and of the hypermodel's reader."""

    def layers(count: int) -> dict[str, float]:
        both: Any = {"num_encoder_layers": count, "num_decoder_layers": count}
        sizes = dataclasses.replace(SIZES, **both, vocab_size=2)
        return flops_lib.system_flops(make_config(system), sizes)

    two, four = layers(2), layers(4)
    for name, value in four.items():
        assert value == pytest.approx(2 * two[name], rel=0.03)


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def parameters(m: model.Model) -> dict[str, Any]:
    """Return the shapes of backbone and hypermodel."""

    def init() -> dict[str, Any]:
        params = {"backbone": t5.init_params(m.sizes, jax.random.key(0))}
        if m.hypermodel is not None:
            params["hypermodel"] = hypermodels.init_params(m.hypermodel, jax.random.key(1))
        return params

    return jax.eval_shape(init)


def test_compiled_code_has_the_same_count() -> None:
    m = model.build_model(make_config("none"), dataclasses.replace(SIZES, scan_unroll=3))
    batch = {"hyper_inputs": ids(1, 1), "tasks": ids(1)}
    batch |= {"inputs": ids(1, 1, INPUT), "targets": ids(1, 1, TARGET)}
    compiled = jax.jit(m.logits).lower(parameters(m), batch).compile().cost_analysis()
    assert compiled is not None
    assert flops("none")["per_example"] == pytest.approx(compiled["flops"], rel=0.01)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(system: str) -> None:
    counts, plain = flops(system), flops("none")
    assert counts["concatenated"] == plain["concatenated"] > 4 * plain["per_example"]
    layout, reads = SYSTEMS[system].layout, SYSTEMS[system].conditioned_on
    learned = system.startswith(("shared_", "task_"))
    # At least an encoder's run over the text, where there is one.
    encoder = HYPER * SIZES.num_encoder_layers * (4 * 96 * 64 + 3 * 96 * 256) * 2
    read = not learned and not layout.in_inputs and system != "none"
    assert counts["per_task"] > encoder if read else counts["per_task"] == 0
    if layout.in_inputs:
        extra = 0 if system == "concat" else 0.01 * plain["concatenated"]
        assert counts["per_example"] - plain["concatenated"] >= extra
        assert counts["per_example"] < 1.15 * plain["concatenated"]
    else:
        assert (counts["per_example"] > plain["per_example"]) == (system != "none")
        assert counts["per_example"] < 0.5 * plain["concatenated"]
    assert (reads == "input") == (system == "hyperdecoder")


def test_cost_of_adapters_per_example() -> None:
    """The FLOPs that each kind adds to an example: twice its multiply-adds."""
    base, layers = flops("none")["per_example"], INPUT * 2 + TARGET * 3
    width, joined = 96, 64

    def added(system: str, **fields: Any) -> float:
        if not fields:
            return flops(system)["per_example"] - base
        return flops_lib.system_flops(make_config(system, **fields), SIZES)["per_example"] - base

    targets = ("enc_self.query", "dec_mlp.wo")
    lora = INPUT * 2 * (width + joined) + TARGET * 3 * (256 + width)
    lora_cost = added("shared_lora", adapter__lora_targets=targets)
    assert lora_cost == pytest.approx(2 * 8 * lora, rel=0.15)
    bottleneck = 2 * layers * 2 * width * 16
    assert added("task_bottleneck") == pytest.approx(bottleneck, rel=0.15)
    # Softmax and bias are no multiply-adds, and of an attention this small a third.
    prefix = 2 * layers * 2 * joined * 10
    assert prefix < added("shared_prefix") < 1.6 * prefix
    # Keys and values of the memory, in each layer of the decoder; then as a prefix.
    memory = 2 * 3 * (HYPER * 2 * width * joined + TARGET * HYPER * 2 * joined)
    assert added("fid_icl") == pytest.approx(memory, rel=0.05)


def test_nothing_is_allocated() -> None:
    counts = flops_lib.system_flops(
        make_config("hyper_prefix"), dataclasses.replace(SIZES, vocab_size=10**9)
    )
    assert counts["per_example"] > 2 * TARGET * 96 * 1e9  # of an embedding of 384 GB


@pytest.mark.parametrize("system", SYSTEMS)
def test_generated_parameters_are_counted(system: str) -> None:
    config = make_config(system, data__hyper_length=5, data__input_length=3)
    m = model.build_model(config, SIZES)
    length = 8 if system == "hyperdecoder" else 5
    adapters = jax.eval_shape(m.adapters, parameters(m), ids(2, length), ids(2))
    if system in ("none", "concat"):
        assert adapters is None
        assert flops_lib.generated_parameters(m, config) == 0
        return
    numbers = sum(x.size for x in jax.tree.leaves(adapters) if x.dtype != bool)
    assert 2 * flops_lib.generated_parameters(m, config) == numbers > 0
    if system == "shared_prefix":  # encoder's self-attention and decoder's cross-attention
        assert numbers == 2 * (2 + 3) * 2 * 10 * 64


# ------------------------------------------------------------------------------- a training step


def counted(function: Any, *arrays: Any) -> float:
    return flops_lib.jaxpr_flops(jax.make_jaxpr(function)(*arrays))


A, B = np.ones((3, 5), np.float32), np.ones((5, 7), np.float32)
PRODUCT = 2.0 * 3 * 5 * 7


def test_products_of_every_kind() -> None:
    assert counted(jnp.matmul, A, B) == PRODUCT
    assert counted(jnp.add, A, A) == 0
    many = np.ones((4, 3, 5)), np.ones((4, 5, 7))
    assert counted(jnp.matmul, *many) == 4 * PRODUCT
    assert counted(jax.vmap(jnp.matmul, (0, None)), many[0], B) == 4 * PRODUCT
    assert counted(lambda x: jnp.einsum("ab,ab->", x, x), A) == 2 * 15
    # 1-D convolution of 10 places, 3 of the kernel, 4 channels to 6; then in two groups.
    signal, kernel = np.ones((1, 4, 10), np.float32), np.ones((6, 4, 3), np.float32)
    both = (1,), "SAME"
    assert counted(lambda x, k: jax.lax.conv(x, k, *both), signal, kernel) == 2 * 10 * 3 * 4 * 6

    def grouped(x: Any, k: Any) -> Any:
        return jax.lax.conv_general_dilated(x, k, *both, feature_group_count=2)

    assert counted(grouped, signal, kernel[:, :2]) == 10 * 3 * 4 * 6


def test_nested_programs() -> None:
    def product(x: Any) -> Any:
        return x @ B

    def scanned(x: Any) -> Any:
        turns: Any = jax.lax.scan(lambda c, _: (c + jnp.sum(x @ B), None), 0.0, None, length=11)
        return turns[0]

    def choose(x: Any) -> Any:
        turns = [
            lambda x: x[0],
            lambda x: jnp.sum(product(x) @ B.T, 0),
            lambda x: product(x)[0, :5],
        ]
        return jax.lax.switch(jnp.int32(x[0, 0]), turns, x)

    def loop(x: Any) -> Any:
        start: Any = 0.0
        return jax.lax.while_loop(lambda c: c < 9, lambda c: c + jnp.sum(x @ B), start)

    assert counted(jax.jit(product), A) == PRODUCT
    assert counted(scanned, A) == 11 * PRODUCT
    assert counted(jax.vmap(scanned), np.ones((4, 3, 5))) == 44 * PRODUCT
    assert counted(choose, A) == 2 * PRODUCT
    assert counted(loop, A) == PRODUCT
    own = jax.custom_vjp(product)
    own.defvjp(lambda x: (product(x), None), lambda _, y: (y @ B.T,))
    assert counted(own, A) == PRODUCT
    assert counted(jax.grad(lambda x: jnp.sum(own(x))), A) == 2 * PRODUCT


def test_remat_is_counted() -> None:
    def loss(x: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.sin(x @ B) @ B.T))

    plain = counted(jax.grad(loss), A)
    assert plain == 4 * PRODUCT
    assert counted(jax.grad(jax.checkpoint(loss)), A) > plain


TASKS, EXAMPLES = 2, 3
WIDE = dataclasses.replace(SIZES, emb_dim=256, head_dim=64, mlp_dim=512)


def batch_of(system: str, examples: int = EXAMPLES, length: int = INPUT) -> dict[str, Any]:
    long = SYSTEMS[system].layout.in_inputs
    return {
        "hyper_inputs": ids(TASKS, 1 if long else HYPER),
        "tasks": ids(TASKS),
        "inputs": ids(TASKS, examples, length + HYPER if long else length),
        "targets": ids(TASKS, examples, TARGET),
    }


def step_flops(system: str, sizes: t5.T5Config = WIDE, examples: int = EXAMPLES) -> float:
    config = make_config(system)
    m = model.build_model(config, sizes)
    return flops_lib.train_flops(m, config, batch_of(system, examples), step.loss_sums)


@pytest.mark.parametrize("system", ["hyper_lora", "hint", "hyperdecoder"])
def test_a_step_equals_xlas_count(system: str) -> None:
    m = model.build_model(make_config(system), dataclasses.replace(WIDE, scan_unroll=3))
    frozen = parameters(m)
    trained = {branch: frozen.pop(branch) for branch in m.system.trains}

    def gradient(trained: Any, frozen: Any, batch: Any) -> Any:
        return jax.grad(step.loss_sums, argnums=1, has_aux=True)(m, trained, frozen, batch, None)

    expected = flops_lib.count_flops(gradient, trained, frozen, batch_of(system))
    assert step_flops(system) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("changes", [GATED, PLAIN])
def test_a_plain_step_is_three_forward_passes(changes: dict[str, Any]) -> None:
    """6 N D, with N D the parameters used per token, plus attention."""
    sizes = dataclasses.replace(SIZES, **changes)
    rows = TASKS * EXAMPLES
    expected = 3 * rows * by_hand(sizes, HYPER + INPUT)
    assert step_flops("concat", sizes) == expected
    # Remat, unrolling and dtype do not change the model's cost.
    recomputed = dataclasses.replace(sizes, remat="full", scan_unroll=2, dtype="bfloat16")
    assert step_flops("concat", recomputed) == expected


def test_frozen_weights_have_no_gradient_cost() -> None:
    """A frozen backbone costs two passes: forward, and gradients of activations."""
    forward = TASKS * EXAMPLES * by_hand(WIDE, INPUT)
    adapters = step_flops("shared_lora") - 2 * forward
    assert 0 < adapters < 0.2 * forward


def test_the_hypermodel_runs_once_a_task() -> None:
    cost = {n: step_flops("hyper_lora", examples=n) for n in (1, 2, 5)}
    assert cost[5] - cost[2] == 3 * (cost[2] - cost[1])
    encoder = TASKS * HYPER * WIDE.num_encoder_layers * (4 * 256 * 256 + 3 * 256 * 512) * 2
    assert cost[1] - (cost[2] - cost[1]) > 3 * encoder


def test_a_step_of_any_size_is_counted_without_weights() -> None:
    xl = t5.preset("xl", remat="minimal")
    assert step_flops("concat", xl) == 3 * TASKS * EXAMPLES * by_hand(xl, HYPER + INPUT)


# ------------------------------------------------------------------------------------- seconds


def write(folder: Path, *times: tuple[float, float]) -> Path:
    """Write a metrics.jsonl of (time, seconds)."""
    records = [json.dumps({"step": i, "time": t, "seconds": s}) for i, (t, s) in enumerate(times)]
    (folder / workdir_lib.METRICS_FILE).write_text("\n".join(records) + "\n")
    return folder


def test_training_seconds_of_all_parts(tmp_path: Path) -> None:
    assert workdir_lib.training_seconds(tmp_path) is None
    assert workdir_lib.training_seconds(write(tmp_path, (105, 5), (110, 10))) == 10
    # Resumed at 120 and at 200; the last part starts with more seconds than the part before it had.
    parts = [(105, 5), (110, 10), (123, 3), (250, 50), (260, 60)]
    assert workdir_lib.training_seconds(write(tmp_path, *parts)) == 10 + 3 + 60
    # Rounding, and a clock set forward by 4 s: one part.
    assert workdir_lib.training_seconds(write(tmp_path, (105, 5), (114.001, 10), (119, 15))) == 15
    # A truncated line, and a line of another kind.
    with (tmp_path / workdir_lib.METRICS_FILE).open("a") as file:
        file.write('[3]\n{"step": 9}\n{"step": 3, "ti')
    assert workdir_lib.training_seconds(tmp_path) == 15
    write(tmp_path)
    assert workdir_lib.training_seconds(tmp_path) == 0


# ------------------------------------------------------------- the closed form that papers use

# Mean lengths of the test tasks of Super-NaturalInstructions: by definition, and with two examples.
SNI = [flops_lib.Lengths(95, 81, 14), flops_lib.Lengths(305, 81, 14)]
LONG = flops_lib.Lengths(1024, 1024, 256)


def xla(sizes: t5.T5Config, lengths: flops_lib.Lengths) -> dict[str, float]:
    """Return XLA's counts of the plain backbone at these lengths."""
    config = make_config("none")
    names = {"hyper_length": "text", "input_length": "input", "target_length": "output"}
    config.data.update({field: int(getattr(lengths, name)) for field, name in names.items()})
    return flops_lib.system_flops(config, sizes)


@pytest.mark.parametrize(
    ("size", "off"), [("small", 0.14), ("base", 0.10), ("large", 0.10), ("xl", 0.04)]
)
@pytest.mark.parametrize("lengths", SNI, ids=["def", "def_pos_2"])
def test_closed_form_agrees_with_xla(size: str, off: float, lengths: flops_lib.Lengths) -> None:
    """The closed form leaves out attention and output, which weigh more in narrow models."""
    sizes, n = t5.preset(size), 100
    counts = xla(sizes, lengths)
    estimate, whole = (flops_lib.closed_form(sizes, lengths, n, whole=w) for w in (False, True))
    assert n * counts["concatenated"] == pytest.approx(estimate["concat"], rel=off)
    assert n * counts["concatenated"] == pytest.approx(whole["concat"], rel=0.03)
    # Here without the reading of the text, a hundredth of all.
    assert n * counts["per_example"] == pytest.approx(estimate["adapters"], rel=off)
    assert n * counts["per_example"] == pytest.approx(whole["adapters"], rel=0.05)


def test_long_texts_need_attention_in_the_closed_form() -> None:
    sizes = t5.preset("xl")
    count = xla(sizes, LONG)["concatenated"]
    estimate, whole = (
        flops_lib.closed_form(sizes, LONG, 1, whole=w)["concat"] for w in (False, True)
    )
    assert count > 1.10 * estimate
    assert count == pytest.approx(whole, rel=0.03)


def test_long_outputs_need_self_attention_in_the_closed_form() -> None:
    sizes, lengths = t5.preset("xl"), flops_lib.Lengths(1, 1, 512)
    count = xla(sizes, lengths)["per_example"]
    task, example = (flops_lib.closed_form(sizes, lengths, n, whole=True) for n in (0, 1))
    assert count == pytest.approx(example["adapters"] - task["adapters"], rel=2e-3)


def test_parameters_of_the_closed_form() -> None:
    """Embeddings and output are left out: they would add 5 % at xl, 75 % at small."""
    for size, off in {"small": 0.74, "xl": 0.04}.items():
        sizes = t5.preset(size)
        params = jax.eval_shape(lambda c=sizes: t5.init_params(c, jax.random.key(0)))
        table = sizes.vocab_size * sizes.emb_dim
        blocks = flops_lib.block_parameters(sizes)
        assert model.count_parameters(params) - 2 * table == pytest.approx(blocks, rel=1e-3)
        assert 2 * table > off * blocks


def test_rows_of_a_task_share_its_memory() -> None:
    """fid_icl's memory has keys and values in each layer of the decoder, once for all rows."""
    alone, in_four = (
        flops_lib.system_flops(make_config("fid_icl"), SIZES, rows)["per_example"]
        for rows in (1, 4)
    )
    shared = 2 * 3 * HYPER * 2 * 96 * 64
    assert alone - in_four == pytest.approx(shared * 3 / 4, rel=0.05)
    assert flops_lib.system_flops(make_config("none"), SIZES, 4)["per_example"] == pytest.approx(
        flops("none")["per_example"], rel=0.01
    )
