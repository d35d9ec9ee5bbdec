"""Backbone weights in and out: T5X, Hugging Face and native folders, one tree in memory.

In memory a backbone is a `T5Config` and a nested dict of arrays under T5X's names with the layers
of each stack stacked on axis 0 (`encoder/layers/attention/query/kernel [N, D, H*K]`). On disk it is

* native: `config.json` + `model.safetensors`, keys are the paths joined by `/`;
* t5x: a directory with a msgpack file `checkpoint`, whose arrays are inline or zarr arrays beside
  it, one tree per layer (`encoder/layers_0/attention/query/kernel [D, H*K]`);
* hf: a Hugging Face T5 folder, `config.json` + `model.safetensors` (or shards with an index).

Every reader first lists what the files hold as `Tensor`s that are read only when they are needed,
brings the names to T5X's, compares names and shapes with those of the config, and then fills one
stacked array after the other: never is the model in memory twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from flax import serialization, traverse_util

from hyper_t5.errors import UserError
from hyper_t5.files import (
    Shape,
    Tensor,
    open_safetensors,
    read_json,
    replaced_folder,
    write_json,
    write_safetensors,
)
from hyper_t5.names import (
    HF_ALIASES,
    HF_UNUSED,
    LAYER,
    Params,
    digest,
    hf_name,
    hf_transposed,
    layer_paths,
    param_shapes,
    t5x_name,
    to_hf,
)
from hyper_t5.t5 import T5Config
from hyper_t5.vocab import SENTENCEPIECE_EXTRA_IDS, Vocabulary

VocabIdentity = dict[str, Any]

NATIVE_FORMAT = "hyper_t5.backbone"
STORAGE_DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# The fields that decide what the numbers of a checkpoint mean; the others (dtype, dropout, remat)
# may differ between the run that made it and the run that reads it.
SHAPE_FIELDS = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "head_dim",
    "mlp_dim",
    "mlp_activations",
    "logits_via_embedding",
    "relpos_buckets",
    "relpos_max_distance",
)


# --------------------------------------------------------------------------------- reading


def load_backbone(
    path: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[T5Config, Params, VocabIdentity | None]:
    """Reads a backbone from a native, T5X or Hugging Face path.

    Args:
      path: a folder of one of the three layouts, or a T5X `checkpoint` file.
      dtype: how to store the weights, 'float32' or 'bfloat16'.

    Returns:
      The config; the nested dict of numpy arrays, layers stacked (see `param_shapes`); and the
      identity of its vocabulary, for `vocab.load_vocab(identity, base_dir=path)`; None where the
      folder does not say (always for T5X).

    Raises:
      UserError: what is at `path` is missing, damaged, or not a T5.
    """
    if dtype not in STORAGE_DTYPES:
        raise UserError(
            f"backbone.dtype: {dtype!r} is not one of {', '.join(STORAGE_DTYPES)}"
            " (T5 overflows in float16)"
        )
    root = Path(path)
    kind = detect(root)
    if kind == "native":
        return _load_native(root, STORAGE_DTYPES[dtype])
    if kind == "t5x":
        tensors = _t5x_tensors(root)
        config = _infer_config(tensors, root)
        return config, _assemble(config, tensors, STORAGE_DTYPES[dtype]), None
    return _load_hf(root, STORAGE_DTYPES[dtype])


def detect(root: Path) -> str:
    """Which layout is at `root`: 'native', 't5x' or 'hf'.

    Raises:
      UserError: none of them; the message says what was looked for and what is there instead.
    """
    if not root.exists():
        raise UserError(f"{root}: does not exist; backbone.path takes a folder with T5 weights")
    if root.is_file():
        if root.suffix in (".safetensors", ".json", ".bin", ".pt", ".index"):
            raise UserError(f"{root}: is a file; give the folder that holds it")
        return "t5x"
    if (root / "_METADATA").exists():
        raise UserError(
            f"{root}: is an Orbax checkpoint; only T5X's own format (a file `checkpoint` and zarr"
            " folders) is read: restore it with T5X and save it with t5x.checkpoints.Checkpointer"
        )
    if (root / "checkpoint").is_file():
        return "t5x"
    if (root / "config.json").is_file():
        content = read_json(root / "config.json")
        if content.get("format") == NATIVE_FORMAT:
            return "native"
        if "model_type" in content:
            return "hf"
        raise UserError(
            f'{root / "config.json"}: has neither "format": "{NATIVE_FORMAT}" nor Hugging'
            ' Face\'s field "model_type": it describes no T5'
        )
    steps = [p for p in root.glob("checkpoint_*") if p.is_dir() and ".tmp-" not in p.name]
    if steps:
        latest = max(steps, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
        raise UserError(f"{root}: holds {len(steps)} T5X checkpoints; give one, such as {latest}")
    raise UserError(
        f"{root}: holds no T5 weights: neither config.json (native or Hugging Face) nor a file"
        " `checkpoint` (T5X)"
    )


Describe = Callable[[str, Shape], tuple[str, Shape]]


def _as_is(path: str, shape: Shape) -> tuple[str, Shape]:
    return path, shape


def _as_hf(path: str, shape: Shape) -> tuple[str, Shape]:
    try:
        return hf_name(path), shape[::-1] if hf_transposed(path) else shape
    except KeyError:
        return path, shape


def _verify(
    expected: Mapping[str, Shape],
    tensors: Mapping[str, Tensor],
    where: str,
    describe: Describe = _as_is,
) -> None:
    """Compares names, shapes and kinds with those expected, before a single array is read."""

    def names(paths: Collection[str]) -> str:
        listed = sorted(describe(path, ())[0] for path in paths)
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        return ", ".join(listed[:3]) + more

    if missing := expected.keys() - tensors.keys():
        raise UserError(
            f"{where}: lacks {names(missing)}: the file is incomplete, or not of this model"
        )
    if extra := tensors.keys() - expected.keys():
        raise UserError(f"{where}: holds {names(extra)}, which this T5 does not have")
    for path, shape in expected.items():
        tensor = tensors[path]
        if tensor.shape != shape:
            name, wanted = describe(path, shape)
            found = describe(path, tensor.shape)[1]
            raise UserError(
                f"{tensor.file}: {name} has shape {list(found)}, expected {list(wanted)} from the"
                " other sizes of this model; take config and weights from the same model"
            )
        if "float" not in tensor.dtype.lower():
            name = describe(path, shape)[0]
            raise UserError(f"{tensor.file}: {name} holds {tensor.dtype}, not floating point")


def _assemble(
    config: T5Config,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    describe: Describe = _as_is,
) -> Params:
    """Reads per-layer tensors into stacked arrays of `dtype`."""
    stacked = param_shapes(config)
    expected: dict[str, Shape] = {}
    for path, shape in stacked.items():
        expected |= layer_paths(path, shape)
    where = next((tensor.file for tensor in tensors.values()), "checkpoint")
    _verify(expected, tensors, where, describe)
    flat = {}
    for path, shape in stacked.items():
        flat[path] = out = np.empty(shape, dtype)
        if "/layers/" not in path:
            out[...] = tensors[path].read()
            continue
        for i, name in enumerate(layer_paths(path, shape)):
            out[i] = tensors[name].read()
    return traverse_util.unflatten_dict(flat, sep="/")


# ---------------------------------------------------------------------------------- native


def _load_native(root: Path, dtype: np.dtype) -> tuple[T5Config, Params, VocabIdentity | None]:
    file = root / "config.json"
    content = read_json(file)
    config = _config_from_fields(content.get("model"), file)
    tensors = open_safetensors(root / "model.safetensors")
    expected = param_shapes(config)
    _verify(expected, tensors, str(root / "model.safetensors"))
    flat = {path: tensors[path].read().astype(dtype, copy=False) for path in expected}
    return config, traverse_util.unflatten_dict(flat, sep="/"), content.get("vocab")


def _config_from_fields(fields: Any, file: Path) -> T5Config:
    """A T5Config from the dict that `dataclasses.asdict` made of one."""
    known = {field.name for field in dataclasses.fields(T5Config)}
    if not isinstance(fields, dict):
        raise UserError(f'{file}: lacks the object "model" with the fields of T5Config')
    if unknown := fields.keys() - known:
        raise UserError(f"{file}: model.{sorted(unknown)[0]} is no field of T5Config")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    like = T5Config()
    for name, value in values.items():
        if type(value) is not type(getattr(like, name)):
            wanted = type(getattr(like, name)).__name__
            raise UserError(f"{file}: model.{name} must be {wanted}, not {value!r}")
    return T5Config(**values)


def save_native(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Params,
    vocab: Vocabulary | None = None,
) -> None:
    """Writes a native backbone folder; arrays keep their dtype.

    Args:
      folder: written under another name and then moved here; an earlier backbone here is replaced.
      config: the backbone's sizes.
      params: its arrays (see `param_shapes`).
      vocab: its vocabulary, whose file goes into the folder too.

    Raises:
      UserError: `params` or `vocab` do not fit `config`, the folder holds other files, no space
        is left.
    """
    flat = _checked(config, params, vocab)
    file = vocab.identity().get("file", "") if vocab else ""
    with replaced_folder(folder, ("config.json", "model.safetensors", file)) as new:
        content = {
            "format": NATIVE_FORMAT,
            "model": dataclasses.asdict(config),
            "vocab": vocab.save(new) if vocab else None,
        }
        write_json(new / "config.json", content)
        write_safetensors(new / "model.safetensors", flat)


def _checked(config: T5Config, params: Params, vocab: Vocabulary | None) -> dict[str, np.ndarray]:
    """The flat arrays of `params`, once they and the vocabulary are known to fit `config`."""
    if vocab and vocab.size > config.vocab_size:
        raise UserError(
            f"vocabulary: has {vocab.size} ids, but model.vocab_size is {config.vocab_size};"
            " a model needs a row of its embedding for each id"
        )
    flat = {
        path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }
    tensors = {p: Tensor("parameters", a.shape, a.dtype.name, a.view) for p, a in flat.items()}
    _verify(param_shapes(config), tensors, "parameters")
    return flat


# ------------------------------------------------------------------------------------- T5X


def _t5x_tensors(root: Path) -> dict[str, Tensor]:
    """What a T5X checkpoint's `target` holds, under per-layer paths."""
    file = root if root.is_file() else root / "checkpoint"
    try:
        tree = serialization.msgpack_restore(file.read_bytes())
        target = tree["optimizer"]["target"]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: is truncated or not a T5X checkpoint ({error or type(error).__name__})"
        ) from error
    if not isinstance(target, dict):
        raise UserError(f"{file}: optimizer.target is not a tree of parameters")
    leaves = traverse_util.flatten_dict(target, sep="/", is_leaf=lambda _, x: "driver" in x)
    return {path: _t5x_tensor(file, path, leaf) for path, leaf in leaves.items()}


