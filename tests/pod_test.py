"""Whole commands on several hosts: two processes of four devices each stand in for a pod.

What one process of eight devices does they must do too, and whatever ends them must lose nothing.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import procs
import runs
from hyper_t5 import checkpoint, watch

HYPER_T5 = ["-m", "hyper_t5"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ConfigDict]:
    """A config for eight devices, each with a task of its own unless a test cuts the model."""
    folder = tmp_path_factory.mktemp("inputs")
    backbone = runs.save_backbone(folder / "t5")
    sni = runs.save_sni(folder / "official")

    def make_config(**fields: Any) -> ConfigDict:
        here: dict[str, Any] = {"backbone__path": str(backbone), "data__sni_dir": str(sni)}
        here |= {"mesh__data": -1, "data__tasks_per_batch": 8, "train__keep": 0}
        here |= {"adapter__lora_targets": ("enc_self.query", "dec_cross.value", "dec_mlp.wo")}
        here |= {"model__dropout_rate": 0.1}
        return runs.make_config(**here | fields)

    return make_config


def run_hosts(argv: Sequence[str], hosts: int = 2, code: int = 0) -> list[procs.Result]:
    """Run a command on all hosts to its end, which each of them must come to with this code."""
    results = procs.run_hosts([*HYPER_T5, *argv], hosts, 8 // hosts, timeout=300)
    assert [r.code for r in results] == [code] * hosts, results
    return results


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in runs.lines(folder)]


@pytest.mark.slow
def test_two_hosts_do_what_one_does(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages and evaluation; the model is cut over the devices of each host."""
    # Compiled as users have it: answers of a model that has hardly learned turn on rounding.
    monkeypatch.setattr(procs, "cpu_flags", "--xla_force_host_platform_device_count={}".format)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    mesh: dict[str, Any] = {"mesh__data": 2, "mesh__model": 4, "system": "hyper_lora"}
    found: dict[int, Any] = {}
    for hosts in (1, 2):
        folder = tmp_path / str(hosts)
        first = make(stage="hyperpretrain", **mesh)
        second = make(hypermodel__path=str(folder / "first"), **mesh)
        results = run_hosts(runs.command(first, folder / "first"), hosts)
        run_hosts(runs.command(second, folder / "second"), hosts)
        run_hosts(["evaluate", "--workdir", str(folder / "second")], hosts)
        out = folder / "second" / "eval" / "4"
        report = json.loads((out / "metrics.json").read_text())["splits"]
        rows = (out / "predictions.jsonl").read_text()
        found[hosts] = losses(folder / "first"), losses(folder / "second"), report, rows
        # Process 0 speaks for all of them, and one file has the metrics.
        assert ["step 2/4" in r.stdout for r in results] == [True, False][:hosts]
        assert [line["step"] for line in runs.lines(folder / "first")] == [2, 4]
    np.testing.assert_allclose(found[2][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[2][1], found[1][1], rtol=1e-5)
    assert found[2][2:] == found[1][2:]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1), (1, 8)])
def test_other_meshes_of_two_hosts(make: Any, tmp_path: Path, mesh: tuple[int, int]) -> None:
    fields = {"mesh__data": mesh[0], "mesh__model": mesh[1], "system": "shared_lora"}
    for hosts in (1, 2):
        run_hosts(runs.command(make(**fields), tmp_path / str(hosts)), hosts)
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)


@pytest.mark.slow
def test_a_sigterm_to_one_host_and_a_restart_on_another_number_of_hosts(
    make: Any, tmp_path: Path
) -> None:
    config = make(system="shared_lora", train__steps=400, train__save_every=1000)
    argv = runs.command(config, tmp_path / "run")
    with procs.start_hosts([*HYPER_T5, *argv]) as started:
        procs.wait_for(started[0], "step 2/400")
        started[1].send(signal.SIGTERM)
        results = procs.join(started)
    assert [r.code for r in results] == [75, 75], results
    said = "hyper-t5: error: preempted; saved at step "
    assert [r.stderr.count(said) for r in results] == [1, 1], results
    step = checkpoint.latest_step(tmp_path / "run")
    assert step is not None
    assert 2 <= step < 400
    assert all(f"{said}{step} in" in r.stderr for r in results)
    for hosts in (2, 1):
        more = runs.command(config, tmp_path / "run", f"--gin.train.steps={step + 5 - hosts}")
        results = run_hosts(more, hosts)
        assert f"steps {step}" in results[0].stdout or f"steps {step + 3}" in results[0].stdout
    assert checkpoint.latest_step(tmp_path / "run") == step + 4


