"""A backbone, tasks and configs that the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from tests.support import tiny_runs


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


@pytest.fixture(scope="session")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_sni(tmp_path_factory.mktemp("sni") / "official")


@pytest.fixture(scope="session")
def make_config(backbone: Path, sni: Path) -> Callable[..., ConfigDict]:
    """Make a config of six steps on this backbone and these tasks.

    Its system, one adapter for all tasks, compiles fastest.
    """

    def make(**fields: Any) -> ConfigDict:
        settings: dict[str, Any] = {
            "backbone__path": str(backbone),
            "data__sni_dir": str(sni),
            "system": "shared_lora",
            "train__steps": 6,
            "train__save_every": 1,
            "adapter__lora_targets": ("enc_self.query", "dec_cross.value", "dec_mlp.wo"),
        }
        return tiny_runs.make_config(**settings | fields)

    return make
