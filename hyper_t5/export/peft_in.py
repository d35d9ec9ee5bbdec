"""PEFT import: a PEFT folder as our adapters, with the same effect as in PEFT.

Shapes: N layers, R rank, P prefix length, H heads, K head width, L PEFT's `num_layers`.

LoRA. PEFT selects modules by name, and gives each its own rank and alpha. Our adapters have one
rank and one scale for all layers of a target, so a module is padded with zeros up to the highest
rank of its target (it stays zero in training: the gradient of each matrix is a product with the
other one), a module without LoRA is all zeros, and a different alpha / R is multiplied into b.

Prefix. T5's decoder layer i uses the entries 4i and 4i+1, modulo 2L, of the table `[P, 2 L H K]` as
key and value: PEFT repeats the table and drops the entries of cross-attention. With L = N, PEFT's
default, layers i and i + N/2 share their entries. With L = 2N, as in our exports, none do.

PEFT ignores missing and unexpected tensors. Here they are errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5.adapters import Adapters, AdapterSpec, PrefixSpec
from hyper_t5.export.peft_names import (
    PEFT_CONFIG,
    PEFT_PICKLE,
    PEFT_TENSORS,
    PROMPT,
    lora_tensor,
    modules_of,
)
from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import check_regular, read_json
from hyper_t5.utils.safetensors_io import Shape, Tensor, open_safetensors

Config = dict[str, Any]
Read = Callable[[str], np.ndarray]

# Fields that are interpreted below, and fields that describe how an adapter was trained,
# initialized or stored and have no effect on its output.
KNOWN_FIELDS = {
    *("peft_type", "task_type", "target_modules", "exclude_modules", "r", "lora_alpha"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "num_virtual_tokens", "num_layers", "token_dim"),
    *("num_attention_heads", "num_transformer_submodules", "prefix_projection"),
    *("auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "ensure_weight_tying"),
    *("fan_in_fan_out", "inference_mode", "init_weights", "lora_dropout", "peft_version"),
    *("revision", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
}
REASONS = {
    "modules_to_save": "replaces whole modules of the backbone",
    "trainable_token_indices": "changes the embedding",
    "use_dora": "scales weights by their norms",
}
MERGE = "merge it in peft (merge_and_unload) and use the merged T5 as the backbone"
INVALID = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error)
# Initializations that leave the weights of the backbone unchanged.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def load_peft(folder: Path, t5_config: T5Config) -> tuple[Adapters, Config]:
    """Read one task's adapters from a PEFT folder.

    Args:
      folder: The folder.
      t5_config: The backbone.

    Returns:
      LoRA, or prefixes at `dec_self`, as float32 leaves `[N, 1, ...]`; and the content of
      adapter_config.json.

    Raises:
      UserError: The folder is damaged, does not fit the backbone, or its effect cannot be
        expressed. No tensor is read before all names and shapes are checked.
    """
    file = folder / PEFT_CONFIG
    check_regular(file)
    config = read_json(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise UserError(
            f"{file}: peft_type is {kind!r:.40}; only LORA and PREFIX_TUNING can be read; {MERGE}"
        )
    check_fields(config, file)
    tensors = _open(folder)
    convert = _lora if kind == "LORA" else _prefix
    try:
        return convert(config, tensors, t5_config, folder), config
    except INVALID as error:
        raise UserError(f"{file}: is not a valid PEFT config ({error}); save it again") from error


def check_fields(config: Config, file: Path) -> None:
    """Raise a UserError for a field that may change the effect of the adapter.

    New variants of LoRA come with new fields, so a field that is not known must be off.
    """
    for field, value in config.items():
        if field in KNOWN_FIELDS or value in (None, False) or value in ("", [], {}):
            continue
        reason = REASONS.get(field, "is a field whose effect is not known here")
        raise UserError(f"{file}: {field}={value!r:.40} {reason}; {MERGE}")
    task = config.get("task_type")
    if task not in ("SEQ_2_SEQ_LM", None):
        raise UserError(f"{file}: task_type {task!r:.40} belongs to a T5 with another head")


def _open(folder: Path) -> dict[str, Tensor]:
    file = folder / PEFT_TENSORS
    if not file.exists() and (folder / PEFT_PICKLE).exists():
        raise UserError(
            f"{folder / PEFT_PICKLE}: is a pickle, which can run any code when loaded; load it with"
            f" peft and save it with safe_serialization=True, which writes {PEFT_TENSORS}"
        )
    check_regular(file)
    return open_safetensors(file)


def _checked_reader(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], folder: Path
) -> Read:
    """Check names, shapes and dtypes of all tensors, and return a function that reads one.

    Raises:
      UserError: The tensors are not those of `shapes`; or, when one is read, it is not finite.
    """
    file = folder / PEFT_TENSORS
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{file}: lacks {_listed(missing)}, which {PEFT_CONFIG} requires")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"{file}: holds {_listed(extra)}, which {PEFT_CONFIG} does not select among the"
            f" projections of this T5; {MERGE}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{file}: {name} has shape {list(tensors[name].shape)}; {PEFT_CONFIG} and this"
                f" backbone require {list(shape)}"
            )

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # an overflow of float64 is reported below
            array = tensors[name].read().astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{file}: {name} has non-finite values; train it again")
        return array

    return read


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _lora(
    config: Config, tensors: Mapping[str, Tensor], t5_config: T5Config, folder: Path
) -> Adapters:
    file = folder / PEFT_CONFIG
    if (bias := config.get("bias", "none")) != "none":
        raise UserError(f"{file}: bias={bias!r:.40} trains biases, and T5's projections have none")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise UserError(
            f"{file}: init_lora_weights={init!r:.40} changes the weights of the backbone; save the"
            " adapter with peft's path_initial_model_for_weight_conversion, or merge it in peft"
        )
    modules = modules_of(t5_config)
    ranks, scales = _ranks_and_scales(config, _adapted_modules(config, t5_config, file))
    lora_bias = bool(config.get("lora_bias"))
    read = _checked_reader(tensors, _lora_shapes(ranks, lora_bias, t5_config), folder)

    target_ranks: dict[str, int] = {}
    target_scales: dict[str, float] = {}
    for module, rank in ranks.items():
        target, _ = modules[module]
        target_ranks[target] = max(rank, target_ranks.get(target, 0))
        target_scales.setdefault(target, scales[module])
    alphas = {target: target_scales[target] * rank for target, rank in target_ranks.items()}
    spec = AdapterSpec(lora=ad.lora_spec(target_ranks, alphas, lora_bias))
    tree = jax.tree.map(
        lambda shape: np.zeros(shape, np.float32),
        ad.shapes(spec, t5_config, num_tasks=1),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    for module, rank in ranks.items():
        target, layer = modules[module]
        site, _, projection = target.partition(".")
        leaf = tree[site][projection]
        ratio = np.float32(scales[module] / target_scales[target])
        leaf["a"][layer, 0, :, :rank] = read(lora_tensor(module, "lora_A.weight")).T
        leaf["b"][layer, 0, :rank] = read(lora_tensor(module, "lora_B.weight")).T * ratio
        if lora_bias:
            leaf["bias"][layer, 0] = read(lora_tensor(module, "lora_B.bias")) * ratio
    return Adapters(tree, spec)


def _adapted_modules(config: Config, t5_config: T5Config, file: Path) -> list[str]:
    """List the modules with LoRA by PEFT's rules for `target_modules` and related fields."""
    modules = list(modules_of(t5_config))
    targets = config.get("target_modules")
    targets = ["q", "v"] if targets is None else targets  # PEFT's default for T5
    if targets != "all-linear":
        modules = _matching(modules, targets, "target_modules", file)
    if not isinstance(targets, str):
        in_layers = _in_layers(modules, config)
        modules = [module for module in modules if module in targets or module in in_layers]
    if excluded := config.get("exclude_modules"):
        excluded = _matching(modules, excluded, "exclude_modules", file)
        modules = [module for module in modules if module not in excluded]
    if not modules:
        raise UserError(f"{file}: target_modules={targets!r:.60} matches no projection of this T5")
    return modules


