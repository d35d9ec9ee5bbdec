"""Hugging Face T5 folders: `config.json`, and safetensors in one file or several with an index.

T5 1.0 and 1.1 and all that have their network: LM-adapted, FLAN-T5, T0, mT5, ByT5. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.files import read_json, write_json
from hyper_t5.names import (
    HF_ALIASES,
    HF_UNUSED,
    hf_name,
    hf_transposed,
    layer_paths,
    param_shapes,
    t5x_name,
)
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import BLOCK, SafetensorsWriter, Shape, Tensor, open_safetensors
from hyper_t5.vocab import SENTENCEPIECE_EXTRA_IDS, Vocabulary
from hyper_t5.weights.source import Source, VocabIdentity, size_of, verify_layers

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SPIECE, TOKENIZER = "spiece.model", "tokenizer_config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SHARD_BYTES = 5 * 10**9  # most in a file, as transformers had it until its version 5
_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
DtypeOf = Callable[[str], np.dtype]
Put = Callable[[str, np.ndarray], None]


# --------------------------------------------------------------------------------- reading


def open_folder(root: Path) -> Source:
    """Reads the config and the headers, and checks one with the other."""
    state = _tensors(root)
    raw = read_json(root / CONFIG)
    sizes = config_of(root)
    # Transformers 5 leaves the head out of the file when its values are those of the embedding.
    shared_head = bool(raw.get("tie_word_embeddings", raw["model_type"] == "t5"))
    _drop_aliases(state, sizes.logits_via_embedding, shared_head)
    tensors = {}
    for name, tensor in state.items():
        path = t5x_name(name) or name
        tensors[path] = tensor.transposed() if hf_transposed(path) else tensor
    verify_layers(sizes, tensors, str(root), describe)
    return Source("hf", str(root), sizes, tensors, _vocab(root), describe=describe)


def describe(path: str, shape: Shape) -> tuple[str, Shape]:
    """A path and shape of ours as Hugging Face has them."""
    try:
        return hf_name(path), shape[::-1] if hf_transposed(path) else shape
    except KeyError:
        return path, shape


def _tensors(root: Path) -> dict[str, Tensor]:
    if (root / TENSORS).exists():
        return open_safetensors(root / TENSORS)
    index = root / INDEX
    if index.exists():
        return _sharded_tensors(root, index)
    pickles = [*root.glob("*.bin"), *root.glob("*.pt")]
    remedy = (
        f"{pickles[0].name} is a pickle and is not opened: load the model with transformers and"
        " call save_pretrained(folder, safe_serialization=True)"
        if pickles
        else "the folder is incomplete"
    )
    raise UserError(f"{root}: holds no model.safetensors; {remedy}")


def _sharded_tensors(root: Path, index: Path) -> dict[str, Tensor]:
    """What an index names, each tensor in the file that it says, and nothing beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f'{index}: lacks the object "weight_map"')
    shards = sorted(set(map(str, weight_map.values())))
    for name in shards:
        # Links are followed: Hugging Face's own cache is made of them.
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{index}: {name} points outside of the folder")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name} is no safetensors file, and no other is opened")
    state: dict[str, Tensor] = {}
    for name in shards:
        found = open_safetensors(root / name)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if wrong := listed ^ found.keys():
            one = min(wrong)
            says = "lacks" if one in listed else "also holds"
            raise UserError(f"{root / name}: {says} {one}, unlike what {index.name} says of it")
        state |= found
    return state


def config_of(root: Path) -> T5Config:
    """The sizes, from config.json alone."""
    file = root / CONFIG
    raw = read_json(file)
    kind = raw["model_type"]
    if kind not in ("t5", "mt5"):
        why = "; umt5 has a position table in every layer" if kind == "umt5" else ""
        raise UserError(
            f"{file}: model_type is {kind!r}; only 't5' and 'mt5' are this network{why}"
        )
    activation = raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{file}: feed_forward_proj is {activation!r}; supported: {', '.join(_ACTIVATIONS)}"
        )
    fixed = {"layer_norm_epsilon": 1e-6, "pad_token_id": 0, "decoder_start_token_id": 0}
    for name, wanted in fixed.items():
        if raw.get(name, wanted) != wanted:
            raise UserError(f"{file}: {name} is {raw[name]}; T5 has {wanted}")
    raw.setdefault("relative_attention_num_buckets", 32)
    raw.setdefault("relative_attention_max_distance", 128)
    if raw.get("num_decoder_layers") is None:  # as transformers' own config class takes it
        raw["num_decoder_layers"] = raw.get("num_layers")
    return T5Config(
        vocab_size=size_of(raw, "vocab_size", file),
        emb_dim=size_of(raw, "d_model", file),
        num_heads=size_of(raw, "num_heads", file),
        num_encoder_layers=size_of(raw, "num_layers", file),
        num_decoder_layers=size_of(raw, "num_decoder_layers", file),
        head_dim=size_of(raw, "d_kv", file),
        mlp_dim=size_of(raw, "d_ff", file),
        mlp_activations=_ACTIVATIONS[activation],
        logits_via_embedding=_tied(raw),
        relpos_buckets=size_of(raw, "relative_attention_num_buckets", file),
        relpos_max_distance=size_of(raw, "relative_attention_max_distance", file),
    )


