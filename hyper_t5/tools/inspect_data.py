"""Statistics of a mixture or of text, as batches hold them: ``hyper-t5 data``.

Decoded episodes, lengths against the config's limits, padding, sampling rates, warnings about
tasks, and the speed of the data pipeline. The report is a dict of plain values (``data.json``);
`inspect_report` prints it.

Lengths are those of at most `MEASURED_ROWS` rows of a task, the same ones in every run. Labels and
repeated inputs are counted over all rows of a task in memory, and over the measured rows of a lazy
one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyper_t5 import pipeline
from hyper_t5.data import batch as batch_lib
from hyper_t5.data.batch import SIDES, Batch, Layout
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.task_rows import LazyRows, TaskData, TaskRow, text_key
from hyper_t5.data.templates import TEMPLATES, ConditioningRule, conditioning_rule, format_example
from hyper_t5.data.text_corpus import TextSampler
from hyper_t5.data.vocab import EOS_ID, PAD_ID, UNK_ID, ByteVocabulary, Vocabulary
from hyper_t5.tasks.rows import choose_rows
from hyper_t5.tools import inspect_report
from hyper_t5.utils import files, memory
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import choose

MEASURED_ROWS = 200  # of a task
# Shares above which a warning names the task.
ONE_LABEL = 0.95  # of rows with the most frequent output
CUT = 0.10  # of inputs or targets that are truncated
REPEATED = 0.50  # of rows whose input an earlier row has

Report = dict[str, Any]


def describe(
    config: Any,
    name: str = "",
    out: Path | None = None,
    episodes: int = 3,
    steps: int = 50,
    start: float | None = None,
) -> Report:
    """Print the report on a mixture or on ``data.text``, write it under ``out``, and return it.

    Args:
      config: a whole config.
      name: a name of `pipeline.find_mixture`; '' is the text of ``data.text``.
      out: a folder for data.json.
      episodes: number of episodes to decode, of those in the batches.
      steps: number of batches to draw.
      start: ``time.perf_counter()`` when start-up began; now by default.

    Raises:
      UserError: an unknown name, invalid data, or ``out`` cannot be written.
    """
    start = time.perf_counter() if start is None else start
    config = config.copy_and_resolve_references()
    if out is not None:
        files.check_writable(out / "data.json")
    if name:
        mixture, split, fields = pipeline.find_mixture(name)
        config.update_from_flattened_dict({"data.mixture": mixture, **fields})
        report = mixture_report(config, split, episodes, steps, start) | {"name": name}
    else:
        report = text_report(config, episodes, steps, start)
    print("\n".join(inspect_report.lines(report, MEASURED_ROWS)), flush=True)
    if out is not None:
        files.write_json(out / "data.json", report)
        print(f"\nwritten: {out / 'data.json'}")
    return report


# ------------------------------------------------------------------------------- reports


def mixture_report(
    config: Any, split: str, episodes: int, steps: int, start: float | None = None
) -> Report:
    """Return the report on one split of ``config.data.mixture``; changes ``config``.

    ``eval.shots`` is the number of examples on a held-out split. Over-long instructions are cut
    whatever ``data.on_long_instruction`` is, and a warning names all of them.
    """
    clock = [time.perf_counter() if start is None else start]
    c, mixture, layout = config.data, config.data.mixture, _layout(config)
    vocab = pipeline.mixture_vocab(c)
    importlib.import_module("hyper_t5.tasks.seqio_tasks")  # TensorFlow, whose time is reported
    clock.append(time.perf_counter())
    if split in pipeline.held_out_splits(mixture) and split != "train" and not c.variant:
        c.shots = (config.eval.shots, config.eval.shots)
    tasks = pipeline.load_tasks(mixture, c, split, vocab)
    clock.append(time.perf_counter())
    with_rows = [task for task in tasks if len(task.rows)]
    if not with_rows:
        raise UserError(f"{mixture}, split {split}: none of its {len(tasks)} tasks has a row")
    truncating = c.copy_and_resolve_references()
    truncating.on_long_instruction = "truncate"
    sampler = EpisodeSampler(with_rows, vocab, truncating, config.seed, layout)
    clock.append(time.perf_counter())
    batches, seconds = draw(sampler, steps)
    common = _common_fields(config, layout, vocab, batches, seconds, clock)
    counts, shares = sampler.stats, rate_shares(tasks)
    stats, texts = [], []
    for task, share in zip(tasks, shares.tolist(), strict=True):
        of_task, task_texts = task_stats(task, share, vocab, c)
        stats.append(of_task)
        texts.append(task_texts)
    drawn = Counter(sampler.names[i] for batch in batches for i in batch["tasks"].tolist())
    others = opposite_tasks(mixture, split, c, vocab)
    shown, dropped = counts["shown_examples"], counts["dropped_examples"]
    return common | {
        "name": f"{mixture}_{split}",
        "mixture": mixture,
        "split": split,
        "tasks": len(tasks),
        "rows": sum(task["rows"] for task in stats),
        "skipped": dict(sum((Counter(task.skipped) for task in tasks), Counter())),
        "episodes": decoded_episodes(batches, sampler.names, vocab, episodes),
        "lengths": _task_lengths(c, layout, texts, shares, batches, counts),
        "examples_dropped": dropped / max(1, dropped + shown),
        "examples_missing": counts["missing_examples"] / max(1, counts["episodes"]),
        "effective_tasks": effective_number(shares),
        "compared_with": sorted(others),
        "by_task": [t | {"drawn_share": drawn[t["name"]] / drawn.total()} for t in stats],
        "warnings": find_warnings(stats, c, conditioning_rule(c, layout), others),
    }


def text_report(config: Any, episodes: int, steps: int, start: float | None = None) -> Report:
    """Return the report on ``config.data.text``, split as in hyperpretraining."""
    clock = [time.perf_counter() if start is None else start]
    c, layout = config.data, _layout(config)
    vocab = pipeline.mixture_vocab(c)
    text = importlib.import_module("hyper_t5.tasks.text")  # TensorFlow
    clock.append(time.perf_counter())
    chunks = text.open_chunks(c, vocab, config.seed)
    clock.append(time.perf_counter())
    sampler = TextSampler(chunks, c, config.seed, layout)
    clock.append(time.perf_counter())
    batches, seconds = draw(sampler, steps)
    spec = batch_lib.batch_spec(c, layout, text=True)
    names = [n for n in batch_lib.IDS if not (layout.in_inputs and n == "hyper_inputs")]
    return _common_fields(config, layout, vocab, batches, seconds, clock) | {
        "name": c.text,
        "chunks": len(chunks) if hasattr(chunks, "__len__") else None,
        "chunk_tokens": sampler.stats["tokens"] / max(1, sampler.stats["chunks"]),
        "episodes": decoded_episodes(batches, (), vocab, episodes),
        "lengths": {name: _batch_lengths(batches, name, spec[name].shape[-1]) for name in names},
        "warnings": [],
    }


def _layout(config: Any) -> Layout:
    from hyper_t5.hypermodels import SYSTEMS  # imports JAX

    return SYSTEMS[choose("system", config.system, SYSTEMS)].layout


def _common_fields(
    config: Any,
    layout: Layout,
    vocab: Vocabulary,
    batches: Sequence[Batch],
    seconds: float,
    clock: Sequence[float],
) -> Report:
    """Return the fields of both reports; ``clock`` has the times between the parts of start-up."""
    c, (tasks, rows) = config.data, batches[0]["inputs"].shape[:2]
    examples, count = sum(map(batch_lib.example_count, batches)), len(batches)
    padding = {}
    for name in batch_lib.IDS:
        real = sum(int(np.count_nonzero(batch[name])) for batch in batches)
        padding[name] = {"real": real, "size": count * batches[0][name].size}
    padding["all"] = {key: sum(p[key] for p in padding.values()) for key in ("real", "size")}
    parts = zip(("import", "read", "sampler"), np.diff(clock).tolist(), strict=True)
    return {
        "vocabulary": {**vocab.identity(), "size": vocab.size},
        "system": config.system,
        "layout": layout.name,
        "limits": {key: c[key] for key in ("hyper_length", "input_length", "target_length")},
        "tasks_per_batch": tasks,
        "rows_per_task": rows,
        "examples_per_row": examples / (count * tasks * rows),
        "padding": {name: p | {"share": 1 - p["real"] / p["size"]} for name, p in padding.items()},
        "speed": {
            "start_up_seconds": dict(parts),
            "batches": count,
            "batch_seconds": seconds,
            "episodes_per_second": count * tasks / seconds,
            "examples_per_second": examples / seconds,
            "real_tokens_per_second": padding["all"]["real"] / seconds,
            "peak_rss_mb": memory.peak_memory_mb(),
        },
    }


# ------------------------------------------------------------------------------- tasks


class Texts(NamedTuple):
    """The texts of one kind: lengths in tokens [n], and whether they are truncated [n]."""

    lengths: np.ndarray
    cut: np.ndarray


def task_stats(
    task: TaskData, share: float, vocab: Vocabulary, data_config: Any
) -> tuple[Report, dict[str, Texts]]:
    """Return a task's statistics, and its texts by kind in ``data.template`` before truncation.

    Args:
      task: its rows may be lazy.
      share: of the episodes, by the mixture's rates.
      vocab: to encode with.
      data_config: ``config.data``.
    """
    few = list(choose_rows(task, "train", MEASURED_ROWS).rows)
    rows: Sequence[TaskRow] = few if isinstance(task.rows, LazyRows) else task.rows
    count = max(1, len(rows))
    texts = _texts(task, few, vocab, data_config)
    labels = Counter(row.outputs[0] for row in rows)
    [(top_label, top_count)] = labels.most_common(1) or [("", 0)]
    stats = {
        "name": task.name,
        "category": task.category,
        "rows": len(task.rows),
        "rows_looked_at": len(rows),  # for labels and repeated inputs
        "rate_share": share,
        "wordings": len(task.instructions),
        "longest_instruction": int(texts["instruction"].lengths.max(initial=0)),
        "examples": len(task.examples),
        "labels": len(labels),  # distinct outputs
        "top_label": top_label,
        "top_label_share": top_count / count,
        "repeated_inputs": (len(rows) - len({text_key(row.input) for row in rows})) / count,
        "empty_outputs": sum(not any(text.strip() for text in row.outputs) for row in rows),
        "cut_inputs": float(texts["inputs"].cut.mean()) if rows else 0.0,
        "cut_targets": float(texts["targets"].cut.mean()) if rows else 0.0,
        "skipped": dict(task.skipped),
    }
    return stats, texts


def _texts(
    task: TaskData, rows: Sequence[TaskRow], vocab: Vocabulary, data_config: Any
) -> dict[str, Texts]:
    c, template = data_config, TEMPLATES[data_config.template]
    texts = {
        "instruction": [template.instruction(text) for text in task.instructions],
        "example": [format_example(e, i, c.template) for i, e in enumerate(task.examples)],
        "inputs": [template.query(row.input) for row in rows],
        "targets": [text for row in rows for text in row.outputs],
    }
    # One call: the tokenizer's threads need long lists.
    ids = iter(vocab.encode_batch([text for of_kind in texts.values() for text in of_kind]))
    lengths = {
        kind: np.array([len(next(ids)) + 1 for _ in of_kind], np.int64)
        for kind, of_kind in texts.items()
    }
    limits = {
        "instruction": c.hyper_length,
        "example": c.example_length - 1 if c.example_length else np.iinfo(np.int64).max,
        "inputs": np.full(len(rows), c.input_length),
        "targets": c.target_length,
    }
    if c.example_length and rows:  # the output comes first: see episodes.cut_input
        first_outputs = np.cumsum([0, *(len(row.outputs) for row in rows[:-1])])
        left = c.example_length - lengths["targets"][first_outputs]
        limits["inputs"] = np.minimum(limits["inputs"], np.maximum(left, 1))
    return {kind: Texts(n, n > limits[kind]) for kind, n in lengths.items()}


def rate_shares(tasks: Sequence[TaskData]) -> np.ndarray:
    """Return each task's share of the episodes, [tasks]; a task without rows is never drawn."""
    rates = np.array([task.rate if len(task.rows) else 0.0 for task in tasks], np.float64)
    return rates / max(rates.sum(), np.finfo(np.float64).tiny)


