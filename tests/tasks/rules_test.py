"""The examples track: rules that only examples tell, held out by operation and by parameter."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.data.task_rows import TaskData
from hyper_t5.data.vocab import load_vocab
from hyper_t5.tasks import rules
from hyper_t5.tasks.synthetic import VOCAB_FILE
from hyper_t5.utils.errors import UserError

VOCAB = load_vocab(str(VOCAB_FILE), extra_ids=0)


def tasks_of(split: str) -> list[TaskData]:
    config = config_lib.defaults()
    return [read() for read in rules.load_rows(config.data, split, VOCAB).readers.values()]


def test_unseen_compositions_are_in_no_training_task_with_any_parameters() -> None:
    splits = rules.rules()
    trained = {(r.family, r.kinds) for r in splits["train"].values()}
    unseen = {(r.family, r.kinds) for r in splits["unseen_compositions"].values()}
    assert not trained & unseen
    assert {family for family, _ in unseen} == set(rules.FAMILIES)
    # Each operation of an unseen pair is trained, alone and in other pairs.
    for family, kinds in unseen:
        for index, kind in enumerate(kinds):
            assert (family, (kind,)) in trained
            assert any(f == family and len(k) == 2 and k[index] == kind for f, k in trained)


def test_unseen_parameters_are_of_trained_compositions() -> None:
    splits = rules.rules()
    trained = {(r.family, r.kinds) for r in splits["train"].values()}
    for rule in splits["unseen_parameters"].values():
        assert (rule.family, rule.kinds) in trained
        assert rule.parameters
        for other in splits["train"].values():
            assert other.family != rule.family or not rule.parameters & other.parameters


def test_rows_are_what_their_operations_say() -> None:
    checked = set()
    for rule in rules.rules()["train"].values():
        row = rules._row(rule, "train", 0)
        items, [output] = row.input.split(), row.outputs
        if rule.kinds == ("select",):
            positions = [int(p) - 1 for p in rule.operations[0].parameters]
            assert output == " ".join(items[p] for p in positions)
        elif rule.kinds == ("shift",):
            way, by = rule.operations[0].parameters[:-1], int(rule.operations[0].parameters[-1])
            by = by if way == "forward" else -by
            pairs = zip(items, output.split(), strict=True)
            assert all((ord(y) - ord(x) - by) % 26 == 0 for x, y in pairs)
        elif rule.kinds == ("reverse", "add"):
            by = int(rule.operations[1].parameters)
            assert output == " ".join(str((int(x) + by) % 10) for x in items[::-1])
        elif rule.kinds == ("replace",):
            old, new = list(rule.operations[0].parameters)
            assert output == " ".join(new if x == old else x for x in items)
        else:
            continue
        checked.add(rule.kinds)
    assert checked >= {("select",), ("shift",), ("replace",)}


def test_silent_tasks_differ_in_their_instruction_alone() -> None:
    spoken, silent = tasks_of("unseen_compositions"), tasks_of("silent_compositions")
    assert [task.name for task in spoken] == [task.name for task in silent]
    assert {task.instruction for task in silent} == {rules.SILENT}
    assert len({task.instruction for task in spoken}) == len(spoken)
    assert [task.rows[5] for task in spoken] == [task.rows[5] for task in silent]
    trained = {task.name: task for task in tasks_of("train")}
    for task in tasks_of("silent_train"):
        inputs = {row.input for row in trained[task.name].rows}
        assert sum(row.input in inputs for row in itertools.islice(task.rows, 50)) < 10


@pytest.mark.parametrize("shots", [1, 4, 16])
@pytest.mark.parametrize("split", rules.HELD_OUT)
def test_as_many_examples_as_requested_are_shown(split: str, shots: int) -> None:
    config = config_lib.defaults()
    config.data.update(hyper_length=264, input_length=10, target_length=10, use_instruction=False)
    config.eval.update(shots=shots, max_rows_per_task=20)
    for task in build_eval_tasks(tasks_of(split), VOCAB, config):
        assert len(task.shown) == shots
        assert task.dropped == task.truncated_inputs == 0
        assert not {x for x, _ in task.shown} & set(task.texts)


def test_the_dataset_loads_as_any_other() -> None:
    config = config_lib.defaults()
    config.data.mixture = "rules"
    for split in ("unseen_compositions", "train"):
        tasks = pipeline.load_tasks("rules", config.data, split, VOCAB)
        assert len(tasks) == len(rules.rules()[split])
    assert np.ptp([task.rate for task in tasks]) == 0
    with pytest.raises(UserError, match="the splits are train, unseen_parameters"):
        rules.load_rows(config.data, "test", VOCAB)
