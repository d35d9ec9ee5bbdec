"""The SentencePiece model of the embedded suite: every word and letter is one piece.

``python -m hyper_t5.experiments.synthetic_vocabulary`` writes tasks/synthetic.model, which is
shipped. Frequencies do not matter, so that rare words are whole pieces too.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import sentencepiece

from hyper_t5.tasks.synthetic import ALPHABET, VOCAB_FILE, suite


def train_vocabulary(path: Path = VOCAB_FILE, seed: int = 0) -> None:
    """Train and write the model."""
    words = {"gives", "Definition", "Input", "Output", "Example", *ALPHABET, *ALPHABET.upper()}
    for tasks in suite(seed).values():
        for task in tasks.values():
            rows = [f"{row['input']} {row['output'][0]}" for row in task["Instances"][:50]]
            words.update(
                re.findall(r"[A-Za-z']+|[0-9]|[.,;:]", " ".join(task["Definition"] + rows))
            )
    words |= {word.lower() for word in words}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([word for word in sorted(words) for _ in range(100)]),
        model_writer=(blob := io.BytesIO()),
        model_type="bpe",
        vocab_size=800,
        user_defined_symbols=["\nInput:", "\nOutput:"],
        character_coverage=1.0,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(blob.getvalue())


if __name__ == "__main__":
    train_vocabulary()
