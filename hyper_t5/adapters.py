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
``lora_bias``); R and alpha may differ by target. A prefix adds P keys and values that every row of
the task may attend to (Li & Liang 2021). A bottleneck adapter stands beside an MLP (He et al.
2022): ``y += act(x down + down_bias) up + up_bias``. Memory is M encoded tokens that the decoder
cross-attends beside the encoded input (fusion-in-decoder: HINT, FiD-ICL); it has no layers, so its
N is 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import typing
from collections.abc import Mapping, Sequence
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
SITES = (*ATTENTION_SITES, *MLP_SITES)
ATTENTION_PROJECTIONS = ("query", "key", "value", "out")
POSITION_BIASES = ("hf", "zero")
BOTTLENECK_ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
BOTTLENECK_INPUTS = ("normed", "raw")
MEMORY = "memory"  # beside the sites in an adapters tree
HYPERMODEL = "hypermodel"  # beside them in a folder

SPEC_FILE = "adapter_spec.json"
TENSOR_FILE = "adapter.safetensors"
FORMAT = "hyper_t5.adapter"
_LARGEST = 2**16  # of a rank or a length; what a file claims beyond it is no adapter


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
    """Low-rank updates of projections, ``targets`` like ``"enc_self.query"``, ``"dec_mlp.wo"``.

    ``rank_pattern`` and ``alpha_pattern`` are (target, number) pairs for the targets whose rank or
    alpha is not ``rank`` or ``alpha``, as PEFT's fields of these names.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    bias: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def rank_of(self, target: str) -> int:
        """R of a target."""
        return dict(self.rank_pattern).get(target, self.rank)

    def alpha_of(self, target: str) -> float:
        """Alpha of a target."""
        return dict(self.alpha_pattern).get(target, self.alpha)

    def scale_of(self, target: str) -> float:
        """What the product of a target's a and b is multiplied by."""
        return self.alpha_of(target) / self.rank_of(target)


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
        """As JSON can hold it; a pattern is an object, as in PEFT's files."""
        data = dataclasses.asdict(self)
        for name in ("rank_pattern", "alpha_pattern") if data["lora"] else ():
            data["lora"][name] = dict(data["lora"][name])
        return data

    @classmethod
    def from_dict(cls, data: Any) -> AdapterSpec:
        """Inverse of ``to_dict``.

        Raises:
            ValueError: a field is missing, unknown, of another type, or no number that could be.
        """
        made = _read_fields(cls, data, "spec")
        _check_places(made)
        return made


def _read_fields(kind: type, data: Any, name: str) -> Any:
    """A dataclass of this module from the JSON object of its fields."""
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be an object")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(data.keys() - hints.keys()):
        raise ValueError(f"{name}.{unknown[0]} is unknown")
    made = {}
    for field, hint in hints.items():
        if field in data:
            made[field] = _read_field(hint, data[field], f"{name}.{field}")
        elif fields[field].default is dataclasses.MISSING:
            raise ValueError(f"{name}.{field} is missing")
    return kind(**made)


def _read_field(hint: Any, value: Any, name: str) -> Any:
    """One field's JSON value as the type of its hint."""
    origin, (inner, *_) = typing.get_origin(hint), typing.get_args(hint) or (None,)
    if hint in (int, float):
        if type(value) in (int, hint):
            return hint(_number(value, hint, name))
    elif hint in (str, bool):
        if type(value) is hint:
            return value
    elif origin is not tuple:  # a spec, or None
        return None if value is None else _read_fields(inner, value, name)
    elif typing.get_origin(inner) is tuple:  # pairs of a target and a number
        if isinstance(value, dict):
            number = typing.get_args(inner)[1]
            return tuple((k, _read_field(number, v, f"{name}[{k!r}]")) for k, v in value.items())
    elif isinstance(value, list):
        return tuple(_read_field(inner, v, name) for v in value)
    raise ValueError(f"{name} is {value!r:.40}, of another type")


def _number(value: float, kind: type, name: str) -> float:
    least = 0 if name == "spec.memory" else 1
    if kind is int and not least <= value <= _LARGEST:
        raise ValueError(f"{name} is {value:.6g}, not in {least}..{_LARGEST}")
    if not 0 <= value < 1e30:
        raise ValueError(f"{name} is {value:.6g}, no number to scale by")
    return value


