"""Configs: one table of fields, typed overrides, cross-field checks.

A config is an ``ml_collections.ConfigDict``, locked and typed. It comes from a Python file
(``configs/mtf.py:system=hyper_lora,size=base``) with a function ``get_config(arg)`` that starts
from ``defaults()``; then the lines of every ``--gin_file``; then every ``--gin.field=value``.
Invalid input is a UserError of one line that names the field, its location, and the remedy.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import (
    SEED_END,
    Override,
    choose,
    coerce,
    flatten,
    nearest,
    parse,
    read_overrides,
    set_field,
)
from hyper_t5.utils.overrides import parse_args as parse_args
from hyper_t5.utils.paths import expand

if TYPE_CHECKING:
    from hyper_t5.t5 import T5Config


class Field(NamedTuple):
    """A config field: its default, and the values that are valid."""

    default: Any
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    greater_than: float | None = None
    less_than: float | None = None


def _one_of(*choices: str) -> Field:
    """Return a field with named values; the first is the default."""
    return Field(choices[0], choices)


def _at_least(minimum: int, default: Any) -> Field:
    return Field(default, minimum=minimum)


def _positive(default: float) -> Field:
    return Field(default, greater_than=0)


def _fraction(default: float) -> Field:
    return Field(default, minimum=0, less_than=1)


def fields() -> dict[str, Any]:
    """Return every field: sections of `Field`s, or of bare defaults where any value is valid.

    Sections of systems and fields of datasets come from their registries.
    """
    from hyper_t5 import t5  # imports JAX, which reading overrides must not cost
    from hyper_t5.data.templates import TEMPLATES
    from hyper_t5.hypermodels import SYSTEMS
    from hyper_t5.tasks import MIXTURES

    model = dataclasses.asdict(t5.preset("tiny"))
    sizes = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers")
    for name in (*sizes, "head_dim", "mlp_dim"):
        model[name] = _at_least(1, model[name])
    model["dropout_rate"] = _fraction(model["dropout_rate"])
    model["dtype"] = _one_of("float32", "bfloat16")
    model["remat"] = _one_of("none", "minimal", "full")
    table: dict[str, Any] = {
        "seed": Field(0, minimum=0, less_than=SEED_END),
        # Raw text | episodes | the evaluated tasks, by rows that are not evaluated (for adapters
        # learned for each task).
        "stage": Field("mtf", ("hyperpretrain", "mtf", "peft")),
        "system": "hyper_prefix",  # a name in hypermodels.SYSTEMS
        "model": model,
        "backbone": {
            "path": "",  # the backbone's folder; '' = random, for systems that train it
            "dtype": _one_of("float32", "bfloat16"),  # storage of the frozen weights
        },
        "hypermodel": {
            "reader": _one_of("layerwise", "decoder_queries"),
            "gist_tokens": _at_least(0, 0),  # layerwise: of appended tokens; 0 = the whole text
            "init": _one_of("backbone", "random"),
            "path": "",  # workdir or checkpoint whose hypermodel training starts from
        },
        "adapter": {
            "lora_rank": _at_least(1, 16),
            "lora_alpha": _positive(8.0),
            "lora_bias": False,
            # Other ranks or alphas by target: 'dec_cross=32,enc_mlp.wo=4,value=8'; the first match
            # counts, and alpha stays lora_alpha where its pattern has none, as in PEFT.
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
            "prefix_length": _at_least(1, 32),
            "prefix_sites": ("enc_self", "dec_cross"),
            "position_bias": _one_of("hf", "zero"),
            "prefix_mask": False,  # task_prefix: slots that its start masks stay masked
            "bottleneck_sites": ("enc_mlp", "dec_mlp"),
            "bottleneck_sizes": (64,),  # one for all of them, or one each
            "bottleneck_activation": _one_of("gelu", "relu", "silu", "tanh"),
            "bottleneck_input": _one_of("normed", "raw"),  # what the MLP reads, or before its norm
            "task_slots": _at_least(0, 0),  # tasks of a system with adapters for each
        },
        "peft": {
            # The start of each task's adapters: a workdir, whose hypermodel generates them, or an
            # adapter folder; '' = random, as in PEFT. configs/peft.py takes sizes from there.
            "init": "",
        },
        "data": {
            "mixture": "synthetic",  # a name in tasks.MIXTURES
            "store": "",  # a store built by `hyper-t5 build`: the mixture's tasks are read from it
            "text": "",  # a .jsonl, .jsonl.gz, .txt, ..., folder or glob; tfds:NAME; or 'synthetic'
            "cache_dir": "",  # for tokenized text; '' = the user's cache folder
            "vocab": "",  # '' = the mixture's own | 'bytes' | a SentencePiece .model file
            "extra_ids": _at_least(0, 100),  # sentinels at the end of the vocabulary
            "hyper_length": _at_least(1, 128),
            # A longer conditioning is read in so many chunks of hyper_length, each the instruction
            # and as many examples as fit, whose adapters are composed.
            "chunks": _at_least(1, 1),
            "input_length": _at_least(1, 64),
            "target_length": _at_least(1, 32),  # tokens, EOS included
            "tasks_per_batch": _at_least(1, 8),
            "examples_per_task": _at_least(1, 4),  # rows of a batch: their product
            "shots": (0, 2),  # fewest and most examples shown to the hypermodel, per episode
            "use_instruction": True,
            # What an episode of training shows, by rates: 'instruction=1,examples=2,both=1', with
            # one or more examples, as data.shots says. '' = by use_instruction and shots.
            "conditioning": "",
            # '' = by shots and use_instruction | 'def' | 'def_pos_2' (instruction and the task's
            # first 2 examples) | 'pos_2' (2 examples drawn from the task alone); any number for 2.
            "variant": "",
            "template": Field("labelled", tuple(TEMPLATES)),  # see data/templates.py
            # Tokens of a shown example, of which the input is cut; 0 = any.
            "example_length": _at_least(0, 0),
            # Tokens of conditioning and input in one (system=concat); 0 = room for both.
            "concat_length": _at_least(0, 0),
            # Drop whole examples, last first | cut at the start (MetaICL).
            "on_long_examples": _one_of("drop", "cut_left"),
            "pack": False,  # several examples of a task in each row, without padding in between
            "on_missing_task": _one_of("raise", "skip"),  # tasks of a split without a file
            "on_bad_row": _one_of("raise", "skip"),  # skipped rows are counted and printed
            "empty_targets": _one_of("raise", "skip", "keep"),  # rows whose output is blank
            "on_long_instruction": _one_of("raise", "truncate"),
            "chunk_length": 512,  # tokens of text that hyperpretraining splits
            # CACLM's A|B|C|D, or HINT's splits.
            "text_split": _one_of("caclm", "three_way", "six_way"),
            "segment_shares": (0.25, 0.25),  # the largest of B, and of C, as shares of a chunk
            "max_instances_per_task": _at_least(0, 0),  # 0 = all
        },
        "train": {
            "steps": _at_least(1, 1000),
            "log_every": _at_least(1, 50),
            "save_every": _at_least(1, 500),
            "keep": _at_least(0, 3),  # the newest checkpoints; 0 = all
            "keep_period": _at_least(0, 0),  # also keep multiples of this step; 0 = none
            # Validation every so many steps; 0 = never, and no row is held out.
            "eval_every": _at_least(0, 0),
            "eval_split": "",  # '' = held-out rows of training tasks, which are never trained on
            "eval_tasks": _at_least(1, 16),
            "eval_rows": _at_least(1, 4),  # of each of these tasks
            "keep_best": False,  # also save and keep the step with the lowest validation loss
            "microbatches": _at_least(1, 1),  # gradient accumulation; divides data.tasks_per_batch
            "z_loss": _at_least(0, 1e-4),
            "label_smoothing": _fraction(0.0),
            "on_bad_step": _one_of("stop", "skip"),  # loss or gradient not finite, or a spike
            "spike": _at_least(0, 0.0),  # a loss over so many times its running mean; 0 = never
        },
        # How a run is spread over devices (parallel/sharding.py); one size may be -1: the rest.
        "mesh": {
            "slices": 1,  # TPU slices, connected by the data-centre network
            "data": -1,  # parts of a batch; trained parameters are sharded over it too (ZeRO)
            "model": 1,  # parts of each matrix
            # Logical axis = mesh axis, nothing where it is not sharded: T5X's standard rules.
            "rules": (
                *("vocab=model", "mlp=model", "heads=model", "joined_kv=model"),
                *("embed=", "layers=", "prefix=", "relpos_buckets="),
            ),
        },
        "optimizer": {
            "name": _one_of("adamw", "adafactor"),  # T5X's Adafactor
            "learning_rate": _positive(1e-3),
            "schedule": _one_of("constant", "linear", "cosine", "rsqrt"),  # after warm-up
            "warmup_steps": _at_least(0, 0),
            # Newly initialized heads may learn faster than copied weights.
            "head_learning_rate_scale": _positive(1.0),
            "backbone_learning_rate_scale": _at_least(0, 1.0),  # where it is trained too
            "weight_decay": _at_least(0, 0.0),
            "clip_norm": _at_least(0, 1.0),  # 0 = no clipping
            "b1": _fraction(0.9),
            "b2": _fraction(0.999),
            "eps": _positive(1e-8),  # adamw
            "decay_rate": _fraction(0.8),  # adafactor
            "min_dim_size_to_factor": 128,
            "multiply_by_parameter_scale": True,
            # T5X: the first step of its schedule, and what each group subtracts from it.
            "first_step": _at_least(0, 0),
            "hypermodel_step_offset": _at_least(0, 0),
            "backbone_step_offset": _at_least(0, 0),
        },
        "eval": {
            "mixture": "",  # '' = data.mixture
            "split": "",  # '' = every held-out split of the mixture
            "max_rows_per_task": _at_least(0, 100),  # 0 = all
            "batch": _at_least(1, 32),  # rows
            "max_decode_length": _at_least(1, 32),
            "beam_size": _at_least(1, 1),
            "shots": _at_least(0, 2),  # examples shown
            # 'auto' ranks options where every row of a task has them.
            "method": _one_of("auto", "generate", "rank"),
            "gpt2_merges": "",  # GPT-2's merges.txt, for ROUGE-L of SNI's cross-lingual track
        },
    }
    for dataset in MIXTURES.values():
        table["data"] |= dataset.options
    return table | {name: dict(s.options) for name, s in SYSTEMS.items() if s.options}


def path_fields() -> list[str]:
    """Return the fields that name files or folders."""
    from hyper_t5.tasks import MIXTURES

    names = ["backbone.path", "hypermodel.path", "peft.init", "eval.gpt2_merges"]
    names += [f"data.{name}" for name in ("store", "text", "cache_dir", "vocab")]
    return names + [f"data.{name}" for dataset in MIXTURES.values() for name in dataset.paths]


# Old name -> new name of fields: refused, except in adapter folders.
RENAMED = {"eval.how": "eval.method", "data.encoding": "data.template"}


def defaults() -> ConfigDict:
    """Return every field with its default, locked: a run of toy size on the embedded task suite."""

    def default(value: Any) -> Any:
        if isinstance(value, Field):
            return value.default
        return {k: default(v) for k, v in value.items()} if isinstance(value, dict) else value

    return ConfigDict(default(fields()), type_safe=True).lock()


def use_preset(config: ConfigDict, size: str) -> None:
    """Set ``config.model`` to a named size: T5 1.1's ``base``, or T5 1.0's ``t5-base``."""
    from hyper_t5 import t5

    choose("size", size, [*t5.PRESETS, *(f"t5-{name}" for name in t5.T5_1_0_PRESETS)])
    config.model.update(dataclasses.asdict(t5.preset(size)))


def use_mixture(config: ConfigDict, name: str) -> None:
    """Set ``config.data`` to the rows and text of a benchmark's published results.

    Lengths are each config's to set.
    """
    from hyper_t5.tasks import MIXTURES

    choose("mixture", name, MIXTURES)
    config.data.update(MIXTURES[name].settings, mixture=name)


def t5_config(config: ConfigDict) -> T5Config:
    """Return the sizes in ``config.model``."""
    from hyper_t5 import t5

    return t5.T5Config(**config.model.to_dict())


# ------------------------------------------------------------------------ reading and overriding


def load(
    config_arg: str,
    overrides: Sequence[str | Override] = (),
    gin_files: Sequence[str | os.PathLike[str]] = (),
) -> ConfigDict:
    """Return the config of ``FILE.py[:arg,...]``, then ``gin_files``, then ``overrides``; locked.

    FILE.py is looked up on disk, then among the configs shipped in the package, so that
    ``configs/quickstart.py`` works from any directory. Call ``validate`` on the result.
    """
    file, colon, arg = config_arg.partition(".py:")
    path = _find_config_file(file + ".py" if colon else file)
    result = _run_config_file(path, arg if colon else None)
    if not isinstance(result, ConfigDict):
        raise UserError(
            f"{path}: get_config returns {type(result).__name__}, not a ConfigDict; "
            "start from hyper_t5.config.defaults()"
        )
    config = _typed(result.to_dict(), str(path))
    apply(config, read_overrides(overrides, gin_files))
    return config


def apply(config: ConfigDict, overrides: Iterable[Override]) -> None:
    """Set each override's field in place, as the type of its default."""
    known = flatten(defaults())
    for field, text, location in overrides:
        _refuse_renamed(field, location)
        set_field(config, field, text, known, location, parse)
    _expand_paths(config)


