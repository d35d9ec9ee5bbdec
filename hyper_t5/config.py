"""Configs: the fields and their defaults, typed overrides, cross-field checks.

A config is an ``ml_collections.ConfigDict``, locked and typed. It comes from a Python file
(``configs/mtf.py:system=hyper_lora,size=base``) with a function ``get_config(arg)`` that starts
from ``defaults()``; then the lines of every ``--gin_file``; then every ``--gin.field=value``.
Every mistake is a UserError of one line that names the field, its place, and the remedy.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import json
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from hyper_t5.errors import UserError
from hyper_t5.overrides import (
    Override,
    choose,
    coerce,
    flatten,
    nearest,
    parse,
    read_overrides,
    set_field,
)
from hyper_t5.overrides import parse_args as parse_args

if TYPE_CHECKING:
    from hyper_t5.t5 import T5Config


def defaults() -> ConfigDict:
    """Every field with its default, locked: a run of toy size on the embedded task suite."""
    from hyper_t5 import t5  # imports JAX, which reading overrides must not cost
    from hyper_t5.hypermodels import SYSTEMS

    sections = {
        "seed": 0,
        # 'hyperpretrain' (raw text) | 'mtf' (episodes) | 'peft' (the tasks that are judged, by the
        # rows that are not: for adapters learned for each task)
        "stage": "mtf",
        "system": "hyper_prefix",  # a name in hypermodels.SYSTEMS
        "model": dataclasses.asdict(t5.preset("tiny")),
        "backbone": {
            "path": "",  # the backbone's folder; '' = random, for systems that train it
            "dtype": "float32",  # storage of the frozen weights: 'float32' | 'bfloat16'
        },
        "hypermodel": {
            "reader": "layerwise",  # 'layerwise' | 'decoder_queries'
            "gist_tokens": 0,  # layerwise: read this many appended tokens; 0 = the whole text
            "init": "backbone",  # 'backbone' | 'random'
            "path": "",  # a workdir or checkpoint to start from: how one stage hands over
        },
        "adapter": {
            "lora_rank": 16,
            "lora_alpha": 8.0,
            "lora_bias": False,
            # where rank or alpha is another: 'dec_cross=32,enc_mlp.wo=4,value=8', the first that
            # fits counts; alpha stays lora_alpha where its pattern says nothing, as in PEFT
            "lora_rank_pattern": "",
            "lora_alpha_pattern": "",
            "lora_targets": (
                "enc_self.query",
                "enc_self.value",
                "dec_self.query",
                "dec_self.value",
                "dec_cross.query",
                "dec_cross.value",
            ),
            "prefix_length": 32,
            "prefix_sites": ("enc_self", "dec_cross"),
            "position_bias": "hf",  # 'hf' | 'zero'
            "prefix_mask": False,  # task_prefix: slots that its start leaves out stay out
            "bottleneck_sites": ("enc_mlp", "dec_mlp"),
            "bottleneck_sizes": (64,),  # one for all of them, or one each
            "bottleneck_activation": "gelu",  # 'gelu' | 'relu' | 'silu' | 'tanh'
            "bottleneck_input": "normed",  # 'normed', what the MLP reads | 'raw', before its norm
            "task_slots": 0,  # for how many tasks a system with adapters for each keeps them
        },
        "peft": {
            # What the adapters of each task start from: a workdir, whose hypermodel makes them, or
            # an adapter folder; '' = random, as PEFT's do. configs/peft.py takes sizes from there.
            "init": "",
        },
        "data": {
            "mixture": "synthetic",
            "task_files": "",  # mixture 'task_files': a task file, a folder of them, or a glob
            "sni_dir": "",  # Super-NaturalInstructions: the folder that holds tasks/ and splits/
            "p3_dir": "",  # P3 as on the hub: <task>/{info,stats}.<split>.json and TFRecords
            "p3_prompts": "",  # a file of prompts with their fields masked; see tasks/p3.py
            "metaicl_dir": "",  # MetaICL: the folder that holds data/ and config/
            "metaicl_setting": "hr_to_lr",  # a file of its config/
            "glue_dir": "",  # GLUE as jsonl files; see tasks/glue.py
            "qa_dir": "",  # SQuAD or MRQA files; see tasks/extractive_qa.py
            "store": "",  # a store made by `hyper-t5 build`: the mixture's tasks are read from it
            "text": "",  # a .jsonl, .jsonl.xz, .txt, folder or glob; tfds:NAME; or 'synthetic'
            "cache_dir": "",  # for tokenised text; '' = the user's cache folder
            "vocab": "",  # '' = the mixture's own | 'bytes' | a SentencePiece .model file
            "extra_ids": 100,  # sentinels at the end of the vocabulary
            "hyper_length": 128,
            "input_length": 64,
            "target_length": 32,  # tokens, EOS included
            "tasks_per_batch": 8,
            "examples_per_task": 4,  # rows of a batch: their product
            "shots": (0, 2),  # fewest and most examples shown to the hypermodel, per episode
            "use_instruction": True,
            # '' = by shots and use_instruction | 'def' | 'def_pos_2' (instruction and the task's
            # first 2 examples) | 'pos_2' (2 examples drawn from the task alone); any number for 2
            "variant": "",
            # how instruction, examples and inputs are written: 'labelled' | 'tk_instruct' |
            # 'metaicl'; see prompts.py
            "encoding": "labelled",
            "example_length": 0,  # tokens of a shown example, of which the input is cut; 0 = any
            "concat_length": 0,  # of text and input in one (system=concat); 0 = room for both
            "on_long_examples": "drop",  # 'drop' whole ones, last first | 'cut_left' (MetaICL's)
            "pack": False,  # several examples of a task in each row, without padding in between
            "on_missing_task": "raise",  # 'raise' | 'skip' tasks of a split that have no file
            "on_bad_row": "raise",  # 'raise' | 'skip' (counted and printed)
            "empty_targets": "raise",  # 'raise' | 'skip' | 'keep': rows whose output is nothing
            "on_long_instruction": "raise",  # 'raise' | 'truncate'
            "chunk_length": 512,  # tokens of text that hyperpretraining cuts
            "text_split": "caclm",  # 'caclm' (A|B|C|D) | 'three_way', 'six_way' (HINT's)
            "segment_shares": (0.25, 0.25),  # the largest of B, and of C, as shares of a chunk
            "max_instances_per_task": 0,  # 0 = all
        },
        "train": {
            "steps": 1000,
            "log_every": 50,
            "save_every": 500,
            "keep": 3,  # the newest checkpoints; 0 = all
            "keep_period": 0,  # and for good each whose step is a multiple of this; 0 = none
            "microbatches": 1,  # gradient accumulation; divides data.tasks_per_batch
            "z_loss": 1e-4,
            "label_smoothing": 0.0,
            "on_bad_step": "stop",  # no number, or a spike, as loss or gradient: 'stop' | 'skip'
            "spike": 0.0,  # a loss over this many times its running mean is a bad step; 0 = never
        },
        # How a run is spread over devices (sharding.py); one size may be -1: all that are left.
        "mesh": {
            "slices": 1,  # TPU slices, with the data-centre network between them
            "data": -1,  # parts of a batch; what is trained is cut by them too (ZeRO)
            "model": 1,  # parts of each matrix
            "rules": (  # logical axis = mesh axis, nothing where it is not cut; T5X's standard ones
                *("vocab=model", "mlp=model", "heads=model", "joined_kv=model"),
                *("embed=", "layers=", "prefix=", "relpos_buckets="),
            ),
        },
        "optimizer": {
            "name": "adamw",  # 'adamw' | 'adafactor' (T5X's)
            "learning_rate": 1e-3,
            "schedule": "constant",  # after warm-up: 'constant' | 'linear' | 'cosine' | 'rsqrt'
            "warmup_steps": 0,
            "head_learning_rate_scale": 1.0,  # fresh heads may learn faster than the copied rest
            "backbone_learning_rate_scale": 1.0,  # where it is trained too
            "weight_decay": 0.0,
            "clip_norm": 1.0,  # 0 = no clipping
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,  # adamw
            "decay_rate": 0.8,  # adafactor
            "min_dim_size_to_factor": 128,
            "multiply_by_parameter_scale": True,
            # T5X's: the step that its schedule starts at, and what each group subtracts from it.
            "first_step": 0,
            "hypermodel_step_offset": 0,
            "backbone_step_offset": 0,
        },
        "eval": {
            "mixture": "",  # '' = data.mixture
            "split": "",  # '' = every held-out split of the mixture
            "max_rows_per_task": 100,  # 0 = all
            "batch": 32,  # rows
            "max_decode_length": 32,
            "beam_size": 1,
            "shots": 2,  # examples shown
            # 'auto' (options are ranked where every row of a task has them) | 'generate' | 'rank'
            "how": "auto",
            "gpt2_merges": "",  # GPT-2's merges.txt: for ROUGE-L of SNI's cross-lingual track
        },
    }
    sections |= {name: dict(s.options) for name, s in SYSTEMS.items() if s.options}
    return ConfigDict(sections, type_safe=True).lock()


def use_preset(config: ConfigDict, size: str) -> None:
    """Set ``config.model`` to a named size: T5 1.1's ``base``, or T5 1.0's ``t5-base``."""
    from hyper_t5 import t5

    choose("size", size, [*t5.PRESETS, *(f"t5-{name}" for name in t5.T5_1_0_PRESETS)])
    config.model.update(dataclasses.asdict(t5.preset(size)))


# What each benchmark's own rows and text need, by the papers that it is compared with.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "synthetic": {},
    "sni": {  # Tk-Instruct's rows, definition and two positive examples
        "variant": "def_pos_2",
        "max_instances_per_task": 100,
        "empty_targets": "keep",  # six official rows: nothing is the right answer
        "on_long_instruction": "truncate",  # a few definitions are longer than any input
    },
    # k = 16 examples of the same prompt, as MetaICL and FiD-ICL; "def" needs data.p3_prompts.
    "p3": {"variant": "pos_16"},
    "metaicl": {
        "variant": "pos_16",
        "encoding": "metaicl",
        "example_length": 256,
        "on_long_examples": "cut_left",
    },
}


def use_mixture(config: ConfigDict, name: str) -> None:
    """Set ``config.data`` to a benchmark's own rows and text; lengths are each config's to set."""
    choose("mixture", name, BENCHMARKS)
    config.data.update(BENCHMARKS[name], mixture=name)


def t5_config(config: ConfigDict) -> T5Config:
    """The sizes in ``config.model``."""
    from hyper_t5 import t5

    return t5.T5Config(**config.model.to_dict())


# ---------------------------------------------------------------------- reading and overriding


def load(
    config_arg: str,
    overrides: Sequence[str | Override] = (),
    gin_files: Sequence[str | os.PathLike[str]] = (),
) -> ConfigDict:
    """The config of ``FILE.py[:arg,...]``, then ``gin_files``, then ``overrides``; locked.

    FILE.py is looked for on disk, then among the configs shipped in the package, so that
    ``configs/quickstart.py`` works from any directory. Call ``validate`` on the result.
    """
    file, colon, arg = config_arg.partition(".py:")
    path = _find_config_file(file + ".py" if colon else file)
    found = _run_config_file(path, arg if colon else None)
    if not isinstance(found, ConfigDict):
        raise UserError(
            f"{path}: get_config returns {type(found).__name__}, not a ConfigDict; "
            "start from hyper_t5.config.defaults()"
        )
    config = _typed(found.to_dict(), str(path))
    apply(config, read_overrides(overrides, gin_files))
    return config


def apply(config: ConfigDict, overrides: Iterable[Override]) -> None:
    """Set each override's field in place, as the type of its default."""
    known = flatten(defaults())
    for field, text, where in overrides:
        set_field(config, field, text, known, where, parse)


