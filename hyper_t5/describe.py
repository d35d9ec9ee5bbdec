"""What a mixture really holds, before a run is paid for: ``hyper-t5 data``.

Decoded episodes as the model reads them, lengths against the config's limits, padding, how often
each task is drawn, what is wrong with which task, and how fast batches come. The report is a dict
of plain numbers and texts (``data.json``); ``describe_show`` makes of it what is printed and drawn.

Tasks may have more rows than fit in memory, so lengths come from at most ROWS_LOOKED_AT rows a
task, the same in every run. Labels and repeated inputs come from all rows of a task in memory, and
from those same few of one that stays on disk.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyper_t5 import data, files, metrics
from hyper_t5 import describe_show as show
from hyper_t5.episodes import input_width
from hyper_t5.errors import UserError
from hyper_t5.overrides import choose
from hyper_t5.prompts import ENCODINGS, ShowRule, example_text, show_rule
from hyper_t5.taskfile import LazyRows, Row, TaskRows, text_key
from hyper_t5.vocab import EOS_ID, PAD_ID, UNK_ID, ByteVocabulary, Vocabulary

ROWS_LOOKED_AT = 200  # of a task, for lengths
ONE_LABEL = 0.95  # a warning above this share of rows with one and the same output
CUT = 0.10  # a warning above this share of inputs or targets that lose their end
REPEATED = 0.50  # a warning above this share of rows whose input another row of the task has
BINS = 40  # of a histogram

Report = dict[str, Any]


# -------------------------------------------------------------------------------------- one task


@dataclass(frozen=True)
class TaskFacts:
    """What there is to say of one task; shares are 0..1, lengths in tokens with EOS."""

    name: str
    category: str
    rows: int
    rows_looked_at: int  # for labels and repeated inputs
    rate_share: float  # of the episodes drawn, by the mixture's rates
    wordings: int
    longest_instruction: int
    examples: int  # of its own, to show
    labels: int  # different outputs among those looked at
    top_label: str
    top_label_share: float
    repeated_inputs: float  # share of rows whose input an earlier one has
    empty_outputs: int  # rows
    cut_inputs: float
    cut_targets: float
    skipped: Mapping[str, int] = field(default_factory=dict)


class Texts(NamedTuple):
    """All texts of one kind: [n] lengths in tokens, weights, and whether the end is cut."""

    lengths: np.ndarray
    weights: np.ndarray
    cut: np.ndarray


def look_at_task(
    task: TaskRows, share: float, vocab: Vocabulary, data_config: Any
) -> tuple[TaskFacts, dict[str, Texts]]:
    """One task's facts, and its texts as `data.encoding` writes them, before any cut.

    Args:
        task: the task; its rows may be lazy.
        share: of the episodes drawn.
        vocab: of the ids.
        data_config: `config.data`, for the encoding and the limits.
    """
    few = _few_rows(task)
    looked: Sequence[Row] = few if isinstance(task.rows, LazyRows) else task.rows
    texts = _texts(task, few, share, vocab, data_config)
    labels = Counter(row.outputs[0] for row in looked)
    top, most = labels.most_common(1)[0] if labels else ("", 0)
    different = len({text_key(row.input) for row in looked})
    number = max(1, len(looked))
    facts = TaskFacts(
        name=task.name,
        category=task.category,
        rows=len(task.rows),
        rows_looked_at=len(looked),
        rate_share=share,
        wordings=len(task.instructions),
        longest_instruction=int(texts["instruction"].lengths.max(initial=0)),
        examples=len(task.examples),
        labels=len(labels),
        top_label=top,
        top_label_share=most / number,
        repeated_inputs=1 - different / number if looked else 0.0,
        empty_outputs=sum(not any(text.strip() for text in row.outputs) for row in looked),
        cut_inputs=_share(texts["inputs"].cut),
        cut_targets=_share(texts["targets"].cut),
        skipped=dict(task.skipped),
    )
    return facts, texts


def _texts(
    task: TaskRows, few: Sequence[Row], share: float, vocab: Vocabulary, data_config: Any
) -> dict[str, Texts]:
    """A task's texts by kind, in one call of the tokeniser (its threads need long lists)."""
    c, encoding = data_config, ENCODINGS[data_config.encoding]
    written = {
        "instruction": [encoding.instruction(text) for text in task.instructions],
        "example": [example_text(e, i, c.encoding) for i, e in enumerate(task.examples)],
        "inputs": [encoding.asked(row.input) for row in few],
        "targets": [text for row in few for text in row.outputs],
    }
    ids = iter(vocab.encode_batch([text for texts in written.values() for text in texts]))
    lengths = {
        kind: np.array([len(next(ids)) + 1 for _ in texts], np.int64)
        for kind, texts in written.items()
    }
    limits = {
        "instruction": np.array(c.hyper_length),
        "example": np.array(c.example_length - 1 if c.example_length else np.iinfo(np.int64).max),
        "inputs": np.full(len(few), c.input_length),
        "targets": np.array(c.target_length),
    }
    if c.example_length and few:  # an input has what its output leaves: see episodes.cut_input
        places = np.cumsum([0, *(len(row.outputs) for row in few[:-1])])
        left = c.example_length - lengths["targets"][places]
        limits["inputs"] = np.minimum(limits["inputs"], np.maximum(left, 1))
    return {
        kind: Texts(n, np.full(len(n), share / max(1, len(n))), n > limits[kind])
        for kind, n in lengths.items()
    }