def effective_number(shares: np.ndarray) -> float:
    """Return exp(entropy) of shares: n for n equal shares (Hill number of order 1)."""
    positive = shares[shares > 0]
    return float(np.exp(-np.sum(positive * np.log(positive))))


# ------------------------------------------------------------------------------- batches


def draw(sampler: pipeline.Sampler, steps: int) -> tuple[list[Batch], float]:
    """Return the batches of the first steps, and the seconds that the sampler took."""
    start = time.perf_counter()
    batches = [sampler.batch(step) for step in range(steps)]
    return batches, time.perf_counter() - start


def examples_of(batch: Batch, slot: int) -> list[dict[str, np.ndarray]]:
    """Return the inputs and targets of an episode's examples, without padding."""
    examples = []
    for row in range(batch["inputs"].shape[1]):
        ids = {f"{side}s": batch[f"{side}s"][slot, row] for side in SIDES}
        if "input_segments" not in batch:
            examples.append({name: _unpadded(array) for name, array in ids.items()})
            continue
        segments = {f"{side}s": batch[f"{side}_segments"][slot, row] for side in SIDES}
        for number in range(1, 1 + max(int(array.max()) for array in segments.values())):
            examples.append({name: ids[name][segments[name] == number] for name in ids})
    return examples


def decoded_episodes(
    batches: Sequence[Batch], names: Sequence[str], vocab: Vocabulary, count: int
) -> list[dict[str, Any]]:
    """Return the first episodes as text: task, hyper_inputs, and inputs and targets of examples."""
    slots = ((batch, slot) for batch in batches for slot in range(len(batch["tasks"])))
    return [
        {
            "task": names[batch["tasks"][slot]] if names else "",
            "hyper_inputs": decode(_unpadded(batch["hyper_inputs"][slot]), vocab),
            "examples": [
                {name: decode(ids, vocab) for name, ids in example.items()}
                for example in examples_of(batch, slot)
            ],
        }
        for batch, slot in itertools.islice(slots, count)
    ]


