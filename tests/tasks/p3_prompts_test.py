"""Files of P3's prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper_t5.tasks.p3_prompts import read_prompts
from hyper_t5.utils.errors import UserError
from tests.support.p3_cache import PROMPTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROMPTS + "\na |||| b\nmore\n", r"line 10: an entry must be 'dataset \|\|\|\| templ"),
        (PROMPTS + "\na |||| b |||| \n", r"line 10: an entry must be"),
        (PROMPTS + "\n\n\udcff", r"line 11: not UTF-8"),
    ],
)
def test_an_invalid_entry_is_reported_with_its_line(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        read_prompts(str(file))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.p3_prompts=.*none: cannot read \(No such file"):
        read_prompts(str(tmp_path / "none"))


def test_the_last_entry_of_a_name_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    entries = ["trec |||| X-y |||| one", "trec |||| x_Y |||| two", "a|||| b |||| c"]
    file.write_text(("\n" + "*" * 28 + "\n").join(entries))
    assert read_prompts(str(file)) == {"trec_x_y": "two", "a_b": "c"}
    assert "1 name(s) occur twice, the last counts: trec_x_y, ...\n" in capsys.readouterr().out
