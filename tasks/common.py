"""What every file of SeqIO Tasks here shares: names, vocabularies, registration that may repeat."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import seqio

from hyper_t5.vocab import ByteVocabulary, SentencePieceVocabulary, Vocabulary

_signatures: dict[str, str] = {}  # name of a Task or Mixture -> what it was registered from
_vocabularies: dict[str, seqio.Vocabulary] = {}


def seqio_name(prefix: str, name: str) -> str:
    """`prefix_name` with the characters that SeqIO refuses (hyphens, mostly) replaced."""
    return re.sub(r"[^\w.:]", "_", f"{prefix}_{name}")


def seqio_vocab(vocab: Vocabulary) -> seqio.Vocabulary:
    """SeqIO's vocabulary with the same ids. One object an identity: mixtures compare them."""
    key = json.dumps(vocab.identity(), sort_keys=True)
    if key not in _vocabularies:
        if isinstance(vocab, ByteVocabulary):
            _vocabularies[key] = seqio.ByteVocabulary(vocab.extra_ids)
        elif isinstance(vocab, SentencePieceVocabulary):
            _vocabularies[key] = seqio.SentencePieceVocabulary(
                str(vocab.model_file), vocab.extra_ids
            )
        else:
            raise TypeError(f"no SeqIO vocabulary for {type(vocab).__name__}")
    return _vocabularies[key]


def text_features(vocab: Vocabulary, names: Sequence[str]) -> dict[str, seqio.Feature]:
    """Output features that are token ids ending in EOS."""
    return {name: seqio.Feature(seqio_vocab(vocab), add_eos=True) for name in names}


def register_once(registry: Any, name: str, signature: Any, make: Callable[[], Any]) -> None:
    """Adds `make()` under `name`, unless it is there already, registered from the same things.

    SeqIO's registries are global and refuse a second entry. A process may well ask twice (train,
    then evaluate), or ask for the same name in another folder (tests): the latter replaces.

    Args:
        registry: seqio.TaskRegistry or seqio.MixtureRegistry.
        name: the entry's name.
        signature: anything with a stable repr that says what the entry is made from.
        make: builds the Task or Mixture.
    """
    described = repr(signature)
    if name in registry.names():
        if _signatures.get(name) == described:
            return
        registry.remove(name)
    registry.add_provider(name, make())
    _signatures[name] = described
