"""Configs: typed fields, overrides, renamed fields, JSON, resume, cross-field checks."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import hyper_t5
from hyper_t5 import config as config_lib
from hyper_t5 import model, t5
from hyper_t5.checkpoints import workdir
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.utils import overrides
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import flatten

pytestmark = pytest.mark.smoke

BACKBONE = "backbone.path=somewhere"


def config_file(folder: Path, body: str, head: str = "") -> str:
    path = folder / "mine.py"
    path.write_text(
        "from hyper_t5 import config as c\n"
        f"{head}\n"
        "def get_config(arg):\n"
        "    config = c.defaults()\n"
        f"    {body}\n"
        "    return config\n"
    )
    return str(path)


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return config_file(tmp_path, "pass")


def error_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as e:
        config_lib.load(*args, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------------------------------- fields


def test_model_section_is_a_t5_config() -> None:
    config = config_lib.defaults()
    assert config_lib.t5_config(config) == t5.preset("tiny")
    config_lib.use_preset(config, "t5-base")
    assert config_lib.t5_config(config) == t5.preset("t5-base")
    assert dataclasses.asdict(t5.preset("xl")).keys() == set(config.model)


def test_defaults_are_valid_locked_and_of_scalar_types() -> None:
    config = config_lib.defaults()
    config_lib.apply(config, overrides.read_overrides([BACKBONE]))
    config_lib.validate(config)
    for field, value in overrides.flatten(config).items():
        assert type(value) in (bool, int, float, str, tuple), field
        assert type(value) is not tuple or value, f"{field}: the type of its elements is unknown"
    with pytest.raises(AttributeError):
        config.train.stpes = 3
    with pytest.raises(TypeError):
        config.train.steps = "many"


# ------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=7", 7),
        ("train.steps = 7", 7),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("adapter.lora_bias=True", True),
        ("data.text='a b.jsonl'", "a b.jsonl"),
        ('data.text="x=y#z"', "x=y#z"),
        ("data.text=/data/c4.jsonl", "/data/c4.jsonl"),
        ("data.text=2024", "2024"),
        ("data.text=", ""),
        ("data.shots=1,3", (1, 3)),
        ("data.shots=(1, 3)", (1, 3)),
        ("data.segment_shares=0.5,0.25", (0.5, 0.25)),
        ("data.shots=[1, 3]", (1, 3)),
        ("adapter.prefix_sites=enc_self,dec_self", ("enc_self", "dec_self")),
        ("adapter.prefix_sites='enc_self'", ("enc_self",)),
        ("adapter.prefix_sites=('enc_self', 'dec_self')", ("enc_self", "dec_self")),
        ("adapter.prefix_sites=()", ()),
    ],
)
def test_override_is_read_as_the_fields_type(plain: str, text: str, expected: object) -> None:
    field = text.partition("=")[0].strip()
    value = overrides.flatten(config_lib.load(plain, [text]))[field]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=1.5", "an integer"),
        ("train.steps=1e3", "an integer"),
        ("train.steps=True", "an integer"),
        ("train.steps=many", "an integer"),
        ("train.steps=", "an integer"),
        ("optimizer.learning_rate=fast", "a number"),
        ("optimizer.learning_rate=True", "a number"),
        ("optimizer.learning_rate=1e999", "a number"),
        ("adapter.lora_bias=1", "True or False"),
        ("adapter.lora_bias=yes", "True or False"),
        ("data.text='open", "a string"),
        ("data.shots=2", "a tuple such as 0,2"),
        ("data.shots=a,b", "an integer"),
        ("data.shots=(1,", "a tuple such as 0,2"),
        ("adapter.prefix_sites=('enc_self', 3)", "a tuple such as enc_self,dec_cross"),
    ],
)
def test_wrong_type_names_the_expected_one(plain: str, text: str, expected: str) -> None:
    message = error_of(plain, [text])
    field, _, value = text.partition("=")
    assert f"{field} expects {expected}" in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.stpes=3", "unknown field train.stpes, the nearest is train.steps"),
        ("rank=3", "the nearest is adapter.lora_rank"),
        ("learning_rate=3", "the nearest is optimizer.learning_rate"),
        ("optimiser.clip=3", "the nearest is optimizer.clip_norm"),
        ("train=3", "train is a section; its fields: train."),
        ("train.steps", "expected path.to.field = value"),
        ("train.steps.more=3", "the nearest is train.steps"),
    ],
)
def test_unknown_field_names_the_nearest(plain: str, text: str, expected: str) -> None:
    assert expected in error_of(plain, [text])


def test_order_is_file_then_gin_files_then_flags(tmp_path: Path) -> None:
    file = config_file(tmp_path, "config.train.update(steps=1, keep=1, log_every=1, save_every=1)")
    first, second = tmp_path / "first.gin", tmp_path / "second.gin"
    first.write_text("train.keep = 2\ntrain.log_every = 2\ntrain.save_every = 2\n")
    second.write_text("train.log_every = 3\ntrain.save_every = 3\n")
    train = config_lib.load(file, ["train.save_every=4"], [first, second]).train
    assert (train.steps, train.keep, train.log_every, train.save_every) == (1, 2, 3, 4)


def test_gin_file_has_comments_quotes_and_blank_lines(tmp_path: Path, plain: str) -> None:
    gin = tmp_path / "a.gin"
    gin.write_text(
        "# train.steps = 1\n\n  train.steps = 5  # five\n"
        "data.text = 'a#b.txt'  # 'quoted'\ndata.vocab = it's\n"
    )
    config = config_lib.load(plain, [], [gin])
    assert (config.train.steps, config.data.text, config.data.vocab) == (5, "a#b.txt", "it's")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train.stpes = 3", "the nearest is train.steps"),
        ("train.steps = x", "train.steps expects an integer"),
        ("import t5x", "expected path.to.field = value"),
    ],
)
def test_gin_file_mistake_names_file_and_line(
    tmp_path: Path, plain: str, line: str, expected: str
) -> None:
    gin = tmp_path / "a.gin"
    gin.write_text(f"# first\n\n{line}\n")
    message = error_of(plain, [], [gin])
    assert message.startswith(f"{gin}:3: ")
    assert expected in message


def test_missing_gin_file(tmp_path: Path, plain: str) -> None:
    assert "nothing.gin" in error_of(plain, [], [tmp_path / "nothing.gin"])


# ------------------------------------------------------------------------------- renamed fields


@pytest.mark.parametrize(
    ("old", "new"), [("eval.how", "eval.method"), ("data.encoding", "data.template")]
)
def test_renamed_field_is_refused_by_its_old_name(
    tmp_path: Path, plain: str, old: str, new: str
) -> None:
    fields = flatten(config_lib.defaults())
    assert old not in fields
    assert new in fields
    message = f"{old} is now {new}; use that name"
    value = fields[new]
    assert error_of(plain, [f"{old}={value}"]) == f"--gin: {message}"
    gin = tmp_path / "a.gin"
    gin.write_text(f"seed = 1\n{old} = {value}\n")
    assert error_of(plain, [], [gin]) == f"{gin}:2: {message}"
    section, _, name = old.partition(".")
    written = config_lib.defaults().to_dict()
    written[section][name] = written[section].pop(new.partition(".")[2])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(written))
    with pytest.raises(UserError) as error:
        workdir.load_config(tmp_path)
    assert str(error.value) == f"{path}: {message}"
    # Adapter folders of earlier versions still load.
    config = config_lib.from_adapter(written, "adapter")
    assert flatten(config) == fields


@pytest.mark.parametrize("values", [None, [], {"eval": 3}, {"eval.hwo": "auto"}])
def test_bad_config_of_an_adapter_is_one_line(values: Any) -> None:
    with pytest.raises(UserError, match=r"^adapter: ") as error:
        config_lib.from_adapter(values, "adapter")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- config files


def test_arguments_are_typed_by_their_defaults() -> None:
    args = config_lib.parse_args("n=3, flag,rate=1,name=a-b", n=1, flag=False, rate=0.5, name="")
    assert vars(args) == {"n": 3, "flag": True, "rate": 1.0, "name": "a-b"}
    assert type(args.rate) is float
    assert vars(config_lib.parse_args(None, n=1)) == {"n": 1}
    assert config_lib.parse_args("flag=False", flag=True).flag is False


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("sise=base", "unknown argument 'sise', the nearest is 'size'; known: size, count"),
        ("base", "unknown argument 'base'"),
        ("size", "argument 'size' needs a value: size=..."),
        ("count=many", "argument 'count' expects an integer, got 'many'"),
    ],
)
def test_bad_argument_of_a_config_file(tmp_path: Path, arg: str, expected: str) -> None:
    file = config_file(tmp_path, "c.parse_args(arg, size='', count=1)")
    message = error_of(f"{file}:{arg}")
    assert message.startswith(f"{file}: ")
    assert expected in message


def test_unknown_size_names_the_nearest(tmp_path: Path) -> None:
    file = config_file(tmp_path, "c.use_preset(config, arg)")
    assert config_lib.load(f"{file}:small").model.emb_dim == 512
    assert "unknown size 'smal', the nearest is 'small'" in error_of(f"{file}:smal")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("config.train.stpes = 3", "mine.py:5: unknown field stpes, the nearest is train.steps"),
        ("config.trian.steps = 3", "mine.py:5: unknown field trian, the nearest is train"),
        ("config.eval.how = 'rank'", "mine.py:5: eval.how is now eval.method; use that name"),
        ("config.train.steps = 'x'", "mine.py:5: TypeError: "),
        ("1 / 0", "mine.py:5: ZeroDivisionError: division by zero"),
        ("assert False", "mine.py:5: AssertionError"),
        ("x = = 1", "mine.py:5: SyntaxError: invalid syntax"),
        ("import nothing_of_that_name", "mine.py:5: ModuleNotFoundError"),
        ("config.adapter.lora_rank = True", "adapter.lora_rank expects an integer, got True"),
        ("config = 3", "get_config returns int, not a ConfigDict"),
        ("config = c.ConfigDict({'train': {'stpes': 1}})", "the nearest is train.steps"),
    ],
)
def test_mistake_in_a_config_file(tmp_path: Path, body: str, expected: str) -> None:
    message = error_of(config_file(tmp_path, body))
    assert expected in message
    assert "mine.py" in message
    assert len(message) < 300


def test_config_file_without_get_config(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert "defines no function get_config" in error_of(str(tmp_path / "mine.py"))


def test_missing_config_file_names_the_nearest_shipped() -> None:
    assert "the nearest shipped one is configs/mtf.py" in error_of("configs/mft.py")
    assert "a config is a Python file" in error_of("configs/mtf")


@pytest.mark.parametrize("name", ["mtf", "hyperpretrain"])
@pytest.mark.parametrize("arg", ["", ":system=hyper_lora,size=xl"])
def test_shipped_config_is_valid(name: str, arg: str) -> None:
    config = config_lib.load(f"configs/{name}.py{arg}", [BACKBONE])
    config_lib.validate(config)
    assert config_lib.t5_config(config).emb_dim == (2048 if arg else 1024)


def test_shipped_config_loads_in_any_directory(tmp_path: Path) -> None:
    """Load from an installed package, without links, in a folder without configs/."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(Path(hyper_t5.__file__).parent, site / "hyper_t5", ignore=skip)
    code = (
        "from hyper_t5 import config as c; import hyper_t5; print(hyper_t5.__file__);"
        "print(c.load('configs/mtf.py:size=xl').model.emb_dim)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    run = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == [str(site / "hyper_t5" / "__init__.py"), "2048"], run.stderr


# ---------------------------------------------------------------------------------- JSON, resume


def test_json_round_trip(plain: str) -> None:
    values = ["data.shots=1,1", "adapter.prefix_sites=()", "optimizer.learning_rate=3e-5"]
    config = config_lib.load(plain, values)
    again = config_lib.from_json(config_lib.to_json(config))
    assert overrides.flatten(again) == overrides.flatten(config)
    assert [type(v) for v in overrides.flatten(again).values()] == [
        type(v) for v in overrides.flatten(config).values()
    ]
    assert again.is_locked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n "seed": 0,', "config.json:2: truncated or not JSON"),
        ("[]", "not a config"),
        ('{"sede": 0}', "the nearest is seed"),
        ('{"seed": 0.5}', "seed expects an integer"),
    ],
)
def test_bad_json(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        config_lib.from_json(text)


def test_differences_leaves_out_the_allowed(plain: str) -> None:
    old = config_lib.load(plain)
    new = config_lib.load(plain, ["seed=3", "train.steps=9", "eval.batch=1"])
    assert config_lib.differences(old, new, ["train.steps", "eval.*"]) == ["seed: 0 -> 3"]
    assert len(config_lib.differences(old, new)) == 3


def test_resume_refuses_another_config_and_keeps_the_old(tmp_path: Path, plain: str) -> None:
    run = tmp_path / "run"
    assert workdir.write_or_check_config(run, config_lib.load(plain, ["adapter.lora_rank=5"])) == []
    assert (
        workdir.write_or_check_config(run, config_lib.load(plain)) == []
    )  # nothing was trained yet
    (run / "checkpoints" / "1").mkdir(parents=True)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"adapter.lora_rank: 16 -> 4.*another --workdir"):
        workdir.write_or_check_config(
            run, config_lib.load(plain, ["adapter.lora_rank=4", "train.steps=9"])
        )
    assert (run / "config.json").read_bytes() == before


