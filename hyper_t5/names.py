"""The names and shapes of a T5's arrays: our stacked tree, T5X's per-layer tree, Hugging Face's.

Pure functions of trees, paths and shapes; the files are read and written in weights/. N layers of
a stack, D model width, H heads, K head width.

    ours           encoder/layers/attention/query/kernel             [N, D, H*K]
    T5X            encoder/layers_{i}/attention/query/kernel         [D, H*K]
    Hugging Face   encoder.block.{i}.layer.0.SelfAttention.q.weight  [H*K, D]

Names and shapes are those of checkpoints that T5X and transformers wrote (tests/golden).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5.errors import UserError
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import Shape, as_bytes, blocks

Params = dict[str, Any]

LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")


def param_shapes(config: T5Config) -> dict[str, Shape]:
    """The path and shape of every array of a backbone, layers stacked on axis 0."""
    emb, inner, mlp = config.emb_dim, config.num_heads * config.head_dim, config.mlp_dim
    relpos = (config.num_heads, config.relpos_buckets)
    wi = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
    shapes: dict[str, Shape] = {"token_embedder/embedding": (config.vocab_size, emb)}
    if not config.logits_via_embedding:
        shapes["decoder/logits_dense/kernel"] = (emb, config.vocab_size)
    stacks = (
        ("encoder", config.num_encoder_layers, {"attention": "attention"}),
        (
            "decoder",
            config.num_decoder_layers,
            {"self_attention": "self_attention", "encoder_decoder_attention": "cross_attention"},
        ),
    )
    for stack, layers, attentions in stacks:
        shapes[f"{stack}/relpos_bias/rel_embedding"] = relpos
        shapes[f"{stack}/{stack}_norm/scale"] = (emb,)
        for block, norm in attentions.items():
            for name in ("query", "key", "value"):
                shapes[f"{stack}/layers/{block}/{name}/kernel"] = (layers, emb, inner)
            shapes[f"{stack}/layers/{block}/out/kernel"] = (layers, inner, emb)
            shapes[f"{stack}/layers/pre_{norm}_layer_norm/scale"] = (layers, emb)
        for name in wi:
            shapes[f"{stack}/layers/mlp/{name}/kernel"] = (layers, emb, mlp)
        shapes[f"{stack}/layers/mlp/wo/kernel"] = (layers, mlp, emb)
        shapes[f"{stack}/layers/pre_mlp_layer_norm/scale"] = (layers, emb)
    return shapes


def layer_paths(path: str, shape: Shape) -> dict[str, Shape]:
    """The per-layer paths and shapes of one stacked path (itself, when it is not of a layer)."""
    if "/layers/" not in path:
        return {path: shape}
    return {path.replace("/layers/", f"/layers_{i}/"): shape[1:] for i in range(shape[0])}


def stacked_path(path: str) -> tuple[str, int | None]:
    """Our path of a per-layer path of T5X, and which layer of it; None: it is of no layer."""
    if match := LAYER.fullmatch(path):
        return f"{match[1]}/layers/{match[3]}", int(match[2])
    return path, None


def t5x_paths(config: T5Config) -> list[str]:
    """Every per-layer path of T5X; those of one stacked array follow each other."""
    shapes = param_shapes(config).items()
    return [name for path, shape in shapes for name in layer_paths(path, shape)]


def to_t5x(params: Params) -> Params:
    """Our stacked tree as T5X's tree with one subtree `layers_{i}` per layer (views, no copies)."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        for i, name in enumerate(layer_paths(path, leaf.shape)):
            flat[name] = leaf if name == path else leaf[i]
    return traverse_util.unflatten_dict(flat, sep="/")


def from_t5x(tree: Params) -> Params:
    """T5X's per-layer tree as our stacked tree of numpy arrays; inverse of `to_t5x`.

    Raises:
      UserError: layers are missing in between, or differ in shape.
    """
    flat: dict[str, Any] = {}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        if match := LAYER.fullmatch(path):
            stacked = f"{match[1]}/layers/{match[3]}"
            layers.setdefault(stacked, {})[int(match[2])] = np.asarray(leaf)
        else:
            flat[path] = leaf
    for path, found in layers.items():
        if sorted(found) != list(range(len(found))):
            raise UserError(f"{path}: has layers {sorted(found)}; expected 0, 1, ... without gap")
        if len({leaf.shape for leaf in found.values()}) > 1:
            raise UserError(f"{path}: its layers have different shapes")
        flat[path] = np.stack([found[i] for i in range(len(found))])
    return traverse_util.unflatten_dict(flat, sep="/")