def _t5x_tensor(file: Path, path: str, leaf: Any) -> Tensor:
    """One leaf of a T5X tree: an inline array, or the placeholder of a zarr array on disk."""
    if isinstance(leaf, np.ndarray):
        return Tensor(str(file), leaf.shape, leaf.dtype.name, lambda: leaf)
    try:
        metadata = leaf["metadata"]
        # tensorstore before 0.1.14 kept the path beside the driver, not inside the kvstore.
        folder = PurePosixPath(leaf["kvstore"].get("path") or leaf["path"])
        spec = {
            "driver": "zarr",
            "dtype": leaf["dtype"],
            "metadata": {key: metadata[key] for key in ("shape", "chunks", "compressor")},
            # Left to itself tensorstore answers zeros for a chunk file that is not there.
            "fill_missing_data_reads": False,
        }
        shape = tuple(metadata["shape"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file}: {path} is neither an array nor a zarr placeholder") from error
    if leaf["driver"] != "zarr":
        raise UserError(f"{file}: {path} is kept by {leaf['driver']!r}; only zarr is read")
    if folder.is_absolute() or ".." in folder.parts:
        raise UserError(f"{file}: {path} points outside of the checkpoint ({folder})")
    array = file.parent / folder
    return Tensor(str(array), shape, str(leaf["dtype"]), lambda: _read_zarr(array, spec))


def _read_zarr(array: Path, spec: dict[str, Any]) -> np.ndarray:
    import tensorstore  # 0.3 s, and nobody but T5X's readers needs it

    kvstore = {"driver": "file", "path": f"{array.resolve()}/"}
    # Copy tools that drop dot-files lose .zarray; the placeholder says all that it said.
    lost = array.is_dir() and not (array / ".zarray").exists()
    store = tensorstore.open(
        {**spec, "kvstore": kvstore}, open=True, read=True, assume_metadata=lost
    ).result()
    return store.read().result()


def _infer_config(tensors: Mapping[str, Tensor], root: Path) -> T5Config:
    """The sizes of a T5X model from the shapes of its arrays.

    T5X keeps no config in a checkpoint. The number of heads is that of the position table, because
    a query kernel only tells heads times head size. Not in any shape, so taken from the models
    that exist: gated MLPs use gelu, plain ones relu; positions saturate at distance 128.
    """

    def shape(path: str, rank: int) -> Shape:
        if path not in tensors:
            raise UserError(
                f"{root}: is not a T5 in T5X's per-layer layout: lacks {path}; it holds"
                f" {', '.join(sorted(tensors)[:3])}, ..."
            )
        if len(tensors[path].shape) != rank:
            found = list(tensors[path].shape)
            raise UserError(f"{tensors[path].file}: {path} has shape {found}, not {rank} axes")
        return tensors[path].shape

    def layers(stack: str) -> int:
        found = [int(m[2]) for m in map(LAYER.fullmatch, tensors) if m and m[1] == stack]
        return max(found, default=-1) + 1

    vocab_size, emb_dim = shape("token_embedder/embedding", 2)
    num_heads, buckets = shape("encoder/relpos_bias/rel_embedding", 2)
    query = "encoder/layers_0/attention/query/kernel"
    inner = shape(query, 2)[1]
    if num_heads == 0 or inner % num_heads:
        raise UserError(
            f"{tensors[query].file}: {query} has {inner} columns, which"
            f" {num_heads} heads (of encoder/relpos_bias/rel_embedding) do not divide"
        )
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        head_dim=inner // num_heads,
        mlp_dim=shape("encoder/layers_0/mlp/wo/kernel", 2)[0],
        mlp_activations=(
            ("relu",) if "encoder/layers_0/mlp/wi/kernel" in tensors else ("gelu", "linear")
        ),
        logits_via_embedding="decoder/logits_dense/kernel" not in tensors,
        relpos_buckets=buckets,
    )