def _find_config_file(file: str) -> Path:
    path = Path(file)
    if path.suffix != ".py":
        raise UserError(f"--config {file}: a config is a Python file, as in configs/mtf.py:size=xl")
    if path.is_file():
        return path
    spec = importlib.util.find_spec("hyper_t5.configs")
    folders = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    for folder in folders if path.parent.as_posix() in (".", "configs") else ():
        if (folder / path.name).is_file():
            return folder / path.name
    shipped = sorted(f"configs/{p.name}" for d in folders for p in d.glob("[!_]*.py"))
    hint = f", the nearest shipped one is {nearest(file, shipped)}" if shipped else ""
    raise UserError(f"--config {file}: no such file{hint}")


def _run_config_file(path: Path, arg: str | None) -> Any:
    # exec, not import: it leaves no __pycache__ beside a user's file and never reads a stale one.
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), namespace)
        if not callable(namespace.get("get_config")):
            raise UserError("it defines no function get_config(arg)")
        return namespace["get_config"](arg)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except Exception as e:  # whatever a config file's code does wrong is the user's to mend
        line = getattr(e, "lineno", 1)
        for frame in traceback.extract_tb(e.__traceback__):
            line = frame.lineno if frame.filename == str(path) else line
        # ml_collections' message for an unknown field is a dump of all fields, then the hint.
        lines = str(e).replace("\\n", "\n").splitlines() or [""]
        text = lines[-1 if isinstance(e, AttributeError) else 0].replace("\\", "").strip("'\"")
        raise UserError(f"{path}:{line}: {type(e).__name__}: {text}") from e


