"""Adapters: what a hypermodel emits and a frozen T5 takes as an argument.

The hub type of the package: hypermodels, backbone, export and serving share it, and it knows none
of them. Shapes use N layers of a stack, T tasks, D model width, H heads, K head width, R LoRA rank,
P prefix length. Every leaf leads with ``[N, T]``, so that it rides the scan over layers and so that
the rows of task t, and no others, see slice t.

    tree["enc_self"]["query"]     = {"a": [N,T,D,R], "b": [N,T,R,H*K], optional "bias": [N,T,H*K]}
    tree["enc_self"]["prefix"]    = {"key", "value": [N,T,P,H,K], optional "mask": bool [N,T,P]}
    tree["enc_mlp"]["bottleneck"] = {"down": [N,T,D,A], "up": [N,T,A,D], "down_bias": [N,T,A],
                                     "up_bias": [N,T,D]}
    tree["memory"]                = {"states": [1,T,M,D], "mask": bool [1,T,M]}

LoRA's effect is ``y += (x a b + bias) * alpha / R`` (Hu et al. 2021; the bias is PEFT's
``lora_bias``). A prefix adds P keys and values that every row of the task may attend to
(Li & Liang 2021). A bottleneck adapter stands beside an MLP (He et al. 2022):
``y += act(x down + down_bias) up + up_bias``. Memory is M encoded tokens that the decoder
cross-attends beside the encoded input (fusion-in-decoder: HINT, FiD-ICL); it has no layers, so its
N is 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from hyper_t5 import files, tensors
from hyper_t5.errors import UserError

ATTENTION_SITES = ("enc_self", "dec_self", "dec_cross")
MLP_SITES = ("enc_mlp", "dec_mlp")
ATTENTION_PROJECTIONS = ("query", "key", "value", "out")
POSITION_BIASES = ("hf", "zero")
MEMORY = "memory"  # beside the sites in an adapters tree
HYPERMODEL = "hypermodel"  # beside them in a folder

SPEC_FILE = "adapter_spec.json"
TENSOR_FILE = "adapter.safetensors"
FORMAT = "hyper_t5.adapter"


class Dims(Protocol):
    """The sizes of a backbone that adapter shapes depend on (``t5.T5Config`` has them)."""

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
    """Low-rank updates of projections, ``targets`` like ``"enc_self.query"``, ``"dec_mlp.wo"``."""

    targets: tuple[str, ...]
    rank: int
    alpha: float
    bias: bool = False

    @property
    def scale(self) -> float:
        """What the product of a and b is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class PrefixSpec:
    """Extra keys and values at the attention ``sites``.

    ``position_bias``: ``"hf"`` gives prefix slot j the relative position bias of a real token j - P
    places before the row's first one (what PEFT's past key values get); ``"zero"`` gives none
    (HINT). Cross-attention has no position bias in T5, so there both are the same.
    """

    sites: tuple[str, ...]
    length: int
    position_bias: str = "hf"


