"""Adapters in: a PEFT folder as our adapters, computing what PEFT computes of it.

Shapes: N layers, R rank, P prefix length, H heads, K head width, L the layers that PEFT was told.

LoRA. PEFT goes by the names of modules: `target_modules` says which ones have a pair of matrices,
`rank_pattern` and `alpha_pattern` which rank and alpha. We keep one rank and one scale for all
layers of a target, so

* a module of a lower rank than others of its target gets components of zeros. They stay zeros in
  training too, since the gradient of each of the two matrices is a product with the other;
* a module that PEFT leaves alone, where another layer's of the target is not, is all zeros;
* where layers of a target differ in alpha / R, the difference is multiplied into b.

Prefix. Of the table [P, 2 L H K] T5's decoder layer i gets the entries 4i and 4i+1 modulo 2L as key
and value (PEFT repeats the entries, and throws away those for cross-attention). With L = N, as PEFT
itself makes it, layers i and i + N/2 share theirs; with L = 2N, as we write it, none do.

What is silent in PEFT is an error here: tensors that are missing, or that nothing asks for.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.adapters import (
    Adapters,
    AdapterSpec,
    PrefixSpec,
    lora_spec,
    num_layers,
    projection_shape,
)
from hyper_t5.errors import UserError
from hyper_t5.export.peft_names import (
    PEFT_CONFIG,
    PEFT_PICKLE,
    PEFT_TENSORS,
    PROMPT,
    modules_of,
)
from hyper_t5.files import check_regular, read_json
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import Shape, Tensor, open_safetensors

Config = dict[str, Any]

# Fields that are read below, and those that say how an adapter was trained, started or stored and
# nothing of what it computes.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "encoder_hidden_size",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prefix_projection",  # what is saved is projected already
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "token_dim",
    "use_rslora",
    "velora_config",  # how gradients are stored
}
_REASONS = {
    "alora_invocation_tokens": "works on some tokens of an input only",
    "layer_replication": "makes another model of the backbone",
    "modules_to_save": "replaces whole modules of the backbone",
    "target_parameters": "changes parameters that T5 has not",
    "trainable_token_indices": "changes the embedding",
    "use_dora": "scales weights by their norms",
}
_SOFT = "soft tokens in front of the input are nothing that we can say"
_MERGE = "merge it in peft (merge_and_unload) and give the T5 so made as the backbone"
_REMEDIES = {"PROMPT_TUNING": _SOFT, "P_TUNING": _SOFT, "MULTITASK_PROMPT_TUNING": _SOFT}
_PATTERN_SECONDS = 5.0  # of computing
_Read = Callable[[str], np.ndarray]


def load_peft(folder: Path, sizes: T5Config) -> tuple[Adapters, Config]:
    """One task's adapters from a PEFT folder, for a backbone of these sizes.

    Returns:
      LoRA, or prefixes at `dec_self`, as float32 leaves `[N, 1, ...]`; and the content of
      adapter_config.json.

    Raises:
      UserError: it is damaged, does not fit the backbone, or we cannot say what it computes (the
        message says why, and what can be done). No tensor is read before all names and shapes are
        known to be right.
    """
    file = folder / PEFT_CONFIG
    check_regular(file, 2**24)
    config = read_json(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise UserError(
            f"{file}: peft_type is {kind!r:.40}; of PEFT's adapters LORA and PREFIX_TUNING are "
            f"read; {_REMEDIES.get(str(kind), _MERGE)}"
        )
    _refuse_unknown(config, file)
    tensors = _open(folder)
    read = _lora if kind == "LORA" else _prefix
    return read(config, tensors, sizes, folder), config


def _open(folder: Path) -> dict[str, Tensor]:
    file = folder / PEFT_TENSORS
    if not file.exists() and (folder / PEFT_PICKLE).exists():
        raise UserError(
            f"{folder / PEFT_PICKLE}: is a pickle, which can run any code when it is read, and is "
            "never opened here; load it with peft where you trust it and save it again with "
            f"safe_serialization=True, which makes {PEFT_TENSORS}"
        )
    check_regular(file)
    return open_safetensors(file)


def _refuse_unknown(config: Config, file: Path) -> None:
    """UserError for a field that changes what PEFT computes into what we cannot say.

    PEFT gets new variants of LoRA with new fields; what is not known to be harmless is refused,
    unless it is off.
    """
    for field, value in config.items():
        if field in _KNOWN or value in (None, False) or value in ("", [], {}):
            continue
        reason = _REASONS.get(field, "is none of the fields whose effect is known here")
        raise UserError(f"{file}: {field}={value!r:.40} {reason}; {_MERGE}")
    task = config.get("task_type")
    if task not in ("SEQ_2_SEQ_LM", None):
        raise UserError(f"{file}: task_type {task!r:.40} is of a T5 with another head")


@contextlib.contextmanager
def _patience(file: Path) -> Iterator[None]:
    """UserError when the block, which matches a stranger's patterns, computes for seconds.

    A pattern can be made to run for ever. Only a main thread can be interrupted so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise UserError(f"{file}: a pattern in it takes for ever to match; simplify it")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _PATTERN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# ------------------------------------------------------------------------------------- fields


