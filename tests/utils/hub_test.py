"""``hf://``: the files of a local hub server, its cache, and what cannot be downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_t5.utils import hub
from hyper_t5.utils.errors import UserError
from tests.support import hub_server, tiny_runs

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")


def convert(source: str, out: Path, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process: huggingface_hub reads its variables when it is imported."""
    argv = ["convert", "--input", source, "--to", "hf", "--out", str(out)]
    return subprocess.run(
        [sys.executable, "-m", "hyper_t5", *argv],
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_backbone_of_the_hub_is_read_cached_and_used_offline(tmp_path: Path) -> None:
    folder, cache = tiny_runs.save_backbone(tmp_path / "t5"), tmp_path / "cache"
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with hub_server.hub("org/t5", folder) as (endpoint, requests):
        done = convert("hf://org/t5", tmp_path / "a", cache, HF_ENDPOINT=endpoint)
        assert done.returncode == 0, done.stderr
        assert not [path for path in requests if path.endswith(".bin")]
        missing = {"hf://org/other": "no such repository", "hf://org/t5@no": "no such revision no"}
        for source, message in missing.items():
            done = convert(source, tmp_path / "b", cache, HF_ENDPOINT=endpoint)
            assert done.returncode == 2
            assert message in done.stderr
            assert done.stderr.count("\n") == 1
    done = convert("hf://org/t5", tmp_path / "c", cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    done = convert("hf://org/uncached", tmp_path / "d", cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "not in the cache" in done.stderr


@pytest.mark.parametrize("path", ["hf://t5", "hf://org/t5/file", "hf://org/../t5", "hf://"])
def test_a_malformed_name_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="write hf://ORGANIZATION/NAME"):
        hub.local_folder(path)