def _hf_layer_names() -> dict[tuple[str, str], str]:
    """(stack, path inside a T5X layer) -> name inside `{stack}.block.{i}`."""
    names = {}
    blocks = {
        "encoder": ("attention",),
        "decoder": ("self_attention", "encoder_decoder_attention"),
    }
    for stack, attentions in blocks.items():
        for i, attention in enumerate(attentions):
            module = "EncDecAttention" if i else "SelfAttention"
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
                names[stack, f"{attention}/{ours}/kernel"] = f"layer.{i}.{module}.{theirs}.weight"
            norm = "cross_attention" if i else attention
            names[stack, f"pre_{norm}_layer_norm/scale"] = f"layer.{i}.layer_norm.weight"
        for name in ("wi", "wi_0", "wi_1", "wo"):
            mlp = f"layer.{len(attentions)}.DenseReluDense.{name}.weight"
            names[stack, f"mlp/{name}/kernel"] = mlp
        names[stack, "pre_mlp_layer_norm/scale"] = f"layer.{len(attentions)}.layer_norm.weight"
    return names


_HF_FIXED = {
    "token_embedder/embedding": "shared.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "encoder/relpos_bias/rel_embedding": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "decoder/relpos_bias/rel_embedding": (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
}
_HF_LAYER = _hf_layer_names()
_T5X_FIXED = {theirs: ours for ours, theirs in _HF_FIXED.items()}
_T5X_LAYER = {(stack, theirs): ours for (stack, ours), theirs in _HF_LAYER.items()}
HF_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Written by the first conversions of T5 1.0 and used by no version of the model since.
HF_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def hf_name(path: str) -> str:
    """Hugging Face's name of a per-layer T5X path; KeyError when T5 has no such array."""
    if match := LAYER.fullmatch(path):
        return f"{match[1]}.block.{match[2]}.{_HF_LAYER[match[1], match[3]]}"
    return _HF_FIXED[path]


def t5x_name(name: str) -> str | None:
    """The per-layer T5X path of a Hugging Face name, or None; inverse of `hf_name`."""
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(.+)", name)
    inner = _T5X_LAYER.get((match[1], match[3])) if match else None
    return f"{match[1]}/layers_{match[2]}/{inner}" if match and inner else _T5X_FIXED.get(name)


def hf_transposed(path: str) -> bool:
    """Whether Hugging Face keeps this array with its two axes exchanged."""
    return path.endswith(("/kernel", "/rel_embedding"))


def to_hf(params: Params) -> dict[str, np.ndarray]:
    """Our tree as a Hugging Face state dict (kernels `[out, in]`, all arrays C-contiguous)."""
    state = {}
    for path, leaf in traverse_util.flatten_dict(to_t5x(params), sep="/").items():
        array = np.asarray(leaf)
        # safetensors writes the bytes of a transposed view in the wrong order without a word.
        state[hf_name(path)] = np.ascontiguousarray(array.T if hf_transposed(path) else array)
    return state


def from_hf(state: Mapping[str, np.ndarray]) -> Params:
    """A Hugging Face state dict as our tree; inverse of `to_hf`.

    Raises:
      UserError: a name that T5 does not have.
    """
    flat = {}
    for name, array in state.items():
        if (path := t5x_name(name)) is None:
            raise UserError(f"{name}: is no tensor of a Hugging Face T5")
        flat[path] = np.ascontiguousarray(array.T if hf_transposed(path) else array)
    return from_t5x(traverse_util.unflatten_dict(flat, sep="/"))


def digest(params: Params) -> str:
    """sha256 of the values under their T5X per-layer names, in hex.

    The same for a stacked and a per-layer tree, and for bf16 values kept as bf16 or as fp32.
    """
    result = hashlib.sha256()
    flat = traverse_util.flatten_dict(to_t5x(params), sep="/")
    for path in sorted(flat):
        add_to_digest(result, path, np.asarray(flat[path]))
    return result.hexdigest()


def add_to_digest(result: Any, path: str, array: np.ndarray) -> None:
    """Adds one array to a digest in the making; arrays come in the order of their sorted paths."""
    result.update(digest_head(path, array.shape))
    for block in blocks(array):
        result.update(as_bytes(block.astype("<f4", copy=False)).data)


def digest_head(path: str, shape: Shape) -> bytes:
    """What stands before an array's values in a digest."""
    return f"{path} {list(shape)}\n".encode()
