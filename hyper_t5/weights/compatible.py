"""Which backbone a checkpoint or an adapter belongs to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from hyper_t5 import names
from hyper_t5.errors import UserError
from hyper_t5.names import Params
from hyper_t5.t5 import T5Config
from hyper_t5.weights.source import VocabIdentity

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


def backbone_meta(
    config: T5Config, vocab: VocabIdentity | None, params: Params, digest: str = ""
) -> dict[str, Any]:
    """What a checkpoint or adapter keeps of the backbone it belongs to; see `check_compatible`.

    ``digest`` is that of ``params`` where it is known already, as where they lie on a mesh.
    """
    fields = dataclasses.asdict(config)
    model = {name: fields[name] for name in SHAPE_FIELDS}
    identity = None if vocab is None else {k: v for k, v in vocab.items() if k != "file"}
    dtypes = {leaf.dtype.name for leaf in traverse_util.flatten_dict(params).values()}
    digest = digest or names.digest(params)
    made: dict[str, Any] = {"model": model, "vocab": identity, "digest": digest}
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
