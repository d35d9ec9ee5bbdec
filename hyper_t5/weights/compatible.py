"""Identity of a backbone, and the check that an adapter or checkpoint belongs to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.weights import param_names
from hyper_t5.weights.param_names import Params
from hyper_t5.weights.source import VocabIdentity

# The fields of T5Config that define the network. The others (dtype, dropout, remat) may differ
# between the run that wrote a checkpoint and the run that reads it.
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


def backbone_meta(
    config: T5Config, vocab: VocabIdentity | None, params: Params, digest: str = ""
) -> dict[str, Any]:
    """Return the identity of a backbone as JSON content, for `check_compatible`.

    Args:
      config: The backbone's config.
      vocab: Identity of its vocabulary, or None.
      params: Its weights.
      digest: The digest of `params` if known, as for weights on a mesh.
    """
    fields = dataclasses.asdict(config)
    dtypes = {leaf.dtype.name for leaf in traverse_util.flatten_dict(params).values()}
    meta = {
        "model": {name: fields[name] for name in SHAPE_FIELDS},
        "vocab": None if vocab is None else {k: v for k, v in vocab.items() if k != "file"},
        "digest": digest or param_names.digest(params),
        # The digest is of the stored values: compare it with weights loaded in the same dtype.
        "dtype": "bfloat16" if dtypes == {"bfloat16"} else "float32",
    }
    return json.loads(json.dumps(meta))  # equal to the content after it is saved and loaded


def check_compatible(
    config: T5Config,
    vocab: VocabIdentity | None,
    meta: Mapping[str, Any],
    *,
    digest: str | None = None,
    path: str = "checkpoint",
) -> None:
    """Check that a checkpoint or adapter belongs to the backbone in use.

    Args:
      config: The backbone in use.
      vocab: Identity of its vocabulary; None is not compared.
      meta: `backbone_meta` of the checkpoint or adapter.
      digest: Digest of the weights in use; None is not compared.
      path: Origin of `meta`, for the message.

    Raises:
      UserError: The sizes, the vocabulary or the weights differ.
    """
    actual = json.loads(json.dumps(dataclasses.asdict(config)))
    expected = meta.get("model")
    if not isinstance(expected, Mapping):
        raise UserError(f"{path}: does not name its backbone")
    differ = [name for name in SHAPE_FIELDS if name in expected and expected[name] != actual[name]]
    if differ:
        theirs, ours = (
            ", ".join(f"{name}={fields[name]}" for name in differ) for fields in (expected, actual)
        )
        raise UserError(
            f"{path}: belongs to a backbone with {theirs}, but backbone.path has {ours}; use the"
            " backbone that it belongs to"
        )
    expected_vocab = meta.get("vocab")
    if vocab is not None and expected_vocab is not None:
        keys = ("kind", "sha256", "extra_ids")
        if any(vocab.get(key) != expected_vocab.get(key) for key in keys):
            raise UserError(
                f"{path}: belongs to the vocabulary {_vocab_text(expected_vocab)}, but the backbone"
                f" has {_vocab_text(vocab)}; use the backbone that it belongs to"
            )
    if digest is not None and meta.get("digest") not in (None, digest):
        raise UserError(
            f"{path}: belongs to a backbone of this size with other weights (digest"
            f" {meta['digest'][:12]}, not {digest[:12]}); use the backbone that it"
            f" belongs to, with backbone.dtype={meta.get('dtype', 'float32')}"
        )


def _vocab_text(vocab: Mapping[str, Any]) -> str:
    sha256 = f", sha256={vocab['sha256'][:12]}" if vocab.get("sha256") else ""
    return f"({vocab.get('kind')}, extra_ids={vocab.get('extra_ids')}{sha256})"
