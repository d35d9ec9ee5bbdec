"""Recipes of docs/export.md: many adapters in one PEFT model, and swapped in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import export
from hyper_t5.adapters import Adapters
from hyper_t5.t5.decoding import decode
from tests.support.tiny_peft import (
    INPUTS,
    TASKS,
    WIDE,
    assert_close,
    backbone,
    base_logits,
    load_model,
    logits,
    lora,
    model_logits,
    random_adapters,
    save_backbone,
)

pytest.importorskip("peft")
SPEC = lora("enc_self.query", "dec_cross.value", "dec_mlp.wo")
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("recipes") / "t5", WIDE)


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    return random_adapters(SPEC, WIDE)


@pytest.fixture(scope="module")
def folders(base: Path, adapters: Adapters) -> list[Path]:
    """Export each task as a PEFT folder."""
    return [
        export.export_peft(base.parent / f"task{i}", adapters, WIDE, str(base), task=i)
        for i in range(TASKS)
    ]


def load_all(base: Path, folders: list[Path]) -> Any:
    model = load_model(base, folders[0])
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name)
    return model


def padded(outputs: Any) -> np.ndarray:
    ids = outputs.numpy()[:, 1:]
    return np.pad(ids, ((0, 0), (0, STEPS + 1 - ids.shape[1])))[:, :STEPS]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_answers_as_each_adapter_alone(
    base: Path, folders: list[Path], adapters: Adapters, beams: int
) -> None:
    import torch

    model = load_all(base, folders)
    names = ["default", "task1", "task2", "__base__"]
    ids = torch.tensor(np.repeat(INPUTS[:1], len(names), 0))
    options = {"input_ids": ids, "attention_mask": (ids > 0).long(), "num_beams": beams}
    mixed = model.generate(**options, adapter_names=names, max_new_tokens=STEPS)
    if beams == 1:
        own = [*(ad.take(adapters, [task]) for task in range(TASKS)), None]
        expected = [
            decode(WIDE, backbone(WIDE), INPUTS[:1], each, steps=STEPS)[0][0] for each in own
        ]
        np.testing.assert_array_equal(padded(mixed), expected)
        return
    # Beam search ends differently in both libraries, so each row is compared with PEFT's own.
    for row, name in enumerate(names[:-1]):
        model.set_adapter(name)
        alone = model.generate(**options, max_new_tokens=STEPS)[row : row + 1]
        np.testing.assert_array_equal(padded(mixed)[row], padded(alone)[0])


def test_an_adapter_is_swapped_in_place(
    base: Path, folders: list[Path], adapters: Adapters
) -> None:
    from peft.utils.hotswap import hotswap_adapter

    model = load_model(base, folders[0])
    weights_before = {name: p.data_ptr() for name, p in model.named_parameters()}
    for task in (1, 2, 0):
        hotswap_adapter(model, str(folders[task]), adapter_name="default")
        own = ad.take(adapters, [task])
        assert_close(model_logits(model), logits(WIDE, backbone(WIDE), own))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights_before
    assert not np.allclose(model_logits(model), base_logits(WIDE), atol=1e-3)
