"""Resumed runs; config_test.py has more of the config, mesh_test.py the locks of two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import workdir
from hyper_t5.utils.errors import UserError


def test_a_resumed_run_may_change_its_mesh_and_its_checkpoints(tmp_path: Path) -> None:
    workdir.write_or_check_config(tmp_path, config_lib.defaults())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    other = config_lib.defaults()
    other.mesh.model, other.train.keep_period = 4, 1000
    changes = ["mesh.model: 1 -> 4", "train.keep_period: 0 -> 1000"]
    assert workdir.write_or_check_config(tmp_path, other) == changes
    other.train.microbatches = 2
    with pytest.raises(UserError, match=r"another config \(train.microbatches: 1 -> 2\)"):
        workdir.write_or_check_config(tmp_path, other)


@pytest.mark.parametrize("content", ['{"format": "hyper_t5.backbone"}', '{"model_type": "t5"}'])
def test_the_folder_of_a_backbone_is_no_workdir(tmp_path: Path, content: str) -> None:
    """It is refused, and its config.json is not overwritten by a new run."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"is a backbone, not a run; .* as --backbone"):
        workdir.load_config(tmp_path)
    with pytest.raises(UserError, match="is a backbone, not a run"):
        workdir.write_or_check_config(tmp_path, config_lib.defaults())
    assert (tmp_path / "config.json").read_text() == content
