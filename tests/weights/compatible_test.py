"""The check that an adapter or checkpoint belongs to the backbone in use."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hyper_t5 import weights
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.utils.errors import UserError
from tests.support.param_trees import T5_1_0, random_params


def test_check_compatible() -> None:
    params = random_params(T5_1_0)
    vocab = ByteVocabulary(3).identity()
    meta = weights.backbone_meta(T5_1_0, vocab, params)
    assert meta == json.loads(json.dumps(meta))
    runtime = dataclasses.replace(T5_1_0, dtype="bfloat16", remat="full", dropout_rate=0.1)
    weights.check_compatible(runtime, vocab, meta, digest=weights.digest(params))
    weights.check_compatible(T5_1_0, None, meta)

    other = dataclasses.replace(T5_1_0, emb_dim=48, mlp_activations=("gelu", "linear"))
    with pytest.raises(UserError, match=r"w/1: .*emb_dim=24.*has emb_dim=48"):
        weights.check_compatible(other, vocab, meta, path="w/1")
    with pytest.raises(UserError, match=r"bytes, extra_ids=3.*has \(bytes, extra_ids=4\)"):
        weights.check_compatible(T5_1_0, ByteVocabulary(4).identity(), meta)
    with pytest.raises(UserError, match="other weights"):
        weights.check_compatible(T5_1_0, vocab, meta, digest="0" * 64)
    with pytest.raises(UserError, match="does not name its backbone"):
        weights.check_compatible(T5_1_0, vocab, {})
