"""FLOPs of an example and of a training step, from shapes alone.

`jaxpr_flops` is the count of record: matrix products and convolutions, as model FLOPs utilization
is defined (PaLM, arXiv 2204.02311, appendix B), with the true trip counts of loops. Two others
check it: `system_flops`, XLA's count of everything that an example needs, with unrolled layers,
differs by the elementwise part, about 1 %; `closed_form` is the estimate that papers compare
systems by, from sizes and lengths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import model, t5
from hyper_t5.hypermodels import BACKBONE
from hyper_t5.hypermodels.learned import Learned

Tree = dict[str, Any]


def system_flops(
    config: ConfigDict, sizes: t5.T5Config, rows: int = 1, fixed: ad.Adapters | None = None
) -> dict[str, float]:
    """Count XLA's FLOPs of ``config.system`` at the full lengths of ``config.data``.

    Args:
      config: of the system.
      sizes: of the backbone.
      rows: examples of one task in a batch, which share the decoder's work on the task's memory.
      fixed: adapters of one task, for a system that emits none.

    Returns:
      ``per_task``: one run of the hypermodel; 0 where none is run, or for every input.
      ``per_example``: a teacher-forced forward pass of one example with its adapters, including the
      conditioning where it precedes the input, and the hypermodel where it reads the input.
      ``concatenated``: the same of the plain backbone with the conditioning before the input.
    """
    m, d = _unrolled(config, sizes), config.data
    params = model.param_shapes(m)
    wide, targets = d.hyper_length * d.chunks + d.input_length, _ids(rows, d.target_length)

    def example(backbone: Tree, adapters: Any, inputs: Any, targets: Any) -> jax.Array:
        return t5.T5(m.sizes).apply({"params": backbone}, inputs, targets, adapters)

    def count_example(adapters: Any, length: int) -> float:
        return count_flops(example, params[BACKBONE], adapters, _ids(rows, length), targets) / rows

    counts = {"per_task": 0.0, "per_example": 0.0, "concatenated": count_example(None, wide)}
    if m.system.conditioned_on == "input":
        batch = {"hyper_inputs": _ids(1, 1), "tasks": _ids(1), "inputs": _ids(1, 1, wide)}
        batch["targets"] = _ids(1, 1, d.target_length)
        return counts | {"per_example": count_flops(m.logits, params, batch)}
    if m.hypermodel is not None and not isinstance(m.hypermodel, Learned):
        counts["per_task"] = count_flops(m.adapters, params, *_conditioning(m, config))
    length = wide if m.system.layout.in_inputs else d.input_length
    return counts | {"per_example": count_example(fixed or _emitted(m, params, config), length)}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a task's conditioning, of an input and of an output; or their means."""

    text: float
    input: float
    output: float


def block_parameters(sizes: t5.T5Config) -> int:
    """Count the matrix parameters of all layers, without embeddings, output, norms and biases."""
    attention = 4 * sizes.emb_dim * sizes.num_heads * sizes.head_dim
    mlp = (len(sizes.mlp_activations) + 1) * sizes.emb_dim * sizes.mlp_dim
    encoder = sizes.num_encoder_layers * (attention + mlp)
    return encoder + sizes.num_decoder_layers * (2 * attention + mlp)


def closed_form(
    sizes: t5.T5Config, lengths: Lengths, examples: float, *, whole: bool = False
) -> dict[str, float]:
    """Estimate FLOPs of ``examples`` of one task as HINT compares systems (Ivison et al. 2023).

    A token passes one of the two stacks, half of the N = `block_parameters` parameters, with two
    operations each. For n examples with t, i and o tokens of text, input and output (HyperLoRA,
    appendix D.2):

    - ``concat``: N n (t + i + o), with the text before every input
    - ``adapters``: N t + N n (i + o), with the text read once

    For equally deep stacks this is exactly the work of the matrices: the decoder's keys and values
    of each input token are half of what a decoder layer has more than an encoder layer. Hypermodel
    heads and generated adapters are not included.

    Args:
      sizes: of the backbone.
      lengths: t, i, o.
      examples: n.
      whole: add attention, which grows with the square of lengths, and the output projection.
    """
    n, t, i, o = examples, lengths.text, lengths.input, lengths.output
    parameters = block_parameters(sizes)
    total = {"concat": parameters * n * (t + i + o), "adapters": parameters * (t + n * (i + o))}
    if not whole:
        return total

    def read(tokens: float) -> float:
        return sizes.num_encoder_layers * tokens * tokens

    def write(tokens: float) -> float:
        return sizes.num_decoder_layers * o * (o + tokens)

    products = 4 * sizes.num_heads * sizes.head_dim  # per pair of positions: logits and values
    output = 2 * n * o * sizes.emb_dim * sizes.vocab_size
    total["concat"] += products * n * (read(t + i) + write(t + i)) + output
    total["adapters"] += products * (read(t) + n * (read(i) + write(i))) + output
    return total


