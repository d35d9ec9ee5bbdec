"""The embedded suite's examples track: rules that no finite list of instructions covers.

As in `synthetic`, a task maps five items to others by an *order* operation, an *item* operation or
both in this order. Here operations have parameters that are drawn for each task (keep the items at
positions 5, 2 and 3; move every letter 4 steps back; replace every 3 with 8), so that examples say
most rules as well as an instruction. Five splits:

- ``train``: single operations and compositions;
- ``unseen_parameters``: compositions of training, with parameters that no training task has;
- ``unseen_compositions``: ordered pairs of operations that no training task has, with any
  parameters;
- ``silent_compositions``: the same tasks, whose instruction is the same for all: `SILENT`;
- ``silent_train``: training tasks with that instruction and other rows.

Rows are functions of (seed, task, number), generated on access.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hyper_t5.data.task_rows import LazyRows, TaskData, TaskRow
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks import synthetic
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.rows import choose_rows
from hyper_t5.utils.errors import UserError

SPLITS = (
    "train",
    "unseen_parameters",
    "unseen_compositions",
    "silent_compositions",
    "silent_train",
)
HELD_OUT = SPLITS[1:]
SILENT = "Apply the rule that the examples follow."
ROWS = 400  # of a task
HELD_OUT_SHARE = 0.25  # of the ordered pairs of operations
VARIANTS = 16  # parameters drawn for a pair of operations
EVAL_TASKS = 24  # of a held-out split and family

Items = list[str]
# The columns of an animal's row; any of them may be what is shown.
COLUMNS = ("animal", "plural", "young", "home", "sound")
ANIMALS = {name: (name, *others) for name, others in synthetic.ANIMALS.items()}
ITEMS = {
    "letter": list(synthetic.ALPHABET),
    "number": list("0123456789"),
    **{column: [row[i] for row in ANIMALS.values()] for i, column in enumerate(COLUMNS)},
}


class Operation(NamedTuple):
    """An operation on a list of items, with its parameters.

    Attributes:
      kind: its name without parameters: what counts for unseen compositions.
      parameters: as text, '' for none.
      apply: from the items to the outputs.
      phrases: to say it in an instruction; {s} is the noun of the items.
      source: what the items are, where the family alone does not say it.
    """

    kind: str
    parameters: str
    apply: Callable[[Items], Items]
    phrases: tuple[str, ...]
    source: str = ""


# ------------------------------------------------------------------------------- operations


def _select(rng: random.Random) -> Operation:
    positions = rng.sample(range(5), rng.randint(2, 5))
    numbers = [str(p + 1) for p in positions]
    text = f"{', '.join(numbers[:-1])} and {numbers[-1]}"
    phrases = (
        f"write the {{s}}s at positions {text}",
        f"keep only the {{s}}s {text}, in that order",
    )
    return Operation("select", "".join(numbers), lambda x: [x[p] for p in positions], phrases)


def _orders(rng: random.Random) -> Iterator[Operation]:
    for name, (function, phrases, _) in synthetic.ORDER.items():
        yield Operation(name, "", function, tuple(phrases))
    yield _select(rng)


def _each(function: Callable[[str], str]) -> Callable[[Items], Items]:
    return lambda items: [function(x) for x in items]


def _replace(family: str, rng: random.Random) -> Operation:
    old, new = rng.sample(ITEMS[family], 2)
    phrases = (f"replace every {old} with {new}", f"change each {old} to {new}")
    return Operation("replace", old + new, _each(lambda x: new if x == old else x), phrases)


def _letter_items(rng: random.Random) -> Iterator[Operation]:
    by = rng.choice([n for n in range(-6, 7) if n])
    way = "forward" if by > 0 else "back"
    phrases = (
        f"move every letter {abs(by)} steps {way} in the alphabet",
        f"replace each letter with the one {abs(by)} places {'later' if by > 0 else 'earlier'}",
    )
    letters = synthetic.ALPHABET
    yield Operation(
        "shift", f"{way}{abs(by)}", _each(lambda c: letters[(letters.index(c) + by) % 26]), phrases
    )
    yield Operation("capital", "", _each(str.upper), ("write each letter as a capital",))
    yield _replace("letter", rng)


def _number_items(rng: random.Random) -> Iterator[Operation]:
    n = rng.randint(1, 9)
    yield Operation(
        "add",
        f"{n}",
        _each(lambda x: str((int(x) + n) % 10)),
        (f"add {n} to each number, keeping the last digit", f"raise each number by {n}"),
    )
    k = rng.randint(0, 9)
    yield Operation(
        "subtract_from",
        f"{k}",
        _each(lambda x: str((k - int(x)) % 10)),
        (f"subtract each number from {k}, keeping the last digit",),
    )
    m = rng.choice([2, 3, 4, 6, 7, 8, 9])
    yield Operation(
        "multiply",
        f"{m}",
        _each(lambda x: str(m * int(x) % 10)),
        (f"multiply each number by {m}, keeping the last digit",),
    )
    parity = synthetic.ITEM["number"]["parity"]
    yield Operation("parity", "", _each(parity[0]), tuple(parity[1]))
    yield _replace("number", rng)


def _animal_items(rng: random.Random) -> Iterator[Operation]:
    for target, column in enumerate(COLUMNS):
        source = rng.choice([i for i in range(len(COLUMNS)) if i != target])
        table = {row[source]: row[target] for row in ANIMALS.values()}
        of_it = "" if source == 0 else f", given its {COLUMNS[source]}"
        phrases = (
            f"name the {column} of each animal{of_it}",
            f"write each animal's {column}{of_it}",
        )
        yield Operation(
            column,
            COLUMNS[source] * (source > 0),
            _each(table.__getitem__),
            phrases,
            COLUMNS[source],
        )
    yield Operation("initial", "", _each(lambda x: x[0]), ("write the first letter of each name",))


FAMILIES: dict[str, Callable[[random.Random], Iterator[Operation]]] = {
    "letter": _letter_items,
    "number": _number_items,
    "animal": _animal_items,
}

# ------------------------------------------------------------------------------- tasks


class Rule(NamedTuple):
    """One task: a family, and one or two operations."""

    family: str
    operations: tuple[Operation, ...]

    @property
    def name(self) -> str:
        """The name of the task: family, operations and parameters."""
        parts = [f"{o.kind}{o.parameters and '_' + o.parameters}" for o in self.operations]
        return "_".join([self.family, *parts])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The operations without parameters."""
        return tuple(o.kind for o in self.operations)

    @property
    def parameters(self) -> set[tuple[str, str]]:
        """The (kind, parameters) of the operations that have some."""
        return {(o.kind, o.parameters) for o in self.operations if o.parameters}


