"""LoRA merged into a backbone. `peft_out_test.py` compares merged with applied LoRA in peft."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import export, weights
from hyper_t5.utils.errors import UserError
from tests.support.tiny_peft import (
    DEC_PREFIX,
    GATED,
    TASK,
    WIDE,
    assert_close,
    backbone,
    load_model,
    logits,
    lora,
    model_logits,
    patterned,
    random_adapters,
)


def test_merged_backbone_in_transformers(tmp_path: Path) -> None:
    adapters = random_adapters(patterned(WIDE), WIDE)
    params = backbone(WIDE)
    before = weights.digest(params)
    weights.save_hf(tmp_path / "merged", WIDE, export.merge_lora(params, adapters, TASK))
    assert weights.digest(params) == before
    expected = logits(WIDE, params, ad.take(adapters, [TASK]))
    assert_close(model_logits(load_model(tmp_path / "merged")), expected)


def test_rounding_to_bfloat16_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), backbone(WIDE))
    adapters = jax.tree.map(lambda x: x * 0.02, random_adapters(patterned(WIDE), WIDE))
    merged = export.merge_lora(params, adapters, TASK)
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"bfloat16"}
    assert "rounding to bfloat16 changes the update of" in capsys.readouterr().out
    exact = export.merge_lora(params, adapters, TASK, "float32")
    assert capsys.readouterr().out == ""
    before, after = (
        tree["decoder"]["layers"]["encoder_decoder_attention"]["key"]["kernel"]
        for tree in (params, exact)
    )
    leaf = adapters.tree["dec_cross"]["key"]
    delta = 3.0 * np.asarray(leaf["a"][:, TASK]) @ np.asarray(leaf["b"][:, TASK])
    np.testing.assert_allclose(after - before.astype(np.float32), delta, atol=1e-6)
    assert np.abs(delta).max() > 1e-4


def test_what_cannot_be_merged() -> None:
    with pytest.raises(UserError, match="only LoRA is an update of the weights; prefixes"):
        export.merge_lora(backbone(GATED), random_adapters(DEC_PREFIX, GATED))
    wide = random_adapters(lora("enc_self.query"), dataclasses.replace(GATED, emb_dim=32))
    with pytest.raises(UserError, match=r"enc_self\.query has an update of shape \[1, 32, 16\]"):
        export.merge_lora(backbone(GATED), wide)
