"""Command line: ``hyper-t5 COMMAND``, the same as ``python -m hyper_t5 COMMAND``.

``@command`` turns a function into the argparse parser of a command; its flags follow it. A function
imports what it calls, so that ``--help`` and invalid flags need no JAX. Errors are one line on
stderr. Exit codes: 0 success, 1 failure such as a non-finite loss, 2 invalid input, 75 preempted
after a checkpoint (the same command resumes), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hyper_t5 import __version__
from hyper_t5.utils import flags
from hyper_t5.utils.errors import EXIT_CODES, UserError, exit_status, handle_errors
from hyper_t5.utils.flags import GIN, Parser, at_least, path, seed, split_gin
from hyper_t5.utils.overrides import Override, choose, read_overrides
from hyper_t5.utils.paths import expanded_path

PARSER = Parser(
    prog="hyper-t5",
    description="Hypermodels that generate adapters for a frozen T5 from a task's text.",
    epilog="example:\n  hyper-t5 quickstart --out runs/quickstart",
)
PARSER.add_argument("--version", action="version", version=__version__)
COMMANDS = PARSER.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)


@handle_errors("hyper-t5")
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    args.run(args)


def parse_args(argv: Sequence[str]) -> Namespace:
    """Parse a command line; ``gin`` lists its ``--gin.`` overrides."""
    words, gin = split_gin(argv)
    parser = PARSER
    if words and not words[0].startswith("-"):
        parser = COMMANDS.choices[choose("command", words[0], COMMANDS.choices)]
    parser.check_flags(words)
    args = PARSER.parse_args(words, Namespace(gin=gin))
    if gin and "gin_file" not in args:
        raise UserError(f"{GIN}{gin[0]}: {args.command} takes no config; remove it")
    return args


def command(example: str, *parents: Parser) -> Callable[[Callable[[Namespace], None]], Parser]:
    """Make a command of a function; its name and docstring become the command's name and help."""

    def decorate(run: Callable[[Namespace], None]) -> Parser:
        name, summary = run.__name__, str(run.__doc__)
        epilog = f"example:\n  hyper-t5 {name} {example}"
        parser = COMMANDS.add_parser(
            name, help=summary.rstrip("."), description=summary, epilog=epilog, parents=parents
        )
        parser.set_defaults(run=run)
        return parser

    return decorate


@contextlib.contextmanager
def join_processes(args: Namespace) -> Iterator[None]:
    """Join the other processes of a run; an error in this process ends all of them."""
    from hyper_t5.parallel import distributed

    try:
        distributed.initialize(
            args.coordinator_address,
            args.process_count,
            args.process_index,
            initialization_timeout=args.initialization_timeout,
            heartbeat_timeout=args.heartbeat_timeout,
        )
        yield
    except tuple(EXIT_CODES) as error:
        # Earlier than JAX's abort, so that this process keeps its own exit code.
        distributed.abort(exit_status(error)[0], args.heartbeat_timeout / 2)
        raise
    distributed.barrier("end")  # process 0 may still be writing files, longer than JAX would wait


def load_config(args: Namespace, mixture: str = "", needs_backbone: bool = True) -> Any:
    """Load --config, or the shipped config of a mixture, with the overrides, and validate it."""
    from hyper_t5 import config as config_lib
    from hyper_t5.configs import mtf

    shipped = f"configs/mtf.py:mixture={mixture}" if mixture in mtf.LENGTHS else ""
    if args.config or shipped:
        config = config_lib.load(args.config or shipped, args.gin, args.gin_file)
    else:
        config = config_lib.defaults()
        config_lib.apply(config, read_overrides(args.gin, args.gin_file))
    config.data.mixture = mixture or config.data.mixture
    config_lib.validate(config, needs_backbone=needs_backbone)
    return config


# ----------------------------------------------------------------------------------- commands


@command("--out runs/quickstart")
def quickstart(args: Namespace) -> None:
    """Train, evaluate, adapt and export on the bundled tasks."""
    from hyper_t5.tools import quickstart

    quickstart.main(args.out, args.seeds, args.backbone, args.systems)


quickstart.add_argument(
    "--out", type=path, default="runs/quickstart", help="folder (default: %(default)s)"
)
quickstart.add_argument("--seeds", type=seed, nargs="+", default=[0], help="seeds (default: 0)")
quickstart.add_argument(
    "--backbone", type=path, help="folder of a backbone (default: the shipped one)"
)
quickstart.add_argument("--systems", nargs="+", default=[], help="systems, or all (default: six)")


