"""What a system costs: FLOPs of an example and of a training step, numbers emitted, seconds.

Everything but the seconds follows from shapes: no weight is allocated and nothing is run.

There are two counts of FLOPs. `flops` is XLA's, of everything that an example needs, and unrolls
the layers. `jaxpr_flops` counts matrix products and convolutions alone, as model FLOPs utilisation
is defined (PaLM, arXiv 2204.02311, appendix B), at the true number of a loop's turns; the two
differ by what is elementwise, about 1 %. `closed_form` is the estimate that papers compare systems
by, of sizes and lengths alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import files, metrics, model, t5
from hyper_t5.hypermodels import BACKBONE
from hyper_t5.hypermodels.learned import Learned

Tree = dict[str, Any]


def flops(
    config: ConfigDict, sizes: t5.T5Config, rows: int = 1, given: ad.Adapters | None = None
) -> dict[str, float]:
    """Of ``config.system`` on a backbone of these sizes, at the full lengths of ``config.data``.

    ``rows`` examples of one task are in a batch: they share what the decoder makes of the task's
    encoded text, where a system gives it that.

    - ``per_task``: the hypermodel's run over one conditioning, made once for all of a task's
      examples; 0 where none is read, or as part of every input.
    - ``per_example``: a teacher-forced forward pass of one example, its adapters given: with the
      text in front of the input where the system has it there, and with the hypermodel's run where
      that is of the inputs themselves.
    - ``concatenated``: the same of the plain backbone with the text in front, the yardstick.

    ``given``: adapters of one task that are there, for a system that emits none.
    """
    m, d = _unrolled(config, sizes), config.data
    params = model.shapes_of(m)
    wide, targets = d.hyper_length + d.input_length, _ids(rows, d.target_length)

    def example(backbone: Tree, adapters: Any, inputs: Any, targets: Any) -> jax.Array:
        return t5.T5(m.sizes).apply({"params": backbone}, inputs, targets, adapters)

    def count_example(adapters: Any, length: int) -> float:
        return count(example, params[BACKBONE], adapters, _ids(rows, length), targets) / rows

    found = {"per_task": 0.0, "per_example": 0.0, "concatenated": count_example(None, wide)}
    if m.choice.reads == "input":
        batch = {"hyper_inputs": _ids(1, 1), "tasks": _ids(1), "inputs": _ids(1, 1, wide)}
        batch["targets"] = _ids(1, 1, d.target_length)
        return found | {"per_example": count(m.logits, params, batch)}
    if m.hypermodel is not None and not isinstance(m.hypermodel, Learned):
        found["per_task"] = count(m.adapters, params, *_conditioning(m, config))
    length = wide if m.choice.layout == "concat" else d.input_length
    return found | {"per_example": count_example(given or _emitted(m, params, config), length)}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a task's text (instruction, examples), of an input and of an output; or means."""

    text: float
    input: float
    output: float


def block_parameters(sizes: t5.T5Config) -> int:
    """Numbers in the matrices of all layers: neither embeddings, output, nor norms and biases."""
    attention = 4 * sizes.emb_dim * sizes.num_heads * sizes.head_dim
    mlp = (len(sizes.mlp_activations) + 1) * sizes.emb_dim * sizes.mlp_dim
    encoder = sizes.num_encoder_layers * (attention + mlp)
    return encoder + sizes.num_decoder_layers * (2 * attention + mlp)


def closed_form(
    sizes: t5.T5Config, lengths: Lengths, examples: float, *, whole: bool = False
) -> dict[str, float]:
    """FLOPs of ``examples`` of one task, by the estimate that HINT compares systems with.

    A token meets one of the two stacks, half of the N parameters, with two operations each. Of
    n examples with t, i and o tokens of text, input and output (Ivison et al. 2023, as HyperLoRA's
    appendix D.2 has it):

    - ``concat``: N n (t + i + o), where the text is in front of every input
    - ``adapters``: N t + N n (i + o), where it is read once

    N is `block_parameters`. By that a stack's tokens cost exactly what their matrices do where the
    stacks are equally deep: keys and values for the decoder, computed of each input token, are half
    of what a decoder's layer has more than an encoder's. ``whole`` adds what the estimate leaves
    out of a T5: attention, which grows with the square of lengths, and the output's matrix. What a
    system does besides, a hypermodel's heads or generated adapters, is in neither.
    """
    n, t, i, o = examples, lengths.text, lengths.input, lengths.output
    parameters = block_parameters(sizes)
    found = {"concat": parameters * n * (t + i + o), "adapters": parameters * (t + n * (i + o))}
    if not whole:
        return found

    def read(tokens: float) -> float:
        return sizes.num_encoder_layers * tokens * tokens

    def write(tokens: float) -> float:
        return sizes.num_decoder_layers * o * (o + tokens)

    products = 4 * sizes.num_heads * sizes.head_dim  # of a pair of positions: logits, and values
    output = 2 * n * o * sizes.emb_dim * sizes.vocab_size
    found["concat"] += products * n * (read(t + i) + write(t + i)) + output
    found["adapters"] += products * (read(t) + n * (read(i) + write(i))) + output
    return found