# ---------------------------------------------------------------------------- Hugging Face

_HF_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}


def _load_hf(root: Path, dtype: np.dtype) -> tuple[T5Config, Params, VocabIdentity | None]:
    state = _hf_tensors(root)
    raw = read_json(root / "config.json")
    config = _config_from_hf(root / "config.json", raw)
    # Transformers 5 leaves the head out of the file when its values are those of the embedding.
    shared_head = bool(raw.get("tie_word_embeddings", raw["model_type"] == "t5"))
    _drop_aliases(state, config.logits_via_embedding, shared_head)
    tensors = {}
    for name, tensor in state.items():
        path = t5x_name(name) or name
        if hf_transposed(path):
            tensor = _transposed(tensor)
        tensors[path] = tensor
    return config, _assemble(config, tensors, dtype, _as_hf), _hf_vocab(root)


def _transposed(tensor: Tensor) -> Tensor:
    return dataclasses.replace(tensor, shape=tensor.shape[::-1], load=lambda: tensor.load().T)


def _hf_tensors(root: Path) -> dict[str, Tensor]:
    if (root / "model.safetensors").exists():
        return open_safetensors(root / "model.safetensors")
    index = root / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f'{index}: lacks the object "weight_map"')
        state: dict[str, Tensor] = {}
        for name in sorted(set(map(str, weight_map.values()))):
            if Path(name).name != name:
                raise UserError(f"{index}: {name} points outside of the folder")
            state |= open_safetensors(root / name)
        return state
    pickles = [*root.glob("*.bin"), *root.glob("*.pt")]
    remedy = (
        f"{pickles[0].name} is a pickle and is not opened: load the model with transformers and"
        " call save_pretrained(folder, safe_serialization=True)"
        if pickles
        else "the folder is incomplete"
    )
    raise UserError(f"{root}: holds no model.safetensors; {remedy}")