@dataclasses.dataclass(frozen=True)
class BottleneckSpec:
    """Two-layer adapters beside the MLPs at ``sites``, of width ``sizes[i]`` at ``sites[i]``.

    ``input``: ``"normed"`` is what the MLP reads (HINT), ``"raw"`` the residual stream before the
    norm (Hyperdecoders).
    """

    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    activation: str = "gelu"
    input: str = "normed"


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Static description of one backbone's adapters; stored with every checkpoint and export.

    ``memory`` is M, 0 without.
    """

    lora: LoraSpec | None = None
    prefix: PrefixSpec | None = None
    bottleneck: BottleneckSpec | None = None
    memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AdapterSpec:
        """Inverse of ``to_dict``; KeyError or TypeError where a field is missing or unknown."""
        kinds: dict[str, Any] = {
            "lora": LoraSpec,
            "prefix": PrefixSpec,
            "bottleneck": BottleneckSpec,
        }
        made = {}
        for name, kind in kinds.items():
            fields = data.get(name)
            if fields:  # JSON has lists where specs have tuples
                fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
                made[name] = kind(**fields)
        return cls(**made, memory=int(data.get("memory", 0)))


@struct.dataclass
class Adapters:
    """Adapters of T tasks for one backbone: a pytree of arrays and its static spec."""

    tree: dict[str, Any]
    spec: AdapterSpec = struct.field(pytree_node=False)

    @property
    def num_tasks(self) -> int:
        """T; 1 where nothing is adapted."""
        leaves = jax.tree.leaves(self.tree)
        return leaves[0].shape[1] if leaves else 1


def targets_of(
    sites: Sequence[str], dims: Dims, projections: Sequence[str] = ()
) -> tuple[str, ...]:
    """Every LoRA target at ``sites``; ``projections`` narrows it (empty: all of them)."""
    mlp = ("wi",) if len(dims.mlp_activations) == 1 else ("wi_0", "wi_1")
    names = dict.fromkeys(ATTENTION_SITES, ATTENTION_PROJECTIONS)
    names |= dict.fromkeys(MLP_SITES, (*mlp, "wo"))
    return tuple(f"{s}.{p}" for s in sites for p in names[s] if not projections or p in projections)


def num_layers(site: str, dims: Dims) -> int:
    """N of the stack that ``site`` is in."""
    return dims.num_encoder_layers if site.startswith("enc") else dims.num_decoder_layers


def projection_shape(target: str, dims: Dims) -> tuple[int, int]:
    """(input, output) width of a LoRA target such as ``"dec_cross.value"``."""
    site, _, projection = target.partition(".")
    if target not in targets_of((*ATTENTION_SITES, *MLP_SITES), dims):
        known = (
            ", ".join(targets_of([site], dims))
            if site in (*ATTENTION_SITES, *MLP_SITES)
            else (", ".join((*ATTENTION_SITES, *MLP_SITES)))
        )
        raise UserError(
            f"adapter.lora_targets: no projection {target!r} in this T5; known: {known}"
        )
    joined = dims.num_heads * dims.head_dim
    narrow, wide = dims.emb_dim, joined if site in ATTENTION_SITES else dims.mlp_dim
    return (wide, narrow) if projection in ("out", "wo") else (narrow, wide)


def shapes(spec: AdapterSpec, dims: Dims, num_tasks: int) -> dict[str, Any]:
    """The adapters' tree with a shape tuple at each leaf (a prefix's optional mask left out)."""
    tree: dict[str, Any] = {}
    if spec.lora:
        rank = spec.lora.rank
        for target in spec.lora.targets:
            site, _, projection = target.partition(".")
            n, (fan_in, fan_out) = num_layers(site, dims), projection_shape(target, dims)
            leaf: dict[str, tuple[int, ...]]
            leaf = {"a": (n, num_tasks, fan_in, rank), "b": (n, num_tasks, rank, fan_out)}
            if spec.lora.bias:
                leaf["bias"] = (n, num_tasks, fan_out)
            tree.setdefault(site, {})[projection] = leaf
    if spec.prefix:
        for site in spec.prefix.sites:
            if site not in ATTENTION_SITES:
                raise UserError(f"adapter.prefix_sites: {site!r} is none of {ATTENTION_SITES}")
            n, slots = num_layers(site, dims), spec.prefix.length
            shape = (n, num_tasks, slots, dims.num_heads, dims.head_dim)
            tree.setdefault(site, {})["prefix"] = {"key": shape, "value": shape}
    if spec.bottleneck:
        for site, size in zip(spec.bottleneck.sites, spec.bottleneck.sizes, strict=True):
            if site not in MLP_SITES:
                raise UserError(f"adapter.bottleneck_sites: {site!r} is none of {MLP_SITES}")
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
    """Adapters without effect: zeros, and prefixes and memory that no row may attend to."""
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
    """The adapters of ``tasks`` (an index array [T']), in that order."""
    return Adapters(jax.tree.map(lambda x: x[:, jnp.asarray(tasks)], adapters.tree), adapters.spec)


def concatenate(many: Sequence[Adapters]) -> Adapters:
    """Adapters of several tasks, made apart, as one batch; their specs must be equal."""
    if any(a.spec != many[0].spec for a in many):
        raise UserError("adapters of one batch must have one AdapterSpec; run the others apart")
    trees = [a.tree for a in many]
    return Adapters(jax.tree.map(lambda *x: jnp.concatenate(x, 1), *trees), many[0].spec)


def parameters_per_task(adapters: Adapters) -> int:
    """How many numbers describe one task; masks are none."""
    numbers = [x for x in jax.tree.leaves(adapters.tree) if x.dtype != bool]
    return sum(int(np.prod(x.shape)) // x.shape[1] for x in numbers)


def norms(adapters: Adapters) -> jax.Array:
    """The L2 norm of all numbers that describe each task: float32 [T]."""
    numbers = [x for x in jax.tree.leaves(adapters.tree) if x.dtype != bool]
    squares = (jnp.square(jnp.moveaxis(x, 1, 0).astype(jnp.float32)) for x in numbers)
    return jnp.sqrt(sum((x.reshape(len(x), -1).sum(-1) for x in squares), jnp.zeros(())))


def check(adapters: Adapters, dims: Dims, where: str) -> None:
    """UserError naming the first tensor whose name or shape does not fit this backbone."""
    found = {k: tuple(v.shape) for k, v in _flatten(adapters.tree).items()}
    expected = _flatten(shapes(adapters.spec, dims, adapters.num_tasks))
    for name in [k for k in found if k.endswith("prefix/mask")]:
        expected[name] = expected[name.replace("mask", "key")][:3]
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: adapter tensor {name} is {found.get(name, 'missing')}, this backbone "
                f"needs {expected.get(name, 'none of that name')}; use the backbone it was made for"
            )


# ---------------------------------------------------------------------------------------- on disk


def save(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    meta: dict[str, Any],
    hypermodel: dict[str, Any] | None = None,
) -> Path:
    """Write the native adapter folder: all tasks in it, the spec, and ``meta`` (JSON).

    ``hypermodel``: its parameters, where adapters are made anew for each input and so are not yet.

    An adapter that lies there is replaced, whole or not at all; UserError where the folder holds
    other files, or cannot be written.
    """
    tree = adapters.tree if hypermodel is None else {**adapters.tree, HYPERMODEL: hypermodel}
    flat = {k: np.asarray(v) for k, v in _flatten(tree).items()}
    header = {"format": FORMAT, "spec": adapters.spec.to_dict(), "meta": meta}
    with files.replaced_folder(folder, (SPEC_FILE, TENSOR_FILE)) as fresh:
        tensors.write_safetensors(fresh / TENSOR_FILE, flat)
        files.write_json(fresh / SPEC_FILE, header)
    return Path(folder)


def load(
    folder: str | os.PathLike[str],
) -> tuple[Adapters, dict[str, Any], dict[str, Any] | None]:
    """Read a native adapter folder back: (adapters, meta, hypermodel or None)."""
    folder = Path(folder)
    if not (folder / SPEC_FILE).is_file():
        raise UserError(
            f"{folder / SPEC_FILE}: no such file; a native adapter folder holds {SPEC_FILE} and "
            f"{TENSOR_FILE} (`hyper-t5 adapt` makes one)"
        )
    header = files.read_json(folder / SPEC_FILE)
    try:
        if header.get("format") != FORMAT:
            raise KeyError("format")
        spec = AdapterSpec.from_dict(header["spec"])
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{folder / SPEC_FILE}: not an adapter spec ({e}); make it again with `hyper-t5 adapt`"
        ) from None
    stored = tensors.open_safetensors(folder / TENSOR_FILE)
    flat = {name: tensor.read() for name, tensor in stored.items()}
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        node = tree
        *parents, leaf = name.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
        if value.dtype != bool and not np.isfinite(value.astype(np.float32)).all():
            raise UserError(f"{folder / TENSOR_FILE}: {name} has non-finite numbers; make it again")
    hypermodel = tree.pop(HYPERMODEL, None)
    return Adapters(tree, spec), header.get("meta", {}), hypermodel


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flatten(value, name + "/") if isinstance(value, dict) else {name: value}
    return flat