def _expand_paths(config: ConfigDict) -> None:
    for field in path_fields():
        section, _, name = field.partition(".")
        config[section][name] = expand(config[section][name])


def _refuse_renamed(field: str, location: str) -> None:
    if field in RENAMED:
        raise UserError(f"{location}: {field} is now {RENAMED[field]}; use that name")


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
    except Exception as e:  # any error of a config file's code is the user's to fix
        line = getattr(e, "lineno", 1)
        for frame in traceback.extract_tb(e.__traceback__):
            line = frame.lineno if frame.filename == str(path) else line
        text = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        if isinstance(e, AttributeError) and isinstance(e.__context__, KeyError):
            # ml_collections' message, "Key 'NAME' ..." or "'NAME'", is a dump of all fields.
            message = str(e.__context__.args[0]).removeprefix("Key ")
            text = _unknown_key(re.findall(r"\w+", message)[0])
        raise UserError(f"{path}:{line}: {text}") from e


def _unknown_key(key: str) -> str:
    for old, new in RENAMED.items():
        if old.endswith(f".{key}"):
            return f"{old} is now {new}; use that name"
    config = defaults()
    return f"unknown field {key}, the nearest is {nearest(key, [*config, *flatten(config)])}"


def _typed(values: Any, location: str) -> ConfigDict:
    """Return plain nested values on top of the defaults, with every type checked."""
    if not isinstance(values, Mapping):
        raise UserError(f"{location}: not a config, which is a JSON object")
    config = defaults()
    known = flatten(config)
    for field, value in flatten(values).items():
        _refuse_renamed(field, location)
        set_field(config, field, value, known, location, coerce)
    return config


