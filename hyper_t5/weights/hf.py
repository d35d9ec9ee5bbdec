"""Hugging Face T5 folders: `config.json` and `model.safetensors`, or shards with an index.

Supports T5 1.0 and 1.1 and models with the same network: LM-adapted, FLAN-T5, T0, mT5, ByT5. Does
not use torch.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.data.vocab import SENTENCEPIECE_EXTRA_IDS, Vocabulary
from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json, write_json
from hyper_t5.utils.safetensors_io import SafetensorsWriter, Shape, Tensor, open_safetensors
from hyper_t5.weights.param_names import (
    HF_ALIASES,
    HF_UNUSED,
    hf_name,
    hf_transposed,
    layer_shapes,
)
from hyper_t5.weights.source import DtypeOf, TensorSource, VocabIdentity, Write, check_layers

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SPIECE, TOKENIZER = "spiece.model", "tokenizer_config.json"
# T5Config -> config.json
_SIZES = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "relpos_buckets": "relative_attention_num_buckets",
    "relpos_max_distance": "relative_attention_max_distance",
}
_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
# Written by transformers next to feed_forward_proj; if they contradict it, they apply.
_DERIVED = {
    "relu": {"dense_act_fn": "relu", "is_gated_act": False},
    "gated-gelu": {"dense_act_fn": "gelu_new", "is_gated_act": True},
}
_TOKEN_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_CONSTANTS = {"layer_norm_epsilon": 1e-6, **_TOKEN_IDS}
_REQUIRED = {**_CONSTANTS, "is_encoder_decoder": True, "is_decoder": False}
_MUST_BE_OFF = ("tie_encoder_decoder", "quantization_config", "pruned_heads")
_GENERATION = "generation_config.json"


def open_folder(root: Path) -> TensorSource:
    """Read the config and the headers, and check one against the other."""
    state = _tensors(root)
    config = read_config(root)
    raw = read_json(root / CONFIG)
    # Transformers 5 leaves the head out of the file if its values are those of the embedding.
    shared_head = bool(raw.get("tie_word_embeddings", raw["model_type"] == "t5"))
    _drop_aliases(state, config.logits_via_embedding, shared_head)
    check_layers(config, state, str(root), _entry)
    tensors = {}
    for path in layer_shapes(config):
        tensor = state[hf_name(path)]
        tensors[path] = tensor.transposed() if hf_transposed(path) else tensor
    return TensorSource("hf", str(root), config, tensors, _vocab(root))


def _entry(path: str, shape: Shape) -> tuple[str, Shape]:
    """Return Hugging Face's name and shape of a per-layer T5X path."""
    return hf_name(path), shape[::-1] if hf_transposed(path) else shape


def _tensors(root: Path) -> dict[str, Tensor]:
    if (root / TENSORS).exists():
        return open_safetensors(root / TENSORS)
    if (root / INDEX).exists():
        return _sharded_tensors(root, root / INDEX)
    for pickle in (*root.glob("*.bin"), *root.glob("*.pt")):
        raise UserError(
            f"{root}: {pickle.name} is a pickle and is not loaded; load the model with transformers"
            " and call save_pretrained(folder, safe_serialization=True)"
        )
    raise UserError(f"{root}: holds no model.safetensors; the folder is incomplete")


def _sharded_tensors(root: Path, index: Path) -> dict[str, Tensor]:
    """Open the shards of an index, and check that they hold the tensors that it lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f'{index}: lacks the object "weight_map"')
    state: dict[str, Tensor] = {}
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        # A symbolic link is followed: Hugging Face's cache consists of them.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name} is not a safetensors file in this folder")
    for name in names:
        shard = open_safetensors(root / name)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if wrong := listed ^ shard.keys():
            verb = "lacks" if min(wrong) in listed else "also holds"
            raise UserError(f"{root / name}: {verb} {min(wrong)}, which contradicts {index.name}")
        state |= shard
    return state


def read_config(root: Path) -> T5Config:
    """Read the T5Config from config.json."""
    file = root / CONFIG
    raw = read_json(file)
    kind = raw["model_type"]
    if kind not in ("t5", "mt5"):
        reason = "; umt5 has a position table in every layer" if kind == "umt5" else ""
        raise UserError(f"{file}: model_type is {kind!r}; only t5 and mt5 are supported{reason}")
    activation = raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{file}: feed_forward_proj is {activation!r}; supported: {', '.join(_ACTIVATIONS)}"
        )
    _check_values(raw, _REQUIRED | _DERIVED[activation], file)
    for name in _MUST_BE_OFF:
        if raw.get(name):
            raise UserError(
                f"{file}: {name} is {raw[name]!r:.40}, which is not supported; save the model"
                " without it"
            )
    if (root / _GENERATION).exists():  # transformers generates with these ids
        _check_values(read_json(root / _GENERATION), _TOKEN_IDS, root / _GENERATION)
    raw.setdefault("relative_attention_num_buckets", 32)
    raw.setdefault("relative_attention_max_distance", 128)
    if raw.get("num_decoder_layers") is None:  # the default of transformers
        raw["num_decoder_layers"] = raw.get("num_layers")
    sizes: dict[str, Any] = {ours: raw.get(theirs) for ours, theirs in _SIZES.items()}
    for ours, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{file}: {_SIZES[ours]} must be a positive integer, not {size!r}")
    return T5Config(
        **sizes, mlp_activations=_ACTIVATIONS[activation], logits_via_embedding=_is_tied(raw)
    )


def _check_values(raw: Mapping[str, Any], required: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError for a value that differs from the only one that is computed with."""
    for name, value in required.items():
        if raw.get(name, value) != value:
            raise UserError(
                f"{file}: {name} is {raw[name]!r:.40}, and only {value!r} is supported; use a model"
                " that was trained with it"
            )