def _whole(config: Config, field: str, file: Path, least: int = 1) -> int:
    value = config.get(field)
    if type(value) is not int or not least <= value < 2**31:
        raise UserError(f"{file}: {field} is {value!r:.40}, not a whole number from {least} on")
    return value


def _numbers(config: Config, field: str, file: Path) -> dict[str, float]:
    """A rank_pattern or alpha_pattern."""
    found = config.get(field) or {}
    kinds = (int,) if field == "rank_pattern" else (int, float)
    good = isinstance(found, dict) and all(
        type(number) in kinds and 0 < number < 2**31 for number in found.values()
    )
    if not good:
        raise UserError(f"{file}: {field} must give each pattern a number above 0")
    return dict(found)


def _pattern(text: Any, field: str, file: Path) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{file}: {field}: {text!r:.60} is no pattern ({error})") from None


def _names(config: Config, field: str, file: Path) -> list[str]:
    """A field that is a list of names."""
    found = config.get(field)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{file}: {field} must be a pattern or a list of names")
    return found


# --------------------------------------------------------------------------------------- LoRA


def _lora(config: Config, tensors: Mapping[str, Tensor], sizes: T5Config, folder: Path) -> Adapters:
    file = folder / PEFT_CONFIG
    _check_lora_fields(config, file)
    modules = modules_of(sizes)
    with _patience(file):
        ranks, scales = _ranks_and_scales(config, _covered(config, sizes, file), file)
    shapes = _lora_shapes(ranks, bool(config.get("lora_bias")), sizes)
    read = _checked(tensors, shapes, folder)
    by_target: dict[str, dict[int, str]] = {}
    for module, (target, layer) in modules.items():
        if module in ranks:
            by_target.setdefault(target, {})[layer] = module
    target_ranks, alphas = {}, {}
    tree: dict[str, Any] = {}
    for target, layers in by_target.items():
        rank = max(ranks[module] for module in layers.values())
        scale = scales[next(iter(layers.values()))]
        target_ranks[target], alphas[target] = rank, scale * rank
        site, _, projection = target.partition(".")
        leaf = _zeros(target, rank, bool(config.get("lora_bias")), sizes)
        for layer, module in layers.items():
            _fill(leaf, layer, f"base_model.model.{module}", scales[module] / scale, read)
        tree.setdefault(site, {})[projection] = leaf
    spec = lora_spec(target_ranks, alphas, bool(config.get("lora_bias")))
    return Adapters(tree, AdapterSpec(lora=spec))


def _check_lora_fields(config: Config, file: Path) -> None:
    if (bias := config.get("bias", "none")) != "none":
        raise UserError(f"{file}: bias={bias!r:.40} changes biases, and T5's projections have none")
    if config.get("fan_in_fan_out"):
        raise UserError(f"{file}: fan_in_fan_out is of models whose weights lie [in, out], not T5")
    start = config.get("init_lora_weights", True)
    # The others change the backbone's own weights when PEFT loads the adapter.
    if start not in (True, False, None, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{file}: init_lora_weights={start!r:.40} is LoRA on weights that it has changed; save "
            "it again with peft's path_initial_model_for_weight_conversion, or merge it there"
        )
    for field in ("lora_bias", "use_rslora"):
        if not isinstance(config.get(field, False), (bool, type(None))):
            raise UserError(f"{file}: {field} must be true or false")