def _few_rows(task: TaskRows) -> list[Row]:
    """At most ROWS_LOOKED_AT rows of a task, drawn by its name, in their order."""
    number = len(task.rows)
    if number <= ROWS_LOOKED_AT:
        return list(task.rows)
    rng = np.random.default_rng([42, zlib.crc32(task.name.encode())])
    places = np.sort(rng.choice(number, ROWS_LOOKED_AT, replace=False, shuffle=False))
    return [task.rows[place] for place in places.tolist()]


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if flags.size else 0.0


def shares_of(tasks: Sequence[TaskRows]) -> np.ndarray:
    """Each task's share of the episodes [tasks]; a task without rows is never drawn."""
    rates = np.array([task.rate if len(task.rows) else 0.0 for task in tasks], np.float64)
    return rates / max(rates.sum(), np.finfo(np.float64).tiny)


def effective_number(shares: np.ndarray) -> float:
    """exp of the shares' entropy: equal shares of n tasks have n (Hill's number of order 1)."""
    kept = shares[shares > 0]
    return float(np.exp(-np.sum(kept * np.log(kept))))


# --------------------------------------------------------------------------------------- batches


def examples_of(batch: data.Batch, slot: int) -> list[dict[str, np.ndarray]]:
    """An episode's examples, each feature's ids without padding; packed rows are taken apart.

    Args:
        batch: of a sampler. Packed, input_segments and target_segments say which example of its
            row each place belongs to; 0 is padding.
        slot: which of the T episodes.
    """
    sides = {"inputs": "input_segments", "targets": "target_segments"}
    found = []
    for g in range(batch["inputs"].shape[1]):
        row = {name: batch[name][slot, g] for name in sides}
        if "input_segments" not in batch:
            found.append({name: _unpadded(ids) for name, ids in row.items()})
            continue
        where = {name: batch[segments][slot, g] for name, segments in sides.items()}
        for number in range(1, 1 + max(int(places.max()) for places in where.values())):
            found.append({name: ids[where[name] == number] for name, ids in row.items()})
    return found


def _features(batch: data.Batch) -> list[str]:
    """The names of a batch's arrays of ids."""
    other = ("_segments", "_positions")
    return [name for name in batch if name != "tasks" and not name.endswith(other)]


def _unpadded(ids: np.ndarray) -> np.ndarray:
    kept = np.flatnonzero(ids != PAD_ID)
    return ids[: kept[-1] + 1] if len(kept) else ids[:0]


def decode(ids: Iterable[int], vocab: Vocabulary) -> str:
    """Ids as text with the specials visible: ``</s>`` ends a part, ``<pad>`` stands inside one."""
    plain = 3 + 256 if isinstance(vocab, ByteVocabulary) else vocab.size
    special = {EOS_ID: "</s>", PAD_ID: "<pad>", UNK_ID: "<unk>"}
    parts: list[str] = []
    waiting: list[int] = []
    for i in (*map(int, ids), -1):  # -1 is no id: it makes an end
        if i not in special and 0 <= i < plain:
            waiting.append(i)
            continue
        parts.append(vocab.decode(waiting) if waiting else "")
        parts.append(special.get(i, f"<{i}>") if i >= 0 else "")
        waiting = []
    return "".join(parts)


