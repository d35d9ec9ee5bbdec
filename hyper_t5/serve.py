"""Use: a task's text to an adapter folder, an adapter to outputs, an adapter to other tools.

No TensorFlow here: these commands start fast and run where only JAX is installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import export as export_lib
from hyper_t5 import files, model, names, weights
from hyper_t5.decoding import decode
from hyper_t5.errors import UserError
from hyper_t5.taskfile import format_conditioning, read_task_file
from hyper_t5.vocab import EOS_ID

# ------------------------------------------------------------------------------------------- adapt


def adapt(
    workdir: str | Path,
    task: str | Path,
    out: str | Path,
    format: str = "native",
    base_model: str = "",
) -> Path:
    """Read a task file, generate its adapter, write it as a ``native`` or ``peft`` folder.

    Shows the hypermodel the instruction and as many examples as it was trained on
    (``data.shots``) that fit its length. Returns the folder.
    """
    config, m, backbone, params = model.load_run(workdir)
    if m.hypermodel is None:
        raise UserError(
            f"{workdir}: system={config.system} emits no adapters; adapt needs a run "
            "of a hypermodel such as system=hyper_prefix"
        )
    instruction, examples = read_task_file(task)
    shown = examples[: config.data.shots[1]] if config.data.shots[1] else []
    ids, dropped = format_conditioning(
        instruction if config.data.use_instruction else "",
        shown,
        backbone.vocab,
        config.data.hyper_length,
        where=str(task),
    )
    padded = np.zeros((1, config.data.hyper_length), np.int32)
    padded[0, : len(ids)] = ids
    adapters = model.generate(m, params, jnp.asarray(padded))
    assert adapters is not None
    meta = {
        "backbone": weights.backbone_meta(
            backbone.sizes, backbone.vocab.identity(), backbone.params
        ),
        "system": config.system,
        "instruction": instruction,
        "examples_shown": len(shown) - dropped,
        "input_length": config.data.input_length,
    }
    if format == "peft":
        base = base_model or config.backbone.path
        return export_lib.export_peft(out, adapters, backbone.sizes, base)
    return ad.save(out, adapters, meta)


# ----------------------------------------------------------------------------------------- predict


def predict(
    backbone: str | Path,
    adapters: Sequence[str | Path],
    input: str | Path,
    output: str | Path,
    *,
    batch: int = 32,
    max_decode_length: int = 128,
    beam_size: int = 1,
) -> int:
    """Run a jsonl of ``{"input": ...}`` rows; write the rows with ``"output"`` added, in order.

    With several adapters each row says by ``"adapter": NAME`` which folder's it is for; rows of
    different adapters share a batch. Returns the number of rows.
    """
    base = model.load_backbone(backbone, config_lib.defaults())
    names = [Path(a).name for a in adapters]
    loaded = [_load_adapter(a, base) for a in adapters]
    if len(set(names)) < len(names):
        raise UserError(
            f"--adapter: two folders are named {sorted(names)}; rename one, since rows "
            "name their adapter by its folder"
        )
    rows = _read_rows(Path(input), names)
    ids = [[*base.vocab.encode(row["input"]), EOS_ID] for row in rows]
    length = _bucket(max((len(x) for x in ids), default=1))
    group = max(1, batch // len(names))  # rows of one adapter in a batch
    every = ad.concatenate(loaded)
    queues = [[i for i, row in enumerate(rows) if row["adapter"] == name] for name in names]
    made: dict[int, str] = {}
    while any(queues):
        block = np.zeros((len(names), group, length), np.int32)
        places = []
        for t, queue in enumerate(queues):
            for g, i in enumerate(queue[:group]):
                block[t, g, : len(ids[i])] = ids[i]
                places.append((i, t * group + g))
            queues[t] = queue[group:]
        decoded, _ = decode(
            base.sizes,
            base.params,
            jnp.asarray(block.reshape(-1, length)),
            every,
            steps=max_decode_length,
            beam_size=beam_size,
        )
        made |= {i: base.vocab.decode(np.asarray(decoded[place]).tolist()) for i, place in places}
        print(f"predict: row {len(made)}/{len(rows)}", flush=True)
    for i, row in enumerate(rows):
        row["output"] = made[i]
    files.write_json_lines(Path(output), rows)
    return len(rows)


def _load_adapter(folder: str | Path, base: model.Backbone) -> ad.Adapters:
    adapters, meta = ad.load(folder)
    weights.check_compatible(
        base.sizes,
        base.vocab.identity(),
        meta.get("backbone", {}),
        digest=names.digest(base.params),
        where=str(folder),
    )
    ad.check(adapters, base.sizes, str(folder))
    return adapters


def _read_rows(path: Path, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"--input {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--input {path}: is not UTF-8 text; convert it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(
                f"{path}:{number}: not JSON ({e.msg}); give one object a line"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("input"), str):
            raise UserError(f'{path}:{number}: needs a field "input" with text')
        name = row.setdefault("adapter", names[0] if len(names) == 1 else None)
        if name not in names:
            raise UserError(
                f'{path}:{number}: field "adapter" is {name!r}; with several adapters '
                f"it names one of {', '.join(names)}"
            )
        rows.append(row)
    return rows


def _bucket(length: int) -> int:
    """The next power of two, 16 at least: few shapes, few compilations."""
    return max(16, 1 << (length - 1).bit_length())


# ------------------------------------------------------------------------------------------ export


def export(adapter: str | Path | None, out: str | Path, format: str, backbone: str | Path) -> Path:
    """Write an adapter for other tools.

    ``peft``: a PEFT folder. ``merged``: the backbone with LoRA inside, in Hugging Face's layout.
    ``backbone``: the backbone alone in that layout, for ``PeftModel`` to load the adapter onto.
    """
    base = model.load_backbone(backbone, config_lib.defaults())
    if format == "backbone":
        weights.save_hf(out, base.sizes, base.params, base.vocab)
        return Path(out)
    if adapter is None:
        raise UserError(f"--format {format} needs --adapter, the folder that `hyper-t5 adapt` made")
    adapters = _load_adapter(adapter, base)
    if format == "peft":
        return export_lib.export_peft(out, adapters, base.sizes, str(backbone))
    weights.save_hf(out, base.sizes, export_lib.merge_lora(base.params, adapters), base.vocab)
    return Path(out)
