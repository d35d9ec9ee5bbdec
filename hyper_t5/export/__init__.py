"""Export and import of adapters: native folders, PEFT folders, and merged backbones.

    native.py      adapters <-> a native folder
    peft_out.py    adapters -> a PEFT folder
    peft_in.py     a PEFT folder -> adapters
    merged.py      LoRA -> the weights of the backbone

`export` is the command: it reads a native or PEFT folder and writes any format. docs/export.md says
what each format can express.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import model, runs, weights
from hyper_t5.data.templates import TEMPLATES
from hyper_t5.data.vocab import load_vocab
from hyper_t5.export import native
from hyper_t5.export.merged import merge_lora
from hyper_t5.export.peft_in import load_peft
from hyper_t5.export.peft_names import PEFT_CONFIG, PEFT_TENSORS
from hyper_t5.export.peft_out import export_peft
from hyper_t5.t5 import T5Config
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

__all__ = [
    "PEFT_CONFIG",
    "PEFT_TENSORS",
    "check_no_text",
    "export",
    "export_peft",
    "input_template",
    "is_peft",
    "load_peft",
    "merge_lora",
    "save_peft",
]

_Adapter = tuple[ad.Adapters, dict[str, Any], dict[str, Any] | None]
_Backbone = tuple[T5Config, dict[str, Any], dict[str, Any] | None]


def export(
    adapter: str | Path,
    out: str | Path,
    format: str,
    backbone: str | Path,
    base_model: str = "",
    dtype: str = "",
) -> Path:
    """Convert a native or PEFT adapter folder into another format.

    Args:
      adapter: The adapter folder.
      out: The folder to write.
      format: `peft`, `native`, or `merged`: the backbone with merged LoRA in Hugging Face's layout.
      backbone: The folder of the adapter's backbone.
      base_model: With `peft`, as for `save_peft`.
      dtype: `float32` or `bfloat16`. Empty is float32 for `peft`, and keeps the dtype otherwise.

    Returns:
      The folder.

    Raises:
      UserError: The format cannot express the adapters, or a folder is damaged or does not fit.
        Nothing is written.
    """
    base_folder = runs.backbone_folder(backbone)
    loaded, (t5_config, params, vocab) = _load(Path(adapter), base_folder)
    adapters, meta, hypermodel = loaded
    if format == "native":
        adapters = ad.astype(adapters, dtype) if dtype else adapters
        return native.save(out, adapters, meta, hypermodel)
    check_no_text(meta, str(adapter))
    if format == "peft":
        return save_peft(out, adapters, t5_config, meta, backbone, base_model, dtype)
    merged = merge_lora(params, adapters, dtype=dtype)
    weights.save_hf(out, t5_config, merged, load_vocab(vocab, base_folder) if vocab else None)
    return Path(out)


def save_peft(
    out: str | Path,
    adapters: ad.Adapters,
    t5_config: T5Config,
    meta: dict[str, Any],
    backbone: str | Path,
    base_model: str = "",
    dtype: str = "",
) -> Path:
    """Write one task's adapters as a PEFT folder that names their backbone.

    Args:
      out: The folder to write.
      adapters: The adapters.
      t5_config: Their backbone's config.
      meta: Their metadata, as in a native folder.
      backbone: The folder of their backbone. Transformers opens a folder in another form as a T5
        with random weights, so the PEFT config names it only in Hugging Face's form.
      base_model: The name or path in the PEFT config instead of `backbone`.
      dtype: `float32` or `bfloat16`; empty is float32.

    Returns:
      The folder.
    """
    digest, weights_dtype = (meta["backbone"].get(key, "unknown") for key in ("digest", "dtype"))
    text = (
        f"The digest of its weights in {weights_dtype} is `{digest}`; `hyper-t5 convert` writes it"
        " to convert.json."
    )
    base = base_model or _hf_folder(backbone)
    command = f"hyper-t5 convert --input {shlex.quote(str(backbone))} --to hf --out base_model"
    if not base:
        text += f" Convert it for transformers:\n\n```bash\n{command}\n```\n\n"
    kind, template = dtype or "float32", input_template(meta)
    folder = export_peft(out, adapters, t5_config, base, 0, kind, template, text)
    if not base:
        print(
            f"{folder}: names no base model, because {backbone} is not in Hugging Face's form;"
            f" convert it with `{command}` and pass --base-model base_model",
            file=sys.stderr,
            flush=True,
        )
    return folder


def _hf_folder(backbone: str | Path) -> str:
    """Return the absolute path of a local folder in Hugging Face's form; empty for others."""
    folder = runs.backbone_folder(backbone)
    is_hf = files.is_local(files.as_path(backbone)) and weights.detect(folder) == "hf"
    return str(folder.absolute()) if is_hf else ""


def _load(folder: Path, base_folder: Path) -> tuple[_Adapter, _Backbone]:
    """Load an adapter folder and its backbone, and check that they fit."""
    if is_peft(folder):
        backbone = weights.load_backbone(base_folder)
        t5_config, params, vocab = backbone
        adapters, config = load_peft(folder, t5_config)
        meta = {
            "backbone": weights.backbone_meta(t5_config, vocab, params),
            "encoding": "labelled",
            "source": {"format": "peft", "base_model": config.get("base_model_name_or_path")},
        }
        return (adapters, meta, None), backbone
    adapters, meta, hypermodel = native.load(folder)
    expected = meta.get("backbone")
    if not isinstance(expected, dict):
        raise UserError(f"{folder}: does not name its backbone; generate the adapter again")
    # The digest was computed in the dtype in which the weights were stored.
    backbone = weights.load_backbone(base_folder, dtype=expected.get("dtype", "float32"))
    t5_config, params, vocab = backbone
    digest = weights.digest(params)
    weights.check_compatible(t5_config, vocab, expected, digest=digest, path=str(folder))
    ad.check(adapters, t5_config, str(folder))
    if hypermodel is not None:
        config = config_lib.from_adapter(meta.get("config"), str(folder))
        shapes = model.hypermodel_shapes(model.build_model(config, t5_config))
        runs.check_hypermodel(hypermodel, shapes, str(folder))
    return (adapters, meta, hypermodel), backbone


def is_peft(folder: Path) -> bool:
    """Return whether a folder is PEFT's; raise a UserError if it is both PEFT's and native."""
    peft_file, native_file = ((folder / name).exists() for name in (PEFT_CONFIG, native.SPEC_FILE))
    if peft_file and native_file:
        raise UserError(
            f"{folder}: holds both {PEFT_CONFIG} and {native.SPEC_FILE}; keep one of them"
        )
    return peft_file


def input_template(meta: dict[str, Any]) -> str:
    """Return the template of inputs, with `...` for the input; empty for plain inputs."""
    name = meta.get("encoding", "labelled")
    if name not in tuple(TEMPLATES):  # a list is not hashable
        raise UserError(f"adapter: encoding {name!r:.40} is not one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name].query("...")
    return "" if template == "..." else template


def check_no_text(meta: dict[str, Any], folder: str) -> None:
    """Raise a UserError if the adapter is used with the task's text in front of every input."""
    if "text" in meta:
        raise UserError(
            f"export: {folder} puts the task's text in front of every input, which an adapter file"
            " cannot express; keep the native folder, which `hyper-t5 predict` reads"
        )