@dataclass
class Drawn:
    """What N batches held: counts over all of them, and the lengths of their parts."""

    batches: int = 0
    seconds: float = 0.0
    episodes: int = 0
    examples: int = 0
    rows: int = 0
    real_tokens: int = 0
    tasks: Counter[int] = field(default_factory=Counter)
    real: Counter[str] = field(default_factory=Counter)
    size: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def add(self, batch: data.Batch) -> None:
        """Counts one batch."""
        names = _features(batch)
        self.batches += 1
        self.episodes += len(batch["tasks"])
        self.rows += int(np.prod(batch["inputs"].shape[:2]))
        self.tasks.update(batch["tasks"].tolist())
        self.real_tokens += data.real_tokens({name: batch[name] for name in names})
        for name in names:
            self.real[name] += int(np.count_nonzero(batch[name]))
            self.size[name] += batch[name].size
            if batch[name].ndim == 2:
                self.lengths.setdefault(name, []).extend(np.count_nonzero(batch[name], 1).tolist())
        for slot in range(len(batch["tasks"])):
            for example in examples_of(batch, slot):
                self.examples += 1
                for name, ids in example.items():
                    self.lengths.setdefault(name, []).append(len(ids))


def draw(sampler: data.Sampler, batches: int) -> Drawn:
    """Batches 0, ..., batches - 1, counted; only their making is timed."""
    drawn = Drawn()
    for step in range(batches):
        start = time.perf_counter()
        batch = sampler.batch(step)
        drawn.seconds += time.perf_counter() - start
        drawn.add(batch)
    return drawn


def decoded_episodes(sampler: data.Sampler, vocab: Vocabulary, number: int) -> list[dict[str, Any]]:
    """The first `number` episodes from batch 0 on: task, hyper_inputs and examples, as text."""
    found: list[dict[str, Any]] = []
    for step in range(number):
        batch = sampler.batch(step)
        for slot, task in enumerate(batch["tasks"].tolist()):
            if len(found) == number:
                return found
            episode = {"task": sampler.names[task] if sampler.names else ""}
            episode |= {
                name: decode(_unpadded(batch[name][slot]), vocab)
                for name in _features(batch)
                if batch[name].ndim == 2
            }
            examples = [
                {name: decode(ids, vocab) for name, ids in example.items()}
                for example in examples_of(batch, slot)
            ]
            found.append(episode | {"examples": examples})
    return found


# --------------------------------------------------------------------------------------- lengths


