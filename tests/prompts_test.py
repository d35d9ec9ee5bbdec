"""How tasks are written: variants, Tk-Instruct's text to the character, MetaICL's rules."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from sentencepiece import SentencePieceProcessor

import runs
import tiny
from hyper_t5 import config as config_lib
from hyper_t5 import data, prompts
from hyper_t5.errors import UserError
from hyper_t5.taskfile import Example, Row, TaskRows, text_key
from hyper_t5.vocab import EOS_ID, ByteVocabulary, load_vocab

BYTES = ByteVocabulary()


def make_config(**fields: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.data.update(
        mixture="sni",
        vocab="bytes",
        extra_ids=0,
        hyper_length=400,
        input_length=300,
        target_length=20,
        tasks_per_batch=2,
        examples_per_task=3,
    )
    config.data.update(fields)
    config.eval.max_rows_per_task = 4
    return config


def task(rows: int = 8, examples: int = 3, **fields: Any) -> TaskRows:
    return TaskRows(
        fields.pop("name", "t"),
        ("Say it.",),
        tuple((f"shown {i}", f"s{i}") for i in range(examples)),
        tuple(Row(f"{i}", f"row {i}", (f"a{i}",)) for i in range(rows)),
        **fields,
    )


def text_of(ids: np.ndarray) -> str:
    return BYTES.decode(ids[ids > 0].tolist())


# ------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    ("variant", "instruction", "shown"),
    [
        ("def", True, []),
        ("def_pos_1", True, [0]),
        ("def_pos_2", True, [0, 1]),
        ("def_pos_9", True, [0, 1, 2]),
        ("pos_2", False, None),
    ],
)
def test_variants(variant: str, instruction: bool, shown: list[int] | None) -> None:
    """def_pos_k shows the first k; pos_k any k. A variant goes before shots and use_instruction."""
    config = make_config(variant=variant, shots=(1, 1), use_instruction=not instruction)
    first = len(shown or ())
    sampler = data.EpisodeSampler([task()], BYTES, config.data, 0)
    config.data.tasks_per_batch = 1
    seen = set()
    for step in range(12):
        text = text_of(sampler.batch(step)["hyper_inputs"][0])
        assert text.startswith("Say it.") == instruction
        found = [int(x[6]) for x in text.split("\nInput: ")[1:] if x.startswith("shown")]
        if shown is None:
            assert len(found) == len(set(found)) == 2
            seen.add(tuple(found))
        else:
            assert found[: min(first, 3)] == shown
    assert shown is not None or len(seen) > 3, "not drawn"
    text = text_of(data.eval_episodes([task()], BYTES, config)[0].hyper_ids)
    wanted = [0, 1] if shown is None else shown
    assert [int(x[6]) for x in text.split("\nInput: ")[1:] if x[:5] == "shown"] == wanted


@pytest.mark.parametrize(
    "variant", ["de", "pos_0", "pos", "def_", "defpos_1", "def_pos_x", "pos_1_"]
)
def test_unknown_variants_are_refused(variant: str) -> None:
    config = make_config(variant=variant)
    config.backbone.path = "x"
    with pytest.raises(UserError, match=r"data\.variant='.*' is unknown: 'def'"):
        config_lib.validate(config)


# ---------------------------------------------------------------------------- Tk-Instruct


def golden_cases() -> list[Any]:
    """Written by Tk-Instruct's own collator, with bytes as tokens (tests/golden/README.md)."""
    return json.loads((tiny.GOLDEN / "tk_instruct.json").read_text())["cases"]


def golden_task() -> TaskRows:
    raw = json.loads((tiny.GOLDEN / "tk_instruct.json").read_text())["task"]
    shown = tuple((e["input"], e["output"]) for e in raw["Positive Examples"])
    return TaskRows("t", tuple(raw["Definition"]), shown, ())


