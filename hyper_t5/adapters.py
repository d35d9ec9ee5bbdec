"""Adapters: the output of a hypermodel and an argument of the frozen T5.

The hub type of the package: hypermodels, backbone, export and serving share it, and it imports none
of them. Shapes use N layers of a stack, T tasks, D model width, H heads, K head width, R LoRA rank,
P prefix length, A bottleneck width, M memory length. Every leaf has the leading dimensions
`[N, T]`: the layer scan iterates over N, and the rows of task t use slice t.

    tree["enc_self"]["query"]     = {"a": [N,T,D,R], "b": [N,T,R,H*K], optional "bias": [N,T,H*K]}
    tree["enc_self"]["prefix"]    = {"key", "value": [N,T,P,H,K], optional "mask": bool [N,T,P]}
    tree["enc_mlp"]["bottleneck"] = {"down": [N,T,D,A], "up": [N,T,A,D], "down_bias": [N,T,A],
                                     "up_bias": [N,T,D]}
    tree["memory"]                = {"states": [1,T,M,D], "mask": bool [1,T,M]}

- LoRA (Hu et al. 2021): `y += (x a b + bias) * alpha / R`. The bias is PEFT's `lora_bias`. R and
  alpha may differ by target.
- Prefix (Li & Liang 2021): P keys and values that every row of the task may attend to.
- Bottleneck adapter (He et al. 2022), parallel to an MLP:
  `y += act(x down + down_bias) up + up_bias`.
- Memory (fusion-in-decoder; HINT, FiD-ICL): M encoded tokens that the decoder cross-attends in
  addition to the encoded input. It has no layers, so its N is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from hyper_t5.utils.errors import UserError

Shape = tuple[int, ...]

ATTENTION_SITES = ("enc_self", "dec_self", "dec_cross")
MLP_SITES = ("enc_mlp", "dec_mlp")
SITES = (*ATTENTION_SITES, *MLP_SITES)
ATTENTION_PROJECTIONS = ("query", "key", "value", "out")
POSITION_BIASES = ("hf", "zero")
BOTTLENECK_ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
BOTTLENECK_INPUTS = ("normed", "raw")
MEMORY = "memory"  # a key of the adapters tree, next to the sites


class Dims(Protocol):
    """The sizes of a backbone that adapter shapes depend on; `t5.T5Config` has them."""

    @property
    def emb_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def num_encoder_layers(self) -> int: ...
    @property
    def num_decoder_layers(self) -> int: ...
    @property
    def mlp_activations(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank updates of projections.

    Attributes:
      targets: SITE.PROJECTION, such as `enc_self.query` or `dec_mlp.wo`.
      rank: R of every target without an entry in `rank_pattern`.
      alpha: Alpha of every target without an entry in `alpha_pattern`.
      bias: Whether each target also has a bias.
      rank_pattern: (target, rank) pairs, as PEFT's field of this name.
      alpha_pattern: (target, alpha) pairs.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    bias: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        _check_names("target", [target.partition(".")[0] for target in self.targets], SITES)
        if not all(rank >= 1 for rank in (self.rank, *dict(self.rank_pattern).values())):
            raise ValueError("a rank is not positive")
        if not all(0 <= alpha < 1e30 for alpha in (self.alpha, *dict(self.alpha_pattern).values())):
            raise ValueError("an alpha is negative or not finite")

    def rank_of(self, target: str) -> int:
        """Return the rank R of a target."""
        return dict(self.rank_pattern).get(target, self.rank)

    def alpha_of(self, target: str) -> float:
        """Return the alpha of a target."""
        return dict(self.alpha_pattern).get(target, self.alpha)

    def scale_of(self, target: str) -> float:
        """Return alpha / R, the factor of the product a b of a target."""
        return self.alpha_of(target) / self.rank_of(target)


@dataclasses.dataclass(frozen=True)
class PrefixSpec:
    """Extra keys and values at attention sites.

    Attributes:
      sites: Attention sites.
      length: P, the number of slots.
      position_bias: With `hf`, slot j has the relative position bias of a real token P - j
        positions before the first one of the row, as PEFT's past key values have. With `zero` it
        has none (HINT). T5's cross-attention has no position bias, so both are the same there.
    """

    sites: tuple[str, ...]
    length: int
    position_bias: str = "hf"

    def __post_init__(self) -> None:
        _check_names("prefix site", self.sites, ATTENTION_SITES)
        _check_names("position_bias", [self.position_bias], POSITION_BIASES)
        if not self.length >= 1:
            raise ValueError("the prefix length is not positive")


@dataclasses.dataclass(frozen=True)
class BottleneckSpec:
    """Two-layer adapters parallel to MLPs.

    Attributes:
      sites: MLP sites.
      sizes: A, the hidden width at each site.
      activation: One of `BOTTLENECK_ACTIVATIONS`.
      input: `normed` reads the input of the MLP (HINT), `raw` the residual stream before the norm
        (Hyperdecoders).
    """

    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    activation: str = "gelu"
    input: str = "normed"

    def __post_init__(self) -> None:
        _check_names("bottleneck site", self.sites, MLP_SITES)
        _check_names("activation", [self.activation], BOTTLENECK_ACTIVATIONS)
        _check_names("input", [self.input], BOTTLENECK_INPUTS)
        if len(self.sizes) != len(self.sites) or not all(size >= 1 for size in self.sizes):
            raise ValueError("bottleneck sizes must be positive, one per site")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Static description of the adapters of one backbone, stored in every checkpoint and export.

    Attributes:
      lora: LoRA, or None.
      prefix: Prefixes, or None.
      bottleneck: Bottleneck adapters, or None.
      memory: M; 0 means no memory.
    """

    lora: LoraSpec | None = None
    prefix: PrefixSpec | None = None
    bottleneck: BottleneckSpec | None = None
    memory: int = 0

    def __post_init__(self) -> None:
        if not self.memory >= 0:
            raise ValueError("the memory length is negative")