@command(
    "--config configs/mtf.py:system=hyper_lora,size=base --workdir runs/mtf "
    "--gin.backbone.path=t5_base --gin.data.sni_dir=natural-instructions",
    *(flags.CONFIG, flags.WORKDIR, flags.PROCESSES),
)
def train(args: Namespace) -> None:
    """Train a hypermodel or a baseline; resumes from the newest checkpoint."""
    config = load_config(args)
    with join_processes(args):
        from hyper_t5 import config as config_lib
        from hyper_t5.checkpoints import workdir
        from hyper_t5.parallel import distributed
        from hyper_t5.training import loop

        distributed.check_same("the config", zlib.crc32(config_lib.to_json(config).encode()))
        with workdir.lock(args.workdir):
            for change in workdir.write_or_check_config(args.workdir, config):
                distributed.log(f"resume with {change}")
            loop.train(config, args.workdir, profile=args.profile)


train.add_argument("--profile", action="store_true", help="trace three steps to WORKDIR/profile")


@command(
    "--workdir runs/mtf --compare runs/concat --gin.eval.shots=2",
    flags.COMPARE,
    flags.STEP,
    flags.PROCESSES,
)
def evaluate(args: Namespace) -> None:
    """Evaluate on held-out tasks: metrics with intervals, predictions, a plot; resumable."""
    if args.adapter and (not args.backbone or args.step is not None):
        raise UserError(
            "evaluate: --adapter and --backbone belong together; pass both, and no --step"
        )
    if args.adapter and (args.config or not args.out):
        raise UserError("evaluate: --adapter needs --out and no --config; use --gin.FIELD=VALUE")
    overrides = read_overrides(args.gin, args.gin_file)
    if args.mixture:
        overrides.append(Override("eval.mixture", args.mixture, "--mixture"))
    if args.workdir and args.backbone:
        overrides.append(Override("backbone.path", args.backbone, "--backbone"))
    config = load_config(args) if args.config else None
    with join_processes(args):
        from hyper_t5.checkpoints import workdir
        from hyper_t5.evaluation import evaluate

        if config is not None:
            workdir.write_or_check_config(args.workdir, config)
        if args.adapter:
            evaluate.evaluate_adapter(
                args.adapter, args.backbone, overrides, args.out, args.compare
            )
        else:
            evaluate.evaluate_workdir(args.workdir, overrides, args.out, args.compare, args.step)


_group = evaluate.add_mutually_exclusive_group(required=True)
_group.add_argument("--workdir", type=path, help="run: config.json, checkpoints/, metrics.jsonl")
_group.add_argument("--adapter", type=path, help="native or PEFT adapter to use for every task")
evaluate.add_argument("--backbone", type=path, help="of the adapter; or where the run's is now")
evaluate.add_argument("--config", type=path, help="config of a new workdir, of an untrained system")
evaluate.add_argument("--mixture", help="short for --gin.eval.mixture=MIXTURE")
evaluate.add_argument("--out", type=path, help="folder of the results (default: in WORKDIR/eval)")


@command("--predictions runs/mtf/eval/1000/predictions.jsonl --out metrics.json", flags.COMPARE)
def score(args: Namespace) -> None:
    """Score the predictions of an evaluation, or a submission against its references."""
    from hyper_t5.evaluation import evaluate

    evaluate.score_file(args.predictions, args.references, args.gpt2_merges, args.out, args.compare)


score.add_argument(
    "--predictions", type=path, required=True, help="predictions.jsonl, or a submission"
)
score.add_argument(
    "--references", type=path, help="Super-NaturalInstructions references of a submission"
)
score.add_argument(
    "--gpt2_merges", type=path, help="merges.txt of GPT-2, for the cross-lingual track"
)
score.add_argument("--out", type=path, help="JSON file of all metrics")


@command("--workdir runs/mtf --workdir runs/concat --out runs/report")
def report(args: Namespace) -> None:
    """Write an HTML report of evaluated runs; the run with system=concat is the baseline."""
    from hyper_t5.evaluation import report

    print(report.write_report(args.workdir, args.out, robustness=args.robustness))


report.add_argument(
    "--workdir",
    type=path,
    action="append",
    required=True,
    help="evaluated run, or metrics.json; repeatable",
)
report.add_argument(
    "--robustness", type=path, default="", help="robustness.json of `hyper-t5 robustness`"
)
report.add_argument("--out", type=path, required=True, help="folder of report.html and its plots")


