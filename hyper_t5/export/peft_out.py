"""Adapters out: a folder that `peft.PeftModel.from_pretrained` loads.

Shapes: T tasks, N layers, D model width, H heads, K head width, R rank, P prefix length.

PEFT's formats are those of its own files and loader (peft 0.17 to 0.21, prefixes from 0.18 on). Two
things decide what it can say about a T5:

* LoRA: a module for each projection, `lora_A [R, in]` and `lora_B [out, R]`, scaled by alpha/R,
  both of which may differ by module.
* Prefix tuning: past keys and values, which reach the decoder's self-attention and nothing else.
  Of the layers it is told, it gives T5's decoder layer i the entries 4i and 4i+1 and throws the
  entries 4i+2 and 4i+3 (for cross-attention) away, so twice the layers are declared and zeros
  stand where it throws away.

PEFT reports neither keys that are not there nor keys that should not be, so everything written is
read back and compared here, and its names with those of the spec.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5.adapters import Adapters, LoraSpec, check, num_layers, targets_of
from hyper_t5.errors import UserError
from hyper_t5.export.merged import check_task
from hyper_t5.export.peft_names import (
    EVERYWHERE,
    PEFT_CONFIG,
    PEFT_TENSORS,
    PROMPT,
    hf_module,
)
from hyper_t5.files import replaced_folder, write_json
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import write_safetensors


def export_peft(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    t5_config: T5Config,
    base_model_name_or_path: str,
    task: int = 0,
    dtype: str = "float32",
    asked: str = "",
) -> Path:
    """Writes one task's adapters as a folder for `peft.PeftModel.from_pretrained`.

    Args:
      folder: gets adapter_config.json, adapter_model.safetensors and a README.md.
      adapters: LoRA, or prefixes at `dec_self` with position bias `hf`; leaves `[N, T, ...]`.
      t5_config: the backbone they were made for.
      base_model_name_or_path: the backbone in Hugging Face's layout (`weights.save_hf`).
      task: which of the T tasks.
      dtype: of the tensors, 'float32' or 'bfloat16'. PEFT makes float32 of either when it loads
        them, unless it is told `autocast_adapter_dtype=False`.
      asked: how an input is written where it is not as it is; for the README.

    Returns:
      The folder's path.

    Raises:
      UserError: PEFT cannot express these adapters (the message says why, and what can); they do
        not fit the backbone or are not finite; the folder holds other files.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"export: dtype {dtype!r} is none of float32, bfloat16")
    tree = _one_task(adapters, t5_config, task, dtype)
    _refuse_inexpressible(adapters, tree)
    config: dict[str, Any] = {
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
    }
    if adapters.spec.lora is not None:
        config |= _lora_config(adapters.spec.lora, t5_config)
        tensors = _lora_tensors(adapters.spec.lora, tree)
        expected = _lora_names(adapters.spec.lora, t5_config)
    else:
        prefix = tree["dec_self"]["prefix"]
        config |= _prefix_config(prefix["key"].shape[1], t5_config)
        tensors, expected = {PROMPT: _prefix_table(prefix)}, {PROMPT}
    if tensors.keys() != expected:
        raise AssertionError(f"PEFT names: {sorted(tensors.keys() ^ expected)}")
    with replaced_folder(folder, (PEFT_CONFIG, PEFT_TENSORS, "README.md")) as new:
        write_json(new / PEFT_CONFIG, config)
        write_safetensors(new / PEFT_TENSORS, tensors, {"format": "pt"})
        text = _readme(Path(folder).name, config, dtype, asked)
        (new / "README.md").write_text(text, encoding="utf-8")
    return Path(folder)


# ----------------------------------------------------------------------------------- checks


def _one_task(adapters: Adapters, config: T5Config, task: int, dtype: str) -> dict[str, Any]:
    """The adapters' tree as numpy arrays without the task axis, known to fit and to be finite."""
    check(adapters, config, "export")
    check_task(adapters, task)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(adapters.tree, sep="/").items():
        array = np.asarray(leaf[:, task])
        if array.dtype != bool:
            array = array.astype(dtype)
            if not np.isfinite(array).all():
                raise UserError(f"export: {path} of task {task} has non-finite numbers")
        flat[path] = array
    return traverse_util.unflatten_dict(flat, sep="/")


def _refuse_inexpressible(adapters: Adapters, tree: Mapping[str, Any]) -> None:
    """UserError with the reason and the alternative for what PEFT's T5 cannot compute."""
    lora, prefix = adapters.spec.lora, adapters.spec.prefix
    native = "keep the native folder, which `hyper-t5 predict` reads"
    if adapters.spec.bottleneck is not None:
        raise UserError(
            f"export: PEFT has no bottleneck adapters beside T5's MLPs; emit LoRA, or {native}"
        )
    if adapters.spec.memory:
        raise UserError(
            "export: PEFT cannot give T5's decoder more memory than its encoder made; use a system"
            f" that fuses no text, or {native}"
        )
    if lora is not None and prefix is not None:
        raise UserError(
            "export: PEFT cannot have LoRA and prefixes active together; emit one of them"
            f" (adapter.lora_rank=0 or adapter.prefix_length=0), or {native}"
        )
    if prefix is None:
        if lora is None:
            raise UserError(f"export: there is nothing in these adapters; {native}")
        return
    if other := [site for site in prefix.sites if site != "dec_self"]:
        raise UserError(
            f"export: PEFT gives T5 prefixes in the decoder's self-attention only, not at"
            f" {', '.join(other)}; train with adapter.prefix_sites=('dec_self',), or {native}"
        )
    if prefix.position_bias != "hf":
        raise UserError(
            "export: PEFT gives prefixes the position bias of real tokens, and these were made with"
            f" adapter.position_bias={prefix.position_bias!r}; train with 'hf', or {native}"
        )
    mask = tree["dec_self"]["prefix"].get("mask")
    if mask is not None and not mask.all():
        raise UserError(
            f"export: {int((~mask).sum())} of {mask.size} prefix slots are masked, and PEFT"
            " attends to all of them; emit prefixes of a fixed length (hypermodel.gist_tokens), or"
            f" {native}"
        )