def _covered(config: Config, sizes: T5Config, file: Path) -> list[str]:
    """The modules that `target_modules` and its kin choose, by PEFT's rules.

    Raises:
      UserError: none, or one that is no projection (the embedding, the head).
    """
    modules = list(modules_of(sizes))
    others = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"] + [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        for stack in ("encoder", "decoder")
    ]
    targets = config.get("target_modules")
    if targets is None:
        targets = ["q", "v"]  # PEFT's own choice for a T5
    if isinstance(targets, str) and targets.lower() == "all-linear":
        chosen = modules
    elif isinstance(targets, str):
        pattern = _pattern(targets, "target_modules", file)
        chosen = [name for name in (*modules, *others) if pattern.fullmatch(name)]
    else:
        listed = _names(config | {"target_modules": targets}, "target_modules", file)
        ends = [name for name in (*modules, *others) if _ends_in(name, listed)]
        in_layers = _of_layers(ends, config, file)
        chosen = [name for name in ends if name in listed or name in in_layers]
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        pattern = _pattern(excluded, "exclude_modules", file)
        chosen = [name for name in chosen if not pattern.fullmatch(name)]
    elif excluded:
        listed = _names(config, "exclude_modules", file)
        chosen = [name for name in chosen if not _ends_in(name, listed)]
    if beyond := [name for name in chosen if name in others]:
        raise UserError(
            f"{file}: target_modules has LoRA on {beyond[0]}; ours is on the projections of "
            f"attention and MLPs alone; {_MERGE}"
        )
    if not chosen:
        raise UserError(f"{file}: target_modules={targets!r:.60} matches nothing in this T5")
    return chosen


def _ends_in(name: str, listed: list[str]) -> bool:
    """Whether a module is one of those listed by their whole names or by the ends of them."""
    return any(name == end or name.endswith("." + end) for end in listed)


def _of_layers(chosen: list[str], config: Config, file: Path) -> list[str]:
    """Those of the layers in `layers_to_transform`, if that is given.

    The number of a layer is the first in a module's name, or the one behind `layers_pattern`.
    """
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return chosen
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if not all(type(i) is int for i in wanted):
        raise UserError(f"{file}: layers_to_transform must be whole numbers")
    names = config.get("layers_pattern") or []
    if not isinstance(names, str):
        names = _names(config, "layers_pattern", file) if names else []
    names = [names] if isinstance(names, str) else names
    # Without a pattern: any word between two dots, in front of the number.
    heads = [rf"(?:.*?\.)?{name}" for name in names] or [r".*?\.[^.]*"]
    patterns = [_pattern(rf"{head}\.(\d+)\.", "layers_pattern", file) for head in heads]

    def layer(module: str) -> int:
        found = next(filter(None, (pattern.match(module) for pattern in patterns)), None)
        return int(found[found.re.groups]) if found else -1

    return [module for module in chosen if layer(module) in wanted]