@command(
    "--workdir runs/mtf --workdir runs/shared --out runs/robustness",
    flags.STEP,
    flags.MOVED_BACKBONE,
    flags.PROCESSES,
)
def robustness(args: Namespace) -> None:
    """Evaluate runs with 0 to 16 examples and with perturbed task text; resumable."""
    overrides = read_overrides(args.gin, args.gin_file)
    with join_processes(args):
        from hyper_t5 import runs
        from hyper_t5.evaluation import robustness

        overrides += runs.backbone_override(args.backbone)
        robustness.robustness(
            args.workdir, args.out, overrides, args.shots, args.metric, args.seed, args.step
        )


robustness.add_argument(
    "--workdir", type=path, action="append", required=True, help="run; repeatable"
)
robustness.add_argument(
    "--out", type=path, required=True, help="folder of robustness.json and its plot"
)
robustness.add_argument(
    "--shots",
    type=lambda text: [at_least(0)(number.strip()) for number in text.split(",")],
    default="0,1,2,4,8,16",
    help="numbers of examples (default: %(default)s)",
)
robustness.add_argument("--metric", default="", help="metric (default: headline of the benchmark)")
robustness.add_argument("--seed", type=seed, default=0, help="of perturbation (default: 0)")


@command(
    "--mixture sni_test --gin.data.sni_dir=natural-instructions --gin.data.vocab=spiece.model",
    flags.GIN_FILES,
)
def data(args: Namespace) -> None:
    """Inspect a mixture: episodes, lengths, padding, sampling rates, warnings, speed."""
    start = time.perf_counter()
    from hyper_t5 import pipeline
    from hyper_t5.tools import inspect_data

    mixture = pipeline.find_mixture(args.mixture)[0] if args.mixture else ""
    config = load_config(args, mixture, needs_backbone=False)
    config.stage = "hyperpretrain" if args.text else "mtf"
    inspect_data.describe(config, args.mixture, args.out, args.episodes, args.steps, start)


_group = data.add_mutually_exclusive_group(required=True)
_group.add_argument("--mixture", default="", help="such as sni, or of SeqIO, such as sni_test")
_group.add_argument("--text", action="store_true", help="inspect data.text instead")
data.add_argument(
    "--config", type=path, help="config file (default: that of configs/mtf.py, if any)"
)
data.add_argument("--out", type=expanded_path, help="folder of data.json (default: print only)")
data.add_argument("--episodes", type=at_least(1), default=3, help="number to print (default: 3)")
data.add_argument("--steps", type=at_least(1), default=50, help="batches to draw (default: 50)")


@command(
    "--mixture sni --out gs://bucket/data --gin.data.sni_dir=natural-instructions", flags.GIN_FILES
)
def build(args: Namespace) -> None:
    """Write a mixture or text as sharded TFRecords with a manifest."""
    from hyper_t5.tools import build_dataset

    build_dataset.build(
        load_config(args, args.mixture, needs_backbone=False).data,
        args.out,
        mixture=args.mixture,
        text=args.text,
        shards=args.shards,
        overwrite=args.overwrite,
    )


_group = build.add_mutually_exclusive_group(required=True)
_group.add_argument("--mixture", default="", help="such as sni; prints the folder for data.store")
_group.add_argument(
    "--text", type=path, default="", help="text files; train with data.text=tfds:NAME"
)
build.add_argument("--out", type=path, required=True, help="folder, local or gs://")
build.add_argument("--shards", type=at_least(1), default=0, help="per split (default: by size)")
build.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
build.add_argument(
    "--config", type=path, help="config file (default: that of configs/mtf.py, if any)"
)


@command(
    "--workdir runs/mtf --task task.json --out my_adapter --format peft",
    flags.WORKDIR,
    flags.STEP,
    flags.MOVED_BACKBONE,
    flags.PEFT,
    flags.GIN_FILES,
)
def adapt(args: Namespace) -> None:
    """Generate an adapter from a task file; print its folder."""
    from hyper_t5 import runs
    from hyper_t5.inference import predictor

    overrides = [*read_overrides(args.gin, args.gin_file), *runs.backbone_override(args.backbone)]
    run = runs.open(args.workdir, overrides, step=args.step)
    print(predictor.adapt(run, args.task, args.out, args.format, args.base_model, args.dtype))


