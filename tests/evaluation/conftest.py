"""Fixtures of evaluation tests: a backbone, held-out tasks, and a run of each system."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.hypermodels import SYSTEMS
from tests.support import tiny_runs
from tests.support.evaluations import edit_task, evaluate_run, read_evaluation


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


@pytest.fixture(scope="session")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Super-NaturalInstructions folder; its held-out tasks have six and three rows."""
    folder = tiny_runs.save_sni(tmp_path_factory.mktemp("sni") / "official")
    edit_task(
        folder, tiny_runs.HELD_OUT[1], lambda task: task["Instances"].__delitem__(slice(3, None))
    )
    return folder


@pytest.fixture(scope="session")
def make_config(backbone: Path, sni: Path) -> Callable[..., ConfigDict]:
    """Return a function that returns a valid config on ``backbone`` and ``sni``."""
    return functools.partial(
        tiny_runs.make_config, backbone__path=str(backbone), data__sni_dir=str(sni)
    )


@pytest.fixture(scope="session")
def run_of(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns a workdir of a system as if trained."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(system: str) -> Path:
        folder, fields = root / system, dict[str, Any](adapter__bottleneck_sizes=(3,))
        if system == "hint":
            fields |= {
                "adapter__prefix_sites": ad.ATTENTION_SITES,
                "adapter__position_bias": "zero",
            }
        if system.startswith("task_"):
            fields |= {"stage": "peft", "adapter__task_slots": 2}
        config = make_config(system=system, **fields)
        if not SYSTEMS[system].trains:
            workdir.write_or_check_config(folder, config)
            return folder
        tiny_runs.untrained_run(config, folder)
        if config.adapter.task_slots:  # as in training, and in another order than evaluation's
            params, meta = checkpoint.load_subtree(folder, "params")
            meta["tasks"] = tiny_runs.HELD_OUT[::-1]
            checkpoint.save(folder, 2, {"params": params}, meta)
        return folder

    return run


@pytest.fixture(scope="session")
def evaluation_of(run_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a system's evaluation, which runs once."""
    root = tmp_path_factory.mktemp("evaluated")

    @functools.cache
    def folder(system: str) -> Path:
        evaluate_run(run_of(system), root / system)
        return root / system

    return folder


@pytest.fixture(scope="session")
def evaluated(evaluation_of: Any) -> Callable[[str], Any]:
    """Return a function that returns (metrics, predictions) of a system's evaluation."""
    return lambda system: read_evaluation(evaluation_of(system))