def _check_names(field: str, names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{field} {unknown[0]!r} is not one of {', '.join(known)}")


def lora_spec(
    ranks: Mapping[str, int], alphas: Mapping[str, float], bias: bool = False
) -> LoraSpec:
    """Build a LoraSpec from the rank and alpha of each target; the most common are its defaults."""

    def most_common(numbers: Mapping[str, Any]) -> Any:
        values = list(numbers.values())
        return max(dict.fromkeys(values), key=values.count)

    rank, alpha = most_common(ranks), most_common(alphas)
    return LoraSpec(
        tuple(ranks),
        rank,
        alpha,
        bias,
        tuple((target, r) for target, r in ranks.items() if r != rank),
        tuple((target, a) for target, a in alphas.items() if a != alpha),
    )


@struct.dataclass
class Adapters:
    """Adapters of T tasks for one backbone: a pytree of arrays and its static spec."""

    tree: dict[str, Any]
    spec: AdapterSpec = struct.field(pytree_node=False)

    @property
    def num_tasks(self) -> int:
        """T; 1 for an empty tree."""
        leaves = jax.tree.leaves(self.tree)
        return leaves[0].shape[1] if leaves else 1


def targets_of(
    sites: Sequence[str], dims: Dims, projections: Sequence[str] = ()
) -> tuple[str, ...]:
    """List the LoRA targets at `sites`, of all projections or of `projections` only."""
    mlp = ("wi",) if len(dims.mlp_activations) == 1 else ("wi_0", "wi_1")
    names = dict.fromkeys(ATTENTION_SITES, ATTENTION_PROJECTIONS)
    names |= dict.fromkeys(MLP_SITES, (*mlp, "wo"))
    return tuple(f"{s}.{p}" for s in sites for p in names[s] if not projections or p in projections)


def num_layers(site: str, dims: Dims) -> int:
    """Return N of the stack that contains a site or target."""
    return dims.num_encoder_layers if site.startswith("enc") else dims.num_decoder_layers


def projection_shape(target: str, dims: Dims) -> tuple[int, int]:
    """Return the (input, output) width of a LoRA target such as `dec_cross.value`."""
    site, _, projection = target.partition(".")
    if target not in targets_of(SITES, dims):
        known = ", ".join(targets_of([site], dims) if site in SITES else SITES)
        raise UserError(
            f"adapter.lora_targets: no projection {target!r} in this T5; known: {known}"
        )
    joined = dims.num_heads * dims.head_dim
    narrow, wide = dims.emb_dim, joined if site in ATTENTION_SITES else dims.mlp_dim
    return (wide, narrow) if projection in ("out", "wo") else (narrow, wide)


def shapes(spec: AdapterSpec, dims: Dims, num_tasks: int) -> dict[str, Any]:
    """Return the adapters tree with a shape at each leaf, without the optional prefix masks."""
    tree: dict[str, Any] = {}
    if spec.lora:
        for target in spec.lora.targets:
            site, _, projection = target.partition(".")
            rank = spec.lora.rank_of(target)
            n, (fan_in, fan_out) = num_layers(site, dims), projection_shape(target, dims)
            leaf: dict[str, Shape]
            leaf = {"a": (n, num_tasks, fan_in, rank), "b": (n, num_tasks, rank, fan_out)}
            if spec.lora.bias:
                leaf["bias"] = (n, num_tasks, fan_out)
            tree.setdefault(site, {})[projection] = leaf
    if spec.prefix:
        for site in spec.prefix.sites:
            n, length = num_layers(site, dims), spec.prefix.length
            shape = (n, num_tasks, length, dims.num_heads, dims.head_dim)
            tree.setdefault(site, {})["prefix"] = {"key": shape, "value": shape}
    if spec.bottleneck:
        for site, size in zip(spec.bottleneck.sites, spec.bottleneck.sizes, strict=True):
            n, d = num_layers(site, dims), dims.emb_dim
            tree.setdefault(site, {})["bottleneck"] = {
                "down": (n, num_tasks, d, size),
                "down_bias": (n, num_tasks, size),
                "up": (n, num_tasks, size, d),
                "up_bias": (n, num_tasks, d),
            }
    if spec.memory:
        tree[MEMORY] = {
            "states": (1, num_tasks, spec.memory, dims.emb_dim),
            "mask": (1, num_tasks, spec.memory),
        }
    return tree


def zeros(spec: AdapterSpec, dims: Dims, num_tasks: int) -> Adapters:
    """Create adapters without effect: zero weights, and fully masked prefixes and memory."""
    tree = jax.tree.map(
        jnp.zeros, shapes(spec, dims, num_tasks), is_leaf=lambda x: type(x) is tuple
    )
    if spec.memory:
        tree[MEMORY]["mask"] = tree[MEMORY]["mask"].astype(bool)
    for site in spec.prefix.sites if spec.prefix else ():
        shape = tree[site]["prefix"]["key"].shape[:3]
        tree[site]["prefix"]["mask"] = jnp.zeros(shape, bool)
    return Adapters(tree, spec)


def take(adapters: Adapters, tasks: Any) -> Adapters:
    """Select the adapters of `tasks` (an index array `[T']`), in that order."""
    return Adapters(jax.tree.map(lambda x: x[:, jnp.asarray(tasks)], adapters.tree), adapters.spec)


def concatenate(parts: Sequence[Adapters]) -> Adapters:
    """Join adapters of different tasks along the task axis; their specs must be equal."""
    if any(part.spec != parts[0].spec for part in parts):
        raise UserError("adapters of one batch must have one AdapterSpec; use a batch for each")
    trees = [part.tree for part in parts]
    return Adapters(jax.tree.map(lambda *x: jnp.concatenate(x, 1), *trees), parts[0].spec)


def compose(adapters: Adapters, weights: jax.Array) -> Adapters:
    """Compose the adapters of C chunks of each task's conditioning into one adapter a task.

    LoRA products and bottlenecks are summed by weight, side by side in their ranks and widths;
    prefixes and memories are joined by attention, which takes no weights. All shapes depend on C
    alone: an unused chunk has zero LoRA and bottlenecks, and masked slots. With position bias `hf`
    the distance of a prefix depends on the chunks after it, so unused chunks come first; then one
    used chunk has the effect of its own adapters.

    Args:
      adapters: of T * C chunks, those of a task adjacent.
      weights: [T, C], which sum to 1 over C; 0 where a chunk is unused.

    Returns:
      Adapters of T tasks, of rank C * R at the same scale, C * P slots, and so on.
    """
    tasks, chunks = weights.shape

    def leaf(name: str, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), tasks, chunks, *x.shape[2:])
        weight = weights.reshape(1, tasks, chunks, *[1] * (x.ndim - 3))
        if name in _WEIGHTED:
            x = x * weight.astype(x.dtype)
        x = jnp.where(weight > 0, x, jnp.zeros((), x.dtype))
        if name not in _WIDTH_AXES:
            return x.sum(2)
        axis = _WIDTH_AXES[name]
        x = jnp.moveaxis(x, 2, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    flat = traverse_util.flatten_dict(adapters.tree)
    for path in [path for path in flat if path[-1] == "key"]:
        flat.setdefault((*path[:-1], "mask"), jnp.ones(flat[path].shape[:3], bool))
    tree = traverse_util.unflatten_dict({path: leaf(path[-1], x) for path, x in flat.items()})
    return Adapters(tree, _composed_spec(adapters.spec, chunks))


# Leaf name -> the axis of [N, T, ...] that `compose` widens; other leaves are summed.
_WIDTH_AXES = {
    **{"a": 3, "b": 2, "down": 3, "down_bias": 2, "up": 2},
    **{"key": 2, "value": 2, "mask": 2, "states": 2},
}
_WEIGHTED = ("b", "bias", "up", "up_bias")


def _composed_spec(spec: AdapterSpec, chunks: int) -> AdapterSpec:
    """Return the spec of `compose`: C times each width, at the scale alpha / R of each LoRA."""
    lora, prefix, bottleneck = spec.lora, spec.prefix, spec.bottleneck
    if lora:
        lora = dataclasses.replace(
            lora,
            rank=chunks * lora.rank,
            alpha=chunks * lora.alpha,
            rank_pattern=tuple((t, chunks * r) for t, r in lora.rank_pattern),
            alpha_pattern=tuple((t, chunks * a) for t, a in lora.alpha_pattern),
        )
    if prefix:
        prefix = dataclasses.replace(prefix, length=chunks * prefix.length)
    if bottleneck:
        sizes = tuple(chunks * size for size in bottleneck.sizes)
        bottleneck = dataclasses.replace(bottleneck, sizes=sizes)
    return AdapterSpec(lora, prefix, bottleneck, chunks * spec.memory)


def trim(adapters: Adapters) -> Adapters:
    """Remove what unused chunks left in one task's composed adapters; the effect is the same.

    These are the first ranks of each LoRA target, where b is zero, at the same scale alpha / R, and
    the first slots of prefixes, where they are masked at every site.
    """
    flat = traverse_util.flatten_dict(adapters.tree)
    lora, prefix = adapters.spec.lora, adapters.spec.prefix
    if lora:
        ranks = {target: lora.rank_of(target) for target in lora.targets}
        for target in ranks:
            a, b = ((*target.split("."), name) for name in "ab")
            first = int(np.argmax(np.any(np.asarray(flat[b]) != 0, (0, 1, 3))))
            flat[a], flat[b] = flat[a][..., first:], flat[b][:, :, first:]
            ranks[target] -= first
        alphas = {target: lora.scale_of(target) * rank for target, rank in ranks.items()}
        lora = lora_spec(ranks, alphas, lora.bias)
    masks = [x for path, x in flat.items() if path[-2:] == ("prefix", "mask")]
    if prefix and len(masks) == len(prefix.sites):
        first = min(int(np.argmax(np.any(np.asarray(mask), (0, 1)))) for mask in masks)
        flat = {p: x[:, :, first:] if p[-2] == "prefix" else x for p, x in flat.items()}
        prefix = dataclasses.replace(prefix, length=prefix.length - first)
    spec = dataclasses.replace(adapters.spec, lora=lora, prefix=prefix)
    return Adapters(traverse_util.unflatten_dict(flat), spec)


def parameters_per_task(adapters: Adapters) -> int:
    """Count the parameters of one task, without masks."""
    leaves = [x for x in jax.tree.leaves(adapters.tree) if x.dtype != bool]
    return sum(int(np.prod(x.shape)) // x.shape[1] for x in leaves)


def norms(adapters: Adapters) -> jax.Array:
    """Compute the L2 norm of all parameters of each task: float32 `[T]`."""
    leaves = [x for x in jax.tree.leaves(adapters.tree) if x.dtype != bool]
    squares = (jnp.square(jnp.moveaxis(x, 1, 0).astype(jnp.float32)) for x in leaves)
    return jnp.sqrt(sum((x.reshape(len(x), -1).sum(-1) for x in squares), jnp.zeros(())))


def astype(adapters: Adapters, dtype: Any) -> Adapters:
    """Cast all parameters to `dtype`; masks stay bool."""
    tree = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), adapters.tree)
    return Adapters(tree, adapters.spec)