def _typed(values: Mapping[str, Any], where: str) -> ConfigDict:
    """Plain nested values on top of the defaults, every one checked."""
    config = defaults()
    known = flatten(config)
    for field, value in flatten(values).items():
        set_field(config, field, value, known, where, coerce)
    return config


# ------------------------------------------------------------------------ as JSON, and compared


def to_json(config: ConfigDict) -> str:
    """The text of a run's config.json."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def from_json(text: str, where: str = "config.json") -> ConfigDict:
    """The inverse of ``to_json``. A field that the text lacks, being newer, has its default."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}:{e.lineno}: truncated or not JSON ({e.msg})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a config, which is a JSON object")
    return _typed(values, where)


def differences(old: ConfigDict, new: ConfigDict, allowed: Sequence[str] = ()) -> list[str]:
    """``field: old -> new`` for each field that differs and matches no pattern of ``allowed``."""
    before, after = flatten(old), flatten(new)
    return [
        f"{field}: {before.get(field)!r} -> {after.get(field)!r}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
        and not any(fnmatch.fnmatchcase(field, pattern) for pattern in allowed)
    ]


# ------------------------------------------------------------------------------------- validation

_DTYPES = ("float32", "bfloat16")
_CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("hyperpretrain", "mtf", "peft"),
    "model.dtype": _DTYPES,
    "model.remat": ("none", "minimal", "full"),
    "backbone.dtype": _DTYPES,
    "hypermodel.reader": ("layerwise", "decoder_queries"),
    "hypermodel.init": ("backbone", "random"),
    "adapter.position_bias": ("hf", "zero"),
    "adapter.bottleneck_activation": ("gelu", "relu", "silu", "tanh"),
    "adapter.bottleneck_input": ("normed", "raw"),
    "data.text_split": ("caclm", "three_way", "six_way"),
    "data.encoding": ("labelled", "tk_instruct", "metaicl"),
    "data.on_missing_task": ("raise", "skip"),
    "data.on_bad_row": ("raise", "skip"),
    "data.empty_targets": ("raise", "skip", "keep"),
    "data.on_long_examples": ("drop", "cut_left"),
    "data.on_long_instruction": ("raise", "truncate"),
    "optimizer.name": ("adafactor", "adamw"),
    "optimizer.schedule": ("constant", "linear", "cosine", "rsqrt"),
    "train.on_bad_step": ("stop", "skip"),
    "eval.how": ("auto", "generate", "rank"),
}
_AT_LEAST: dict[int, tuple[str, ...]] = {
    0: (
        "seed",
        "hypermodel.gist_tokens",
        "data.extra_ids",
        "data.max_instances_per_task",
        "data.example_length",
        "data.concat_length",
        "train.z_loss",
        "train.keep",
        "train.keep_period",
        "train.spike",
        "adapter.task_slots",
        "optimizer.warmup_steps",
        "optimizer.first_step",
        "optimizer.hypermodel_step_offset",
        "optimizer.backbone_step_offset",
        "optimizer.backbone_learning_rate_scale",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "eval.max_rows_per_task",
        "eval.shots",
    ),
    1: (
        "model.vocab_size",
        "model.emb_dim",
        "model.num_heads",
        "model.num_encoder_layers",
        "model.num_decoder_layers",
        "model.head_dim",
        "model.mlp_dim",
        "adapter.lora_rank",
        "adapter.prefix_length",
        "data.hyper_length",
        "data.input_length",
        "data.target_length",
        "data.tasks_per_batch",
        "data.examples_per_task",
        "train.steps",
        "train.log_every",
        "train.save_every",
        "train.microbatches",
        "eval.batch",
        "eval.max_decode_length",
        "eval.beam_size",
    ),
}
_ABOVE_ZERO = (
    "adapter.lora_alpha",
    "optimizer.learning_rate",
    "optimizer.head_learning_rate_scale",
    "optimizer.eps",
)
_FRACTIONS = (
    "model.dropout_rate",
    "train.label_smoothing",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.decay_rate",
)