# ------------------------------------------------------------------------ JSON, comparison


def to_json(config: ConfigDict) -> str:
    """Return the text of a run's config.json."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def from_json(text: str, location: str = "config.json") -> ConfigDict:
    """Return the config of ``to_json``'s text; fields that it lacks have their default."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{location}:{e.lineno}: truncated or not JSON ({e.msg})") from None
    except (ValueError, RecursionError):
        reason = "a number of thousands of digits, or nested too deeply"
        raise UserError(f"{location}: not valid JSON ({reason})") from None
    return _typed(values, location)


def from_adapter(values: Any, location: str) -> ConfigDict:
    """Return the config in an adapter folder, which may have the old names of renamed fields."""
    if isinstance(values, Mapping):
        values = {RENAMED.get(field, field): value for field, value in flatten(values).items()}
    return _typed(values, location)


def differences(old: ConfigDict, new: ConfigDict, allowed: Sequence[str] = ()) -> list[str]:
    """Return ``field: old -> new`` for each field that differs and matches no allowed pattern."""
    before, after = flatten(old), flatten(new)
    return [
        f"{field}: {before.get(field)!r} -> {after.get(field)!r}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
        and not any(fnmatch.fnmatchcase(field, pattern) for pattern in allowed)
    ]


# ------------------------------------------------------------------------------- validation


