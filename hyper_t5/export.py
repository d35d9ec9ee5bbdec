"""Adapters in other tools' formats: Hugging Face PEFT folders, and merged into the backbone.

Shapes: T tasks, N layers, D model width, H heads, K head width, R rank, P prefix length.

PEFT's formats are those of its own files and loader (peft 0.17 to 0.21, prefixes from 0.18 on). Two
things decide what it can say about a T5:

* LoRA: a module for each projection, `lora_A [R, in]` and `lora_B [out, R]`, scaled by alpha/R.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5.adapters import Adapters, AdapterSpec, LoraSpec, check, num_layers, targets_of
from hyper_t5.errors import UserError
from hyper_t5.files import replaced_folder, write_json
from hyper_t5.names import Params, hf_name
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import write_safetensors

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
_SITE_BLOCKS = {
    "enc_self": ("encoder", "attention"),
    "dec_self": ("decoder", "self_attention"),
    "dec_cross": ("decoder", "encoder_decoder_attention"),
    "enc_mlp": ("encoder", "mlp"),
    "dec_mlp": ("decoder", "mlp"),
}


def export_peft(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    t5_config: T5Config,
    base_model_name_or_path: str,
    task: int = 0,
) -> Path:
    """Writes one task's adapters as a folder for `peft.PeftModel.from_pretrained`.

    Args:
      folder: gets adapter_config.json, adapter_model.safetensors and a README.md.
      adapters: LoRA, or prefixes at `dec_self` with position bias `hf`; leaves `[N, T, ...]`.
      t5_config: the backbone they were made for.
      base_model_name_or_path: the backbone in Hugging Face's layout (`weights.save_hf`).
      task: which of the T tasks.

    Returns:
      The folder's path.

    Raises:
      UserError: PEFT cannot express these adapters (the message says why, and what can); they do
        not fit the backbone or are not finite; the folder holds other files.
    """
    tree = _one_task(adapters, t5_config, task)
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
        peft_version = "0.17"
    else:
        prefix = tree["dec_self"]["prefix"]
        config |= _prefix_config(prefix["key"].shape[1], t5_config)
        tensors = {"prompt_embeddings": _prefix_table(prefix)}
        expected = {"prompt_embeddings"}
        peft_version = "0.18"
    if tensors.keys() != expected:
        raise AssertionError(f"PEFT names: {sorted(tensors.keys() ^ expected)}")
    with replaced_folder(folder, (PEFT_CONFIG, PEFT_TENSORS, "README.md")) as new:
        write_json(new / PEFT_CONFIG, config)
        write_safetensors(new / PEFT_TENSORS, tensors, {"format": "pt"})
        text = _readme(Path(folder).name, base_model_name_or_path, peft_version)
        (new / "README.md").write_text(text, encoding="utf-8")
    return Path(folder)


def merge_lora(params: Params, adapters: Adapters, task: int = 0) -> Params:
    """The backbone with one task's LoRA added to its kernels; `params` stay as they are.

    Args:
      params: a backbone, layers stacked (see `names.param_shapes`).
      adapters: LoRA only; leaves `[N, T, ...]`.
      task: which of the T tasks.

    Raises:
      UserError: prefixes or biases, which a T5 has no parameters for.
    """
    lora = adapters.spec.lora
    if lora is None or adapters.spec != AdapterSpec(lora=lora):
        raise UserError(
            "merge: only LoRA is a change of the weights; prefixes, bottleneck adapters and memory"
            " cannot be merged into a T5; keep them as an adapter folder"
        )
    _check_task(adapters, task)
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for target in lora.targets:
        site, _, projection = target.partition(".")
        leaf = adapters.tree[site][projection]
        if "bias" in leaf and np.any(np.asarray(leaf["bias"][:, task])):
            raise UserError(
                f"merge: {target} has a LoRA bias, and T5's projections have none to add it to;"
                " export with --format=peft, or train with adapter.lora_bias=False"
            )
        a, b = (np.asarray(leaf[name][:, task], np.float32) for name in ("a", "b"))
        stack, block = _SITE_BLOCKS[site]
        path = f"{stack}/layers/{block}/{projection}/kernel"
        kernel = np.asarray(flat[path])
        delta = lora.scale * np.matmul(a, b)  # [N, in, out]
        if delta.shape != kernel.shape:
            raise UserError(
                f"merge: {target} gives {list(delta.shape)}, the backbone's {path} is"
                f" {list(kernel.shape)}; use the backbone the adapters were made for"
            )
        flat[path] = (kernel.astype(np.float32) + delta).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


# ----------------------------------------------------------------------------------- checks


def _check_task(adapters: Adapters, task: int) -> None:
    if not 0 <= task < adapters.num_tasks:
        raise UserError(
            f"export: there is no task {task}; the adapters hold {adapters.num_tasks} (from 0)"
        )


def _one_task(adapters: Adapters, config: T5Config, task: int) -> dict[str, Any]:
    """The adapters' tree as numpy arrays without the task axis, known to fit and to be finite."""
    check(adapters, config, "export")
    _check_task(adapters, task)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(adapters.tree, sep="/").items():
        array = np.asarray(leaf[:, task])
        if array.dtype != bool:
            array = array.astype(np.float32)  # PEFT computes adapters in float32 anyway
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


