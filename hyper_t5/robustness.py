"""How much of its task's text a model reads: the same rows under text that was changed.

Every change of `changes.CHANGES` and every number of shown examples is judged as `hyper-t5
evaluate` judges, over the same rows, and compared task by task with what was not changed. A model
that answers as well with another task's text ignores its conditioning, however good it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import distributed, evaluate, files, intervals, plots, protocols
from hyper_t5.changes import CHANGES, Change, same, settle
from hyper_t5.errors import UserError
from hyper_t5.evaluate import Subject
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.prompts import ShowRule, show_rule

SHOTS = (0, 1, 2, 4, 8, 16)
EXAMPLES_SHOWN = 2  # for changes of examples, where a config shows none
UNCHANGED = "unchanged"
OTHER_TASK = "all text of another task"
PARTS = {  # what is told of a model: the change that decides it, and the words for the text
    OTHER_TASK: "its conditioning",
    "instruction of another task": "its instruction",
    "examples of another task": "its examples",
}


class Asking(NamedTuple):
    """One way to ask all tasks: a change, so many examples shown, and what it is compared with."""

    name: str
    change: Change
    shots: int
    base: str


class Found(NamedTuple):
    """What came of it: the quality of each task (by 'split/task'), answers, examples shown."""

    quality: dict[str, float]
    answers: list[str]
    shown: float


# ------------------------------------------------------------------------------------- the command


def robustness(
    workdirs: Sequence[str | Path],
    out: str | Path,
    overrides: Any = (),
    shots: Sequence[int] = SHOTS,
    metric: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Judge runs under changed text; writes OUT/robustness.json and .png, and prints tables.

    Answers are kept in OUT/answers until all is there: after a stop the next call goes on. Returns
    what is in the file, on process 0; on the others nothing.

    ``metric``: a metric of tasks, the same for all; '' is each benchmark's own.
    """
    runs, place = [], files.as_path(out)
    answers = place / "answers"
    for number, workdir in enumerate(workdirs):
        subject, _ = evaluate.run_subject(workdir, overrides)
        found = ask_all(subject, answers / str(number), shots, metric, seed)
        runs.append({"system": subject.config.system, "workdir": str(workdir), **report(found)})
    if not distributed.is_first():
        return {}
    made = {"seed": seed, "shots": list(shots), "metric": metric or "headline", "runs": runs}
    for run in runs:
        print(f"\n{run['workdir']}\n{table(run)}\n" + "\n".join(run["verdicts"]))
    files.write_json(place / "robustness.json", made)
    picture = plots.robustness(named(runs), place / "robustness.png")
    print(f"\n{place / 'robustness.json'}\n{picture}")
    with files.as_os_error():
        answers.rmtree()
    return made


def askings(config: ConfigDict, shots: Sequence[int]) -> list[Asking]:
    """What is asked, each behind what it is compared with."""
    rule, usual, nothing = _rule(config), _shots(config), Change(same, "nothing")
    fewest = 0 if rule.instruction else 1
    with_examples = usual or EXAMPLES_SHOWN
    counts = sorted({*(n for n in shots if n >= fewest), with_examples} - {usual})
    made = [Asking(UNCHANGED, nothing, usual, UNCHANGED)]
    made += [Asking(shown(n), nothing, n, UNCHANGED) for n in counts]
    for name, change in CHANGES.items():
        if change.of == "instruction" and not rule.instruction:
            continue
        if change.of == "examples" and with_examples != usual:
            made.append(Asking(name, change, with_examples, shown(with_examples)))
        else:
            made.append(Asking(name, change, usual, UNCHANGED))
    return made


def shown(shots: int) -> str:
    """The name of asking with so many examples."""
    return f"{shots} example{'' if shots == 1 else 's'}"


def _rule(config: ConfigDict) -> ShowRule:
    return show_rule(config.data, SYSTEMS[config.system].layout == "concat")


def _shots(config: ConfigDict) -> int:
    """How many examples an evaluation shows."""
    return _rule(config).most if config.data.variant else int(config.eval.shots)


def _with_shots(config: ConfigDict, shots: int) -> ConfigDict:
    """The same evaluation with so many examples."""
    made = config.copy_and_resolve_references()
    made.eval.shots = shots
    if config.data.variant:
        parts = ["def"] if _rule(config).instruction else []
        parts += [f"pos_{shots}"] if shots else []
        made.data.variant = "_".join(parts)
    return made


def ask_all(
    subject: Subject,
    folder: epath.Path,
    shots: Sequence[int] = SHOTS,
    metric: str = "",
    seed: int = 0,
) -> dict[Asking, Found]:
    """Every asking of a run and what came of it, on process 0; what reads the same is asked once.

    ``folder``: where answers are kept, FOLDER/NUMBER for each asking.
    """
    s, config = subject, subject.config
    digests: dict[Asking, str] = {}
    found: dict[str, Found] = {}
    loaded = {
        split: (mixture, settle(tasks, config.eval.max_rows_per_task))
        for split, (mixture, tasks) in evaluate.load(config, s.backbone).items()
    }
    for number, asking in enumerate(askings(config, shots)):
        distributed.say(f"\n== {asking.name}")
        its = dataclasses.replace(s, config=_with_shots(config, asking.shots))
        changed = {
            split: (mixture, asking.change.make(tasks, seed))
            for split, (mixture, tasks) in loaded.items()
        }
        asked = evaluate.ask(its.config, s.m, s.backbone, changed)
        key = _digest(asked)
        if key not in digests.values():
            kept = evaluate.answered(its, asked, folder / str(number))
            if distributed.is_first():  # what was answered before a stop is only there
                found[key] = _found(*evaluate.judge(its.config, asked, kept.rows()), metric)
        digests[asking] = key
    return {asking: found[key] for asking, key in digests.items() if key in found}