def decode(ids: Iterable[int], vocab: Vocabulary) -> str:
    """Decode ids with the special ones visible: ``</s>``, ``<pad>``, ``<unk>``, ``<id>``."""
    plain = 3 + 256 if isinstance(vocab, ByteVocabulary) else vocab.size
    special = {EOS_ID: "</s>", PAD_ID: "<pad>", UNK_ID: "<unk>"}
    groups = itertools.groupby(map(int, ids), key=lambda i: i in special or not 0 <= i < plain)
    return "".join(
        "".join(special.get(i, f"<{i}>") for i in group) if specials else vocab.decode(list(group))
        for specials, group in groups
    )


def _unpadded(ids: np.ndarray) -> np.ndarray:
    return ids[: np.flatnonzero(ids != PAD_ID).max(initial=-1) + 1]


# ------------------------------------------------------------------------------- lengths


def length_stats(
    values: np.ndarray, limit: int, cut: float, weights: np.ndarray | None = None
) -> Report:
    """Return p50, p95 and max of lengths [n] with weights [n].

    Args:
      values: in tokens.
      limit: of the config; 0 is none.
      cut: the share of texts that is truncated.
      weights: by default all equal.
    """
    weights = np.ones(len(values)) if weights is None else weights
    if not weights.sum():
        return {"n": 0, "limit": limit}
    p50, p95 = np.quantile(values, (0.5, 0.95), weights=weights, method="inverted_cdf").tolist()
    longest = int(values.max())
    return {"n": len(values), "p50": p50, "p95": p95, "max": longest, "limit": limit, "cut": cut}