def _check_places(spec: AdapterSpec) -> None:
    """ValueError where the fields of a spec that was read contradict or name what is not there."""
    lora, prefix, bottleneck = spec.lora, spec.prefix, spec.bottleneck
    known: list[tuple[str, Sequence[str], Sequence[str]]] = []
    if lora:
        patterned = [name for name, _ in (*lora.rank_pattern, *lora.alpha_pattern)]
        known.append(("lora's patterns", patterned, lora.targets))
        known.append(("lora.targets", [t.partition(".")[0] for t in lora.targets], SITES))
    if prefix:
        known.append(("prefix.sites", prefix.sites, ATTENTION_SITES))
        known.append(("prefix.position_bias", [prefix.position_bias], POSITION_BIASES))
    if bottleneck:
        known.append(("bottleneck.sites", bottleneck.sites, MLP_SITES))
        known.append(("bottleneck.activation", [bottleneck.activation], BOTTLENECK_ACTIVATIONS))
        known.append(("bottleneck.input", [bottleneck.input], BOTTLENECK_INPUTS))
        if len(bottleneck.sizes) != len(bottleneck.sites):
            raise ValueError("spec.bottleneck.sizes are not as many as its sites")
    for name, given, names in known:
        if wrong := [x for x in given if x not in names]:
            raise ValueError(f"spec.{name}: {wrong[0]!r} is none of {', '.join(names)}")
    for places in (lora.targets if lora else (), prefix.sites if prefix else ()):
        if len(set(places)) < len(places):
            raise ValueError(f"spec names one place twice: {', '.join(places)}")


def lora_spec(
    ranks: Mapping[str, int], alphas: Mapping[str, float], bias: bool = False
) -> LoraSpec:
    """The LoraSpec of targets with these ranks and alphas; the commonest ones are its defaults."""

    def common(numbers: Mapping[str, Any]) -> Any:
        values = list(numbers.values())
        return max(dict.fromkeys(values), key=values.count)

    rank, alpha = common(ranks), common(alphas)
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
    if target not in targets_of(SITES, dims):
        known = ", ".join(targets_of([site], dims) if site in SITES else SITES)
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
        for target in spec.lora.targets:
            site, _, projection = target.partition(".")
            rank = spec.lora.rank_of(target)
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


def astype(adapters: Adapters, dtype: Any) -> Adapters:
    """The adapters with all numbers of ``dtype``; masks stay as they are."""
    tree = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), adapters.tree)
    return Adapters(tree, adapters.spec)


def digest(adapters: Adapters) -> str:
    """Of what they hold, as `save` writes it."""
    return _digest({k: np.asarray(v) for k, v in _flatten(adapters.tree).items()})


def check(adapters: Adapters, dims: Dims, where: str) -> None:
    """UserError naming the first tensor whose name or shape does not fit this backbone."""
    found = {k: tuple(v.shape) for k, v in _flatten(adapters.tree).items()}
    _check_shapes(found, adapters.spec, dims, where)