def _digest(asked: Sequence[evaluate.Asked]) -> str:
    """Of all that the model is given, so that what reads the same is told."""
    made = hashlib.sha256()
    for _, _, task, _ in asked:
        for part in (task.name.encode(), task.hyper_ids.tobytes(), task.inputs.tobytes()):
            made.update(part)
    return made.hexdigest()


def _found(report: dict[str, Any], predictions: Sequence[dict[str, Any]], metric: str) -> Found:
    quality, examples = {}, []
    mixtures = {row["split"]: row["mixture"] for row in predictions}
    for split, told in report["splits"].items():
        name = metric or protocols.of_mixture(mixtures[split]).headline
        for task, scores in told["per_task"].items():
            if name not in scores:
                numbers = [key for key, value in scores.items() if isinstance(value, float)]
                raise UserError(f"--metric: task {task} has no {name}; it has {', '.join(numbers)}")
            quality[f"{split}/{task}"] = float(scores[name])
            examples.append(scores["examples_shown"])
    answers = [row["prediction"] for row in predictions]
    return Found(quality, answers, float(np.mean(examples)))


# --------------------------------------------------------------------------------- what is told


def report(found: dict[Asking, Found]) -> dict[str, Any]:
    """What is told of a run: each asking beside its base, and the verdicts.

    Of each: ``quality``, the mean over tasks; ``shown``, the mean number of examples; the
    ``difference`` to ``base`` with its paired ``interval`` over tasks; ``same_answers``, the % of
    rows that are answered as there.
    """
    named = {asking.name: came for asking, came in found.items()}
    lines = {}
    for asking, came in found.items():
        base = named[asking.base]
        tasks, difference, ends = intervals.difference(_parts(came), _parts(base))
        pairs = zip(came.answers, base.answers, strict=True)
        lines[asking.name] = {
            "shots": asking.shots,
            "changed": asking.change.of,
            "base": asking.base,
            "tasks": tasks,
            "shown": came.shown,
            "quality": intervals.ratio(_parts(came)),
            "difference": difference,
            "interval": ends,
            "same_answers": 100 * float(np.mean([one == other for one, other in pairs])),
            "per_task": came.quality,
        }
    return {"askings": lines, "verdicts": verdicts(lines)}


def _parts(found: Found) -> intervals.Parts:
    return {task: (score, 1.0) for task, score in found.quality.items()}


def verdicts(lines: dict[str, dict[str, Any]]) -> list[str]:
    """In plain words: whether the text, the instruction and the examples are read."""
    return [verdict(lines[name], words) for name, words in PARTS.items() if name in lines]


def verdict(line: dict[str, Any], words: str) -> str:
    """Of one change to another task's text: what it says of the model."""
    low, high = line["interval"] or (-np.inf, np.inf)
    told = (
        f"({line['difference']:+.1f} with another task's, 95 % interval [{low:+.1f}, {high:+.1f}], "
        f"{line['tasks']} tasks; {line['same_answers']:.0f} % of answers stay the same)"
    )
    if line["same_answers"] == 100:
        return f"IGNORES {words}: all answers are the same with another task's {told}"
    if high < 0:
        return f"reads {words} {told}"
    if low > 0:
        return f"is MISLED by {words}: it is better with another task's {told}"
    return f"makes NO USE of {words} that these tasks show {told}"


def table(run: dict[str, Any]) -> str:
    """A line an asking, as aligned text."""
    lines = [["change", "examples", "quality", "difference", "95 % interval", "same answers", "to"]]
    for name, told in run["askings"].items():
        cells = [name, f"{told['shown']:.1f}", f"{told['quality']:.1f}"]
        if name != told["base"]:
            low, high = told["interval"] or (np.nan, np.nan)
            cells += [f"{told['difference']:+.1f}", f"[{low:+.1f}, {high:+.1f}]"]
            cells += [f"{told['same_answers']:.0f} %", told["base"]]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    return evaluate.aligned(lines)


def named(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs by a name that tells them apart: the system, or the folder where it is not alone."""
    systems = [run["system"] for run in runs]
    return {
        run["system"] if systems.count(run["system"]) == 1 else run["workdir"]: run for run in runs
    }


def read(file: str | Path) -> dict[str, dict[str, Any]]:
    """The runs of a robustness.json, `named`.

    Raises:
        UserError: the file is not one.
    """
    made = files.read_json(file)
    try:
        for run in made["runs"]:
            "".join([table(run), *run["verdicts"]])
        return named(made["runs"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: not what `hyper-t5 robustness` wrote") from None