def _config_from_hf(file: Path, raw: dict[str, Any]) -> T5Config:
    """Our config from the content `raw` of a Hugging Face config.json."""
    kind = raw["model_type"]
    if kind not in ("t5", "mt5"):
        raise UserError(f"{file}: model_type is {kind!r}; only 't5' and 'mt5' are this network")
    activation = raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if activation not in _HF_ACTIVATIONS:
        raise UserError(
            f"{file}: feed_forward_proj is {activation!r}; supported: {', '.join(_HF_ACTIVATIONS)}"
        )
    fixed = {"layer_norm_epsilon": 1e-6, "pad_token_id": 0, "decoder_start_token_id": 0}
    for name, wanted in fixed.items():
        if raw.get(name, wanted) != wanted:
            raise UserError(f"{file}: {name} is {raw[name]}; T5 has {wanted}")
    sizes = {
        "vocab_size": "vocab_size",
        "emb_dim": "d_model",
        "num_heads": "num_heads",
        "num_encoder_layers": "num_layers",
        "head_dim": "d_kv",
        "mlp_dim": "d_ff",
    }
    fields: dict[str, Any] = {ours: _hf_size(file, raw, theirs) for ours, theirs in sizes.items()}
    raw.setdefault("num_decoder_layers", fields["num_encoder_layers"])
    raw.setdefault("relative_attention_num_buckets", 32)
    raw.setdefault("relative_attention_max_distance", 128)
    return T5Config(
        **fields,
        num_decoder_layers=_hf_size(file, raw, "num_decoder_layers"),
        mlp_activations=_HF_ACTIVATIONS[activation],
        logits_via_embedding=_hf_tied(raw),
        relpos_buckets=_hf_size(file, raw, "relative_attention_num_buckets"),
        relpos_max_distance=_hf_size(file, raw, "relative_attention_max_distance"),
    )