def _matching(modules: list[str], names: str | list[str], field: str, file: Path) -> list[str]:
    """Select modules by a regex on the whole name, or by a list of names or their endings."""
    if not isinstance(names, str):
        endings = tuple(f".{name}" for name in names)
        return [module for module in modules if f".{module}".endswith(endings)]
    try:
        return [module for module in modules if re.fullmatch(names, module)]
    except re.error as error:
        raise UserError(f"{file}: {field}: {names!r:.60} is not a regex ({error})") from None


def _in_layers(modules: list[str], config: Config) -> list[str]:
    """Select the modules in `layers_to_transform`, if set.

    The layer is the first number in a module's name, or the number after `layers_pattern`.
    """
    layers = config.get("layers_to_transform")
    if layers in (None, []):
        return modules
    layers = layers if isinstance(layers, list) else [layers]
    names = config.get("layers_pattern") or ["[^.]+"]
    names = "|".join([names] if isinstance(names, str) else names)
    pattern = re.compile(rf"(?:.*?\.)?(?:{names})\.(?P<layer>\d+)\.")
    matches = {module: pattern.match(module) for module in modules}
    return [module for module, match in matches.items() if match and int(match["layer"]) in layers]


def _ranks_and_scales(
    config: Config, modules: list[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return R and alpha / R (rsLoRA: alpha / sqrt(R)) of each module.

    The first key of `rank_pattern` or `alpha_pattern` that matches the end of a name applies.
    """

    def value(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
        matches = (
            number
            for pattern, number in (patterns or {}).items()
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module)
        )
        return next(matches, default)

    root = math.sqrt if config.get("use_rslora") else float
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for module in modules:
        rank = value(module, config.get("rank_pattern"), config.get("r", 8))
        alpha = value(module, config.get("alpha_pattern"), config.get("lora_alpha", 8))
        if type(rank) is not int or rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(f"rank {rank!r:.40} and alpha {alpha!r:.40} must be positive numbers")
        ranks[module], scales[module] = rank, alpha / root(rank)
    return ranks, scales


def _lora_shapes(ranks: Mapping[str, int], bias: bool, t5_config: T5Config) -> dict[str, Shape]:
    """Return the name and shape of every tensor that PEFT loads, from the rank of each module."""
    shapes: dict[str, Shape] = {}
    modules = modules_of(t5_config)
    for module, rank in ranks.items():
        fan_in, fan_out = ad.projection_shape(modules[module][0], t5_config)
        shapes[lora_tensor(module, "lora_A.weight")] = (rank, fan_in)
        shapes[lora_tensor(module, "lora_B.weight")] = (fan_out, rank)
        if bias:
            shapes[lora_tensor(module, "lora_B.bias")] = (fan_out,)
    return shapes


def _prefix(
    config: Config, tensors: Mapping[str, Tensor], t5_config: T5Config, folder: Path
) -> Adapters:
    file = folder / PEFT_CONFIG
    length, num_layers = config["num_virtual_tokens"], config["num_layers"]
    num_heads, width = config.get("num_attention_heads"), config.get("token_dim")
    inner, depth = t5_config.num_heads * t5_config.head_dim, t5_config.num_decoder_layers
    if (submodules := config.get("num_transformer_submodules")) not in (2, None):
        raise UserError(
            f"{file}: num_transformer_submodules={submodules!r:.20} applies the prefix to"
            " cross-attention in transformers; only 2 works with a T5: train it again"
        )
    if (num_heads, width) != (t5_config.num_heads, inner):
        raise UserError(
            f"{file}: has {num_heads} heads and token_dim {width}, this backbone has"
            f" {t5_config.num_heads} and {inner}; use the backbone of the adapter"
        )
    if num_layers < depth:
        raise UserError(
            f"{file}: num_layers={num_layers} leaves {depth - num_layers} of the {depth} decoder"
            " layers without a prefix, which T5 cannot compute; train it again"
        )
    read = _checked_reader(tensors, {PROMPT: (length, 2 * num_layers * inner)}, folder)
    entries = read(PROMPT).reshape(length, 2 * num_layers, t5_config.num_heads, t5_config.head_dim)
    first = 4 * np.arange(depth)
    key, value = (
        entries[:, (first + i) % (2 * num_layers)].swapaxes(0, 1)[:, None] for i in range(2)
    )
    spec = AdapterSpec(prefix=PrefixSpec(("dec_self",), length, "hf"))
    return Adapters({"dec_self": {"prefix": {"key": key, "value": value}}}, spec)
