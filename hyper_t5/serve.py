"""Use: a task's text to an adapter folder, an adapter to outputs, an adapter to other tools.

No TensorFlow here: these commands start fast and run where only JAX is installed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
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
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.prompts import ENCODINGS, format_conditioning, show_rule
from hyper_t5.t5 import T5Config
from hyper_t5.taskfile import read_task_file
from hyper_t5.vocab import EOS_ID, Vocabulary, load_vocab

# ------------------------------------------------------------------------------------------- adapt


def adapt(
    workdir: str | Path,
    task: str | Path,
    out: str | Path,
    format: str = "native",
    base_model: str = "",
) -> Path:
    """Read a task file, generate its adapter, write it as a ``native`` or ``peft`` folder.

    Shows the hypermodel what it was trained on (``prompts.show_rule``): the instruction, and as
    many examples as fit its length. Returns the folder.
    """
    config, m, backbone, params = model.load_run(workdir)
    instruction, examples = read_task_file(task)
    rule = show_rule(config.data, m.choice.layout == "concat")
    shown = examples[: rule.most]
    ids, dropped, _ = format_conditioning(
        instruction if rule.instruction else "",
        shown,
        backbone.vocab,
        config.data,
        where=str(task),
        layout=m.choice.layout,
    )
    number = model.task_number(m, Path(task).stem, model.tasks_of(workdir))
    meta = {
        "backbone": weights.backbone_meta(
            backbone.sizes, backbone.vocab.identity(), backbone.params
        ),
        "system": config.system,
        "instruction": instruction,
        "examples_shown": len(shown) - dropped,
        "input_length": config.data.input_length,
        "encoding": config.data.encoding,
    }
    if m.choice.layout == "concat":  # this text goes in front of each input
        meta["text"] = [int(i) for i in ids]
    adapters, hypermodel = ad.Adapters({}, ad.AdapterSpec()), None
    if m.choice.reads == "input":
        meta |= {"config": config.to_dict(), "task_number": number}
        hypermodel = params[HYPERMODEL]
    elif m.hypermodel is not None:
        padded = np.zeros((1, config.data.hyper_length), np.int32)
        padded[0, : len(ids)] = ids
        made = model.generate(m, params, jnp.asarray(padded), jnp.array([number]))
        assert made is not None
        adapters = made
    if format == "peft":
        _refuse_text(meta, f"system={config.system}")
        base = base_model or config.backbone.path
        return export_lib.export_peft(out, adapters, backbone.sizes, base)
    return ad.save(out, adapters, meta, hypermodel)


def _refuse_text(meta: dict[str, Any], where: str) -> None:
    """UserError for what is no adapter alone, and so in no other tool's format."""
    if "text" in meta:
        raise UserError(
            f"export: {where} puts the task's text in front of every input, which no adapter file "
            "can say; keep the native folder, which `hyper-t5 predict` reads"
        )


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
    names = [Path(a).name for a in adapters]
    if len(set(names)) < len(names):
        raise UserError(
            f"--adapter: two folders are named {sorted(names)}; rename one, since rows "
            "name their adapter by its folder"
        )
    rows = _read_rows(Path(input), names)
    files.check_writable(Path(output))  # before the long work
    base, loaded = _load(backbone, adapters)
    if base.vocab is None:
        raise UserError(
            f"{backbone}: does not say its vocabulary; `hyper-t5 export --format backbone` it, put "
            "its spiece.model into the folder made, and give that"
        )
    ids = []
    for row in rows:
        task = loaded[names.index(row["adapter"])]
        encoding = ENCODINGS[task.meta.get("encoding", "labelled")]
        label = base.vocab.encode(encoding.label)
        front = [*task.text[:-1], *label] if len(task.text) > 1 else []
        ids.append([*front, *base.vocab.encode(encoding.asked(row["input"])), EOS_ID])
    # What reads the inputs has adapters of its own for each: no two share a batch.
    apart = any(task.model is not None for task in loaded)
    made: dict[int, str] = {}
    for group in [[name] for name in names] if apart else [names]:
        tasks = [task for task, name in zip(loaded, names, strict=True) if name in group]
        queues = [[i for i, row in enumerate(rows) if row["adapter"] == name] for name in group]
        how = {"steps": max_decode_length, "beam_size": beam_size}
        for places, decoded in _decode_queues(base, tasks, queues, ids, batch, how):
            made |= {i: base.vocab.decode(decoded[place].tolist()) for i, place in places}
            print(f"predict: row {len(made)}/{len(rows)}", flush=True)
    for i, row in enumerate(rows):
        row["output"] = made[i]
    files.write_json_lines(Path(output), rows)
    return len(rows)


