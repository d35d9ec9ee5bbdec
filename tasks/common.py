"""What every file of SeqIO Tasks here shares: names, vocabularies, registration that may repeat.

`seqio`, `tf` and `tfds` are imported from here: TensorFlow is loaded in one place, and quietly.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hyper_t5.vocab import ByteVocabulary, SentencePieceVocabulary, Vocabulary

# What TensorFlow says of its search for a GPU, which it is not to have, and of its own speed.
_NOISE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog"
    r"|[IWE]\d{4} .*\b(port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc:\d+\]"
    r"|To enable the following instructions: "
)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Keeps TensorFlow's remarks off stderr; whatever else is written there comes out at the end.

    They come from C++ while it is loaded, before any setting counts: TF_CPP_MIN_LOG_LEVEL=3 leaves
    half of them (TensorFlow 2.21). So they are caught where they arrive, at file descriptor 2.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed, as in some services
        yield
        return
    failed = True
    with tempfile.TemporaryFile() as caught:
        try:
            os.dup2(caught.fileno(), 2)
            yield
            failed = False
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if failed or not _NOISE.match(line):
                    print(line, file=sys.stderr)


with _without_noise():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds  # noqa: F401

    # It reads data here and computes nothing: left alone it would take the GPU's memory from JAX.
    with contextlib.suppress(RuntimeError):  # whoever calls us has it running already
        tf.config.set_visible_devices([], "GPU")

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
