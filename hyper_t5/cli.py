"""The command line: ``hyper-t5 COMMAND`` is ``python -m hyper_t5 COMMAND``.

A command imports what it needs when it runs, so that ``--help`` and a mistyped flag are answered
at once. Exit codes: 0 done, 1 the run failed (a loss that is no number, a host that is gone), 2 a
mistake in what the user gave, 75 preempted and saved (start it again to go on), 130 interrupted;
one line on stderr and no traceback for each of these.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hyper_t5 import __version__, quiet
from hyper_t5.errors import PreemptedError, UserError

GIN = "--gin."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. ``--help`` and ``--version`` exit by themselves."""
    quiet.libraries()
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        COMMANDS[args.command].run(args)
    except tuple(EXIT_CODES) as error:
        code, message = _answer(error)
        print("hyper-t5: error:", message, file=sys.stderr, flush=True)
        return code
    return 0


EXIT_CODES: dict[type[BaseException], int] = {
    UserError: 2,
    FloatingPointError: 1,
    PreemptedError: 75,
    KeyboardInterrupt: 130,
}


def _answer(error: BaseException) -> tuple[int, str]:
    """The exit code, and the one line to print."""
    code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return code, " ".join(str(error).split()) or "interrupted"


@contextlib.contextmanager
def _as_one_process_of_a_run(args: argparse.Namespace) -> Iterator[None]:
    """Join the other hosts, if there are any; what ends this process here ends them too."""
    from hyper_t5 import distributed

    try:
        distributed.initialize(
            args.coordinator_address,
            args.process_count,
            args.process_index,
            timeout=args.initialization_timeout,
            heartbeat=args.heartbeat_timeout,
        )
        with distributed.catch_sigterm():
            yield
    except tuple(EXIT_CODES) as error:
        distributed.leave(*_answer(error))
        raise
    distributed.finish()


# ------------------------------------------------------------------------------ what each one runs


def _train(args: argparse.Namespace) -> None:
    from hyper_t5 import config as config_lib
    from hyper_t5 import distributed, workdir

    config = config_lib.load(args.config, args.gin, args.gin_file)
    config_lib.validate(config)
    with _as_one_process_of_a_run(args):
        distributed.check_same("the config", zlib.crc32(config_lib.to_json(config).encode()))
        with workdir.hold(args.workdir):
            for change in workdir.check_resume(args.workdir, config):
                distributed.say(f"resume with {change}")
            from hyper_t5 import train

            train.train(config, args.workdir, profile=args.profile)


def _evaluate(args: argparse.Namespace) -> None:
    with _as_one_process_of_a_run(args):
        _evaluate_here(args)


def _evaluate_here(args: argparse.Namespace) -> None:
    from hyper_t5 import config as config_lib
    from hyper_t5 import evaluate, workdir
    from hyper_t5.overrides import Override, read_overrides

    if bool(args.workdir) == bool(args.adapter) or bool(args.adapter) != bool(args.backbone):
        raise UserError("evaluate: give --workdir, or --adapter with its --backbone")
    if args.adapter and (args.config or not args.out):
        raise UserError("evaluate: --adapter needs --out, and no --config: give --gin.FIELD=VALUE")
    if args.config:  # a backbone judged as it is: nothing was trained, so there is no workdir yet
        config = config_lib.load(args.config, args.gin, args.gin_file)
        config_lib.validate(config)
        workdir.check_resume(args.workdir, config)
    overrides = read_overrides(args.gin, args.gin_file)
    if args.mixture:
        overrides.append(Override("eval.mixture", args.mixture, "--mixture"))
    if args.adapter:
        evaluate.evaluate_adapter(args.adapter, args.backbone, overrides, args.out, args.compare)
    else:
        evaluate.evaluate_workdir(args.workdir, overrides, out=args.out, compare=args.compare)


def _score(args: argparse.Namespace) -> None:
    from hyper_t5 import evaluate

    evaluate.score_file(args.predictions, args.references, args.gpt2_merges, args.out, args.compare)


def _report(args: argparse.Namespace) -> None:
    from hyper_t5 import report

    print(report.write_report(args.workdir, args.out, asked=args.robustness or ""))


def _robustness(args: argparse.Namespace) -> None:
    from hyper_t5 import robustness
    from hyper_t5.overrides import read_overrides

    overrides = read_overrides(args.gin, args.gin_file)
    with _as_one_process_of_a_run(args):
        robustness.robustness(args.workdir, args.out, overrides, args.shots, args.metric, args.seed)