@dataclasses.dataclass(frozen=True)
class _Base:
    """A backbone as its folder has it; vocab None where that does not say."""

    sizes: T5Config
    params: dict[str, Any]
    vocab: Vocabulary | None


@dataclasses.dataclass(frozen=True)
class _Task:
    """A native adapter folder: what makes a backbone do one task."""

    adapters: ad.Adapters
    meta: dict[str, Any]
    text: list[int]  # goes in front of each input; empty where nothing does
    model: model.Model | None  # makes adapters of each input, with the parameters hypermodel
    hypermodel: dict[str, Any] | None


def _load(backbone: str | Path, adapters: Sequence[str | Path]) -> tuple[_Base, list[_Task]]:
    """The backbone, stored as it was when the adapters were made for it, and the adapters."""
    found = [ad.load(folder) for folder in adapters]
    made_for = [meta.get("backbone", {}) for _, meta, _ in found]
    folder = model.backbone_folder(backbone)
    dtype = made_for[0].get("dtype", "float32") if found else "float32"
    sizes, params, identity = weights.load_backbone(folder, dtype=dtype)
    plain = T5Config()  # how to compute is no business of the folder's
    sizes = dataclasses.replace(sizes, dtype=plain.dtype, remat=plain.remat)
    base = _Base(sizes, params, load_vocab(identity, folder) if identity else None)
    digest = names.digest(params) if found else ""
    tasks = []
    for path, (loaded, meta, hyper), made in zip(adapters, found, made_for, strict=True):
        weights.check_compatible(sizes, identity, made, digest=digest, where=str(path))
        ad.check(loaded, sizes, str(path))
        m = None
        if hyper is not None:
            config = config_lib.from_json(json.dumps(meta.get("config")), str(path))
            m = model.build(config, sizes)
            model.check_hypermodel(hyper, model.shapes_of_hypermodel(m), str(path))
        tasks.append(_Task(loaded, meta, meta.get("text", []), m, hyper))
    return base, tasks


def _decode_queues(
    base: _Base,
    tasks: Sequence[_Task],
    queues: list[list[int]],
    ids: Sequence[Sequence[int]],
    batch: int,
    how: dict[str, Any],
) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
    """Batches of up to ``batch`` rows, as many of each task: ((row, place) pairs, decoded ids)."""
    share = max(1, batch // len(tasks))  # rows of one task in a batch
    length = _bucket(max((len(ids[i]) for queue in queues for i in queue), default=1))
    every = ad.concatenate([task.adapters for task in tasks])
    while any(queues):
        block = np.zeros((len(tasks), share, length), np.int32)
        places = []
        for t, queue in enumerate(queues):
            for g, i in enumerate(queue[:share]):
                block[t, g, : len(ids[i])] = ids[i]
                places.append((i, t * share + g))
            queues[t] = queue[share:]
        rows, m = jnp.asarray(block.reshape(-1, length)), tasks[0].model
        if m is None:
            decoded, _ = decode(base.sizes, base.params, rows, every, **how)
        else:
            params = {BACKBONE: base.params, HYPERMODEL: tasks[0].hypermodel}
            numbers = jnp.full(len(rows), tasks[0].meta["task_number"], jnp.int32)
            decoded = model.respond(m, params, None, rows, numbers, **how)
        yield places, np.asarray(decoded)


def _read_rows(path: Path, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    try:
        # Not splitlines(), which also cuts at characters that JSON may hold, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
        except RecursionError:
            raise UserError(f"{path}:{number}: nested too deeply for a row") from None
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}:{number}: holds half a surrogate pair, no character") from None
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


def export(
    adapter: str | Path | None,
    out: str | Path,
    format: str,
    backbone: str | Path,
    base_model: str = "",
) -> Path:
    """Write an adapter for other tools.

    ``peft``: a PEFT folder that names ``base_model`` (default: the backbone's folder). ``merged``:
    the backbone with LoRA inside, in Hugging Face's layout. ``backbone``: the backbone alone in
    that layout, for ``PeftModel`` to load the adapter onto.
    """
    if format != "backbone" and adapter is None:
        raise UserError(f"--format {format} needs --adapter, the folder that `hyper-t5 adapt` made")
    base, loaded = _load(backbone, [adapter] if format != "backbone" and adapter else [])
    if format != "backbone":
        _refuse_text(loaded[0].meta, str(adapter))
    if format == "peft":
        base_name = base_model or str(backbone)
        return export_lib.export_peft(out, loaded[0].adapters, base.sizes, base_name)
    merged = format == "merged"
    params = export_lib.merge_lora(base.params, loaded[0].adapters) if merged else base.params
    weights.save_hf(out, base.sizes, params, base.vocab)
    return Path(out)