def validate(config: ConfigDict, needs_backbone: bool = True) -> None:
    """Refuse, by a UserError of one line, values that no run could use or that contradict.

    Not ``needs_backbone``: for looking at data alone.
    """
    flat = flatten(config)
    for field, known in _CHOICES.items():
        if flat[field] == "float16":
            raise UserError(
                f"{field}: float16 is refused, because T5's activations exceed its "
                "largest number, 65504; use bfloat16"
            )
        choose(field, flat[field], known)
    for least, fields in _AT_LEAST.items():
        for field in fields:
            if flat[field] < least:
                raise UserError(f"{field} must be {least} or more, not {flat[field]}")
    for field in _ABOVE_ZERO:
        if flat[field] <= 0:
            raise UserError(f"{field} must be above 0, not {flat[field]}")
    for field in _FRACTIONS:
        if not 0 <= flat[field] < 1:
            raise UserError(f"{field} must be at least 0 and below 1, not {flat[field]}")
    _validate_system(config, needs_backbone)
    _validate_batch(config)


def _validate_system(config: ConfigDict, needs_backbone: bool) -> None:
    from hyper_t5 import adapters, hypermodels

    choose("system", config.system, hypermodels.SYSTEMS)
    system = hypermodels.SYSTEMS[config.system]
    given = config.backbone.path or hypermodels.BACKBONE in system.trains
    if needs_backbone and not given:
        raise UserError(
            f"backbone.path is empty: system {config.system} works on a trained "
            "backbone, which stays frozen; give its folder with --gin.backbone.path="
        )
    for group in ("hypermodel", "backbone"):
        if config.optimizer[f"{group}_step_offset"] > config.optimizer.first_step:
            raise UserError(
                f"optimizer.{group}_step_offset={config.optimizer[f'{group}_step_offset']} is "
                f"beyond optimizer.first_step={config.optimizer.first_step}; lower it"
            )
    if config.stage == "peft" and hypermodels.HYPERMODEL not in system.trains:
        raise UserError(
            f"stage=peft tunes adapters on the tasks that are judged, and system={config.system} "
            "trains none; take one such as task_lora"
        )
    if config.peft.init and not (config.stage == "peft" and config.system.startswith("task_")):
        raise UserError(
            f"peft.init is where stage=peft starts the adapters of each task from; stage="
            f"{config.stage} with system={config.system} has none: set it to '', or take "
            "configs/peft.py"
        )
    if config.peft.init and config.hypermodel.path:
        raise UserError(
            "peft.init and hypermodel.path are both given, and a run starts once; set one to ''"
        )
    if config.hypermodel.gist_tokens and config.hypermodel.reader != "layerwise":
        raise UserError(
            "hypermodel.gist_tokens is for hypermodel.reader=layerwise; set it to 0 "
            f"with {config.hypermodel.reader}"
        )
    sites = (*adapters.ATTENTION_SITES, *adapters.MLP_SITES)
    sizes = t5_config(config)
    # A backbone's folder decides whether its MLPs are gated, and hypermodels check that.
    either = [sizes] + [
        dataclasses.replace(sizes, mlp_activations=names)
        for names in (("relu",), ("gelu", "linear"))
        if config.backbone.path
    ]
    targets = dict.fromkeys(name for c in either for name in adapters.targets_of(sites, c))
    known = {
        "adapter.lora_targets": tuple(targets),
        "adapter.prefix_sites": adapters.ATTENTION_SITES,
        "adapter.bottleneck_sites": adapters.MLP_SITES,
    }
    for field, names in known.items():
        given = config.adapter[field.partition(".")[2]]
        for name in given:
            choose(field, name, names)
        if len(set(given)) < len(given):
            raise UserError(f"{field} names one place twice: {', '.join(given)}")
    hypermodels.specs.pattern(config, "lora_rank_pattern", int)
    hypermodels.specs.pattern(config, "lora_alpha_pattern", float)