def quantile(values: np.ndarray, weights: np.ndarray, share: float) -> int:
    """The least value that at least `share` of the weight is at or below."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    place = int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-9)))
    return int(values[order][place])


def spread(texts: Texts, limit: int) -> Report:
    """p50, p95, max, share cut and a histogram of lengths.

    Args:
        texts: n of them, weighted.
        limit: of the config; 0 is none.
    """
    values, weights = texts.lengths, texts.weights
    if not len(values) or not weights.sum():
        return {"n": 0, "limit": limit}
    p50, p95 = (quantile(values, weights, share) for share in (0.5, 0.95))
    width = -(-max(limit, p95) * 5 // (4 * BINS))  # whole tokens, so that no bar is empty by chance
    edges = np.arange(BINS + 1) * width
    shares, _ = np.histogram(np.minimum(values, edges[-1]), edges, weights=weights)
    return {
        "n": len(values),
        "p50": p50,
        "p95": p95,
        "max": int(values.max()),
        "limit": limit,
        "cut": float(weights[texts.cut].sum() / weights.sum()),
        "histogram": {"edges": edges.tolist(), "shares": (shares / weights.sum()).tolist()},
    }


def _batch_spread(drawn: Drawn, name: str, limit: int, cut: float) -> Report:
    """`spread` of what batches held, of which the share `cut` was cut."""
    values = np.array(drawn.lengths.get(name, ()), np.int64)
    texts = Texts(values, np.ones(len(values)), np.zeros(len(values), bool))
    return spread(texts, limit) | {"cut": cut}


# -------------------------------------------------------------------------------------- warnings


class Check(NamedTuple):
    """Something that may be wrong with a task that has rows.

    `text` may name fields of `config.data` as {c.field}; `note` goes in brackets behind the name.
    """

    kind: str
    text: str
    wrong: Callable[[TaskFacts, Any, ShowRule], bool]
    note: Callable[[TaskFacts], str] = lambda _: ""


def _label(task: TaskFacts) -> str:
    return repr(show.short(show.visible(task.top_label), 24))


CHECKS = (
    Check("one_output", "all rows have one output", lambda t, *_: t.labels == 1, _label),
    Check(
        "one_label",
        f"over {ONE_LABEL:.0%} of rows have one output",
        lambda t, *_: t.labels > 1 and t.top_label_share > ONE_LABEL,
        _label,
    ),
    Check(
        "empty_outputs",
        "rows whose output is nothing (data.empty_targets={c.empty_targets})",
        lambda t, *_: t.empty_outputs > 0,
        lambda t: f"{t.empty_outputs} of {t.rows_looked_at}",
    ),
    Check(
        "long_instruction",
        "instruction over data.hyper_length={c.hyper_length}, in training "
        "data.on_long_instruction={c.on_long_instruction}",
        lambda t, c, rule: rule.instruction and t.longest_instruction > c.hyper_length,
        lambda t: str(t.longest_instruction),
    ),
    Check(
        "cut_inputs",
        f"over {CUT:.0%} of inputs are cut at data.input_length={{c.input_length}}",
        lambda t, *_: t.cut_inputs > CUT,
        lambda t: f"{t.cut_inputs:.0%}",
    ),
    Check(
        "cut_targets",
        f"over {CUT:.0%} of targets are cut at data.target_length={{c.target_length}}",
        lambda t, *_: t.cut_targets > CUT,
        lambda t: f"{t.cut_targets:.0%}",
    ),
    Check(
        "no_examples",
        "no examples of their own, other rows are shown",
        lambda t, _, rule: rule.most > 0 and not t.examples,
    ),
    Check(
        "repeated_inputs",
        f"over {REPEATED:.0%} of rows have the input of an earlier one",
        lambda t, *_: t.repeated_inputs > REPEATED,
        lambda t: f"{t.repeated_inputs:.0%}",
    ),
)


def find_warnings(
    tasks: Sequence[TaskFacts],
    data_config: Any,
    rule: ShowRule,
    others: Mapping[str, Sequence[str]],
) -> list[Report]:
    """What is wrong with which tasks: dicts of kind, text, tasks, and a note for each task.

    Args:
        tasks: all of a split.
        data_config: `config.data`.
        rule: what is shown of a task.
        others: split -> names of its tasks, for those on the other side of the evaluation.
    """
    full = [task for task in tasks if task.rows]
    empty = [task for task in tasks if not task.rows]
    found = [_warning("empty", "no rows, never drawn", empty)]
    for check in CHECKS:
        wrong = [task for task in full if check.wrong(task, data_config, rule)]
        found.append(_warning(check.kind, check.text.format(c=data_config), wrong, check.note))
    for split, names in others.items():
        both = set(names)
        shared = [task for task in tasks if task.name in both]
        found.append(_warning("overlap", f"also in split {split}", shared))
    return [warning for warning in found if warning["tasks"]]


def _warning(
    kind: str,
    text: str,
    tasks: Sequence[TaskFacts],
    note: Callable[[TaskFacts], str] = lambda _: "",
) -> Report:
    names = [task.name for task in tasks]
    return {"kind": kind, "text": text, "tasks": names, "notes": [note(task) for task in tasks]}


def other_names(
    mixture: str, split: str, data_config: Any, vocab: Vocabulary
) -> dict[str, list[str]]:
    """Names of the tasks that `split` should have none of: the held-out ones', or the trained.

    A module of tasks may have ``task_names(data_config, split)``, which reads no rows; else the
    other split is read. One that is not there is left out.
    """
    module = importlib.import_module(data.MIXTURES[mixture])
    found = {}
    for other in module.HELD_OUT if split == "train" else ("train",):
        with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
            if hasattr(module, "task_names"):
                found[other] = list(module.task_names(data_config, other))
            else:
                found[other] = [t.name for t in data.load_tasks(mixture, data_config, other, vocab)]
    return found


# ---------------------------------------------------------------------------------------- report


def describe(
    config: Any,
    name: str = "",
    out: Path | None = None,
    episodes: int = 3,
    steps: int = 50,
    start: float | None = None,
) -> Report:
    """Looks at a mixture, or at `data.text`; prints the report, and writes it where `out` is given.

    Args:
        config: a whole config.
        name: what `data.find_mixture` knows; '' is the text of `data.text`.
        out: a folder for data.json and lengths.png.
        episodes: how many to decode.
        steps: batches to draw.
        start: `time.perf_counter()` when start-up began; now by default.

    Raises:
        UserError: unknown name, bad data, or `out` cannot be written.
    """
    start = time.perf_counter() if start is None else start
    config = config.copy_and_resolve_references()
    if out is not None:
        files.check_writable(out / "data.json")
    if name:
        mixture, split, fields = data.find_mixture(name)
        config.update_from_flattened_dict({"data.mixture": mixture, **fields})
        report = look_at_mixture(config, split, episodes, steps, start)
    else:
        report = look_at_text(config, episodes, steps, start)
    report["name"] = name or report["name"]
    print("\n".join(show.lines(report, ROWS_LOOKED_AT)), flush=True)
    if out is not None:
        files.write_json(out / "data.json", report)
        show.plot_lengths(report, out / "lengths.png")
        print(f"\nwritten: {out / 'data.json'}, {out / 'lengths.png'}")
    return report


def look_at_mixture(
    config: Any, split: str, episodes: int, steps: int, start: float | None = None
) -> Report:
    """The report on one split of `config.data.mixture`; `config` is changed.

    On a split to evaluate, `eval.shots` says how many examples are shown. Over-long instructions
    are cut here whatever `data.on_long_instruction` says: a warning names them all. `start` is when
    start-up began, by `time.perf_counter`.
    """
    clock = [time.perf_counter() if start is None else start]
    mixture, layout, vocab = config.data.mixture, _layout(config), data.mixture_vocab(config.data)
    importlib.import_module("hyper_t5.tasks.common")  # TensorFlow
    module = importlib.import_module(data.MIXTURES[mixture])
    clock.append(time.perf_counter())
    if split in module.HELD_OUT and split != "train" and not config.data.variant:
        config.data.shots = (config.eval.shots, config.eval.shots)
    tasks = data.load_tasks(mixture, config.data, split, vocab)
    clock.append(time.perf_counter())
    drawable = [task for task in tasks if len(task.rows)]
    if not drawable:
        raise UserError(f"{mixture}, split {split}: none of its {len(tasks)} tasks has a row")
    cutting = config.data.copy_and_resolve_references()
    cutting.on_long_instruction = "truncate"
    sampler = data.EpisodeSampler(drawable, vocab, cutting, config.seed, layout)
    clock.append(time.perf_counter())
    drawn = draw(sampler, steps)
    speed = _speed(drawn, dict(zip(("import", "read", "sampler"), np.diff(clock), strict=True)))
    stats = Counter(sampler.stats)
    shares = shares_of(tasks)
    looked = [
        look_at_task(task, float(share), vocab, config.data)
        for task, share in zip(tasks, shares, strict=True)
    ]
    facts = [fact for fact, _ in looked]
    drawn_of = {sampler.names[i]: n / drawn.episodes for i, n in drawn.tasks.items()}
    skipped: Counter[str] = Counter()
    for task in tasks:
        skipped.update(task.skipped)
    others = other_names(mixture, split, config.data, vocab)
    return _common(config, layout, vocab, drawn, speed) | {
        "name": f"{mixture}_{split}",
        "mixture": mixture,
        "split": split,
        "tasks": len(tasks),
        "rows": sum(fact.rows for fact in facts),
        "skipped": dict(skipped),
        "episodes": decoded_episodes(sampler, vocab, episodes),
        "lengths": _task_lengths(config.data, layout, [n for _, n in looked], drawn, stats),
        "examples_dropped": stats["dropped_examples"]
        / max(1, stats["dropped_examples"] + stats["shown_examples"]),
        "examples_missing": stats["missing_examples"] / max(1, drawn.episodes),
        "effective_tasks": effective_number(shares),
        "compared_with": sorted(others),
        "by_task": [asdict(f) | {"drawn_share": drawn_of.get(f.name, 0.0)} for f in facts],
        "warnings": find_warnings(
            facts, config.data, show_rule(config.data, layout == "concat"), others
        ),
    }


def look_at_text(config: Any, episodes: int, steps: int, start: float | None = None) -> Report:
    """The report on `config.data.text`, cut as hyperpretraining cuts it; see `look_at_mixture`."""
    clock = [time.perf_counter() if start is None else start]
    layout, vocab = _layout(config), data.mixture_vocab(config.data)
    source = importlib.import_module("hyper_t5.tasks.text")
    clock.append(time.perf_counter())
    chunks = source.open_chunks(config.data, vocab, config.seed)
    clock.append(time.perf_counter())
    sampler = data.TextSampler(chunks, config.data, config.seed, layout)
    clock.append(time.perf_counter())
    drawn = draw(sampler, steps)
    speed = _speed(drawn, dict(zip(("import", "read", "sampler"), np.diff(clock), strict=True)))
    c = config.data
    limits = {"hyper_inputs": c.hyper_length, "inputs": c.input_length, "targets": c.target_length}
    if layout == "concat":
        limits["inputs"] += c.hyper_length
    lengths = {
        name: _batch_spread(drawn, name, limit, 0.0)
        for name, limit in limits.items()
        if not (layout == "concat" and name == "hyper_inputs")
    }
    return _common(config, layout, vocab, drawn, speed) | {
        "name": config.data.text,
        "chunks": len(chunks) if hasattr(chunks, "__len__") else None,
        "chunk_tokens": sampler.stats["tokens"] / max(1, sampler.stats["chunks"]),
        "episodes": decoded_episodes(sampler, vocab, episodes),
        "lengths": lengths,
        "warnings": [],
    }


def _layout(config: Any) -> str:
    from hyper_t5.hypermodels import SYSTEMS  # imports JAX

    return SYSTEMS[choose("system", config.system, SYSTEMS)].layout


def _task_lengths(
    data_config: Any,
    layout: str,
    looked: Sequence[Mapping[str, Texts]],
    drawn: Drawn,
    stats: Mapping[str, int],
) -> dict[str, Report]:
    """Lengths of the tasks' texts before any cut, and of the conditioning as batches had it."""
    c, rule = data_config, show_rule(data_config, layout == "concat")
    limits = {"inputs": c.input_length, "targets": c.target_length}
    if rule.instruction:
        limits["instruction"] = c.hyper_length
    if rule.most:
        limits["example"] = c.example_length
    found = {}
    for name, limit in limits.items():
        columns = zip(*(texts[name] for texts in looked), strict=True)
        found[name] = spread(Texts(*map(np.concatenate, columns)), limit)
    if layout == "concat":
        cut = stats["truncated_inputs"] / max(1, drawn.examples)
        found["text and input"] = _batch_spread(drawn, "inputs", input_width(c, layout), cut)
    else:
        cut = stats["truncated_conditionings"] / max(1, drawn.episodes)
        found["conditioning"] = _batch_spread(drawn, "hyper_inputs", c.hyper_length, cut)
    return {name: found[name] for name in _LENGTHS if name in found}