def check(adapters: Adapters, dims: Dims, path: str) -> None:
    """Raise a UserError if a tensor's name or shape does not fit the backbone.

    Args:
      adapters: The adapters.
      dims: Sizes of the backbone.
      path: Origin of the adapters, for the message.
    """
    flat = traverse_util.flatten_dict(adapters.tree, sep="/")
    check_shapes({name: tuple(x.shape) for name, x in flat.items()}, adapters.spec, dims, path)


def check_shapes(tensors: Mapping[str, Shape], spec: AdapterSpec, dims: Dims, path: str) -> None:
    """`check` for tensors that are not loaded: names joined by `/` and their shapes."""
    num_tasks = min({shape[1] for shape in tensors.values() if len(shape) > 1}, default=1)
    try:
        expected = traverse_util.flatten_dict(shapes(spec, dims, num_tasks), sep="/")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name in tensors:
        if name.endswith("prefix/mask"):
            expected[name] = expected.get(name.replace("mask", "key"), ())[:3]
    for name in sorted(expected.keys() | tensors.keys()):
        if tensors.get(name) != expected.get(name):
            raise UserError(
                f"{path}: adapter tensor {name} is {tensors.get(name, 'missing')}, this backbone"
                f" needs {expected.get(name, 'no such tensor')}; use the backbone of the adapters"
            )
