"""Names and shapes of a T5's parameters: our stacked tree, T5X's and Hugging Face's.

Pure functions of trees, paths and shapes. N layers of a stack, D model width, H heads, K head
width.

    ours           encoder/layers/attention/query/kernel             [N, D, H*K]
    T5X            encoder/layers_{i}/attention/query/kernel         [D, H*K]
    Hugging Face   encoder.block.{i}.layer.0.SelfAttention.q.weight  [H*K, D]

The tests compare them with checkpoints written by T5X and transformers (tests/golden).
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5.t5 import T5Config
from hyper_t5.utils.safetensors_io import Shape, as_bytes, blocks

Params = dict[str, Any]

LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
SUBLAYERS = {
    "encoder": ("attention", "mlp"),
    "decoder": ("self_attention", "encoder_decoder_attention", "mlp"),
}


def param_shapes(config: T5Config) -> dict[str, Shape]:
    """Return the path and shape of every parameter, layers stacked on axis 0."""
    emb, inner, mlp = config.emb_dim, config.num_heads * config.head_dim, config.mlp_dim
    wi = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
    shapes: dict[str, Shape] = {"token_embedder/embedding": (config.vocab_size, emb)}
    if not config.logits_via_embedding:
        shapes["decoder/logits_dense/kernel"] = (emb, config.vocab_size)
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for stack, depth in depths.items():
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (config.num_heads, config.relpos_buckets)
        shapes[f"{stack}/{stack}_norm/scale"] = (emb,)
        for sublayer in SUBLAYERS[stack]:
            is_mlp = sublayer == "mlp"
            width, out = (mlp, "wo") if is_mlp else (inner, "out")
            for name in wi if is_mlp else ("query", "key", "value"):
                shapes[f"{stack}/layers/{sublayer}/{name}/kernel"] = (depth, emb, width)
            shapes[f"{stack}/layers/{sublayer}/{out}/kernel"] = (depth, width, emb)
            shapes[f"{stack}/layers/{_norm(sublayer)}/scale"] = (depth, emb)
    return shapes


def _norm(sublayer: str) -> str:
    """Return T5X's name of the layer norm before a sublayer."""
    return f"pre_{sublayer.replace('encoder_decoder', 'cross')}_layer_norm"


def layer_paths(path: str, shape: Shape) -> dict[str, Shape]:
    """Return T5X's per-layer paths and shapes of one stacked path."""
    if "/layers/" not in path:
        return {path: shape}
    return {path.replace("/layers/", f"/layers_{i}/"): shape[1:] for i in range(shape[0])}


def layer_shapes(config: T5Config) -> dict[str, Shape]:
    """Return the path and shape of every parameter of T5X's per-layer tree."""
    return {
        name: shape
        for path, stacked in param_shapes(config).items()
        for name, shape in layer_paths(path, stacked).items()
    }


def stacked_path(path: str) -> tuple[str, int | None]:
    """Return the stacked path of a per-layer path and its layer, or None outside of layers."""
    if match := LAYER.fullmatch(path):
        return f"{match[1]}/layers/{match[3]}", int(match[2])
    return path, None


def to_t5x(params: Params) -> Params:
    """Convert a stacked tree into T5X's tree with one subtree `layers_{i}` per layer, as views."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        for i, name in enumerate(layer_paths(path, leaf.shape)):
            flat[name] = leaf if name == path else leaf[i]
    return traverse_util.unflatten_dict(flat, sep="/")


HF_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In early conversions of T5 1.0; unused by every version of the model.
HF_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_HF_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_HF_FIXED = {
    "token_embedder/embedding": "shared.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "encoder/relpos_bias/rel_embedding": f"encoder.{_HF_TABLE}",
    "decoder/relpos_bias/rel_embedding": f"decoder.{_HF_TABLE}",
}
_HF_MODULES = {"encoder_decoder_attention": "EncDecAttention", "mlp": "DenseReluDense"}
_HF_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def hf_name(path: str) -> str:
    """Return Hugging Face's name of a per-layer T5X path."""
    match = LAYER.fullmatch(path)
    if match is None:
        return _HF_FIXED[path]
    stack, layer, inner = match.groups()
    module, projection = inner.split("/")[:2]
    for i, sublayer in enumerate(SUBLAYERS[stack]):
        prefix = f"{stack}.block.{layer}.layer.{i}"
        if module == sublayer:
            name = _HF_PROJECTIONS.get(projection, projection)
            return f"{prefix}.{_HF_MODULES.get(module, 'SelfAttention')}.{name}.weight"
        if module == _norm(sublayer):
            return f"{prefix}.layer_norm.weight"
    raise KeyError(path)


def hf_transposed(path: str) -> bool:
    """Return whether Hugging Face stores a parameter with its two axes swapped."""
    return path.endswith(("/kernel", "/rel_embedding"))


def digest(params: Params) -> str:
    """Return the sha256 of the values under their T5X per-layer names, in hex.

    It is the same for a stacked and a per-layer tree, and for bfloat16 values stored as float32.
    """
    result = hashlib.sha256()
    flat = traverse_util.flatten_dict(to_t5x(params), sep="/")
    for path in sorted(flat):
        update_digest(result, path, np.asarray(flat[path]))
    return result.hexdigest()


def update_digest(result: Any, path: str, array: np.ndarray) -> None:
    """Add one array to a digest; arrays come in the order of their sorted per-layer paths."""
    result.update(digest_header(path, array.shape))
    for block in blocks(array):
        result.update(as_bytes(block.astype("<f4", copy=False)).data)


def digest_header(path: str, shape: Shape) -> bytes:
    """Return the bytes that precede an array's values in a digest."""
    return f"{path} {list(shape)}\n".encode()
