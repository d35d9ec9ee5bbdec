"""Adapters out and in: Hugging Face PEFT folders, native folders, and merged into the backbone.

    peft_out.py    our adapters -> a PEFT folder
    peft_in.py     a PEFT folder -> our adapters
    merged.py      LoRA into the backbone's weights

`export` is the command: a folder of either kind in, a folder of any kind out. Which kind an adapter
folder is shows in its files, so that bringing one in needs no command of its own. See
docs/export.md for what can be said in which format.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import model, names, weights
from hyper_t5.errors import UserError
from hyper_t5.export.merged import merge_lora
from hyper_t5.export.peft_in import load_peft
from hyper_t5.export.peft_names import PEFT_CONFIG, PEFT_TENSORS
from hyper_t5.export.peft_out import export_peft
from hyper_t5.prompts import ENCODINGS
from hyper_t5.t5 import T5Config
from hyper_t5.vocab import load_vocab

__all__ = [
    "PEFT_CONFIG",
    "PEFT_TENSORS",
    "asked",
    "export",
    "export_peft",
    "is_peft",
    "load_peft",
    "merge_lora",
    "refuse_text",
]


def export(
    adapter: str | Path,
    out: str | Path,
    format: str,
    backbone: str | Path,
    base_model: str = "",
    dtype: str = "",
) -> Path:
    """Write an adapter folder, native or PEFT's, in another form.

    Args:
        adapter: the folder.
        out: the folder to make.
        format: ``peft``: a PEFT folder that names ``base_model`` (default: the backbone's folder).
            ``native``: ours. ``merged``: the backbone with LoRA inside, in Hugging Face's layout
            (``hyper-t5 convert`` writes it without).
        backbone: the folder of the backbone the adapter was made for.
        base_model: with ``peft``, the name or path to write in it.
        dtype: of what is written, ``float32`` or ``bfloat16``. '' is float32 for PEFT, and for the
            others what they are.

    Raises:
        UserError: the format cannot say it (the message says why, and what can), a folder is
            damaged or does not fit; nothing is left half-written.
    """
    (loaded, meta, hypermodel), base = _load(Path(adapter), backbone)
    if format == "native":
        return ad.save(out, ad.astype(loaded, dtype) if dtype else loaded, meta, hypermodel)
    refuse_text(meta, str(adapter))
    if format == "peft":
        name, written = base_model or str(backbone), asked(meta)
        return export_peft(out, loaded, base.sizes, name, 0, dtype or "float32", written)
    vocab = load_vocab(base.identity, base.folder) if base.identity else None
    weights.save_hf(out, base.sizes, merge_lora(base.params, loaded, dtype=dtype), vocab)
    return Path(out)


@dataclasses.dataclass(frozen=True)
class _Backbone:
    """A backbone as its folder has it."""

    folder: Path
    sizes: T5Config
    params: dict[str, Any]
    identity: dict[str, Any] | None


def _backbone(folder: str | Path, dtype: str) -> _Backbone:
    found = model.backbone_folder(folder)
    return _Backbone(found, *weights.load_backbone(found, dtype=dtype))


_Loaded = tuple[ad.Adapters, dict[str, Any], dict[str, Any] | None]


def _load(folder: Path, backbone: str | Path) -> tuple[_Loaded, _Backbone]:
    """What is in an adapter folder of either kind, and the backbone that it is known to fit."""
    if is_peft(folder):
        base = _backbone(backbone, "float32")
        loaded, said = load_peft(folder, base.sizes)
        vocab = load_vocab(base.identity, base.folder) if base.identity else None
        meta = {
            "backbone": weights.backbone_meta(
                base.sizes, vocab.identity() if vocab else None, base.params
            ),
            "encoding": "labelled",
            "source": {"format": "peft", "base_model": said.get("base_model_name_or_path")},
        }
        return (loaded, meta, None), base
    loaded, meta, hypermodel = ad.load(folder)
    made_for = meta.get("backbone")
    if not isinstance(made_for, dict):
        raise UserError(f"{folder}: does not say which backbone it was made for; make it again")
    # The digest is of the weights as they were stored then.
    base = _backbone(backbone, made_for.get("dtype", "float32"))
    digest = names.digest(base.params)
    weights.check_compatible(base.sizes, base.identity, made_for, digest=digest, where=str(folder))
    ad.check(loaded, base.sizes, str(folder))
    if hypermodel is not None:
        made_by = config_lib.from_json(json.dumps(meta.get("config")), str(folder))
        wanted = model.shapes_of_hypermodel(model.build(made_by, base.sizes))
        model.check_hypermodel(hypermodel, wanted, str(folder))
    return (loaded, meta, hypermodel), base


def is_peft(folder: Path) -> bool:
    """Whether an adapter folder is PEFT's; UserError where it is both PEFT's and ours."""
    theirs, ours = ((folder / name).exists() for name in (PEFT_CONFIG, ad.SPEC_FILE))
    if theirs and ours:
        raise UserError(
            f"{folder}: holds both {PEFT_CONFIG} and {ad.SPEC_FILE}; give a folder of one adapter"
        )
    return theirs


def asked(meta: dict[str, Any]) -> str:
    """How the hypermodel's encoding writes an input; '' where inputs are taken as they are."""
    name = meta.get("encoding", "labelled")
    if name not in tuple(ENCODINGS):  # a list has no hash
        raise UserError(f"adapter: encoding {name!r:.40} is none of {', '.join(ENCODINGS)}")
    written = ENCODINGS[name].asked("...")
    return "" if written == "..." else written


def refuse_text(meta: dict[str, Any], where: str) -> None:
    """UserError for what is no adapter alone, and so in no other tool's format."""
    if "text" in meta:
        raise UserError(
            f"export: {where} puts the task's text in front of every input, which no adapter file "
            "can say; keep the native folder, which `hyper-t5 predict` reads"
        )
