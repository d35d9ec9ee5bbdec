"""Training in both stages: the loss falls, and checkpoints hold all that is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from hyper_t5 import runs, weights
from hyper_t5.checkpoints import checkpoint
from tests.support import tiny_runs


@pytest.mark.parametrize("system", ["concat", "hyper_prefix", "hyper_lora"])
def test_both_stages_on_the_embedded_suite(make_config: Any, tmp_path: Path, system: str) -> None:
    common: dict[str, Any] = {"system": system, "data__mixture": "synthetic"}
    common |= {"data__hyper_length": 72, "data__input_length": 8, "data__target_length": 8}
    common |= {"data__tasks_per_batch": 4, "optimizer__learning_rate": 3e-3}
    common |= {"train__steps": 30, "train__log_every": 15, "train__save_every": 30}
    first, second = tmp_path / "hyperpretrain", tmp_path / "mtf"
    tiny_runs.run(make_config(stage="hyperpretrain", **common), first)
    path = "backbone__path" if system == "concat" else "hypermodel__path"
    config = make_config(stage="mtf", **common | {path: str(first)})

    # The second stage starts from the last checkpoint of the first, bit for bit.
    kind = "backbone" if system == "concat" else "hypermodel"
    _, _, started, _ = runs.init_run(config)
    ended, _ = checkpoint.load_subtree(first, f"params/{kind}")
    jax.tree.map(np.testing.assert_array_equal, started[kind], ended)

    tiny_runs.run(config, second)
    for folder in (first, second):
        before, after = tiny_runs.lines(folder)
        assert after["loss"] < before["loss"]
        assert checkpoint.latest_step(folder) == 30
    assert before["data/episodes"] >= 60
    names = tiny_runs.leaves(second, 30)
    assert any(name.startswith(f"params/{kind}/") for name in names)
    if system != "concat":
        assert not any("backbone" in name for name in names)
    shutil.rmtree(first)  # a finished run does not need it
    params = runs.open(second).params
    ended, _ = checkpoint.load_subtree(second, f"params/{kind}")
    jax.tree.map(np.testing.assert_array_equal, params[kind], ended)


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "hyper_prefix", "hypermodel__reader": "decoder_queries"},
        {"system": "hyper_prefix", "hypermodel__gist_tokens": 3},
        {"system": "hyper_lora", "hypermodel__reader": "decoder_queries"},
        {"system": "shared_prefix"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_other_system_learns(
    make_config: Any, tmp_path: Path, fields: dict[str, Any]
) -> None:
    tiny_runs.run(
        make_config(train__steps=30, train__log_every=10, train__save_every=30, **fields), tmp_path
    )
    lines = tiny_runs.lines(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_checkpoints_hold_no_frozen_weights(
    make_config: Any, backbone: Path, tmp_path: Path
) -> None:
    # Random, because a hypermodel otherwise starts as a copy of the backbone.
    config = make_config(system="hyper_lora", hypermodel__init="random", train__steps=2)
    before = tiny_runs.digests(backbone)
    tiny_runs.run(config, tmp_path)
    assert tiny_runs.digests(backbone) == before

    # Read by Orbax, independent of our own record.
    folder = tmp_path / "checkpoints" / "2" / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        metadata = orbax.metadata(folder.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        tree = orbax.restore(folder.absolute(), restore_args=as_numpy)
        state = traverse_util.flatten_dict(tree, sep="/")
    assert set(state) == set(tiny_runs.leaves(tmp_path, 2))
    assert not [name for name in state if "backbone" in name]
    frozen = weights.load_backbone(backbone)[1]
    contents = {np.asarray(x).tobytes() for x in jax.tree.leaves(frozen)}
    assert not [name for name, x in state.items() if np.asarray(x).tobytes() in contents]
    assert not (tmp_path / "backbone").exists()
    # The optimizer's state is two moments per parameter, and the counts.
    sizes = {name: np.size(x) for name, x in state.items()}
    trained = sum(size for name, size in sizes.items() if name.startswith("params/"))
    moments = sum(size for name, size in sizes.items() if name.startswith("opt_state/"))
    assert 2 * trained <= moments <= 2 * trained + 4


def test_gradients_reach_every_leaf_of_the_hypermodel(make_config: Any, tmp_path: Path) -> None:
    config = make_config(system="hyper_lora", train__steps=2, adapter__lora_bias=True)
    _, _, before, _ = runs.init_run(config)
    tiny_runs.run(config, tmp_path)
    after, _ = checkpoint.load_subtree(tmp_path, "params")
    same = jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == b)), before, after)
    assert not [k for k, v in traverse_util.flatten_dict(same, sep="/").items() if v]