def validate(config: ConfigDict, needs_backbone: bool = True) -> None:
    """Refuse values that are invalid or contradict each other, by a UserError of one line.

    Without ``needs_backbone``, for data alone, ``backbone.path`` may be empty.
    """
    values = flatten(config)
    for name, field in flatten(fields()).items():
        if isinstance(field, Field):
            _check_value(name, values[name], field)
    _validate_system(config, needs_backbone)
    _validate_adapter(config)
    _validate_batch(config)
    _validate_validation(config)


def _check_value(name: str, value: Any, field: Field) -> None:
    if field.choices:
        if value == "float16":
            raise UserError(
                f"{name}: float16 is refused, because T5's activations exceed its "
                "largest number, 65504; use bfloat16"
            )
        choose(name, value, field.choices)
    elif field.less_than is not None:
        if not (field.minimum or 0) <= value < field.less_than:
            raise UserError(
                f"{name} must be at least {field.minimum} and below {field.less_than}, not {value}"
            )
    elif field.minimum is not None and value < field.minimum:
        raise UserError(f"{name} must be {field.minimum} or more, not {value}")
    elif field.greater_than is not None and value <= field.greater_than:
        raise UserError(f"{name} must be above {field.greater_than}, not {value}")


def _validate_system(config: ConfigDict, needs_backbone: bool) -> None:
    from hyper_t5.hypermodels import BACKBONE, HYPERMODEL, SYSTEMS

    choose("system", config.system, SYSTEMS)
    system = SYSTEMS[config.system]
    if needs_backbone and not (config.backbone.path or BACKBONE in system.trains):
        raise UserError(
            f"backbone.path is empty: system {config.system} needs a trained backbone, which stays "
            "frozen; set its folder with --gin.backbone.path="
        )
    for group in ("hypermodel", "backbone"):
        offset = config.optimizer[f"{group}_step_offset"]
        if offset > config.optimizer.first_step:
            raise UserError(
                f"optimizer.{group}_step_offset={offset} is beyond optimizer.first_step="
                f"{config.optimizer.first_step}; lower it"
            )
    if config.stage == "peft" and HYPERMODEL not in system.trains:
        raise UserError(
            f"stage=peft tunes adapters on the evaluated tasks, and system={config.system} "
            "trains none; use one such as task_lora"
        )
    if config.peft.init and not (config.stage == "peft" and system.kind == "per_task"):
        raise UserError(
            "peft.init is the start of each task's adapters in stage=peft; stage="
            f"{config.stage} with system={config.system} has none: set it to '', or use "
            "configs/peft.py"
        )
    if config.peft.init and config.hypermodel.path:
        raise UserError(
            "peft.init and hypermodel.path are both set, and a run starts once; set one to ''"
        )
    if config.hypermodel.gist_tokens and config.hypermodel.reader != "layerwise":
        raise UserError(
            "hypermodel.gist_tokens is for hypermodel.reader=layerwise; set it to 0 "
            f"with {config.hypermodel.reader}"
        )