def _tied(raw: Mapping[str, Any]) -> bool:
    """Whether the output layer is the scaled embedding (T5 1.0) or has its own kernel.

    Up to transformers 4 the flag `tie_word_embeddings` says so. Transformers 5 saves that flag as
    true for every model and keeps what it said in `scale_decoder_outputs`; mT5 is never scaled.
    """
    if raw["model_type"] == "mt5":
        return False
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))


def _drop_aliases(state: dict[str, Tensor], tied: bool, shared_head: bool) -> None:
    """Leaves in `state` one name for each array of this T5.

    Args:
      state: what the files hold; changed.
      tied: the model has no array for its head.
      shared_head: the model has one, but the file may leave it out when it is the embedding.
    """
    state.pop(HF_UNUSED, None)
    if "shared.weight" not in state and HF_ALIASES[0] in state:
        state["shared.weight"] = state[HF_ALIASES[0]]
    if "shared.weight" not in state:
        return
    shared = state["shared.weight"]
    head = ("lm_head.weight",) if tied else ()
    for name in (*HF_ALIASES, *head):
        alias = state.pop(name, shared)
        if alias is not shared and not _equal(alias, shared):
            raise UserError(
                f"{alias.file}: {name} differs from shared.weight, which config.json says it equals"
            )
    if shared_head and not tied:
        state.setdefault("lm_head.weight", shared)


def _equal(left: Tensor, right: Tensor) -> bool:
    """Whether two arrays on disk have the same values, some rows at a time."""
    if left.shape != right.shape:
        return False
    rows = max(1, BLOCK // max(1, 4 * math.prod(left.shape[1:])))
    parts = [slice(at, at + rows) for at in range(0, left.shape[0], rows)] if left.shape else []
    return all(np.array_equal(left.read(part), right.read(part)) for part in parts)


def _vocab(root: Path) -> VocabIdentity | None:
    """The vocabulary of a Hugging Face folder, as far as its files tell it."""
    file = root / TOKENIZER
    settings = read_json(file) if file.exists() else {}
    if (root / SPIECE).exists():
        sha256 = hashlib.sha256((root / SPIECE).read_bytes()).hexdigest()
        identity = {"kind": "sentencepiece", "file": SPIECE, "sha256": sha256}
        return {**identity, "extra_ids": settings.get("extra_ids", SENTENCEPIECE_EXTRA_IDS)}
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return {"kind": "bytes", "extra_ids": settings.get("extra_ids", 125)}
    return None


# --------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def writer(
    folder: Path,
    sizes: T5Config,
    dtype_of: DtypeOf,
    vocab: Vocabulary | None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[Put]:
    """Gives the function that writes one array under T5X's per-layer path, in any order.

    The folder is for `T5ForConditionalGeneration.from_pretrained`: a model that transformers 5
    builds from the config alone ties output and embedding whatever the config says.

    Raises:
      UserError: Hugging Face's T5 has no such network.
    """
    layout = {}
    for path, shape in param_shapes(sizes).items():
        for name, part in layer_paths(path, shape).items():
            layout[hf_name(name)] = dtype_of(name), describe(name, part)[1]
    dtypes = {dtype.name for dtype, _ in layout.values()}
    write_json(folder / CONFIG, _config(sizes, dtypes))
    _write_tokenizer(folder, vocab)
    shards = _shards(layout, shard_bytes)
    place = {name: file for file, names in shards.items() for name in names}
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        write_json(folder / INDEX, index)
    with contextlib.ExitStack() as stack:
        files = {
            file: stack.enter_context(
                SafetensorsWriter(folder / file, {n: layout[n] for n in names}, {"format": "pt"})
            )
            for file, names in shards.items()
        }

        def put(path: str, array: np.ndarray) -> None:
            name = hf_name(path)
            files[place[name]].write(name, array.T if hf_transposed(path) else array)

        yield put


def _shards(layout: Mapping[str, tuple[np.dtype, Shape]], shard_bytes: int) -> dict[str, list[str]]:
    """File -> names of its tensors, in their order, at most ``shard_bytes`` where more than one."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in layout.items():
        each = math.prod(shape) * dtype.itemsize
        if parts[-1] and size + each > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += each
    if len(parts) == 1:
        return {TENSORS: parts[0]}
    count = len(parts)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": p for i, p in enumerate(parts, 1)}


def _config(config: T5Config, dtypes: Collection[str]) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
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
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relpos_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "feed_forward_proj": names[activations],
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.logits_via_embedding,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        "torch_dtype": "bfloat16" if dtypes == {"bfloat16"} else "float32",
    }


def _write_tokenizer(folder: Path, vocab: Vocabulary | None) -> None:
    if vocab is None:
        return
    identity = vocab.save(folder)
    if "file" in identity:
        (folder / identity["file"]).rename(folder / SPIECE)
    kinds = {"sentencepiece": "T5Tokenizer", "bytes": "ByT5Tokenizer"}
    settings = {"tokenizer_class": kinds[identity["kind"]], "extra_ids": identity["extra_ids"]}
    write_json(folder / TOKENIZER, settings)