def _data(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    from hyper_t5 import data, describe

    if bool(args.mixture) == args.text:
        raise UserError("data: give --mixture NAME, or --text for the text of data.text")
    mixture = data.find_mixture(args.mixture)[0] if args.mixture else ""
    config = _data_config(args, mixture)
    config.stage = "hyperpretrain" if args.text else "mtf"
    describe.describe(config, args.mixture or "", args.out, args.episodes, args.steps, start)


def _build(args: argparse.Namespace) -> None:
    from hyper_t5 import build

    config = _data_config(args, args.mixture or "")
    build.build(
        config.data,
        args.out,
        mixture=args.mixture or "",
        text=args.text or "",
        shards=args.shards,
        overwrite=args.overwrite,
    )


def _data_config(args: argparse.Namespace, mixture: str) -> Any:
    """The config that was given, or else configs/mtf.py's for the mixture, with its overrides."""
    from hyper_t5 import config as config_lib
    from hyper_t5.overrides import read_overrides

    if args.config or mixture in config_lib.BENCHMARKS:
        given = args.config or f"configs/mtf.py:mixture={mixture}"
        config = config_lib.load(given, args.gin, args.gin_file)
    else:
        config = config_lib.defaults()
        config_lib.apply(config, read_overrides(args.gin, args.gin_file))
    if mixture:
        config.data.mixture = mixture
    config_lib.validate(config, needs_backbone=False)
    return config


def _adapt(args: argparse.Namespace) -> None:
    from hyper_t5 import serve

    print(serve.adapt(args.workdir, args.task, args.out, args.format, args.base_model, args.dtype))


def _predict(args: argparse.Namespace) -> None:
    if bool(args.backbone) == bool(args.workdir) or (args.adapter and args.workdir):
        raise UserError("predict: give --backbone and --adapter, or --workdir and --task")
    if args.task and args.backbone:
        raise UserError("predict: --task goes with --workdir, whose hypermodel makes its adapter")
    from hyper_t5 import predict, serve
    from hyper_t5.decoding import Sampling

    options = serve.Options(
        args.batch,
        args.max_decode_length,
        args.beam_size,
        Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        args.max_input_length,
        args.on_long,
    )
    predict.predict(
        args.input,
        args.output,
        options,
        backbone=args.backbone or "",
        adapters=args.adapter,
        workdir=args.workdir or "",
        tasks=args.task,
    )


def _convert(args: argparse.Namespace) -> None:
    import json

    from hyper_t5 import model, weights

    made = weights.convert(
        model.backbone_folder(args.input),
        args.out,
        args.to,
        kind=args.from_,
        dtype=args.dtype,
        scanned=args.scanned,
        vocab=args.vocab,
        say=lambda line: print(f"convert: {line}", file=sys.stderr, flush=True),
    )
    print(json.dumps(made))


def _export(args: argparse.Namespace) -> None:
    from hyper_t5 import export

    print(
        export.export(
            args.adapter, args.out, args.format, args.backbone, args.base_model, args.dtype
        )
    )


def _plan(args: argparse.Namespace) -> None:
    from hyper_t5 import config as config_lib
    from hyper_t5 import plan

    config = config_lib.load(args.config, args.gin, args.gin_file)
    config_lib.validate(config, needs_backbone=False)
    steps = args.steps.split(",")
    plan.plan(config, args.topology, args.slices, steps, args.out, args.config)


def _bench(args: argparse.Namespace) -> None:
    from hyper_t5 import bench
    from hyper_t5.overrides import read_overrides

    gin = [f"{o.field}={o.text}" for o in read_overrides(args.gin, args.gin_file)]
    bench.main(args.names, args.out, args.tiny, gin)


def _quickstart(args: argparse.Namespace) -> None:
    from hyper_t5 import quickstart

    quickstart.main(args.out, args.seeds, args.backbone, args.systems)


# ---------------------------------------------------------------------- names, flags, help, errors

Flag = tuple[str, dict[str, Any]]  # a name and what argparse's add_argument takes


def _path(name: str, help: str, **more: Any) -> Flag:
    return name, {"type": Path, "metavar": "DIR", "help": help, "required": True, **more}


def _file(name: str, help: str, **more: Any) -> Flag:
    return _path(name, help, metavar="FILE", **more)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_index(part.strip()) for part in text.split(",")]


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _number(name: str, default: int, help: str) -> Flag:
    help += f" (default: {default})"
    return name, {"type": _positive, "default": default, "metavar": "N", "help": help}