@pytest.mark.parametrize("definition", [True, False])
@pytest.mark.parametrize("examples", [0, 1, 2, 3])
def test_tk_instruct_to_the_character(examples: int, definition: bool) -> None:
    variant = ("def" if definition else "") + ("_" if definition and examples else "")
    variant += f"pos_{examples}" if examples else ""
    cases = [
        c for c in golden_cases() if (c["examples"], c["definition"]) == (examples, definition)
    ]
    assert len(cases) > 10
    for case in cases:
        config = make_config(
            variant=variant,
            shots=(0, 0),
            use_instruction=definition,
            encoding="tk_instruct",
            concat_length=case["length"],
            input_length=1000,
            on_long_instruction="truncate",
        )
        config.eval.shots = 0
        row = Row("0", case["input"], ("x",))
        asked = TaskRows("t", golden_task().instructions, golden_task().examples, (row,))
        [found] = data.eval_episodes([asked], BYTES, config, "concat")
        assert text_of(found.inputs[0]) == case["source"], case
        assert found.inputs.shape == (1, case["length"])
        assert found.truncated_inputs == (not case["whole"])
        config.data.update(tasks_per_batch=1, examples_per_task=1)
        if definition or not examples:  # else they are drawn
            batch = data.EpisodeSampler([asked], BYTES, config.data, 0, "concat").batch(0)
            assert text_of(batch["inputs"][0, 0]) == case["source"]


# Of what the collator gives for the first 100 rows of the test tasks at hand, as T5's ids and
# decoded again: in 7 rows "###" is "##", "#" in one text and "#", "##" in its parts.
DIGESTS = {
    ("def", 1024): "293349548b130ee544594ada30eaecadbfcc5cdb6c5e6a931121b1fd2c9fee4f",
    ("def_pos_1", 1024): "388df5637c9b644e93ff73fcaed2cdbda3e71b8d80f32ca898e00a656dcbaa0b",
    ("def_pos_2", 1024): "13f9ac3ae2694c6839c896ebdb1e2f25b6979a782ef326583c5d1592fde598ff",
    ("def_pos_2", 256): "35cae4015440077fb9e8ae98656b9fcb18978136e23245ed8f090a7fd5666185",
}


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "length"), DIGESTS)
def test_tk_instruct_on_real_rows(
    variant: str, length: int, shared_dir: Path, real_data: Any
) -> None:
    model = str(shared_dir / "data" / "tokenizer" / "spiece.model")
    vocab, pieces = load_vocab(model), SentencePieceProcessor(model)
    config = make_config(
        variant=variant,
        encoding="tk_instruct",
        concat_length=length,
        sni_dir=str(real_data("sni")),
        on_missing_task="skip",
        empty_targets="keep",
        input_length=10_000,
        on_long_instruction="truncate",
    )
    config.eval.max_rows_per_task = 100
    digest, rows = hashlib.sha256(), 0
    tasks = []
    for task in data.load_tasks("sni", config.data, "test", vocab):
        # It shows what it asks, or one example twice, and we do not: leave such tasks out.
        shown = [text_key(text) for text, _ in task.examples]
        asked = {text_key(row.input) for row in task.rows[:100]}
        if len(set(shown)) == len(shown) and not asked & set(shown):
            tasks.append(task)
    for found in data.eval_episodes(tasks, vocab, config, "concat"):
        for name, ids in zip(found.ids, found.inputs, strict=True):
            text = pieces.decode(ids[ids > 0][:-1].tolist())
            digest.update(repr((found.name, name, text)).encode())
            rows += 1
    assert rows == 10010
    assert digest.hexdigest() == DIGESTS[variant, length]


# --------------------------------------------------------------------------------- MetaICL


def metaicl(k: int, max_length: int, example_length: int) -> ConfigDict:
    return make_config(
        variant=f"pos_{k}",
        encoding="metaicl",
        on_long_examples="cut_left",
        example_length=example_length,
        hyper_length=max_length,
        input_length=example_length,
        concat_length=max_length,
    )


WORDS = list("abcdefghijklmnopqrstuvwxyz")


