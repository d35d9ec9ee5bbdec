"""PEFT export: adapters as a folder that `peft.PeftModel.from_pretrained` loads.

Shapes: N layers, T tasks, H heads, K head width, R rank, P prefix length.

- LoRA: each projection has `lora_A [R, in]` and `lora_B [out, R]`, scaled by alpha / R. Both may
  differ by module.
- Prefix tuning: past keys and values, which reach the decoder's self-attention only. T5's decoder
  layer i uses the entries 4i and 4i+1 of PEFT's table; the entries 4i+2 and 4i+3, of
  cross-attention, are dropped. So the table has twice the layers, and zeros in the dropped entries.

Formats are those of peft 0.17 to 0.21; prefixes need 0.18.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5.adapters import SITES, Adapters, LoraSpec, check, take, targets_of, trim
from hyper_t5.export.merged import check_task
from hyper_t5.export.peft_names import PEFT_CONFIG, PEFT_TENSORS, PROMPT, hf_module, lora_tensor
from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import as_path, replaced_folder, write_json
from hyper_t5.utils.safetensors_io import write_safetensors

README = "README.md"


def export_peft(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    t5_config: T5Config,
    base_model_name_or_path: str,
    task: int = 0,
    dtype: str = "float32",
    input_template: str = "",
    backbone_text: str = "",
) -> Path:
    """Write the adapters of one task as a PEFT folder.

    Args:
      folder: Receives adapter_config.json, adapter_model.safetensors and README.md.
      adapters: LoRA, or prefixes at `dec_self` with position bias `hf`; leaves `[N, T, ...]`.
      t5_config: The backbone of the adapters.
      base_model_name_or_path: The backbone in Hugging Face's layout (`weights.save_hf`); empty
        names none.
      task: Index of the task.
      dtype: `float32` or `bfloat16`. PEFT loads both as float32 unless it is called with
        `autocast_adapter_dtype=False`.
      input_template: The template of inputs, for the README; empty for plain inputs.
      backbone_text: Sentences about the backbone, for the README.

    Returns:
      The folder.

    Raises:
      UserError: PEFT cannot express these adapters, they do not fit the backbone or are not finite,
        or the folder holds other files.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"export: dtype {dtype!r} is not one of float32, bfloat16")
    check_task(adapters, task)
    adapters = trim(take(adapters, [task]))
    tree = _one_task(adapters, t5_config, task, dtype)
    _check_expressible(adapters, tree)
    config: dict[str, Any] = {
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model_name_or_path or None,
        "inference_mode": True,
    }
    if adapters.spec.lora is not None:
        config |= _lora_config(adapters.spec.lora, t5_config)
        tensors = _lora_tensors(adapters.spec.lora, tree)
    else:
        prefix = tree["dec_self"]["prefix"]
        config |= _prefix_config(prefix["key"].shape[1], t5_config)
        tensors = {PROMPT: _prefix_table(prefix)}
    with replaced_folder(folder, (PEFT_CONFIG, PEFT_TENSORS, README)) as new:
        write_json(new / PEFT_CONFIG, config)
        write_safetensors(new / PEFT_TENSORS, tensors, {"format": "pt"})
        name = as_path(folder).name
        text = _readme(name, config, dtype, input_template, backbone_text)
        (new / README).write_text(text, encoding="utf-8")
    return Path(folder)


def _one_task(adapters: Adapters, t5_config: T5Config, task: int, dtype: str) -> dict[str, Any]:
    """Return the tree of one task as numpy arrays without the task axis, checked and cast."""
    check(adapters, t5_config, "export")
    flat = {}
    for path, leaf in traverse_util.flatten_dict(adapters.tree, sep="/").items():
        array = np.asarray(leaf[:, 0])
        if array.dtype != bool:
            array = array.astype(dtype)
            if not np.isfinite(array).all():
                raise UserError(f"export: {path} of task {task} has non-finite values")
        flat[path] = array
    return traverse_util.unflatten_dict(flat, sep="/")


