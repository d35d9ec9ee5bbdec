"""Our T5X checkpoints beside T5X's own Checkpointer, where T5X is installed from its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import names, weights
from tiny import CONFIG, GOLDEN, TIED, params

t5x = pytest.importorskip("t5x", reason="t5x is not installed (github.com/google-research/t5x)")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


def checkpointer(folder: Path, tree: Any, **how: Any) -> Any:
    """T5X's Checkpointer of a state without optimizer, of these parameters."""
    from flax.core import freeze
    from t5x import checkpoints, partitioning, train_state

    axes = jax.tree.map(lambda x: partitioning.PartitionSpec(*[None] * x.ndim), tree)

    class Whole(partitioning.PjitPartitioner):
        """Every parameter is partitioned, and so kept in zarr; each is whole on every device."""

        def get_mesh_axes(self, state: Any) -> Any:
            return state.replace(params=freeze(axes), step=None)

    state = train_state.InferenceState(np.int32(5), freeze(tree))
    return checkpoints.Checkpointer(state, Whole(num_partitions=1), str(folder), **how), state


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["1.1", "1.0"])
def test_t5x_reads_what_we_write(tmp_path: Path, config: Any) -> None:
    weights.save_native(tmp_path / "native", config, params(config))
    weights.convert(tmp_path / "native", tmp_path / "checkpoint_5", "t5x")
    tree = jax.tree.map(np.asarray, names.to_t5x(params(config)))
    theirs, _ = checkpointer(tmp_path, jax.tree.map(np.zeros_like, tree))
    found = theirs.restore(step=5)
    assert int(found.step) == 5
    jax.tree.map(np.testing.assert_array_equal, dict(found.params), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_read_and_write_what_t5x_writes(tmp_path: Path, dtype: str) -> None:
    tree = jax.tree.map(np.asarray, names.to_t5x(params(CONFIG)))
    kept = weights.STORAGE_DTYPES[dtype]
    theirs, state = checkpointer(tmp_path / "theirs", tree, save_dtype=kept)
    theirs.save(state)
    made = tmp_path / "theirs/checkpoint_5"
    found = weights.load_backbone(made, dtype=dtype)[1]
    wanted = jax.tree.map(lambda x: x.astype(kept), tree)
    jax.tree.map(np.testing.assert_array_equal, names.to_t5x(found), wanted)
    weights.convert(made, tmp_path / "checkpoint_5", "t5x")
    theirs_files = [file for file in made.glob("target.*/*") if file.is_file()]
    assert theirs_files
    for file in theirs_files:
        ours = tmp_path / "checkpoint_5" / file.relative_to(made)
        assert ours.read_bytes() == file.read_bytes(), ours


def test_t5x_reads_the_golden_weights_from_a_hugging_face_folder(tmp_path: Path) -> None:
    weights.convert(GOLDEN / "hf_model", tmp_path / "checkpoint_5", "t5x")
    tree = names.to_t5x(weights.load_backbone(GOLDEN / "checkpoint_7")[1])
    theirs, _ = checkpointer(tmp_path, jax.tree.map(np.zeros_like, tree))
    jax.tree.map(np.testing.assert_array_equal, dict(theirs.restore(step=5).params), tree)