def official(demos: list[Example], row: Row, most: int, example: int) -> list[int]:
    """The rules of MetaICL's data.py (method direct), said anew, for the embedded suite's words.

    An example's input is cut to what 2 and its output leave of `example`; demonstrations and input
    are joined, and the first ids go until they, the output and 2 marks are `most`.
    """
    encode = runs.vocabulary().encode
    ids: list[int] = []
    for text, output in demos:
        tail = encode(output)
        ids += encode(text)[: example - 2 - len(tail)] + tail
    longest = max(len(encode(option)) for option in row.options or row.outputs)
    ids += encode(row.input)[: example - 2 - longest]
    return ids[max(0, len(ids) + longest + 2 - most) :]


@pytest.mark.parametrize("most", [1000, 60, 25])
@pytest.mark.parametrize("example", [256, 12, 8])
def test_metaicl_truncates_as_the_official_code(most: int, example: int) -> None:
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(rng.choice(WORDS, length))

    demos = tuple((text(4 * i + 1), text(i % 2 + 1)) for i in range(5))
    row = Row("0", text(15), ("y",), ("y", "n o t"))
    config = metaicl(5, most, example)
    asked = TaskRows("t", ("",), demos, (row,))
    [found] = data.eval_episodes([asked], runs.vocabulary(), config, "concat")
    ids = found.inputs[0][found.inputs[0] > 0].tolist()
    wanted = official(list(demos), row, most, example)
    assert ids == [*wanted, EOS_ID]
    assert len(wanted) > 20 or most < 100


def test_metaicl_conditioning_is_cut_at_its_start() -> None:
    """Apart from the input: the last ids of 16 demonstrations, each of at most 256."""
    rows = tuple(Row(f"{i}", f"{i:02d} " + "x" * 40, ("yes",)) for i in range(40))
    config = metaicl(16, 200, 30).data
    sampler = data.EpisodeSampler([TaskRows("t", ("",), (), rows)], BYTES, config, 0)
    batch = sampler.batch(0)
    for slot in range(2):
        ids = batch["hyper_inputs"][slot]
        assert (ids > 0).all()
        assert ids[-1] == EOS_ID
        text = text_of(ids)
        assert text.endswith("x yes")
        assert 6 <= text.count(" yes") <= 7, "30 ids an example, 2 of them left free"
        asked = {text_of(row)[:2] for row in batch["inputs"][slot]}
        assert not asked & {part.split()[0] for part in text.split(" yes ")[1:]}
    assert sampler.stats["truncated_conditionings"] == 2
    assert sampler.stats["dropped_examples"] == 0


# ------------------------------------------------------------------------------ the rules


def test_concat_length_drops_whole_examples_for_each_input() -> None:
    """Of two inputs of one task the longer loses an example; the instruction stays."""
    rows = (Row("0", "short", ("a",)), Row("1", "long " * 8, ("b",)))
    config = make_config(variant="def_pos_2", concat_length=90)
    shown = (("in one", "out one"), ("in two", "out two"))
    [found] = data.eval_episodes(
        [TaskRows("t", ("Say it.",), shown, rows)], BYTES, config, "concat"
    )
    short, long = map(text_of, found.inputs)
    assert short == (
        "Say it.\nInput: in one\nOutput: out one\nInput: in two\nOutput: out two\nInput: short"
    )
    assert long == "Say it.\nInput: in one\nOutput: out one\nInput: " + "long " * 8
    assert found.truncated_inputs == 0
    assert found.dropped == 1


def test_join_asked_cuts_only_what_must_go() -> None:
    def ids(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    made = prompts.join_asked(ids(2, 3), [ids(4), ids(5, 6)], ids(7, 1), 6)
    assert (made.ids.tolist(), made.dropped, made.truncated) == ([2, 3, 4, 7, 1], 1, False)
    made = prompts.join_asked(ids(2, 3), [ids(4)], ids(7, 8, 9, 1), 4)
    assert (made.ids.tolist(), made.dropped, made.truncated) == ([2, 3, 7, 1], 1, True)
    made = prompts.join_asked(ids(), [ids(4), ids(5, 6)], ids(7, 1), 5, 1, "cut_left")
    assert (made.ids.tolist(), made.dropped, made.truncated) == ([5, 6, 7, 1], 0, True)