# ------------------------------------------------------------------------------------- LoRA


def _lora_names(lora: LoraSpec, config: T5Config) -> set[str]:
    """Every key that PEFT will look for, from the spec and the backbone's sizes alone."""
    leaves = ("lora_A.weight", "lora_B.weight", *(("lora_B.bias",) if lora.bias else ()))
    return {
        f"base_model.model.{hf_module(target, layer)}.{leaf}"
        for target in lora.targets
        for layer in range(num_layers(target, config))
        for leaf in leaves
    }


def _lora_tensors(lora: LoraSpec, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors = {}
    for target in lora.targets:
        site, _, projection = target.partition(".")
        leaf = tree[site][projection]
        for layer in range(leaf["a"].shape[0]):
            module = f"base_model.model.{hf_module(target, layer)}"
            tensors[f"{module}.lora_A.weight"] = leaf["a"][layer].T
            tensors[f"{module}.lora_B.weight"] = leaf["b"][layer].T
            if lora.bias:
                tensors[f"{module}.lora_B.bias"] = leaf["bias"][layer]
    return tensors


def _lora_config(lora: LoraSpec, config: T5Config) -> dict[str, Any]:
    """PEFT's fields. Each target whose rank or alpha is another stands in both patterns."""
    others = [
        target
        for target in lora.targets
        if (lora.rank_of(target), lora.alpha_of(target)) != (lora.rank, lora.alpha)
    ]
    made = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(lora, config),
    }
    if others:
        made["rank_pattern"] = {_regex([t]): lora.rank_of(t) for t in others}
        made["alpha_pattern"] = {_regex([t]): _whole(lora.alpha_of(t)) for t in others}
    return made | ({"lora_bias": True} if lora.bias else {})


def _whole(number: float) -> float:
    """An int where it is one: PEFT's alpha is typed so, and works with either."""
    return int(number) if float(number).is_integer() else number


def _target_modules(lora: LoraSpec, config: T5Config) -> list[str] | str:
    """A plain list like ["q", "v"] where it matches the targets and no others, else a regex.

    A list entry matches every module of that name: "q" stands for the queries of both stacks' self-
    attention and of cross-attention. PEFT matches a string as a regex against whole module names.
    """
    last = {t: hf_module(t, 0).rpartition(".")[2] for t in targets_of(EVERYWHERE, config)}
    names = {last[target] for target in lora.targets}
    if {target for target, name in last.items() if name in names} == set(lora.targets):
        return sorted(names)
    return _regex(lora.targets)


def _regex(targets: Collection[str]) -> str:
    """What matches the whole names of the modules of LoRA targets, in every layer."""
    by_parent: dict[str, list[str]] = {}
    for target in targets:
        parent, _, name = hf_module(target, 0).rpartition(".")
        by_parent.setdefault(parent.replace(".block.0.", r".block.N."), []).append(name)
    parts = [
        re.escape(parent).replace(r"block\.N", r"block\.\d+") + rf"\.({'|'.join(sorted(names))})"
        for parent, names in sorted(by_parent.items())
    ]
    return "|".join(parts)


# ----------------------------------------------------------------------------------- prefix


def _prefix_table(prefix: Mapping[str, np.ndarray]) -> np.ndarray:
    """PEFT's table [P, N * 4 * H * K] of keys and values [N, P, H, K]; see the module docstring."""
    key, value = prefix["key"], prefix["value"]
    layers, slots, heads, width = key.shape
    table = np.zeros((slots, layers, 4, heads, width), key.dtype)
    table[:, :, 0] = key.swapaxes(0, 1)
    table[:, :, 1] = value.swapaxes(0, 1)
    return table.reshape(slots, -1)


def _prefix_config(slots: int, config: T5Config) -> dict[str, Any]:
    # H*K, not D: PEFT's own guess takes D, and fails where the two differ (T5 1.1 small).
    inner = config.num_heads * config.head_dim
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": slots,
        "token_dim": inner,
        "num_attention_heads": config.num_heads,
        "num_layers": 2 * config.num_decoder_layers,
        "num_transformer_submodules": 2,
        "prefix_projection": False,
        "encoder_hidden_size": inner,
    }


def _readme(name: str, config: Mapping[str, Any], dtype: str, asked: str) -> str:
    base = config["base_model_name_or_path"]
    version = "0.17" if config["peft_type"] == "LORA" else "0.18"
    notes = ["The backbone must be the one the adapter was made for."]
    notes.append(f"Inputs are written {asked!r}." if asked else "Inputs are taken as they are.")
    notes.append("Inputs and targets end in the token id 1.")
    if dtype == "bfloat16":
        notes.append("The tensors are bfloat16; PEFT makes float32 of them when it loads them.")
    return f"""# {name}

A PEFT adapter for a T5, emitted by hyper_t5. Needs `peft>={version}` and `transformers`.

```python
from transformers import T5ForConditionalGeneration
from peft import PeftModel
model = PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained({base!r}), {name!r})
```

{chr(10).join(notes)}
"""