def test_resume_may_run_longer_and_records_it(tmp_path: Path, plain: str) -> None:
    workdir.write_or_check_config(tmp_path, config_lib.load(plain))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    longer = config_lib.load(plain, ["train.steps=5000", "eval.split=test", "data.text=moved"])
    assert workdir.write_or_check_config(tmp_path, longer) == [
        "data.text: '' -> 'moved'",
        "eval.split: '' -> 'test'",
        "train.steps: 1000 -> 5000",
    ]
    assert workdir.load_config(tmp_path).train.steps == 5000
    assert workdir.load_config(tmp_path, ["train.steps=3"]).train.steps == 3
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoints",
        "config.json",
        "mine.py",
    }


def test_workdir_without_or_with_a_broken_config(tmp_path: Path, plain: str) -> None:
    with pytest.raises(UserError, match=r"config.json: No such file"):
        workdir.load_config(tmp_path)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints but no config.json"):
        workdir.write_or_check_config(tmp_path, config_lib.load(plain))
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json:1: truncated"):
        workdir.write_or_check_config(tmp_path, config_lib.load(plain))


def test_no_space_for_the_config_keeps_the_previous(
    tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir.write_or_check_config(tmp_path, config_lib.load(plain))
    before = (tmp_path / "config.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*config.json: No space left"):
        workdir.write_or_check_config(tmp_path, config_lib.load(plain, ["train.steps=5000"]))
    assert (tmp_path / "config.json").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "mine.py"}