def _batch_lengths(batches: Sequence[Batch], name: str, limit: int, cut: float = 0.0) -> Report:
    if name == "hyper_inputs":
        lengths = [np.count_nonzero(batch[name], axis=1) for batch in batches]
        return length_stats(np.concatenate(lengths), limit, cut)
    slots = [(batch, slot) for batch in batches for slot in range(len(batch["tasks"]))]
    sizes = [len(example[name]) for slot in slots for example in examples_of(*slot)]
    return length_stats(np.array(sizes), limit, cut)


def text_lengths(texts: Sequence[Texts], shares: np.ndarray, limit: int) -> Report:
    """Return `length_stats` of the texts of tasks, weighted by the tasks' shares [tasks]."""
    lengths, cut = (np.concatenate(arrays) for arrays in zip(*texts, strict=True))
    sizes = np.array([len(of_task.lengths) for of_task in texts])
    weights = np.repeat(shares / np.maximum(sizes, 1), sizes)
    cut_share = float(weights[cut].sum() / max(weights.sum(), np.finfo(np.float64).tiny))
    return length_stats(lengths, limit, cut_share, weights)


def _task_lengths(
    data_config: Any,
    layout: Layout,
    texts: Sequence[Mapping[str, Texts]],
    shares: np.ndarray,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
) -> dict[str, Report]:
    """Return lengths of the tasks' texts before truncation, and of the conditioning in batches."""
    c, rule = data_config, conditioning_rule(data_config, layout)
    limits = {"instruction": c.hyper_length} if rule.instruction else {}
    limits |= {"example": c.example_length} if rule.most else {}
    limits |= {"inputs": c.input_length, "targets": c.target_length}
    lengths = {
        kind: text_lengths([of_task[kind] for of_task in texts], shares, limit)
        for kind, limit in limits.items()
    }
    if layout.in_inputs:
        cut = counts["truncated_inputs"] / max(1, sum(map(batch_lib.example_count, batches)))
        limit = layout.input_length(c)
        lengths["text and input"] = _batch_lengths(batches, "inputs", limit, cut)
    else:
        cut = counts["truncated_conditionings"] / max(1, counts["episodes"])
        lengths["conditioning"] = _batch_lengths(batches, "hyper_inputs", c.hyper_length, cut)
    return lengths