def _draw(family: str, kinds: tuple[str, ...], rng: random.Random) -> Rule:
    """Return a rule of these operations with parameters drawn by ``rng``."""
    known = {o.kind: o for o in (*_orders(rng), *FAMILIES[family](rng))}
    return Rule(family, tuple(known[kind] for kind in kinds))


def _variants(family: str, kinds: tuple[str, ...], count: int, seed: str) -> dict[str, Rule]:
    rng = random.Random(f"{seed}/{family}/{kinds}")
    rules = (_draw(family, kinds, rng) for _ in range(4 * count))
    distinct = {rule.name: rule for rule in rules}
    return dict(list(distinct.items())[:count])


@functools.cache
def rules(seed: int = 0) -> dict[str, dict[str, Rule]]:
    """Return the rules of ``train`` and of both unseen splits, by name; a function of ``seed``."""
    splits: dict[str, dict[str, Rule]] = {split: {} for split in SPLITS[:3]}
    for family, items in FAMILIES.items():
        rng = random.Random(f"{seed}/{family}")
        orders, own = ([o.kind for o in f(rng)] for f in (_orders, items))
        pairs = [(order, item) for order in orders for item in own]
        held_out = set(rng.sample(pairs, round(HELD_OUT_SHARE * len(pairs))))
        new: dict[str, Rule] = {}
        for kinds in [(kind,) for kind in (*orders, *own)] + pairs:
            drawn = _variants(family, kinds, VARIANTS, f"{seed}")
            if kinds in held_out:
                new |= drawn
            else:
                splits["train"] |= drawn
        splits["unseen_compositions"] |= _choose(new, rng)
        seen = set().union(*(r.parameters for r in splits["train"].values()))
        others: dict[str, Rule] = {}
        for kinds in [kinds for kinds in pairs if kinds not in held_out]:
            drawn = _variants(family, kinds, 4 * VARIANTS, f"{seed}/other")
            others |= {n: r for n, r in drawn.items() if r.parameters and not r.parameters & seen}
        splits["unseen_parameters"] |= _choose(others, rng)
    return splits


def _choose(rules: dict[str, Rule], rng: random.Random) -> dict[str, Rule]:
    names = rng.sample(sorted(rules), min(EVAL_TASKS, len(rules)))
    return {name: rules[name] for name in sorted(names)}


def _row(rule: Rule, split: str, number: int) -> TaskRow:
    rng = random.Random(f"{split == 'train'}/{rule.name}/{number}")
    source = next((o.source for o in rule.operations if o.source), rule.family)
    items = rng.sample(ITEMS[source], synthetic.LENGTH)
    for operation in rule.operations:
        if operation.kind == "replace" and number % 4:  # where nothing changes, nothing is shown
            old = operation.parameters[0]
            if old not in items:
                items[rng.randrange(len(items))] = old
    output = items
    for operation in rule.operations:
        output = operation.apply(output)
    return TaskRow(f"{number}", " ".join(items), (" ".join(output),))


def _instructions(rule: Rule) -> tuple[str, ...]:
    rng = random.Random(rule.name)
    frames = (synthetic.ONE_FRAMES if len(rule.operations) == 1 else synthetic.TWO_FRAMES)[0]
    wordings: dict[str, None] = {}
    for frame in frames:
        phrases = [rng.choice(o.phrases).format(s=rule.family) for o in rule.operations]
        a, b = phrases[0], phrases[-1]
        wordings[frame.format(s=rule.family, a=a, b=b, A=a[0].upper() + a[1:])] = None
    return tuple(wordings)


def _task(rule: Rule, name: str, split: str, most: int) -> TaskData:
    rows = LazyRows(functools.partial(_row, rule, split), range(ROWS))
    instructions = (SILENT,) if split.startswith("silent") else _instructions(rule)
    task = TaskData(name, instructions, (), rows, f"{rule.family}s")
    return choose_rows(task, split, most)


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load the tasks of one split; all have the same rate.

    Raises:
      UserError: unknown split.
    """
    del vocab
    if split not in SPLITS:
        raise UserError(f"rules: split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    base = {"silent_compositions": "unseen_compositions", "silent_train": "train"}.get(split, split)
    chosen = rules()[base]
    if split == "silent_train":
        chosen = _choose(chosen, random.Random(split))
    most = data_config.max_instances_per_task
    readers = {
        f"rules_{split}_{name}": functools.partial(_task, rule, name, split, most)
        for name, rule in chosen.items()
    }
    return TaskSet(f"rules_{split}", readers, (split, most), dict.fromkeys(readers, 1.0))