def _whole(name: str, help: str) -> Flag:
    return name, {"type": _index, "default": 0, "metavar": "N", "help": f"{help} (default: 0)"}


def _real(name: str, help: str) -> Flag:
    return name, {"type": _float, "default": 0.0, "metavar": "X", "help": f"{help} (default: 0)"}


_WORKDIR = _path("--workdir", "folder of the run: config.json, checkpoints/, metrics")
_BASE_MODEL: Flag = (
    "--base-model",
    {
        "default": "",
        "metavar": "NAME",
        "help": "with peft: the base model's name or path to write in it",
    },
)
_DTYPE: Flag = (
    "--dtype",
    {
        "choices": ["float32", "bfloat16"],
        "default": "",
        "help": "of what is written; peft makes float32 of either when it loads it (default: "
        "float32 for peft, else as it is)",
    },
)
_COMPARE: Flag = (
    "--compare",
    {
        "type": Path,
        "action": "append",
        "default": [],
        "metavar": "DIR",
        "help": "another run's folder, or metrics.json, to put beside it, with the difference over "
        "the tasks of both; may be repeated",
    },
)
_GIN_FILE: Flag = (
    "--gin_file",
    {
        "type": Path,
        "action": "append",
        "default": [],
        "metavar": "FILE",
        "help": "lines `path.to.field = value` that override the config; may be repeated. So does "
        "--gin.path.to.field=value, which comes after all files",
    },
)


# Named as T5X and JAX name them. A TPU VM and SLURM say these themselves.
_HOSTS: list[Flag] = [
    (
        "--coordinator_address",
        {
            "default": "",
            "metavar": "HOST:PORT",
            "help": "several hosts as one run: where process 0 is (a TPU pod and SLURM say it; or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID do)",
        },
    ),
    (
        "--process_count",
        {"type": _positive, "default": 0, "metavar": "N", "help": "how many processes there are"},
    ),
    (
        "--process_index",
        {"type": _index, "default": -1, "metavar": "I", "help": "which of them this is, from 0"},
    ),
    _number("--initialization_timeout", 300, "seconds to wait for all processes"),
    _number("--heartbeat_timeout", 30, "seconds of silence after which a host counts as gone"),
]