adapt.add_argument(
    "--task",
    type=path,
    required=True,
    help='Super-NaturalInstructions JSON, or {"instruction": ..., "examples": ...}',
)
adapt.add_argument("--out", type=path, required=True, help="folder to write")
adapt.add_argument(
    "--format", choices=["native", "peft"], default="native", help="(default: native)"
)


@command(
    "--backbone t5_base --adapter my_adapter --input rows.jsonl --output out.jsonl", flags.STEP
)
def predict(args: Namespace) -> None:
    """Generate outputs for a file of inputs with one or several adapters; resumable."""
    if not (args.backbone or args.workdir):
        raise UserError("predict: one of the arguments --backbone --workdir is required")
    if args.step is not None and not args.workdir:
        raise UserError("predict: --step chooses a checkpoint of --workdir; pass a workdir")
    if (args.task and not args.workdir) or (args.workdir and args.adapter):
        raise UserError("predict: pass --backbone and --adapter, or --workdir and --task")
    from hyper_t5.inference import predict_files, predictor
    from hyper_t5.t5.decoding import Sampling

    config = predictor.GenerationConfig(
        batch=args.batch,
        max_decode_length=args.max_decode_length,
        beam_size=args.beam_size,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        max_input_length=args.max_input_length,
        on_long=args.on_long,
    )
    predict_files.predict(
        args.input,
        args.output,
        config,
        backbone=args.backbone,
        adapters=args.adapter,
        workdir=args.workdir,
        tasks=args.task,
        step=args.step,
    )


predict.add_argument(
    "--backbone", type=path, default="", help="backbone of the adapters; or, now, of the run"
)
predict.add_argument(
    "--workdir", type=path, default="", help="run that generates adapters of --task"
)
predict.add_argument(
    "--adapter",
    type=path,
    action="append",
    default=[],
    help='native folder; if repeated, rows name "adapter"',
)
predict.add_argument(
    "--task",
    type=path,
    action="append",
    default=[],
    help='file or folder; if repeated, rows name "task"',
)
predict.add_argument("--input", type=path, required=True, help='JSONL file of rows with an "input"')
predict.add_argument("--output", type=path, required=True, help="JSONL file to write")
predict.add_argument("--batch", type=at_least(1), default=32, help="batch size (default: 32)")
predict.add_argument(
    "--max-decode-length", type=at_least(1), default=128, help="tokens of an output (default: 128)"
)
predict.add_argument("--beam-size", type=at_least(1), default=1, help="beams (default: 1)")
predict.add_argument("--temperature", type=float, default=0.0, help="0: no sampling (default: 0)")
predict.add_argument("--top-k", type=at_least(0), default=0, help="0: all tokens (default: 0)")
predict.add_argument("--top-p", type=float, default=0.0, help="0: all tokens (default: 0)")
predict.add_argument("--seed", type=seed, default=0, help="of sampling (default: 0)")
predict.add_argument(
    "--max-input-length", type=at_least(0), default=0, help="tokens; 0: as in training (default: 0)"
)
predict.add_argument(
    "--on-long",
    choices=["truncate", "refuse"],
    default="truncate",
    help="truncate longer inputs, or refuse the file (default: truncate)",
)


@command("--workdir runs/mtf --port 8000", flags.GIN_FILES)
def serve(args: Namespace) -> None:
    """Serve a T5 with an adapter per request over HTTP, and a page to try it."""
    if bool(args.workdir) == bool(args.backbone):
        raise UserError("serve: pass --workdir of a run, or --backbone with --adapter NAME=FOLDER")
    try:
        from hyper_t5.serving import server
        from hyper_t5.serving.service import Limits
    except ImportError as error:
        raise UserError(
            f"serve: needs {error.name}; install the extra: pip install 'hyper_t5[serve]'"
        ) from None
    limits = Limits(
        args.max_batch, args.max_queue, args.max_adapters, args.max_input, args.max_output
    )
    server.serve(
        args.workdir,
        args.backbone,
        args.adapter,
        limits,
        overrides=read_overrides(args.gin, args.gin_file),
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        adapter_dir=args.adapter_dir,
        warm_up=args.warmup,
    )