def _check_expressible(adapters: Adapters, tree: Mapping[str, Any]) -> None:
    """Raise a UserError with reason and alternative for what PEFT's T5 cannot compute."""
    spec = adapters.spec
    sites = spec.prefix.sites if spec.prefix else ()
    bias = spec.prefix.position_bias if spec.prefix else "hf"
    other_sites = ", ".join(site for site in sites if site != "dec_self")
    mask = tree["dec_self"]["prefix"].get("mask") if "dec_self" in sites else None
    masked = 0 if mask is None else int((~mask).sum())
    reasons = {
        "PEFT has no bottleneck adapters parallel to T5's MLPs; emit LoRA": spec.bottleneck,
        "PEFT cannot add memory to T5's decoder; use a system without fusion": spec.memory,
        "PEFT cannot have LoRA and prefixes active together; emit one of them": spec.lora
        and spec.prefix,
        "PEFT supports T5 prefixes in the decoder's self-attention only, not at"
        f" {other_sites}; train with adapter.prefix_sites=('dec_self',)": other_sites,
        "PEFT gives prefixes the position bias of real tokens, and these have"
        f" adapter.position_bias={bias!r}; train with 'hf'": bias != "hf",
        f"{masked} of the prefix slots are masked, and PEFT attends to all of them; emit prefixes"
        " of a fixed length (hypermodel.gist_tokens)": masked,
        "these adapters are empty; emit LoRA": not (spec.lora or spec.prefix),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(
                f"export: {reason}, or keep the native folder, which `hyper-t5 predict` reads"
            )


def _lora_tensors(lora: LoraSpec, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors = {}
    for target in lora.targets:
        site, _, projection = target.partition(".")
        leaf = tree[site][projection]
        for layer in range(len(leaf["a"])):
            module = hf_module(target, layer)
            tensors[lora_tensor(module, "lora_A.weight")] = leaf["a"][layer].T
            tensors[lora_tensor(module, "lora_B.weight")] = leaf["b"][layer].T
            if lora.bias:
                tensors[lora_tensor(module, "lora_B.bias")] = leaf["bias"][layer]
    return tensors


def _lora_config(lora: LoraSpec, t5_config: T5Config) -> dict[str, Any]:
    """Return PEFT's fields; a target of another rank or alpha is in both patterns."""

    def as_int(alpha: float) -> float:
        """PEFT declares alpha as an int, and accepts a float."""
        return int(alpha) if float(alpha).is_integer() else alpha

    default = lora.rank, lora.alpha
    patterned = [t for t in lora.targets if (lora.rank_of(t), lora.alpha_of(t)) != default]
    config = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": as_int(lora.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(lora, t5_config),
    }
    if patterned:
        config["rank_pattern"] = {_regex([t]): lora.rank_of(t) for t in patterned}
        config["alpha_pattern"] = {_regex([t]): as_int(lora.alpha_of(t)) for t in patterned}
    return config | ({"lora_bias": True} if lora.bias else {})


def _target_modules(lora: LoraSpec, t5_config: T5Config) -> list[str] | str:
    """Return a list like `["q", "v"]` if it matches these targets and no others, else a regex.

    A list entry matches every module of that name: "q" is the query of both stacks' self-attention
    and of cross-attention. PEFT matches a string as a regex against whole module names.
    """
    last = {t: hf_module(t, 0).rpartition(".")[2] for t in targets_of(SITES, t5_config)}
    names = {last[target] for target in lora.targets}
    if {target for target, name in last.items() if name in names} == set(lora.targets):
        return sorted(names)
    return _regex(lora.targets)


def _regex(targets: Collection[str]) -> str:
    """Return a regex for the module names of LoRA targets in every layer."""
    by_parent: dict[str, list[str]] = {}
    for target in targets:
        parent, _, name = hf_module(target, 0).rpartition(".")
        by_parent.setdefault(re.escape(parent).replace("0", r"\d+", 1), []).append(name)
    return "|".join(
        rf"{parent}\.({'|'.join(sorted(names))})" for parent, names in sorted(by_parent.items())
    )


def _prefix_table(prefix: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay out keys and values `[N, P, H, K]` as PEFT's table `[P, N * 4 * H * K]`."""
    key, value = prefix["key"], prefix["value"]
    layers, slots, heads, width = key.shape
    table = np.zeros((slots, layers, 4, heads, width), key.dtype)
    table[:, :, 0] = key.swapaxes(0, 1)
    table[:, :, 1] = value.swapaxes(0, 1)
    return table.reshape(slots, -1)


def _prefix_config(slots: int, t5_config: T5Config) -> dict[str, Any]:
    # H*K, not D: PEFT infers D, and fails if the two differ (T5 1.1 small).
    inner = t5_config.num_heads * t5_config.head_dim
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": slots,
        "token_dim": inner,
        "num_attention_heads": t5_config.num_heads,
        "num_layers": 2 * t5_config.num_decoder_layers,
        "num_transformer_submodules": 2,
        "prefix_projection": False,
        "encoder_hidden_size": inner,
    }


def _readme(
    name: str, config: Mapping[str, Any], dtype: str, input_template: str, backbone_text: str
) -> str:
    base = config["base_model_name_or_path"] or "base_model"
    version = "0.17" if config["peft_type"] == "LORA" else "0.18"
    inputs = f"Inputs have the form {input_template!r}." if input_template else "Inputs are plain."
    bfloat16 = " PEFT loads these bfloat16 tensors as float32." if dtype == "bfloat16" else ""
    return f"""# {name}

A PEFT adapter for a T5, emitted by hyper_t5. Needs `peft>={version}` and `transformers`.

```python
from transformers import T5ForConditionalGeneration
from peft import PeftModel
model = PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained({base!r}), {name!r})
```

Use the backbone that the adapter was generated for. {backbone_text}

{inputs} Inputs and targets end in the token id 1.{bfloat16}
"""