_LENGTHS = ("instruction", "example", "conditioning", "text and input", "inputs", "targets")


def _speed(drawn: Drawn, start_up: Mapping[str, float]) -> Report:
    """Seconds, and counts a second; called before anything else takes memory."""
    seconds = max(drawn.seconds, 1e-9)
    return {
        "start_up_seconds": {name: float(s) for name, s in start_up.items()},
        "batches": drawn.batches,
        "batch_seconds": drawn.seconds,
        "episodes_per_second": drawn.episodes / seconds,
        "examples_per_second": drawn.examples / seconds,
        "real_tokens_per_second": drawn.real_tokens / seconds,
        "peak_rss_mb": metrics.peak_memory_mb(),
    }


def _common(config: Any, layout: str, vocab: Vocabulary, drawn: Drawn, speed: Report) -> Report:
    """What a report on tasks and one on text both have."""
    c = config.data
    real, size = sum(drawn.real.values()), sum(drawn.size.values())
    counted = {name: (drawn.real[name], drawn.size[name]) for name in drawn.size}
    return {
        "vocabulary": {**vocab.identity(), "size": vocab.size},
        "system": config.system,
        "layout": layout,
        "limits": {key: c[key] for key in ("hyper_length", "input_length", "target_length")},
        "tasks_per_batch": drawn.episodes // max(1, drawn.batches),
        "rows_per_task": drawn.rows // max(1, drawn.episodes),
        "examples_per_row": drawn.examples / max(1, drawn.rows),
        "padding": {
            name: {"real": r, "size": s, "share": 1 - r / max(1, s)}
            for name, (r, s) in {**counted, "all": (real, size)}.items()
        },
        "speed": speed,
    }