def _ranks_and_scales(
    config: Config, covered: list[str], file: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """module -> R and module -> alpha / R (rsLoRA: alpha / sqrt(R)), by the first pattern that
    matches the end of its name.
    """
    rank, alpha = _whole({"r": 8} | config, "r", file), config.get("lora_alpha", 8)
    if type(alpha) not in (int, float) or not 0 < alpha < 2**31:
        raise UserError(f"{file}: lora_alpha is {alpha!r:.40}, not a number above 0")
    by_field = {}
    for field, default in (("rank_pattern", float(rank)), ("alpha_pattern", float(alpha))):
        numbers = [
            (_pattern(rf"(?:.*\.)?(?:{text})$", field, file), number)
            for text, number in _numbers(config, field, file).items()
        ]
        by_field[field] = {
            module: next((n for pattern, n in numbers if pattern.match(module)), default)
            for module in covered
        }
    ranks, alphas = by_field["rank_pattern"], by_field["alpha_pattern"]
    root = math.sqrt if config.get("use_rslora") else float
    scales = {module: alphas[module] / root(ranks[module]) for module in covered}
    return {module: int(ranks[module]) for module in covered}, scales


def _lora_shapes(ranks: Mapping[str, int], bias: bool, sizes: T5Config) -> dict[str, Shape]:
    """Every tensor that PEFT would look for, and its shape."""
    shapes: dict[str, Shape] = {}
    modules = modules_of(sizes)
    for module, rank in ranks.items():
        fan_in, fan_out = projection_shape(modules[module][0], sizes)
        name = f"base_model.model.{module}"
        shapes[f"{name}.lora_A.weight"] = (rank, fan_in)
        shapes[f"{name}.lora_B.weight"] = (fan_out, rank)
        if bias:
            shapes[f"{name}.lora_B.bias"] = (fan_out,)
    return shapes


def _zeros(target: str, rank: int, bias: bool, sizes: T5Config) -> dict[str, np.ndarray]:
    n, (fan_in, fan_out) = num_layers(target, sizes), projection_shape(target, sizes)
    shapes: dict[str, Shape] = {"a": (n, 1, fan_in, rank), "b": (n, 1, rank, fan_out)}
    if bias:
        shapes["bias"] = (n, 1, fan_out)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _fill(leaf: dict[str, np.ndarray], layer: int, name: str, factor: float, read: _Read) -> None:
    """Puts one module's tensors, b and bias times `factor`, into its target's leaf."""
    a, b = read(f"{name}.lora_A.weight"), read(f"{name}.lora_B.weight")
    rank = len(a)
    leaf["a"][layer, 0, :, :rank] = a.T
    leaf["b"][layer, 0, :rank] = b.T if factor == 1 else b.T * np.float32(factor)
    if "bias" in leaf:
        leaf["bias"][layer, 0] = read(f"{name}.lora_B.bias") * np.float32(factor)


def _checked(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], folder: Path) -> _Read:
    """What reads a tensor as float32, once all names, shapes and types are those of `shapes`.

    Raises:
      UserError: they are not; or, later, a tensor has non-finite numbers.
    """
    file = folder / PEFT_TENSORS
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{file}: lacks {_some(missing)}, which {PEFT_CONFIG} asks for")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{file}: holds {_some(extra)}, which {PEFT_CONFIG} does not ask for")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{file}: {name} has shape {list(tensors[name].shape)}; {PEFT_CONFIG} and this "
                f"backbone make it {list(shape)}"
            )
        if tensors[name].dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise UserError(f"{file}: {name} holds {tensors[name].dtype:.20}, no numbers of LoRA's")

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # of float64; infinity is told of
            array = tensors[name].read().astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{file}: {name} has non-finite numbers; train it again")
        return array

    return read


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# ------------------------------------------------------------------------------------- prefix


def _prefix(
    config: Config, tensors: Mapping[str, Tensor], sizes: T5Config, folder: Path
) -> Adapters:
    file = folder / PEFT_CONFIG
    slots, layers = (_whole(config, f, file) for f in ("num_virtual_tokens", "num_layers"))
    heads, width = (_whole(config, f, file) for f in ("num_attention_heads", "token_dim"))
    inner, depth = sizes.num_heads * sizes.head_dim, sizes.num_decoder_layers
    if (submodules := config.get("num_transformer_submodules")) not in (2, None):
        raise UserError(
            f"{file}: num_transformer_submodules={submodules!r:.20} puts a prefix where "
            "transformers takes it for cross-attention; only 2 works with a T5: train it again"
        )
    if (heads, width) != (sizes.num_heads, inner):
        raise UserError(
            f"{file}: is for attention of {heads} heads and {width} numbers, this backbone has "
            f"{sizes.num_heads} and {inner}; use the backbone it was made for"
        )
    if layers < depth:
        raise UserError(
            f"{file}: num_layers={layers} leaves {depth - layers} of this backbone's {depth} "
            "decoder layers without a prefix, which T5 cannot compute; train it again"
        )
    if slots > 2**16:
        raise UserError(f"{file}: num_virtual_tokens={slots} is no prefix's length")
    read = _checked(tensors, {PROMPT: (slots, 2 * layers * width)}, folder)
    entries = read(PROMPT).reshape(slots, 2 * layers, heads, sizes.head_dim)
    places = 4 * np.arange(depth)
    key, value = (entries[:, (places + i) % (2 * layers)].swapaxes(0, 1)[:, None] for i in range(2))
    spec = AdapterSpec(prefix=PrefixSpec(("dec_self",), slots, "hf"))
    return Adapters({"dec_self": {"prefix": {"key": key, "value": value}}}, spec)