def _is_tied(raw: Mapping[str, Any]) -> bool:
    """Return whether the output layer is the scaled embedding (T5 1.0) or has its own kernel.

    Up to transformers 4 this is the flag `tie_word_embeddings`. Transformers 5 saves that flag as
    true for every model and uses `scale_decoder_outputs`; mT5 is never scaled.
    """
    if raw["model_type"] == "mt5":
        return False
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))


def _drop_aliases(state: dict[str, Tensor], tied: bool, shared_head: bool) -> None:
    """Keep one name for each tensor in `state`.

    A file may name the embedding by any of its aliases: safetensors stores shared memory once. A
    tied model has no tensor for its head; with `shared_head` the file may lack an untied head.
    """
    state.pop(HF_UNUSED, None)
    head = state.get("lm_head.weight")
    names = ["shared.weight", *HF_ALIASES, *(["lm_head.weight"] if tied else [])]
    aliases = {name: state.pop(name) for name in names if name in state}
    if not aliases and shared_head and head:
        aliases["lm_head.weight"] = head
    if not aliases:
        return
    (first, shared), *others = aliases.items()
    for name, alias in others:
        if alias.shape != shared.shape or not np.array_equal(alias.read(), shared.read()):
            raise UserError(
                f"{alias.file}: {name} differs from {first}, and T5 has one embedding; save the"
                " model again"
            )
    state["shared.weight"] = shared
    if shared_head and not tied:
        state.setdefault("lm_head.weight", shared)


def _vocab(root: Path) -> VocabIdentity | None:
    """Return the identity of the vocabulary if the folder has one."""
    file = root / TOKENIZER
    settings = read_json(file) if file.exists() else {}
    if (root / SPIECE).exists():
        sha256 = hashlib.sha256((root / SPIECE).read_bytes()).hexdigest()
        extra_ids = settings.get("extra_ids", SENTENCEPIECE_EXTRA_IDS)
        identity = {"kind": "sentencepiece", "file": SPIECE, "sha256": sha256}
        return identity | {"extra_ids": extra_ids}
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return {"kind": "bytes", "extra_ids": settings.get("extra_ids", 125)}
    return None


@contextlib.contextmanager
def writer(
    folder: Path, config: T5Config, dtype_of: DtypeOf, vocab: Vocabulary | None
) -> Iterator[Write]:
    """Yield a function that writes one array under T5X's per-layer path, in any order.

    Load the folder with `T5ForConditionalGeneration.from_pretrained`: a model that transformers 5
    builds from the config alone always ties output and embedding.

    Raises:
      UserError: Hugging Face's T5 cannot express the network.
    """
    layout = {}
    for path, shape in layer_shapes(config).items():
        name, stored_shape = _entry(path, shape)
        layout[name] = dtype_of(path), stored_shape
    dtypes = {dtype.name for dtype, _ in layout.values()}
    write_json(folder / CONFIG, _config_json(config, dtypes))
    _write_tokenizer(folder, vocab)
    with SafetensorsWriter(folder / TENSORS, layout, {"format": "pt"}) as file:

        def write(path: str, array: np.ndarray) -> None:
            file.write(hf_name(path), array.T if hf_transposed(path) else array)

        yield write


def _config_json(config: T5Config, dtypes: Collection[str]) -> dict[str, Any]:
    names = {activations: name for name, activations in _ACTIVATIONS.items()}
    activations = tuple(config.mlp_activations)
    if activations not in names:
        raise UserError(
            f"mlp_activations {activations} cannot be written as a Hugging Face T5; it has"
            f" {', '.join(map(str, names))}"
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        **_CONSTANTS,
        "feed_forward_proj": names[activations],
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.logits_via_embedding,
        "use_cache": True,
        "torch_dtype": "bfloat16" if dtypes == {"bfloat16"} else "float32",
    }


def _write_tokenizer(folder: Path, vocab: Vocabulary | None) -> None:
    if vocab is None:
        return
    identity = vocab.save(folder)
    if "file" in identity:
        (folder / identity["file"]).rename(folder / SPIECE)
    classes = {"sentencepiece": "T5Tokenizer", "bytes": "ByT5Tokenizer"}
    settings = {"tokenizer_class": classes[identity["kind"]], "extra_ids": identity["extra_ids"]}
    write_json(folder / TOKENIZER, settings)