serve.add_argument("--workdir", type=path, default="", help="run that generates adapters")
serve.add_argument("--backbone", type=path, default="", help="backbone, without a hypermodel")
serve.add_argument(
    "--adapter",
    type=flags.named_path,
    action="append",
    default=[],
    help="NAME=FOLDER of a native adapter; repeatable",
)
serve.add_argument("--adapter_dir", type=path, default="", help="folder to load adapters from")
serve.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
serve.add_argument("--port", type=at_least(0), default=8000, help="0: any (default: 8000)")
serve.add_argument(
    "--api_key", default="", help="bearer token of /v1 (default: HYPER_T5_API_KEY, or none)"
)
serve.add_argument("--max_batch", type=at_least(1), default=16, help="slots (default: 16)")
serve.add_argument("--max_queue", type=at_least(1), default=256, help="waiting rows (default: 256)")
serve.add_argument(
    "--max_adapters", type=at_least(1), default=64, help="adapters in memory (default: 64)"
)
serve.add_argument(
    "--max_input", type=at_least(2), default=256, help="tokens of a prompt (default: 256)"
)
serve.add_argument(
    "--max_output", type=at_least(1), default=128, help="tokens of an output (default: 128)"
)
serve.add_argument(
    "--warmup",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="compile all programs before the first request (default: yes)",
)


@command("--input checkpoint_7 --to native --vocab spiece.model --out t5_base", flags.DTYPE)
def convert(args: Namespace) -> None:
    """Convert T5 weights between T5X, Hugging Face and native; print a JSON summary."""
    from hyper_t5 import runs, weights

    summary = weights.convert(
        runs.backbone_folder(args.input),
        args.out,
        args.to,
        source_format=args.source_format,
        dtype=args.dtype,
        scanned=args.scanned,
        vocab=args.vocab,
        log=lambda line: print(f"convert: {line}", file=sys.stderr, flush=True),
    )
    print(json.dumps(summary))


FORMATS = ["t5x", "hf", "native"]  # of weights
convert.add_argument(
    "--input", type=path, required=True, help="weights, or a run that trained a backbone"
)
convert.add_argument("--out", type=path, required=True, help="folder to write")
convert.add_argument("--to", required=True, choices=FORMATS, help="format of --out")
convert.add_argument(
    "--from", dest="source_format", choices=FORMATS, default="", help="format of --input"
)
convert.add_argument("--scanned", action="store_true", help="t5x: scanned layers, as scalable_t5")
convert.add_argument(
    "--vocab", type=path, default="", help="SentencePiece model, or bytes, for T5X input"
)


@command("--adapter my_adapter --out my_peft --format peft --backbone t5_base", flags.PEFT)
def export(args: Namespace) -> None:
    """Export an adapter to PEFT, native, or merged into its backbone; print the folder."""
    from hyper_t5 import export

    path = export.export(
        args.adapter, args.out, args.format, args.backbone, args.base_model, args.dtype
    )
    print(path)


export.add_argument("--adapter", type=path, required=True, help="native or PEFT folder")
export.add_argument("--out", type=path, required=True, help="folder to write")
export.add_argument(
    "--format",
    choices=["peft", "native", "merged"],
    required=True,
    help="merged: a Hugging Face T5 whose weights include LoRA",
)
export.add_argument("--backbone", type=path, required=True, help="folder of the adapter's backbone")


@command(
    "--config configs/mtf.py:size=xl --topology v5p:4x4x4 --gin.data.tasks_per_batch=128",
    flags.CONFIG,
    flags.GIN_FILES,
)
def plan(args: Namespace) -> None:
    """Compile a config for a TPU topology without TPUs: memory, FLOPs, traffic, time."""
    from hyper_t5.planning import plan

    config = load_config(args, needs_backbone=False)
    plan.plan(config, args.topology, args.slices, args.steps.split(","), args.out, args.config)


plan.add_argument(
    "--topology", required=True, help="chip and slice such as v5e:4x4, or a type such as v5p-128"
)
plan.add_argument("--slices", type=at_least(1), default=1, help="number of slices (default: 1)")
plan.add_argument(
    "--steps", default="train,evaluate,generate", help="programs to compile (default: %(default)s)"
)
plan.add_argument(
    "--out", type=path, help="folder of plan.json and the programs (default: print only)"
)


@command(
    "data packing --gin.data.sni_dir=natural-instructions --gin.data.vocab=spiece.model",
    flags.GIN_FILES,
)
def bench(args: Namespace) -> None:
    """Measure speed and memory, each as a ratio within one run."""
    from hyper_t5 import bench

    gin = [f"{o.field}={o.text}" for o in read_overrides(args.gin, args.gin_file)]
    bench.main(args.names, args.out, args.tiny, gin)


bench.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
bench.add_argument("--out", type=path, help="folder of the tables (default: print only)")
bench.add_argument("--tiny", action="store_true", help="toy sizes, to test the benchmarks")
