"""GPT-2's byte-level BPE (Radford et al. 2019), for ROUGE-L of texts that are not English.

The official script of Super-NaturalInstructions compares the texts of its cross-lingual track by
GPT-2's tokens, which a file merges.txt defines.
"""

from __future__ import annotations

from typing import Any

from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

SOURCE = "https://huggingface.co/gpt2"


class Gpt2Tokenizer:
    """Tokenizer that drops the spaces before tokens, for `text_metrics.rouge_scorer`.

    Args:
      merges: path of GPT-2's merges.txt.

    Raises:
      UserError: the file is no merges.txt, or the package tokenizers is not installed.
    """

    def __init__(self, merges: files.File) -> None:
        try:
            from tokenizers import Tokenizer, models, pre_tokenizers
        except ImportError:
            raise UserError(
                "gpt2_merges: needs the package tokenizers; install the extra gpt2 (bash "
                "launch/setup.sh --extra gpt2)"
            ) from None
        lines = files.read_text(merges).split("\n")
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
        pairs: list[Any] = [tuple(line.split(" ")) for line in lines]
        tokens = [*pre_tokenizers.ByteLevel.alphabet(), *map("".join, pairs)]
        vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        if not pairs or not all(len(pair) == 2 and vocab.keys() >= set(pair) for pair in pairs):
            raise UserError(f"{merges}: is not GPT-2's merges.txt; get it from {SOURCE}")
        self._tokenizer = Tokenizer(models.BPE(vocab, pairs))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text in GPT-2's alphabet of bytes, where Ġ is a space."""
        return [token.lstrip("Ġ") for token in self._tokenizer.encode(text).tokens]