_DATA_CONFIG: Flag = (
    "--config",
    {
        "metavar": "FILE.py[:arg,...]",
        "help": "lengths and the rest (default: configs/mtf.py of the mixture)",
    },
)


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what help says of it, its flags, and the function that runs it."""

    summary: str
    example: str
    run: Callable[[argparse.Namespace], None]
    flags: Sequence[Flag]


COMMANDS = {
    "quickstart": Command(
        "Run everything on the embedded task suite: train, evaluate, adapt, export",
        "hyper-t5 quickstart --out runs/quickstart",
        _quickstart,
        [
            _path(
                "--out",
                "folder for all it makes (default: runs/quickstart)",
                required=False,
                default=Path("runs/quickstart"),
            ),
            (
                "--seeds",
                {
                    "type": int,
                    "nargs": "+",
                    "default": [0],
                    "metavar": "SEED",
                    "help": "repeat for each seed and report all (default: 0)",
                },
            ),
            _path("--backbone", "another than the shipped one", required=False),
            (
                "--systems",
                {
                    "nargs": "+",
                    "default": [],
                    "metavar": "NAME",
                    "help": "which to compare, or all, which takes an hour or two (default: none "
                    "shared_prefix shared_lora hyper_lora hyper_prefix concat)",
                },
            ),
        ],
    ),
    "train": Command(
        "Train a hypermodel, or a baseline, by a config; goes on by itself from a checkpoint",
        "hyper-t5 train --config configs/mtf.py:system=hyper_lora,size=base --workdir runs/mtf "
        "--gin.backbone.path=t5_base --gin.data.sni_dir=natural-instructions",
        _train,
        [
            (
                "--config",
                {
                    "required": True,
                    "metavar": "FILE.py[:arg,...]",
                    "help": "a config file, on disk or shipped, and its arguments",
                },
            ),
            _WORKDIR,
            (
                "--profile",
                {
                    "action": "store_true",
                    "help": "trace three early steps into WORKDIR/profile, for TensorBoard",
                },
            ),
            *_HOSTS,
            _GIN_FILE,
        ],
    ),
    "evaluate": Command(
        "Judge held-out tasks: metrics.json with intervals, predictions, a plot; goes on after a "
        "stop",
        "hyper-t5 evaluate --workdir runs/mtf --compare runs/concat --gin.eval.shots=2",
        _evaluate,
        [
            _path(*_WORKDIR[:1], _WORKDIR[1]["help"], required=False),
            _path(
                "--adapter",
                "instead: an adapter folder, native or PEFT's, which is given to every task",
                required=False,
            ),
            _path("--backbone", "with it: the backbone that it was made for", required=False),
            (
                "--config",
                {
                    "metavar": "FILE.py[:arg,...]",
                    "help": "for a backbone as it is (system=none or concat, nothing trained): "
                    "the config to start the workdir with",
                },
            ),
            ("--mixture", {"metavar": "NAME", "help": "short for --gin.eval.mixture=NAME"}),
            _path("--out", "folder for the results (default: in WORKDIR/eval)", required=False),
            _COMPARE,
            *_HOSTS,
            _GIN_FILE,
        ],
    ),
    "score": Command(
        "Score a file of predictions: an evaluation's, or a submission beside its references",
        "hyper-t5 score --predictions runs/mtf/eval/1000/predictions.jsonl --out metrics.json",
        _score,
        [
            _file("--predictions", "predictions.jsonl, or lines of id and prediction"),
            _file(
                "--references",
                "Super-NaturalInstructions' file of references, for lines of id and prediction",
                required=False,
            ),
            _file(
                "--gpt2_merges", "GPT-2's merges.txt, for the cross-lingual track", required=False
            ),
            _file("--out", "a file for all the metrics, as JSON", required=False),
            _COMPARE,
        ],
    ),
    "report": Command(
        "One HTML page, with its pictures, of runs that were evaluated",
        "hyper-t5 report --workdir runs/mtf --workdir runs/concat --out runs/report",
        _report,
        [
            _path(
                "--workdir",
                "a run's folder, or a metrics.json; may be repeated; the system concat, where it "
                "is among them, is what the others are compared with",
                action="append",
            ),
            _file(
                "--robustness",
                "a robustness.json, of `hyper-t5 robustness`, to show too",
                required=False,
            ),
            _path("--out", "folder for report.html and its pictures"),
        ],
    ),
    "robustness": Command(
        "How much of its text a run reads: shots 0 to 16; reworded, shuffled, another task's text",
        "hyper-t5 robustness --workdir runs/mtf --workdir runs/shared --out runs/robustness",
        _robustness,
        [
            _path("--workdir", "a run's folder; may be repeated", action="append"),
            _path("--out", "folder for robustness.json and robustness.png"),
            (
                "--shots",
                {
                    "type": _counts,
                    "default": "0,1,2,4,8,16",
                    "metavar": "N,N,...",
                    "help": "numbers of examples to show (default: %(default)s)",
                },
            ),
            (
                "--metric",
                {
                    "default": "",
                    "metavar": "NAME",
                    "help": "of metrics.json's tasks, as rougeL (default: each benchmark's own)",
                },
            ),
            _whole("--seed", "of what is drawn: which other task, which order of words"),
            *_HOSTS,
            _GIN_FILE,
        ],
    ),
    "data": Command(
        "Look at what a mixture holds: episodes, lengths, padding, rates, warnings, speed",
        "hyper-t5 data --mixture sni_test --gin.data.sni_dir=natural-instructions "
        "--gin.data.vocab=spiece.model --out data_report",
        _data,
        [
            (
                "--mixture",
                {
                    "metavar": "NAME",
                    "help": "sni, p3, metaicl, ..., for what is trained on; or a SeqIO mixture "
                    "such as sni_test, t0_eval_score_eval, metaicl_qa_to_qa_test_13",
                },
            ),
            ("--text", {"action": "store_true", "help": "the text of data.text instead"}),
            _DATA_CONFIG,
            _path("--out", "folder for data.json and a plot (default: print only)", required=False),
            _number("--episodes", 3, "how many to print"),
            _number("--steps", 50, "how many batches to draw"),
            _GIN_FILE,
        ],
    ),
    "build": Command(
        "Write a mixture or text as sharded TFRecords with a manifest, for a pod to read",
        "hyper-t5 build --mixture sni --out gs://bucket/data "
        "--gin.data.sni_dir=natural-instructions",
        _build,
        [
            (
                "--mixture",
                {"metavar": "NAME", "help": "sni, p3, metaicl, ...; train with data.store=DIR"},
            ),
            (
                "--text",
                {
                    "metavar": "FILES",
                    "help": "text files, as data.text; train with data.text=tfds:NAME",
                },
            ),
            ("--out", {"required": True, "metavar": "DIR", "help": "local or gs://"}),
            (
                "--shards",
                {"type": _positive, "default": 0, "metavar": "N", "help": "of each split"},
            ),
            ("--overwrite", {"action": "store_true", "help": "replace what was built there"}),
            _DATA_CONFIG,
            _GIN_FILE,
        ],
    ),
    "adapt": Command(
        "From a task's text to an adapter folder; prints the folder's path",
        "hyper-t5 adapt --workdir runs/mtf --task task.json --out my_adapter --format peft",
        _adapt,
        [
            _WORKDIR,
            _file(
                "--task",
                'the task: Super-NaturalInstructions JSON, or {"instruction": ..., '
                '"examples": [{"input": ..., "output": ...}]}',
            ),
            _path("--out", "the adapter folder to make"),
            (
                "--format",
                {
                    "choices": ["native", "peft"],
                    "default": "native",
                    "help": "ours, or one that peft's PeftModel loads (default: native)",
                },
            ),
            _BASE_MODEL,
            _DTYPE,
        ],
    ),
    "predict": Command(
        "Outputs of a file of inputs with one adapter, or with many in one batch; goes on after a "
        "stop",
        "hyper-t5 predict --backbone t5_base --adapter my_adapter --input rows.jsonl "
        "--output out.jsonl",
        _predict,
        [
            _path(
                "--backbone",
                "folder of the backbone that the adapters were made for",
                required=False,
            ),
            _path(
                "--adapter",
                'a native adapter folder; repeat it for several, which rows name as "adapter"',
                required=False,
                action="append",
                default=[],
            ),
            _path(
                "--workdir",
                "instead: folder of a run that makes adapters, and keeps them in it",
                required=False,
            ),
            _file(
                "--task",
                "with it: a task file, or a folder of them; repeat it for several, which rows name "
                'as "task"',
                required=False,
                action="append",
                default=[],
            ),
            _file("--input", 'a jsonl file of rows with an "input" each'),
            _file("--output", "the jsonl file to write"),
            _number("--batch", 32, "most rows that decode at a time"),
            _number("--max-decode-length", 128, "most tokens in an output"),
            _number("--beam-size", 1, "1 is greedy, or sampling"),
            _real("--temperature", "draw tokens, from logits divided by this; 0 takes the best"),
            _whole("--top-k", "draw among so many likeliest tokens; 0: all"),
            _real("--top-p", "draw among the likeliest that sum to this probability; 0: all"),
            _whole("--seed", "of what is drawn; an output depends on it and its line alone"),
            _whole("--max-input-length", "most tokens of an input; 0: as the adapter was trained"),
            (
                "--on-long",
                {
                    "choices": ["truncate", "refuse"],
                    "default": "truncate",
                    "help": "cut the end of a longer one, and tell how many, or refuse the file "
                    "(default: truncate)",
                },
            ),
        ],
    ),
    "convert": Command(
        "Weights of a T5 from T5X, Hugging Face or our format into another, checked; prints JSON",
        "hyper-t5 convert --input checkpoint_7 --to native --vocab spiece.model --out t5_base",
        _convert,
        [
            (
                "--input",
                {
                    "required": True,
                    "metavar": "DIR",
                    "help": "what to read, local or gs://; or the workdir of a run that trained a "
                    "backbone",
                },
            ),
            _path("--out", "the folder to make, with convert.json, which is what is printed"),
            (
                "--to",
                {
                    "required": True,
                    "choices": ["t5x", "hf", "native"],
                    "help": "T5X's Checkpointer reads it, transformers reads it, or it is ours",
                },
            ),
            (
                "--from",
                {
                    "dest": "from_",
                    "choices": ["t5x", "hf", "native"],
                    "default": "",
                    "help": "what --input must be (default: found out)",
                },
            ),
            (
                "--dtype",
                {
                    "choices": ["float32", "bfloat16"],
                    "default": "",
                    "help": "of the weights written (default: as they are)",
                },
            ),
            (
                "--scanned",
                {
                    "action": "store_true",
                    "help": "with t5x: the tree of scalable_t5, whose layers are scanned",
                },
            ),
            (
                "--vocab",
                {
                    "default": "",
                    "metavar": "FILE",
                    "help": "the SentencePiece model, or bytes, where --input has no vocabulary, "
                    "as T5X's checkpoints",
                },
            ),
        ],
    ),
    "export": Command(
        "An adapter as a PEFT folder, as ours, or merged into its backbone; prints the path",
        "hyper-t5 export --adapter my_adapter --out my_peft --format peft --backbone t5_base",
        _export,
        [
            _path("--adapter", "an adapter folder, native or of peft"),
            _path("--out", "the folder to make"),
            (
                "--format",
                {
                    "choices": ["peft", "native", "merged"],
                    "required": True,
                    "help": "adapter files for peft; our own, for predict; or a whole Hugging Face "
                    "T5 with LoRA merged in (that T5 without it: hyper-t5 convert --to hf)",
                },
            ),
            _path("--backbone", "folder of the backbone that the adapter was made for"),
            _BASE_MODEL,
            _DTYPE,
        ],
    ),
    "plan": Command(
        "Compile a config for a TPU topology, without one: memory, FLOPs, traffic, time, per chip",
        "hyper-t5 plan --config configs/mtf.py:system=hyper_lora,size=xl --topology v5p:4x4x4 "
        "--gin.data.tasks_per_batch=128 --out runs/plan",
        _plan,
        [
            (
                "--config",
                {
                    "required": True,
                    "metavar": "FILE.py[:arg,...]",
                    "help": "a config file, on disk or shipped, and its arguments",
                },
            ),
            (
                "--topology",
                {
                    "required": True,
                    "metavar": "CHIP:SHAPE",
                    "help": "v3, v4, v5e, v5p or v6e and the shape of a slice, such as v5e:4x4; or "
                    "an accelerator type such as v5p-128",
                },
            ),
            _number("--slices", 1, "of that shape, with the data-centre network between them"),
            (
                "--steps",
                {
                    "default": "train,evaluate,generate",
                    "metavar": "NAME,...",
                    "help": "which to compile, minutes each for a large model (default: "
                    "train,evaluate,generate)",
                },
            ),
            _path("--out", "folder for plan.json and the programs (default: none)", required=False),
            _GIN_FILE,
        ],
    ),
    "bench": Command(
        "Measure speed and memory, each as a ratio inside one run",
        "hyper-t5 bench data packing --gin.data.sni_dir=natural-instructions "
        "--gin.data.vocab=spiece.model --out runs/bench",
        _bench,
        [
            ("names", {"nargs": "*", "metavar": "NAME", "help": "which benchmarks (default: all)"}),
            _path("--out", "folder for the tables (default: print only)", required=False),
            ("--tiny", {"action": "store_true", "help": "toy sizes: only to see that it runs"}),
            _GIN_FILE,
        ],
    ),
}


class _Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line, like all others, and whose help ends in an example."""

    def __init__(self, prog: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            prog,
            usage,
            description,
            epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parse(argv: list[str]) -> argparse.Namespace:
    """The command's arguments; ``command`` is its name, ``gin`` the overrides without prefix."""
    from hyper_t5.overrides import choose, nearest

    listing = "\n".join(f"  {name:<12}{c.summary}" for name, c in COMMANDS.items())
    parser = _Parser(
        "hyper-t5",
        "Hypermodels that turn a task's text into adapters for a frozen T5.",
        f"commands (hyper-t5 COMMAND --help tells more):\n{listing}\n\n"
        f"example:\n  {COMMANDS['quickstart'].example}",
        "hyper-t5 COMMAND [--flag ...]",
    )
    parser.add_argument("--version", action="version", version=__version__)
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)  # --help, --version, or an error
        parser.error(f"give a command: {', '.join(COMMANDS)}")
    name, *rest = argv
    command = COMMANDS[choose("command", name, COMMANDS)]
    parser = _Parser(f"hyper-t5 {name}", command.summary + ".", f"example:\n  {command.example}")
    for flag, options in command.flags:
        parser.add_argument(flag, **options)
    gin = [word.removeprefix(GIN) for word in rest if word.startswith(GIN)]
    if gin and _GIN_FILE not in command.flags:
        parser.error(f"{GIN}{gin[0]}: {name} takes no config")
    if bare := [word for word in gin if "=" not in word]:
        parser.error(f"{GIN}{bare[0]} needs its value in the same word: {GIN}{bare[0]}=VALUE")
    rest = [word for word in rest if not word.startswith(GIN)]
    # Before argparse complains that a flag is missing, which a mistyped one is the reason of.
    flags = parser._option_string_actions
    for word in rest:
        if word.startswith("--") and (flag := word.partition("=")[0]) not in flags:
            parser.error(f"unknown flag {flag}, the nearest is {nearest(flag, flags)}")
    return parser.parse_args(rest, argparse.Namespace(command=name, gin=gin))