def count_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Count the FLOPs of a function of arrays of these shapes by XLA's cost analysis.

    The analysis is of the program before compilation: compiled programs are counted differently by
    device (GPUs hide products in calls), and compiling a large backbone takes a minute.
    """
    return float((jax.jit(function).lower(*shapes).cost_analysis() or {}).get("flops", 0.0))


def train_flops(m: model.Model, config: ConfigDict, batch: Tree, loss: Callable[..., Any]) -> float:
    """Count the model FLOPs of one training step, on all devices together.

    The forward pass, the gradients of trained parameters, and those of activations through frozen
    ones; the hypermodel once per task. Rematerialization and the optimizer are not counted. Padding
    counts as tokens.

    Args:
      m: the model.
      config: of the run.
      batch: arrays, or their shapes and dtypes.
      loss: (m, trained, frozen, batch, rng) -> (loss, anything), as `training.step.loss_sums`.
    """
    m = model.build_model(config, dataclasses.replace(m.sizes, remat="none"))
    params = dict(model.param_shapes(m))
    trained = {branch: params.pop(branch) for branch in m.system.trains}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

    def gradient(trained: Tree, frozen: Tree, batch: Tree) -> Any:
        return jax.grad(lambda t: loss(m, t, frozen, batch, None), has_aux=True)(trained)

    return jaxpr_flops(jax.make_jaxpr(gradient)(trained, params, shapes))


def jaxpr_flops(program: core.ClosedJaxpr | core.Jaxpr) -> float:
    """Count the FLOPs of the matrix products and convolutions of a jaxpr.

    A multiply-add is two. A scan counts by its length, a cond by its most expensive branch, the
    body of a while loop once (its trip count is unknown), a shard_map as on one device.
    Rematerialized products are in a gradient's jaxpr and count.
    """
    return sum(_equation_flops(equation) for equation in program.eqns)


def _equation_flops(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    inputs: Any = [variable.aval for variable in equation.invars]
    outputs: Any = [variable.aval for variable in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * outputs[0].size * math.prod(inputs[0].shape[i] for i in contracted)
    if name == "conv_general_dilated":
        features = inputs[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * outputs[0].size * inputs[1].size / features
    inner = [jaxpr_flops(program) for program in _programs(params.values())]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _programs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    """Yield every jaxpr among the parameters of an equation."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _programs(value)
        elif isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def generated_parameters(m: model.Model, config: ConfigDict) -> int:
    """Count the numbers in the adapters of one task (or input, if conditioned on it)."""
    emitted = _emitted(m, model.param_shapes(m), config)
    return 0 if emitted is None else ad.parameters_per_task(emitted)


def _unrolled(config: ConfigDict, sizes: t5.T5Config) -> model.Model:
    """Return the model without a loop over layers (XLA counts a loop body once) and casts."""
    layers = max(sizes.num_encoder_layers, sizes.num_decoder_layers)
    sizes = dataclasses.replace(sizes, scan_unroll=layers, remat="none", dtype="float32")
    return model.build_model(config, sizes)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _conditioning(m: model.Model, config: ConfigDict) -> tuple[Any, Any]:
    """Return the hypermodel's inputs of one task: ids [1, L] and its number [1]."""
    length = config.data.hyper_length * config.data.chunks
    if m.system.conditioned_on == "input":
        length += config.data.input_length
    return _ids(1, length), _ids(1)


def _emitted(m: model.Model, params: Tree, config: ConfigDict) -> ad.Adapters | None:
    """Return the adapters of one task as shapes."""
    return jax.eval_shape(m.adapters, params, *_conditioning(m, config))