# ------------------------------------------------------------------------------- warnings


def find_warnings(
    tasks: Sequence[Report],
    data_config: Any,
    rule: ConditioningRule,
    others: Mapping[str, Sequence[str]],
) -> list[Report]:
    """Return defects as dicts of kind, text, names of tasks, and a note for each task.

    Args:
      tasks: `task_stats` of a split.
      data_config: ``config.data``.
      rule: the conditioning.
      others: split -> its task names, of `opposite_tasks`.
    """
    c = data_config
    full = [task for task in tasks if task["rows"]]
    warnings: list[Report] = []

    def warn(
        kind: str,
        text: str,
        defective: Sequence[Report],
        note: Callable[[Report], str] = lambda task: "",
    ) -> None:
        names, notes = [t["name"] for t in defective], [note(t) for t in defective]
        if names:
            warnings.append({"kind": kind, "text": text, "tasks": names, "notes": notes})

    def warn_of_share(field: str, limit: float, text: str) -> None:
        defective = [t for t in full if t[field] > limit]
        warn(field, f"over {limit:.0%} of {text}", defective, lambda t: f"{t[field]:.0%}")

    def label(task: Report) -> str:
        return repr(inspect_report.shorten(inspect_report.visible(task["top_label"]), 24))

    warn("empty", "no rows, never drawn", [t for t in tasks if not t["rows"]])
    warn("one_output", "all rows have one output", [t for t in full if t["labels"] == 1], label)
    warn(
        "one_label",
        f"over {ONE_LABEL:.0%} of rows have one output",
        [t for t in full if t["labels"] > 1 and t["top_label_share"] > ONE_LABEL],
        label,
    )
    warn(
        "empty_outputs",
        f"rows with an empty output (data.empty_targets={c.empty_targets})",
        [t for t in full if t["empty_outputs"]],
        lambda t: f"{t['empty_outputs']} of {t['rows_looked_at']}",
    )
    warn(
        "long_instruction",
        f"instruction over data.hyper_length={c.hyper_length}, in training "
        f"data.on_long_instruction={c.on_long_instruction}",
        [t for t in full if rule.instruction and t["longest_instruction"] > c.hyper_length],
        lambda t: str(t["longest_instruction"]),
    )
    warn_of_share("cut_inputs", CUT, f"inputs are cut at data.input_length={c.input_length}")
    warn_of_share("cut_targets", CUT, f"targets are cut at data.target_length={c.target_length}")
    no_examples = [t for t in full if rule.most and not t["examples"]]
    warn("no_examples", "no examples of their own, other rows are shown", no_examples)
    warn_of_share("repeated_inputs", REPEATED, "rows have the input of an earlier one")
    for split, names in others.items():
        shared = set(names)
        warn("overlap", f"also in split {split}", [t for t in tasks if t["name"] in shared])
    return warnings


def opposite_tasks(
    mixture: str, split: str, data_config: Any, vocab: Vocabulary
) -> dict[str, list[str]]:
    """Return task names by split that ``split`` should share none with: held-out or training ones.

    A split that cannot be read is left out.
    """
    names = {}
    for other in pipeline.held_out_splits(mixture) if split == "train" else ("train",):
        with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
            tasks = pipeline.load_tasks(mixture, data_config, other, vocab)
            names[other] = [task.name for task in tasks]
    return names