def test_one_process_trains_in_a_workdir(tmp_path: Path) -> None:
    code = "from hyper_t5.checkpoints import workdir\n"
    code += f"with workdir.lock({str(tmp_path)!r}): print('held')"
    with workdir.lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is being trained in by process" in other.stderr
    assert other.stdout == ""
    with workdir.lock(tmp_path):
        pass


def test_workdir_that_is_a_file(plain: str) -> None:
    with pytest.raises(UserError, match=r"mine\.py"), workdir.lock(plain):
        pass


# ------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["stage=mft"], "unknown stage 'mft', the nearest is 'mtf'"),
        (["hypermodel.reader=layrwise"], "the nearest is 'layerwise'"),
        (["optimizer.name=adam"], "the nearest is 'adamw'; known: adamw, adafactor"),
        (["optimizer.schedule=cos"], "the nearest is 'cosine'"),
        (["model.dtype=float16"], "model.dtype: float16 is refused, because"),
        (["backbone.dtype=float16"], "backbone.dtype: float16 is refused, because"),
        (["model.dtype=fp32"], "unknown model.dtype 'fp32'"),
        (["model.dropout_rate=1"], "model.dropout_rate must be at least 0 and below 1, not 1.0"),
        (["data.input_length=0"], "data.input_length must be 1 or more, not 0"),
        (["train.steps=-1"], "train.steps must be 1 or more, not -1"),
        (["seed=-1"], "seed must be at least 0"),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate must be above 0"),
        (["data.shots=2,1"], "data.shots is the fewest and the most"),
        (["data.shots=1,2,3"], "data.shots is the fewest and the most"),
        (["data.shots=-1,2"], "data.shots is the fewest and the most"),
        (["data.use_instruction=False", "data.shots=0,0"], "data.shots=0,0 and eval.shots=2"),
        (["data.use_instruction=False", "eval.shots=0"], "data.shots=0,2 and eval.shots=0"),
        (
            ["train.microbatches=3"],
            "data.tasks_per_batch=8 cannot be divided into train.microbatches=3",
        ),
        (["backbone.path="], "backbone.path is empty"),
        (["hypermodel.gist_tokens=2", "hypermodel.reader=decoder_queries"], "set it to 0"),
        (["adapter.lora_targets=enc_self.qery"], "the nearest is 'enc_self.query'"),
        (["adapter.lora_rank_pattern=dec_mlp=4"], "'dec_mlp' is none of adapter.lora_targets"),
        (["adapter.lora_rank_pattern=query=4.5"], "'query=4.5' gives no whole number above 0"),
        (["adapter.lora_alpha_pattern=query"], "'query' gives no number above 0"),
        (["adapter.prefix_sites=enc_mlp"], "unknown adapter.prefix_sites 'enc_mlp'"),
        (["adapter.prefix_sites=enc_self,enc_self"], "lists one site twice"),
        (["adapter.bottleneck_sites=enc_self"], "unknown adapter.bottleneck_sites 'enc_self'"),
        (["adapter.bottleneck_sizes=4,0"], "adapter.bottleneck_sizes must each be 1 or more"),
        (["adapter.bottleneck_activation=gellu"], "the nearest is 'gelu'"),
        (["stage=peft", "system=concat"], "stage=peft tunes adapters on the evaluated tasks"),
        (["optimizer.backbone_step_offset=1"], "is beyond optimizer.first_step=0; lower it"),
    ],
)
def test_contradiction_is_refused(plain: str, values: list[str], expected: str) -> None:
    config = config_lib.load(plain, [BACKBONE, *values])
    with pytest.raises(UserError) as e:
        config_lib.validate(config)
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "values",
    [
        ["data.use_instruction=False"],
        ["data.use_instruction=False", "data.shots=0,0", "stage=hyperpretrain"],
        ["system=concat", "backbone.path="],
        ["system=hint", "backbone.path="],
        ["system=hyperdecoder", "data.use_instruction=False", "data.shots=0,0"],
        ["system=task_lora", "stage=peft"],
        ["adapter.lora_targets=enc_mlp.wi"],  # the backbone's folder says whether it has one
        ["adapter.lora_targets=enc_mlp.wi_0"],
    ],
)
def test_valid_combinations_are_accepted(plain: str, values: list[str]) -> None:
    config_lib.validate(config_lib.load(plain, [BACKBONE, *values]))


