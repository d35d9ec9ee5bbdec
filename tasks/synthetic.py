"""The embedded default dataset: a small suite of SNI-style tasks, generated from a seed.

A task maps five items (letters, digits or animals) to others by an *order* operation (reverse, drop
the first, ...), an *item* operation (the next letter, the animal's young, ...), or both in this
order. Instructions are plain English in several wordings. Three splits:

- ``train``: every single operation and most compositions;
- ``unseen_compositions``: pairs of operations never trained on together, in trained wordings;
- ``unseen_wordings``: trained tasks, in sentences and phrases never trained on.

Tasks have the form of Super-NaturalInstructions files (``Definition`` lists the wordings).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyper_t5.data.templates import format_example
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.super_ni import sni_tasks
from hyper_t5.utils.errors import UserError

SPLITS = ("train", "unseen_compositions", "unseen_wordings")
LENGTH = 5  # items in an input
HELD_OUT = SPLITS[1:]
INSTANCES = {"train": 400, "unseen_compositions": 100, "unseen_wordings": 100}
HELD_OUT_PER_DOMAIN = 8
REWORDED_PER_DOMAIN = 8
VOCAB_FILE = Path(__file__).with_name("synthetic.model")

# animal: plural, young, home, sound
ANIMALS = {
    "dog": ("dogs", "puppy", "kennel", "woof"),
    "cat": ("cats", "kitten", "basket", "meow"),
    "cow": ("cows", "calf", "barn", "moo"),
    "horse": ("horses", "foal", "stable", "neigh"),
    "sheep": ("sheep", "lamb", "pen", "baa"),
    "duck": ("ducks", "duckling", "pond", "quack"),
    "pig": ("pigs", "piglet", "sty", "oink"),
    "hen": ("hens", "chick", "coop", "cluck"),
    "frog": ("frogs", "tadpole", "marsh", "croak"),
    "lion": ("lions", "cub", "den", "roar"),
    "goat": ("goats", "kid", "hill", "bleat"),
    "owl": ("owls", "owlet", "tree", "hoot"),
    "bee": ("bees", "larva", "hive", "buzz"),
    "wolf": ("wolves", "pup", "lair", "howl"),
    "mouse": ("mice", "pinkie", "hole", "squeak"),
    "eagle": ("eagles", "eaglet", "nest", "screech"),
}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
DOMAINS: dict[str, list[str]] = {
    "letter": list(ALPHABET),
    "number": list("0123456789"),
    "animal": list(ANIMALS),
}

Items = list[str]
# name -> (function, trained phrasings, phrasings kept for unseen_wordings); {s} is the item's noun.
ORDER: dict[str, tuple[Callable[[Items], Items], list[str], list[str]]] = {
    "reverse": (
        lambda x: x[::-1],
        [
            "reverse the {s}s",
            "put the {s}s in reverse order",
            "write the {s}s backwards",
            "list the {s}s from last to first",
        ],
        ["give the {s}s in backwards order", "list the {s}s in reverse"],
    ),
    "rotate_left": (
        lambda x: x[1:] + x[:1],
        [
            "move the first {s} to the end",
            "put the first {s} behind the others",
            "take the first {s} and place it after the last one",
            "shift the {s}s one place to the left",
        ],
        ["place the first {s} at the end", "take the first {s} and put it behind the last one"],
    ),
    "rotate_right": (
        lambda x: x[-1:] + x[:-1],
        [
            "move the last {s} to the front",
            "put the last {s} ahead of the others",
            "take the last {s} and place it before the first one",
            "shift the {s}s one place to the right",
        ],
        ["place the last {s} at the front", "take the last {s} and put it ahead of the first one"],
    ),
    "swap_ends": (
        lambda x: [x[-1], *x[1:-1], x[0]],
        [
            "swap the first and the last {s}",
            "exchange the two outer {s}s",
            "let the first and last {s} trade places",
            "switch the {s}s at both ends",
        ],
        ["exchange the first and the last {s}", "let the two outer {s}s trade places"],
    ),
    "drop_first": (
        lambda x: x[1:],
        [
            "remove the first {s}",
            "leave out the first {s}",
            "drop the {s} at the start",
            "delete the leading {s}",
        ],
        ["delete the first {s}", "leave out the {s} at the start"],
    ),
    "drop_last": (
        lambda x: x[:-1],
        [
            "remove the last {s}",
            "leave out the last {s}",
            "drop the {s} at the end",
            "delete the final {s}",
        ],
        ["delete the last {s}", "leave out the {s} at the end"],
    ),
    "every_other": (
        lambda x: x[::2],
        [
            "keep only the first, third and fifth {s}",
            "keep every other {s}",
            "skip every second {s}",
            "keep the {s}s at odd positions only",
        ],
        ["keep only every other {s}", "keep only the {s}s at odd positions"],
    ),
    "repeat_first": (
        lambda x: x[:1] + x,
        [
            "write the first {s} twice",
            "repeat the first {s}",
            "say the leading {s} two times",
            "double the {s} at the start",
        ],
        ["say the first {s} twice", "repeat the leading {s}"],
    ),
}


def _shift(by: int) -> Callable[[str], str]:
    return lambda c: ALPHABET[(ALPHABET.index(c) + by) % 26]


def _animal(column: int) -> Callable[[str], str]:
    return lambda name: ANIMALS[name][column]


ITEM: dict[str, dict[str, tuple[Callable[[str], str], list[str], list[str]]]] = {
    "letter": {
        "next": (
            _shift(1),
            [
                "replace each letter with the next one in the alphabet",
                "change every letter to its follower in the alphabet",
                "advance each letter by one",
                "move every letter one step forward in the alphabet",
            ],
            ["replace every letter with its follower", "advance every letter one step"],
        ),
        "next_but_one": (
            _shift(2),
            [
                "replace each letter with the one two places later in the alphabet",
                "advance each letter by two",
                "move every letter two steps forward in the alphabet",
                "change every letter to the second letter after it",
            ],
            ["advance every letter two steps", "move each letter forward by two"],
        ),
        "previous": (
            _shift(-1),
            [
                "replace each letter with the previous one in the alphabet",
                "change every letter to the one before it in the alphabet",
                "move every letter one step back in the alphabet",
                "lower each letter by one",
            ],
            ["replace every letter with the previous one", "move each letter back one step"],
        ),
        "previous_but_one": (
            _shift(-2),
            [
                "replace each letter with the one two places earlier in the alphabet",
                "lower each letter by two",
                "move every letter two steps back in the alphabet",
                "change every letter to the second letter before it",
            ],
            ["lower every letter two steps", "move each letter back two steps"],
        ),
        "capital": (
            str.upper,
            [
                "write each letter as a capital",
                "change every letter to upper case",
                "turn the letters into capitals",
                "make all letters upper case",
            ],
            ["turn each letter into a capital", "write the letters in upper case"],
        ),
    },
    "number": {
        "plus_one": (
            lambda x: str((int(x) + 1) % 10),
            [
                "add one to each number, keeping the last digit",
                "increase every number by one",
                "replace each number with its successor",
                "raise each number by 1",
            ],
            ["add one to every number", "increase each number by 1"],
        ),
        "plus_three": (
            lambda x: str((int(x) + 3) % 10),
            [
                "add three to each number, keeping the last digit",
                "increase every number by three",
                "raise each number by 3",
                "make each number three larger",
            ],
            ["add three to every number", "increase each number by 3"],
        ),
        "from_nine": (
            lambda x: str(9 - int(x)),
            [
                "subtract each number from nine",
                "replace each number with nine minus it",
                "write how much each number lacks to nine",
                "take every number away from 9",
            ],
            ["subtract every number from 9", "replace every number with nine minus the number"],
        ),
        "double": (
            lambda x: str(2 * int(x) % 10),
            [
                "double each number, keeping the last digit",
                "multiply every number by two",
                "write twice each number",
                "replace each number with two times it",
            ],
            ["multiply each number by two", "double every number"],
        ),
        "parity": (
            lambda x: "odd" if int(x) % 2 else "even",
            [
                "say for each number whether it is even or odd",
                "write even or odd for every number",
                "name the parity of each number",
                "replace each number with the word odd or even",
            ],
            ["say even or odd for each number", "write the parity of every number"],
        ),
    },
    "animal": {
        "plural": (
            _animal(0),
            [
                "write the plural of each animal",
                "turn every animal into its plural",
                "name more than one of each animal",
                "change each animal to the plural form",
            ],
            ["change every animal to its plural", "name the plural of each animal"],
        ),
        "young": (
            _animal(1),
            [
                "name the young of each animal",
                "replace every animal with its baby",
                "write what the child of each animal is called",
                "turn each animal into its young",
            ],
            ["write the young of every animal", "replace each animal with its young"],
        ),
        "home": (
            _animal(2),
            [
                "name the home of each animal",
                "replace every animal with where it lives",
                "write the place where each animal lives",
                "turn each animal into its home",
            ],
            ["write the home of every animal", "name where each animal lives"],
        ),
        "sound": (
            _animal(3),
            [
                "write the sound of each animal",
                "replace every animal with the noise it makes",
                "say what each animal says",
                "turn each animal into its sound",
            ],
            ["say the sound of every animal", "write the noise each animal makes"],
        ),
        "initial": (
            lambda x: x[0],
            [
                "write the first letter of each animal's name",
                "replace every animal with its initial",
                "name the initial of each animal",
                "shorten each animal to its first letter",
            ],
            ["write the initial of every animal", "shorten every animal to its initial"],
        ),
    },
}

ONE_FRAMES = (
    ["You get five {s}s. {A}.", "{A}.", "Given a list of {s}s, {a}.", "Your task is to {a}."],
    ["You get a list of {s}s. Your task is to {a}.", "Given five {s}s, {a}."],
)
TWO_FRAMES = (
    [
        "You get five {s}s. {A}, then {b}.",
        "First {a}. Then {b}.",
        "Given a list of {s}s, {a} and after that {b}.",
        "{A}; next, {b}.",
    ],
    ["You get a list of {s}s. First {a}, next {b}.", "Given five {s}s, {a}; then {b}."],
)


def _wordings(domain: str, order: str, item: str, held_out: bool, rng: random.Random) -> list[str]:
    """Return distinct instructions for a task, from trained or held-out frames and phrases."""
    parts = [ORDER[order][1:]] if order else []
    parts += [ITEM[domain][item][1:]] if item else []
    frames = (ONE_FRAMES if len(parts) == 1 else TWO_FRAMES)[held_out]
    wordings: dict[str, None] = {}
    while len(wordings) < (2 if held_out else 8):
        phrases = [rng.choice(p[held_out]).format(s=domain) for p in parts]
        a, b = phrases[0], phrases[-1]
        text = rng.choice(frames).format(s=domain, a=a, b=b, A=a[0].upper() + a[1:])
        wordings[text] = None
    return list(wordings)


def _task(domain: str, order: str, item: str, split: str, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}/{domain}/{order}/{item}/{split}")

    def pair() -> tuple[str, str]:
        items = rng.sample(DOMAINS[domain], LENGTH)
        output = ORDER[order][0](items) if order else items
        if item:
            output = [ITEM[domain][item][0](x) for x in output]
        return " ".join(items), " ".join(output)

    distinct: dict[str, str] = {}
    while len(distinct) < INSTANCES[split] + 8:
        x, y = pair()
        distinct.setdefault(x, y)
    pairs = list(distinct.items())
    category = "composition" if order and item else "single operation"
    return {
        "Definition": _wordings(domain, order, item, split == "unseen_wordings", rng),
        "Categories": [f"{domain} {category}"],
        "Positive Examples": [{"input": x, "output": y, "explanation": ""} for x, y in pairs[:8]],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{i}", "input": x, "output": [y]} for i, (x, y) in enumerate(pairs[8:])
        ],
    }


def suite(seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the tasks as contents of SNI files, by split and name; a function of ``seed``."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in SPLITS}
    for domain in DOMAINS:
        pairs = [(o, i) for o in ORDER for i in ITEM[domain]]
        rng = random.Random(f"{seed}/{domain}")
        held_out = set(rng.sample(pairs, HELD_OUT_PER_DOMAIN))
        trained = [(o, "") for o in ORDER] + [("", i) for i in ITEM[domain]]
        trained += [p for p in pairs if p not in held_out]
        reworded = rng.sample(trained, REWORDED_PER_DOMAIN)
        for split, keys in (
            ("train", trained),
            ("unseen_compositions", sorted(held_out)),
            ("unseen_wordings", reworded),
        ):
            for order, item in keys:
                name = "_".join(x for x in (domain, order, item) if x)
                tasks[split][name] = _task(domain, order, item, split, seed)
    return tasks


def documents(seed: int = 0, count: int = 3000) -> list[str]:
    """Return text for hyperpretraining: instructions and examples of training tasks, joined."""
    tasks = list(suite(seed)["train"].values())
    texts = []
    for index in range(count):
        rng = random.Random(f"{seed}/document/{index}")
        task = rng.choice(tasks)
        parts = [rng.choice(task["Definition"])]
        for row in rng.sample(task["Instances"], 8):
            parts.append(format_example((row["input"], row["output"][0])))
            if rng.random() < 0.2:
                parts.append(" " + rng.choice(task["Definition"]))
        texts.append("".join(parts))
    return texts


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load the suite's tasks of one split.

    Raises:
      UserError: unknown split.
    """
    del vocab
    if split not in SPLITS:
        raise UserError(
            f"synthetic: split {split!r} is unknown; the splits are {', '.join(SPLITS)}"
        )
    return sni_tasks("synthetic", split, suite()[split], data_config)


def write(folder: Path, seed: int = 0) -> None:
    """Write the suite as a folder in SNI's format: tasks/*.json and splits/default/*.txt."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "splits" / "default").mkdir(parents=True, exist_ok=True)
    for split, tasks in suite(seed).items():
        names = []
        for name, task in tasks.items():
            name = f"{split}_{name}"
            names.append(name)
            (folder / "tasks" / f"{name}.json").write_text(json.dumps(task, indent=1))
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(names) + "\n")