def _hf_size(file: Path, raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {name} must be a positive whole number, not {value!r}")
    return value


def _hf_tied(raw: Mapping[str, Any]) -> bool:
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
        if alias.shape != shared.shape or not np.array_equal(alias.read(), shared.read()):
            raise UserError(
                f"{alias.file}: {name} differs from shared.weight, which config.json says it equals"
            )
    if shared_head and not tied:
        state.setdefault("lm_head.weight", shared)


def _hf_vocab(root: Path) -> VocabIdentity | None:
    """The vocabulary of a Hugging Face folder, as far as its files tell it."""
    file = root / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    if (root / "spiece.model").exists():
        model = root / "spiece.model"
        sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
        identity = {"kind": "sentencepiece", "file": model.name, "sha256": sha256}
        return {**identity, "extra_ids": settings.get("extra_ids", SENTENCEPIECE_EXTRA_IDS)}
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return {"kind": "bytes", "extra_ids": settings.get("extra_ids", 125)}
    return None


def save_hf(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Params,
    vocab: Vocabulary | None = None,
) -> None:
    """Writes a Hugging Face T5 folder for `T5ForConditionalGeneration.from_pretrained`.

    Load it with `from_pretrained`: a model that transformers 5 builds from the config alone ties
    output and embedding whatever the config says.

    Args:
      folder: written under another name and then moved here; an earlier model here is replaced.
      config: the backbone's sizes.
      params: its arrays (see `param_shapes`).
      vocab: its vocabulary, for the tokenizer's files.

    Raises:
      UserError: `params` or `vocab` do not fit `config`, Hugging Face's T5 has no such network, the
        folder holds other files, no space is left.
    """
    _checked(config, params, vocab)
    names = {ours: theirs for theirs, ours in _HF_ACTIVATIONS.items()}
    activations = tuple(config.mlp_activations)
    if activations not in names:
        raise UserError(
            f"mlp_activations {activations} cannot be written as a Hugging Face T5; it has"
            f" {', '.join(map(str, names))}"
        )
    owned = ("config.json", "model.safetensors", "spiece.model", "tokenizer_config.json")
    with replaced_folder(folder, owned) as new:
        state = to_hf(params)
        dtypes = {array.dtype.name for array in state.values()}
        write_json(new / "config.json", _hf_config(config, names[activations], dtypes))
        write_safetensors(new / "model.safetensors", state, {"format": "pt"})
        _write_hf_tokenizer(new, vocab)


def _hf_config(config: T5Config, activation: str, dtypes: Collection[str]) -> dict[str, Any]:
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
        "feed_forward_proj": activation,
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


def _write_hf_tokenizer(folder: Path, vocab: Vocabulary | None) -> None:
    if vocab is None:
        return
    identity = vocab.save(folder)
    if "file" in identity:
        (folder / identity["file"]).rename(folder / "spiece.model")
    kinds = {"sentencepiece": "T5Tokenizer", "bytes": "ByT5Tokenizer"}
    settings = {"tokenizer_class": kinds[identity["kind"]], "extra_ids": identity["extra_ids"]}
    write_json(folder / "tokenizer_config.json", settings)


# -------------------------------------------------------------------- which backbone is it for


def backbone_meta(config: T5Config, vocab: VocabIdentity | None, params: Params) -> dict[str, Any]:
    """What a checkpoint or adapter keeps of the backbone it belongs to; see `check_compatible`."""
    fields = dataclasses.asdict(config)
    model = {name: fields[name] for name in SHAPE_FIELDS}
    identity = None if vocab is None else {k: v for k, v in vocab.items() if k != "file"}
    dtypes = {np.asarray(leaf).dtype.name for leaf in traverse_util.flatten_dict(params).values()}
    made: dict[str, Any] = {"model": model, "vocab": identity, "digest": digest(params)}
    # The digest is of the values as they were stored; who compares it must read them so again.
    made["dtype"] = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    # Through JSON, so that what is kept equals what is read back (tuples become lists).
    return json.loads(json.dumps(made))


def check_compatible(
    config: T5Config,
    vocab: VocabIdentity | None,
    meta: Mapping[str, Any],
    *,
    digest: str | None = None,
    where: str = "checkpoint",
) -> None:
    """Refuses a hypermodel checkpoint or adapter that was made for another backbone.

    Args:
      config: of the backbone in use.
      vocab: of the backbone in use; None is unknown and is not compared.
      meta: `backbone_meta` of the backbone it was made for.
      digest: of the weights in use, compared when given.
      where: the file or folder of `meta`, for the message.

    Raises:
      UserError: another size, vocabulary or other weights; both are named.
    """
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    theirs = meta.get("model")
    if not isinstance(theirs, Mapping):
        raise UserError(f"{where}: does not say which backbone it was made for")
    differ = [name for name in SHAPE_FIELDS if name in theirs and theirs[name] != ours[name]]
    if differ:
        made = ", ".join(f"{name}={theirs[name]}" for name in differ)
        here = ", ".join(f"{name}={ours[name]}" for name in differ)
        raise UserError(
            f"{where}: was made for a backbone with {made}, but backbone.path has {here};"
            " give the backbone it was made for"
        )
    made_vocab = meta.get("vocab")
    if vocab is not None and made_vocab is not None:
        keys = [k for k in ("kind", "sha256", "extra_ids") if vocab.get(k) != made_vocab.get(k)]
        if keys:
            raise UserError(
                f"{where}: was made for the vocabulary {_vocab_text(made_vocab)}, but the backbone"
                f" has {_vocab_text(vocab)}; token ids would mean other words"
            )
    if digest is not None and meta.get("digest") not in (None, digest):
        raise UserError(
            f"{where}: was made for a backbone of this size with other weights (digest"
            f" {meta['digest'][:12]}, not {digest[:12]}); give the backbone it was made for, and"
            f" backbone.dtype={meta.get('dtype', 'float32')} as it was then"
        )


def _vocab_text(vocab: Mapping[str, Any]) -> str:
    parts = [str(vocab.get("kind")), f"extra_ids={vocab.get('extra_ids')}"]
    if vocab.get("sha256"):
        parts.append(f"sha256={vocab['sha256'][:12]}")
    return f"({', '.join(parts)})"