def count(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of a function of arrays of these shapes, by XLA's analysis of its program.

    Of the program as it is given to the compiler: what the compilers of the devices make of it is
    counted differently (a GPU's hides products in calls), and takes a minute for a large backbone.
    """
    return float((jax.jit(function).lower(*shapes).cost_analysis() or {}).get("flops", 0.0))


def train_flops(m: model.Model, config: ConfigDict, batch: Tree, loss: Callable[..., Any]) -> float:
    """Model FLOPs of one training step on a batch of these shapes, on all devices together.

    The forward pass, the gradients of what is trained, and those of the activations on their way
    there through what is frozen; the hypermodel once a task. What remat computes again is not
    counted, nor is the optimizer. Padding counts as what it is computed as: a token like others.

    ``loss(m, trained, frozen, batch, rng)`` returns (the loss, anything), as ``train.loss_sums``;
    ``batch`` has arrays, or only their shapes.
    """
    m = model.build(config, dataclasses.replace(m.sizes, remat="none"))
    params = dict(model.shapes_of(m))
    trained = {branch: params.pop(branch) for branch in m.choice.trains}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

    def gradient(trained: Tree, frozen: Tree, batch: Tree) -> Any:
        return jax.grad(lambda t: loss(m, t, frozen, batch, None), has_aux=True)(trained)

    return jaxpr_flops(jax.make_jaxpr(gradient)(trained, params, shapes))


def jaxpr_flops(program: core.ClosedJaxpr | core.Jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of what ``jax.make_jaxpr`` returns.

    A multiplication and an addition are two. A scan counts as often as it turns, of a cond the
    dearest branch, the body of a while loop once, whose turns are not known; a shard_map as on one
    of its devices. What remat computes again is in a gradient's program, and so counts.
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
    """Every program among the parameters of an equation."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _programs(value)
        elif isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def generated_parameters(m: model.Model, config: ConfigDict) -> int:
    """How many numbers the adapters of one task (or one input, where it reads those) have."""
    emitted = _emitted(m, model.shapes_of(m), config)
    return 0 if emitted is None else ad.parameters_per_task(emitted)


def training_seconds(workdir: str | os.PathLike[str]) -> float | None:
    """How long a run was trained, by its metrics.jsonl; None where it has none.

    A run that went on from a checkpoint counts from 0 again: the parts are added.
    """
    path = files.as_path(workdir) / metrics.JSONL
    if not path.exists():
        return None
    total, last, written = 0.0, 0.0, -float("inf")
    for line in files.read_bytes(path).decode(errors="replace").splitlines():
        try:
            values = json.loads(line)
            seconds, now = float(values["seconds"]), float(values["time"])
        except (ValueError, TypeError, KeyError):  # cut off by a kill
            continue
        # Started after the line before it was written; both are rounded.
        if now - seconds > written - 1e-2:
            total, last = total + last, 0.0
        last, written = seconds, now
    return total + last


def _unrolled(config: ConfigDict, sizes: t5.T5Config) -> model.Model:
    """The system with no loop over layers, of which XLA would count the body once, and no casts."""
    layers = max(sizes.num_encoder_layers, sizes.num_decoder_layers)
    sizes = dataclasses.replace(sizes, scan_unroll=layers, remat="none", dtype="float32")
    return model.build(config, sizes)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _conditioning(m: model.Model, config: ConfigDict) -> tuple[Any, Any]:
    """What a hypermodel is given of one task: ids [1, L] and its number [1]."""
    length = config.data.hyper_length
    if m.choice.reads == "input":
        length += config.data.input_length
    return _ids(1, length), _ids(1)


def _emitted(m: model.Model, params: Tree, config: ConfigDict) -> ad.Adapters | None:
    """Shapes of the adapters of one task."""
    return jax.eval_shape(m.adapters, params, *_conditioning(m, config))