def _hf_module(target: str, layer: int) -> str:
    """Hugging Face's name of the module that a LoRA target such as `dec_mlp.wo` changes."""
    site, _, projection = target.partition(".")
    stack, block = _SITE_BLOCKS[site]
    name = hf_name(f"{stack}/layers_{layer}/{block}/{projection}/kernel")
    return name.removesuffix(".weight")


def _lora_names(lora: LoraSpec, config: T5Config) -> set[str]:
    """Every key that PEFT will look for, from the spec and the backbone's sizes alone."""
    leaves = ("lora_A.weight", "lora_B.weight", *(("lora_B.bias",) if lora.bias else ()))
    return {
        f"base_model.model.{_hf_module(target, layer)}.{leaf}"
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
            module = f"base_model.model.{_hf_module(target, layer)}"
            tensors[f"{module}.lora_A.weight"] = leaf["a"][layer].T
            tensors[f"{module}.lora_B.weight"] = leaf["b"][layer].T
            if lora.bias:
                tensors[f"{module}.lora_B.bias"] = leaf["bias"][layer]
    return tensors


def _lora_config(lora: LoraSpec, config: T5Config) -> dict[str, Any]:
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(lora, config),
        **({"lora_bias": True} if lora.bias else {}),
    }


def _target_modules(lora: LoraSpec, config: T5Config) -> list[str] | str:
    """A plain list like ["q", "v"] where it matches the targets and no others, else a regex.

    A list entry matches every module of that name: "q" stands for the queries of both stacks' self-
    attention and of cross-attention. PEFT matches a string as a regex against whole module names.
    """
    last = {t: _hf_module(t, 0).rpartition(".")[2] for t in targets_of(tuple(_SITE_BLOCKS), config)}
    names = {last[target] for target in lora.targets}
    if {target for target, name in last.items() if name in names} == set(lora.targets):
        return sorted(names)
    by_parent: dict[str, list[str]] = {}
    for target in lora.targets:
        parent, _, name = _hf_module(target, 0).rpartition(".")
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
    table = np.zeros((slots, layers, 4, heads, width), np.float32)
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


def _readme(name: str, base: str, peft_version: str) -> str:
    return f"""# {name}

A PEFT adapter for a T5, emitted by hyper_t5. Needs `peft>={peft_version}` and `transformers`.

```python
from transformers import T5ForConditionalGeneration
from peft import PeftModel
model = PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained({base!r}), {name!r})
```

The backbone must be the one the adapter was made for. Inputs and targets end in the token id 1.
"""