def _validate_batch(config: ConfigDict) -> None:
    from hyper_t5 import hypermodels, prompts

    data = config.data
    if len(data.shots) != 2 or not 0 <= data.shots[0] <= data.shots[1]:
        raise UserError(
            "data.shots is the fewest and the most examples shown, such as 0,2; "
            f"not {','.join(map(str, data.shots))}"
        )
    if data.variant:
        prompts.show_rule(data)
    silent = not (data.variant or data.use_instruction or (data.shots[1] and config.eval.shots))
    if silent and config.stage == "mtf" and _needs_text(config):
        raise UserError(
            "data.use_instruction=False needs examples, or the hypermodel reads "
            f"nothing: data.shots={data.shots[0]},{data.shots[1]} and eval.shots="
            f"{config.eval.shots} must allow one"
        )
    if data.pack and config.stage == "hyperpretrain":
        raise UserError("data.pack=True is for tasks; chunks of text fill their rows, set it False")
    if data.pack and hypermodels.SYSTEMS[config.system].reads == "input":
        raise UserError(
            f"data.pack=True puts examples of a task in one row, but system={config.system} has "
            "adapters for each example; set data.pack=False"
        )
    if min(config.adapter.bottleneck_sizes, default=0) < 1:
        raise UserError(
            "adapter.bottleneck_sizes must each be 1 or more, not "
            f"{','.join(map(str, config.adapter.bottleneck_sizes))}"
        )
    if data.tasks_per_batch % config.train.microbatches:
        raise UserError(
            f"data.tasks_per_batch={data.tasks_per_batch} cannot be cut in "
            f"train.microbatches={config.train.microbatches} equal parts"
        )


def _needs_text(config: ConfigDict) -> bool:
    """Whether the system has nothing to go by but the conditioning: not so where it is in front of
    the inputs.
    """
    from hyper_t5 import hypermodels

    return hypermodels.SYSTEMS[config.system].layout != "concat"
