"""The search for the reference data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import reference_data


def test_a_folder_without_the_data_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="no reference data"):
        reference_data.find(None, tmp_path)
    with pytest.raises(pytest.fail.Exception, match="no folder data"):
        reference_data.find(str(tmp_path), tmp_path)
    for part in reference_data.PARTS:
        (tmp_path / part).mkdir()
    assert reference_data.find(None, tmp_path) == tmp_path
    assert reference_data.find(str(tmp_path), Path("other")) == tmp_path
