"""Our checkpoints in T5X's own Checkpointer. Needs T5X, which is not on PyPI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import weights
from hyper_t5.weights import param_names
from tests.support.param_trees import HF, T5X
from tests.support.tiny_model import CONFIG, TIED, params

t5x = pytest.importorskip("t5x", reason="t5x is not installed (github.com/google-research/t5x)")
pytestmark = pytest.mark.filterwarnings("default")  # warnings of T5X


def checkpointer(folder: Path, tree: Any, **options: Any) -> Any:
    """Create T5X's Checkpointer, and a state of these parameters without an optimizer."""
    from flax.core import freeze
    from t5x import checkpoints, partitioning, train_state

    axes = jax.tree.map(lambda x: partitioning.PartitionSpec(*[None] * x.ndim), tree)

    class Partitioner(partitioning.PjitPartitioner):
        """Partitions every parameter, so that it is stored in zarr, over a single device."""

        def get_mesh_axes(self, state: Any) -> Any:
            return state.replace(params=freeze(axes), step=None)

    state = train_state.InferenceState(np.int32(5), freeze(tree))
    partitioner = Partitioner(num_partitions=1)
    return checkpoints.Checkpointer(state, partitioner, str(folder), **options), state


def restore(folder: Path, tree: Any) -> Any:
    """Restore `folder/checkpoint_5`, with parameters as in `tree`."""
    return checkpointer(folder, jax.tree.map(np.zeros_like, tree))[0].restore(step=5)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["1.1", "1.0"])
def test_t5x_reads_our_checkpoint(tmp_path: Path, config: Any) -> None:
    weights.save_native(tmp_path / "native", config, params(config))
    weights.convert(tmp_path / "native", tmp_path / "checkpoint_5", "t5x")
    tree = jax.tree.map(np.asarray, param_names.to_t5x(params(config)))
    state = restore(tmp_path, tree)
    assert int(state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, dict(state.params), tree)


def test_t5x_reads_the_golden_weights_of_a_hugging_face_folder(tmp_path: Path) -> None:
    weights.convert(HF, tmp_path / "checkpoint_5", "t5x")
    tree = param_names.to_t5x(weights.load_backbone(T5X)[1])
    jax.tree.map(np.testing.assert_array_equal, dict(restore(tmp_path, tree).params), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_read_and_write_the_files_of_t5x(tmp_path: Path, dtype: str) -> None:
    tree = jax.tree.map(np.asarray, param_names.to_t5x(params(CONFIG)))
    storage = weights.STORAGE_DTYPES[dtype]
    saver, state = checkpointer(tmp_path / "theirs", tree, save_dtype=storage)
    saver.save(state)
    theirs = tmp_path / "theirs/checkpoint_5"
    loaded = weights.load_backbone(theirs, dtype=dtype)[1]
    expected = jax.tree.map(lambda x: x.astype(storage), tree)
    jax.tree.map(np.testing.assert_array_equal, param_names.to_t5x(loaded), expected)
    weights.convert(theirs, tmp_path / "checkpoint_5", "t5x")
    files = [file for file in theirs.glob("target.*/*") if file.is_file()]
    assert files
    for file in files:
        ours = tmp_path / "checkpoint_5" / file.relative_to(theirs)
        assert ours.read_bytes() == file.read_bytes(), ours