def _validate_adapter(config: ConfigDict) -> None:
    from hyper_t5 import adapters
    from hyper_t5.hypermodels.parts import specs

    sites = (*adapters.ATTENTION_SITES, *adapters.MLP_SITES)
    sizes = t5_config(config)
    # A backbone's folder decides whether its MLPs are gated; hypermodels check that.
    variants = [sizes] + [
        dataclasses.replace(sizes, mlp_activations=names)
        for names in (("relu",), ("gelu", "linear"))
        if config.backbone.path
    ]
    targets = dict.fromkeys(name for c in variants for name in adapters.targets_of(sites, c))
    known = {
        "lora_targets": tuple(targets),
        "prefix_sites": adapters.ATTENTION_SITES,
        "bottleneck_sites": adapters.MLP_SITES,
    }
    for field, names in known.items():
        values = config.adapter[field]
        for name in values:
            choose(f"adapter.{field}", name, names)
        if len(set(values)) < len(values):
            raise UserError(f"adapter.{field} lists one site twice: {', '.join(values)}")
    if min(config.adapter.bottleneck_sizes, default=0) < 1:
        raise UserError(
            "adapter.bottleneck_sizes must each be 1 or more, not "
            f"{','.join(map(str, config.adapter.bottleneck_sizes))}"
        )
    specs.pattern(config, "lora_rank_pattern", int)
    specs.pattern(config, "lora_alpha_pattern", float)


