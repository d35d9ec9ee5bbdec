"""GPT-2's byte-level BPE (Radford et al. 2019), as far as ROUGE of a cross-lingual track needs it.

The official script of Super-NaturalInstructions compares texts that are not English by GPT-2's
tokens. Those are made of a file merges.txt, one merge a line, which https://huggingface.co/gpt2
has: it is not ours to ship, and nothing here fetches it.
"""

from __future__ import annotations

import functools
import itertools
import os

from hyper_t5 import files
from hyper_t5.errors import UserError

# Contractions, then runs of letters, of numbers, of neither, each with one space in front.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE = "Ġ"  # how a space is written


class Gpt2Tokenizer:
    """Tokens without the spaces in front of them, for `scores.rouge_scorer`."""

    def __init__(self, merges: str | os.PathLike[str]) -> None:
        """Reads merges.txt.

        Raises:
            UserError: it cannot be read, or is not such a file.
        """
        import regex

        self._split = regex.compile(_PIECES).findall
        self._bytes = byte_letters()
        self._ranks = read_merges(merges)
        self._cached = functools.lru_cache(maxsize=100_000)(self._merge)

    def tokenize(self, text: str) -> list[str]:
        """Tokens in GPT-2's letters for bytes."""
        pieces = ("".join(self._bytes[b] for b in p.encode()) for p in self._split(text))
        return [token.lstrip(SPACE) for piece in pieces for token in self._cached(piece)]

    def _merge(self, piece: str) -> tuple[str, ...]:
        """The pair of the lowest rank is joined, wherever it stands, until none is left."""
        parts = list(piece)
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            first, second = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if (first, second) not in self._ranks:
                break
            joined: list[str] = []
            for part in parts:
                if joined and joined[-1] == first and part == second:
                    joined[-1] = first + second
                else:
                    joined.append(part)
            parts = joined
        return tuple(parts)


def byte_letters() -> list[str]:
    """A visible letter for each byte: its own in Latin-1 if it has one, else one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in visible)
    moved = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


def read_merges(path: str | os.PathLike[str]) -> dict[tuple[str, str], int]:
    """Pair -> rank."""
    try:
        lines = files.read_bytes(files.as_path(path)).decode().split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; give the merges.txt of GPT-2") from None
    ranks: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise UserError(f"{path}, line {number}: not two tokens; give the merges.txt of GPT-2")
        ranks[pair[0], pair[1]] = len(ranks)
    if not ranks:
        raise UserError(f"{path}: holds no merges; give the merges.txt of GPT-2")
    return ranks