def test_a_batch_over_parts_that_lie_apart() -> None:
    """On a torus a host's devices are no neighbours in the mesh."""
    code = """
from hyper_t5 import distributed
distributed.initialize()
import jax
import numpy as np
from jax.sharding import Mesh
from hyper_t5 import sharding
devices = np.array(jax.devices())[[0, 4, 5, 1, 2, 6, 7, 3]].reshape(1, 8, 1)
placement = sharding.Placement(Mesh(devices, sharding.AXES), ())
share, shares = sharding.share_of(placement)
assert (share, shares) == (jax.process_index(), 2)
mine = np.arange(16)[share * 8 : share * 8 + 8]
batch = sharding.put_batch({"tasks": mine, "ids": 10 * mine[:, None] + np.arange(3)}, placement)
whole = sharding.fetch(batch)
assert sorted(whole["tasks"]) == list(range(16)), whole
assert whole["tasks"].tolist() != list(range(16)), whole
np.testing.assert_array_equal(whole["ids"], 10 * whole["tasks"][:, None] + np.arange(3))
distributed.finish()
"""
    for result in procs.run_hosts(code):
        assert result.code == 0, result


@pytest.mark.slow
def test_a_killed_host_ends_the_other_with_one_line(make: Any, tmp_path: Path) -> None:
    config = make(system="shared_lora", train__steps=5000, train__save_every=5000)
    argv = [*runs.command(config, tmp_path / "run"), "--heartbeat_timeout=4"]
    with procs.start_hosts([*HYPER_T5, *argv]) as started:
        procs.wait_for(started[0], "step 2/5000")
        started[1].send(signal.SIGKILL)
        began = time.monotonic()
        results = procs.join(started)
    assert time.monotonic() - began < 30
    assert results[1].code == -signal.SIGKILL
    assert results[0].code == 1, results
    lines = [line for line in results[0].stderr.splitlines() if "hyper-t5: error:" in line]
    assert len(lines) == 1, results
    assert lines[0].startswith("hyper-t5: error: process 1 (")
    assert "run the same command again" in lines[0]
    assert "Traceback" not in results[0].stderr


def test_a_mistake_on_one_host_is_told_by_both(make: Any, tmp_path: Path) -> None:
    config = make(system="shared_lora")
    argv = runs.command(config, tmp_path / "run")
    given = [[*argv], [*argv, "--gin.seed=1"]]
    code = f"import os, sys; from hyper_t5 import cli; given = {given!r}\n"
    code += "sys.exit(cli.main(given[int(os.environ['JAX_PROCESS_ID'])]))"
    results = procs.run_hosts(code)
    assert [r.code for r in results] == [2, 2], results
    assert all("the config differs: " in r.stderr for r in results), results
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_bad_step_is_kept_by_all_hosts(make: Any, tmp_path: Path) -> None:
    config = make(system="shared_lora", optimizer__learning_rate=1e38, train__steps=8)
    results = run_hosts(runs.command(config, tmp_path / "run"), code=1)
    assert all(" at step 2 on task" in r.stderr for r in results), results
    replay = watch.load_replay(tmp_path / "run" / "replay" / "2")
    assert len(replay.tasks) == len(replay.batch["inputs"]) == 8
    assert replay.state is not None
    assert checkpoint.latest_step(Path(replay.state)) == 1


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["hyperpretrain", "mtf"])
def test_kills_at_any_moment_change_nothing(make: Any, tmp_path: Path, stage: str) -> None:
    """kill -9 of both hosts, at moments drawn at random, also while a checkpoint is written."""
    steps = 40
    fields = {"stage": stage, "system": "hyper_prefix", "train__steps": steps, "train__keep": 2}
    config = make(**fields, train__save_every=2, train__log_every=1)
    run_hosts(runs.command(config, tmp_path / "whole"))
    broken, rng, kills = tmp_path / "broken", random.Random(stage), 0
    argv = [*HYPER_T5, *runs.command(config, broken)]
    for _ in range(3):
        with procs.start_hosts(argv) as started:
            before = checkpoint.latest_step(broken) or 0
            procs.wait_for(started[0], f"step {before + rng.randint(2, 9)}/{steps}", 300)
            time.sleep(rng.random() * 0.2)
            for host in rng.sample(started, 2):
                host.send(signal.SIGKILL)
            results = procs.join(started)
        kills += sum(r.code == -signal.SIGKILL for r in results)
        after = checkpoint.latest_step(broken) or 0
        assert after >= before
    assert kills >= 4
    run_hosts(runs.command(config, broken))
    assert runs.leaves(broken, steps) == runs.leaves(tmp_path / "whole", steps)
    logged = [line["step"] for line in runs.lines(broken)]
    assert logged == sorted(set(logged))