def test_unknown_system_names_the_nearest(plain: str) -> None:
    config = config_lib.load(plain, ["system=hyper_lra"])
    with pytest.raises(UserError, match="unknown system 'hyper_lra', the nearest is 'hyper_lora'"):
        config_lib.validate(config)


def test_a_system_has_a_section_of_its_own() -> None:
    config = config_lib.defaults()
    assert {name for name in SYSTEMS if name in config} == {"hyperdecoder"}
    assert config.hyperdecoder.to_dict() == dict(SYSTEMS["hyperdecoder"].options)


# What each published system is, as its config says.
PUBLISHED: dict[str, dict[str, Any]] = {
    "hint.py:size=base": {"system": "hint", "model.emb_dim": 768, "adapter.prefix_length": 30},
    "hint.py:size=xxl,stage=hyperpretrain": {"data.text_split": "three_way", "train.steps": 10_000},
    "hyperdecoder.py": {
        "system": "hyperdecoder",
        "data.mixture": "glue",
        "model.emb_dim": 1024,
        "data.tasks_per_batch": 128,
    },
    "hyperdecoder.py:mixture=extractive_qa": {"adapter.bottleneck_sizes": (512, 36)},
    "text_to_lora.py": {"system": "text_to_lora", "adapter.lora_rank": 8},
    "fid_icl.py:size=xl": {"system": "fid_icl", "data.shots": (16, 16)},
    "cached.py": {"system": "cached"},
    "rules.py": {"system": "hyper_prefix", "data.mixture": "rules", "train.steps": 1500},
    "rules.py:system=concat": {"system": "concat", "data.mixture": "rules", "train.steps": 12000},
    "cached.py:trained=yes,gist_tokens=32": {
        "system": "hyper_prefix",
        "hypermodel.gist_tokens": 32,
    },
    "hyperpretrain.py:system=hyper_lora": {"system": "hyper_lora", "stage": "hyperpretrain"},
    "mtf.py:system=hyper_lora_plus": {"system": "hyper_lora_plus", "stage": "mtf"},
    "hyperpretrain.py:system=hyper_prefix_plus": {"system": "hyper_prefix_plus"},
    "baselines.py": {"system": "concat", "train.steps": 9_427},
    **{
        f"baselines.py:system={w}_{kind}": {"system": f"{w}_{kind}", "stage": stage}
        for w, stage in (("shared", "mtf"), ("task", "peft"))
        for kind in ("lora", "prefix", "bottleneck")
    },
    "baselines.py:system=none": {"system": "none"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name: str) -> None:
    config = config_lib.load(f"configs/{name}", [BACKBONE])
    config_lib.validate(config)
    values = flatten(config)
    assert {field: values[field] for field in PUBLISHED[name]} == PUBLISHED[name]
    m = model.build_model(config, config_lib.t5_config(config))
    if m.hypermodel is not None:  # and it can be built at that size
        model.hypermodel_shapes(m)


def test_every_system_is_in_a_config_of_published_size() -> None:
    assert {fields.get("system") for fields in PUBLISHED.values()} >= SYSTEMS.keys()


def test_lists_from_a_config_file_become_tuples(tmp_path: Path) -> None:
    file = config_file(tmp_path, "config.data.shots = [1, 1]")
    config = config_lib.load(file)
    assert config.data.shots == (1, 1)
    assert isinstance(config, ConfigDict)