def _validate_validation(config: ConfigDict) -> None:
    c = config.train
    if c.keep_best and not c.eval_every:
        raise UserError(
            "train.keep_best=True keeps the step with the lowest validation loss, and "
            "train.eval_every=0 computes none; set how often, such as train.eval_every=500"
        )
    if c.eval_every and config.stage == "hyperpretrain" and not c.eval_split:
        raise UserError(
            f"train.eval_every={c.eval_every}: stage=hyperpretrain trains on text and has no tasks "
            "to hold rows out of; set train.eval_split to a split of data.mixture"
        )


def _validate_chunks(config: ConfigDict) -> None:
    from hyper_t5.hypermodels import SYSTEMS

    system, chunks = SYSTEMS[config.system], config.data.chunks
    if system.kind != "generated" or system.conditioned_on == "input" or system.layout.in_inputs:
        raise UserError(
            f"data.chunks={chunks}: system={config.system} reads no task in chunks; set it to 1"
        )
    if config.stage == "hyperpretrain" or config.data.on_long_examples != "drop":
        field = "stage" if config.stage == "hyperpretrain" else "data.on_long_examples"
        value = config.stage if field == "stage" else config.data.on_long_examples
        raise UserError(
            f"data.chunks={chunks} splits the examples of tasks, and {field}={value} has none to "
            "split; set data.chunks=1"
        )


def _validate_batch(config: ConfigDict) -> None:
    from hyper_t5.data import templates
    from hyper_t5.hypermodels import SYSTEMS

    data, system = config.data, SYSTEMS[config.system]
    if len(data.shots) != 2 or not 0 <= data.shots[0] <= data.shots[1]:
        raise UserError(
            "data.shots is the fewest and the most examples shown, such as 0,2; "
            f"not {','.join(map(str, data.shots))}"
        )
    if data.variant:
        templates.conditioning_rule(data)
    if data.conditioning:
        templates.conditioning_mix(data, system.layout)
    empty = not (data.variant or data.use_instruction or (data.shots[1] and config.eval.shots))
    if empty and config.stage == "mtf" and not system.layout.in_inputs:
        raise UserError(
            "data.use_instruction=False needs examples, or the hypermodel reads "
            f"nothing: data.shots={data.shots[0]},{data.shots[1]} and eval.shots="
            f"{config.eval.shots} must allow one"
        )
    if data.chunks > 1:
        _validate_chunks(config)
    if data.pack and config.stage == "hyperpretrain":
        raise UserError("data.pack=True is for tasks; chunks of text fill their rows, set it False")
    if data.pack and system.conditioned_on == "input":
        raise UserError(
            f"data.pack=True puts examples of a task in one row, but system={config.system} has "
            "adapters for each example; set data.pack=False"
        )
    if data.tasks_per_batch % config.train.microbatches:
        raise UserError(
            f"data.tasks_per_batch={data.tasks_per_batch} cannot be divided into "
            f"train.microbatches={config.train.microbatches} equal parts"
        )