@pytest.mark.slow
def test_two_hosts_rank_options_as_one_does(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "MetaICL"
    names = {"train": ["copy"], "test": ["first", "last"]}
    (folder / "config" / "tasks").mkdir(parents=True)
    (folder / "config" / "hr_to_lr.json").write_text(json.dumps(names))
    options = ["a b", "a", "z y x"]
    for name in names["test"]:
        inside = folder / "data" / name
        inside.mkdir(parents=True)
        for part in ("train", "test"):
            rows = [
                {"task": name, "input": f"{x} {part}", "output": options[i % 3], "options": options}
                for i, x in enumerate("abcdefghijklmnop")
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (inside / f"{name}_16_100_{part}.jsonl").write_text(text)
    config = make(data__metaicl_dir=str(folder), mesh__data=4, mesh__model=2, system="hyper_lora")
    run = runs.untrained_run(config, tmp_path / "run")
    found = []
    for hosts in (1, 2):
        out = tmp_path / str(hosts)
        flags = ["--mixture=metaicl", "--gin.eval.split=test_100", "--gin.eval.shots=2"]
        flags += ["--gin.data.use_instruction=False", f"--out={out}"]
        run_hosts(["evaluate", "--workdir", str(run), *flags], hosts)
        lines = (out / "predictions.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    assert len(found[0]) == 32
    for one, other in zip(*found, strict=True):
        scores = (one.pop("option_log_probs"), other.pop("option_log_probs"))
        np.testing.assert_allclose(*scores, rtol=1e-5)
        assert one == other


@pytest.mark.soak
def test_killed_hosts_evaluate_on(make: Any, tmp_path: Path) -> None:
    """kill -9 of both after a task or more, then one host, killed too, then both to the end."""
    folder = runs.save_sni(tmp_path / "official", rows=24)
    config = make(
        data__sni_dir=str(folder),
        mesh__data=4,
        mesh__model=2,
        system="hyper_lora",
        eval__split="train",  # three tasks
        eval__batch=4,
        eval__max_decode_length=64,  # long enough to be killed in between
    )
    run = runs.untrained_run(config, tmp_path / "run")
    argv = ["evaluate", "--workdir", str(run), "--out"]
    run_hosts([*argv, str(tmp_path / "whole")])
    out = tmp_path / "broken"
    for hosts, least in ((2, 1), (1, 2)):
        with procs.start_hosts([*HYPER_T5, *argv, str(out)], hosts, 8 // hosts) as started:
            until = time.monotonic() + 300
            while len(kept := list(out.glob("answers/*.jsonl"))) < least:
                assert time.monotonic() < until, "no task was judged"
                assert started[0].process.poll() is None, "it ended first"
                time.sleep(0.01)
            for host in started:
                host.send(signal.SIGKILL)
            procs.join(started)
        assert not (out / "metrics.json").exists()
    kept[0].write_bytes(kept[0].read_bytes()[:-5])
    results = run_hosts([*argv, str(out)])
    assert "of 3 tasks are judged" in results[0].stdout
    assert f"{kept[0]} is damaged" in results[0].stdout
    assert results[1].stdout.count("evaluate") == 0  # process 0 speaks for both
    ended = [place / "predictions.jsonl" for place in (out, tmp_path / "whole")]
    assert ended[0].read_bytes() == ended[1].read_bytes()
    assert not (out / "answers").exists()
