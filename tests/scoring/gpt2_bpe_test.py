"""GPT-2's tokens by hand, and files that are no merges.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hyper_t5.scoring.gpt2_bpe import Gpt2Tokenizer
from hyper_t5.utils.errors import UserError

MERGES = "#version: 0.2\nl o\nlo w\ne r\nt '\nĠ low\nÃ ©\n"


def write(folder: Path, content: bytes) -> Path:
    (folder / "merges.txt").write_bytes(content)
    return folder / "merges.txt"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tokens(tmp_path: Path, line_end: str, mark: str) -> None:
    text = mark + MERGES.replace("\n", line_end)
    tokenize = Gpt2Tokenizer(write(tmp_path, text.encode())).tokenize
    assert tokenize("low lower") == ["low", "low", "er"]
    assert tokenize("wol") == ["w", "o", "l"]
    assert tokenize("t's") == ["t", "'", "s"]  # no merge across a contraction
    assert tokenize("é日") == ["Ã©", "æ", "Ĺ", "¥"]  # bytes c3 a9, e6 97 a5
    assert tokenize("e  r\n") == ["e", "", "", "r", "Ċ"]
    assert tokenize("") == []


@pytest.mark.parametrize("text", ["", "#version: 0.2\n", "a b c\n", "a\n", "low er\n"])
def test_files_that_are_no_merges(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"merges\.txt: is not GPT-2's merges\.txt; get it from"):
        Gpt2Tokenizer(write(tmp_path, text.encode()))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merges\.txt: not UTF-8"):
        Gpt2Tokenizer(write(tmp_path, b"\xff \xff\n"))
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        Gpt2Tokenizer(tmp_path / "none.txt")


def test_the_extra_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="install the extra gpt2"):
        Gpt2Tokenizer(write(tmp_path, MERGES.encode()))