@dataclasses.dataclass(frozen=True)
class _AnyBackbone:
    """Dims that are not known; 0 stands for any number."""

    mlp_activations: tuple[str, ...]
    emb_dim = num_heads = head_dim = mlp_dim = num_encoder_layers = num_decoder_layers = 0


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], spec: AdapterSpec, dims: Dims | None, where: str
) -> None:
    """`check` of the shapes alone; without ``dims`` by what the spec itself says of them."""
    if dims is None:
        targets = spec.lora.targets if spec.lora else ()
        plain = any(target.endswith(".wi") for target in targets)
        dims = _AnyBackbone(("relu",) if plain else ("gelu", "linear"))
    tasks = {shape[1] for shape in found.values() if len(shape) > 1}
    try:
        expected = _flatten(shapes(spec, dims, min(tasks, default=1)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name in [k for k in found if k.endswith("prefix/mask")]:
        expected[name] = expected.get(name.replace("mask", "key"), ())[:3]
    for name in sorted(expected.keys() | found.keys()):
        here, there = found.get(name), expected.get(name)
        same = here and there and len(here) == len(there)
        if not same or any(b not in (0, a) for a, b in zip(here or (), there or (), strict=False)):
            wanted = there and f"({', '.join(str(n or '*') for n in there)})"
            raise UserError(
                f"{where}: adapter tensor {name} is {here or 'missing'}, this backbone "
                f"needs {wanted or 'none of that name'}; use the backbone it was made for"
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
    header = {"format": FORMAT, "spec": adapters.spec.to_dict(), "digest": _digest(flat)}
    with files.replaced_folder(folder, (SPEC_FILE, TENSOR_FILE)) as fresh:
        tensors.write_safetensors(fresh / TENSOR_FILE, flat)
        files.write_json(fresh / SPEC_FILE, header | {"meta": meta})
    return Path(folder)


def load(
    folder: str | os.PathLike[str], dims: Dims | None = None
) -> tuple[Adapters, dict[str, Any], dict[str, Any] | None]:
    """Read a native adapter folder back: (adapters, meta, hypermodel or None).

    Names and shapes are compared with the spec, and with the backbone's ``dims`` where they are
    given, before any tensor is read.

    Raises:
        UserError: the folder is none, is damaged, or does not fit.
    """
    folder = Path(folder)
    spec, digest, meta = _read_spec(folder)
    file = folder / TENSOR_FILE
    files.check_regular(file)
    stored = tensors.open_safetensors(file)
    inner = HYPERMODEL + "/"
    ours = {name: x.shape for name, x in stored.items() if not name.startswith(inner)}
    _check_shapes(ours, spec, dims, str(file))
    for name, tensor in stored.items():
        is_mask = not name.startswith(inner) and name.endswith("/mask")
        if ("bool" if is_mask else "float") not in tensor.dtype.lower():
            raise UserError(f"{file}: {name} holds {tensor.dtype}; make it again")
        if any(other.startswith(name + "/") for other in stored):
            raise UserError(f"{file}: {name} is both a tensor and a folder of them")
    flat = {name: tensor.read() for name, tensor in stored.items()}
    for name, value in flat.items():
        if value.dtype != bool and not np.isfinite(value).all():
            raise UserError(f"{file}: {name} has non-finite numbers; make it again")
    if digest != _digest(flat):
        raise UserError(
            f"{file}: is not the file that {SPEC_FILE} was written with (its digest differs); copy "
            "both again, or make them again"
        )
    tree = _unflatten(flat)
    return (
        Adapters({k: v for k, v in tree.items() if k != HYPERMODEL}, spec),
        meta,
        tree.get(HYPERMODEL),
    )


def _read_spec(folder: Path) -> tuple[AdapterSpec, Any, dict[str, Any]]:
    """What a native folder's JSON file says: the spec, the tensors' digest, and meta."""
    file = folder / SPEC_FILE
    if not file.exists():
        raise UserError(
            f"{file}: no such file; a native adapter folder holds {SPEC_FILE} and "
            f"{TENSOR_FILE} (`hyper-t5 adapt` makes one)"
        )
    files.check_regular(file)
    header = files.read_json(file)
    try:
        if header.get("format") != FORMAT:
            raise ValueError(f'its "format" is not "{FORMAT}"')
        meta = header.get("meta", {})
        if not isinstance(meta, dict):
            raise ValueError("meta must be an object")
        return AdapterSpec.from_dict(header.get("spec")), header.get("digest"), meta
    except ValueError as e:
        raise UserError(
            f"{file}: not an adapter spec ({e}); make it again with `hyper-t5 adapt`"
        ) from None


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    """sha256 of the tensors under their names, in hex: of what they hold, not of how it lies."""
    result = hashlib.sha256()
    for name in sorted(flat):
        result.update(f"{name} {flat[name].dtype} {flat[name].shape}\n".encode())
        result.update(tensors.as_bytes(flat[name]).data)
    return result.hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flatten(value, name + "/") if isinstance(value, dict) else {name: value}
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        node = tree
        *parents, leaf = name.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree
