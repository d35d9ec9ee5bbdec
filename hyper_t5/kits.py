"""The runs that are to reach published results, and where each of their numbers is from.

A *stage* is one training run: a config with its overrides, and the pod that it is planned for.
docs/published.tsv holds the results, and names the stage that ends in each. What could be read:

    [TAGI]      Liao et al. 2024, arXiv 2406.12382: tables 2-4 and 10 print HyperTuning's and HINT's
    [HLoRA]     Lv et al., Findings of ACL 2024 (HyperLoRA): tables 1 and 2, settings in table 5
    [HINT]      allenai/hyper-task-descriptions: gin files, scripts
    [CARD]      the model cards hamishivi/hypertask_T0_3B and _11B
    [HD]        allenai/hyperdecoders: configs, README
    [Tk]        yizhongw/Tk-Instruct: scripts
    [T5]        google-research/text-to-text-transfer-transformer: metrics
"""

from __future__ import annotations

import dataclasses
import re

NOT_FOUND = "NOT FOUND"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run.

    ``overrides`` as they are typed behind --gin.; ``kind`` is a key of SOURCES, which says where
    its numbers are from; ``after``: the stage that it starts from; ``plan``: one whose program is
    the same, so that it is not compiled twice.
    """

    kind: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()
    after: str = ""
    plan: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table: its title, columns, and the rows of it that are not here, with reasons."""

    title: str
    columns: tuple[str, ...]
    missing: str = ""


# ------------------------------------------------------------------------------------------ stages

QUERIES = "hypermodel.reader=decoder_queries"
READERS = {"lora": (QUERIES,), "prefix": (QUERIES, "adapter.prefix_sites=enc_self,dec_self")}
PODS = {"base": "v5p:2x2x2", "large": "v5p:2x2x2", "xl": "v5p:2x4x4", "xxl": "v5p:4x4x8"}
ALL_ROWS = "eval.max_rows_per_task=0"
NO_TEXT = ("data.variant=", "data.use_instruction=False", "data.shots=0,0", "eval.shots=0")


def _hyper_t5() -> dict[str, Stage]:
    """Both stages of Prefix and LoRA, and the fine-tuned backbones they are compared with."""
    found = {}
    for size in ("large", "xl"):
        pod = PODS[size]
        parts = ("train.microbatches=2",) if size == "large" else ()  # 12 long rows a chip
        for kind, reader in READERS.items():
            name, args = f"{kind}_{size}", f"system=hyper_{kind},size={size}"
            first = f"{name}_hyperpretrain"
            found[first] = Stage("caclm", f"configs/hyperpretrain.py:{args}", pod, reader)
            mtf = f"configs/mtf.py:{args},mixture"
            p3 = (*reader, ALL_ROWS)
            found[f"{name}_p3"] = Stage("mtf_p3", f"{mtf}=p3", pod, p3, first)
            if name == "prefix_large":  # of which no result on these tasks is known
                continue
            sni = (*reader, *parts)
            found[f"{name}_sni"] = Stage("mtf_sni", f"{mtf}=sni", pod, sni, first)
        found |= _tk(size, "v5p:2x2x1")
    both = found["prefix_xl_sni"]
    found["prefix_xl_sni_def"] = dataclasses.replace(
        both, overrides=(*both.overrides, "data.variant=def"), plan="prefix_xl_sni"
    )
    large, mixture = PODS["large"], "size=large,mixture=p3"
    joint = f"configs/mtf.py:system=hyper_lora_plus,{mixture}"
    given = (QUERIES, ALL_ROWS)
    found["lora_plus_large_p3"] = Stage("mtf_p3", joint, large, given, "lora_large_hyperpretrain")
    concat = f"configs/mtf.py:system=concat,{mixture}"
    alone = (*NO_TEXT, "data.concat_length=384")
    found["concat_large_p3"] = Stage("baseline_p3", concat, large, (*alone, ALL_ROWS))
    found["concat_large_p3_shots"] = Stage("baseline_p3", concat, large, (ALL_ROWS,))
    shared = f"configs/baselines.py:system=shared_lora,{mixture}"
    found["shared_lora_large_p3"] = Stage("baseline_p3", shared, large, (ALL_ROWS,))
    return found


def _tk(size: str, pod: str) -> dict[str, Stage]:
    """A backbone fine-tuned with the text in front of every input, as Tk-Instruct."""
    config, name = (
        f"configs/baselines.py:system=concat,size={size},mixture=sni",
        f"concat_{size}_sni",
    )
    defined = ("data.variant=def",)
    return {
        name: Stage("tk", config, pod),
        f"{name}_def": Stage("tk", config, pod, defined, plan=name),
    }


def _hint() -> dict[str, Stage]:
    """Both stages at each size; published batches, in as many parts as a chip can hold."""
    found = {}
    sizes = {  # pod; microbatches of the first stage, and of the second
        "base": (PODS["base"], (4, 16), ()),
        "xl": ("v5p:4x4x4", (2, 4), ()),
        "xxl": (PODS["xxl"], (4, 8), ("mesh.model=4",)),
    }
    for size, (pod, (first, second), mesh) in sizes.items():
        pretrain, begin = f"hint_{size}_hyperpretrain", f"configs/hint.py:size={size}"
        given = (f"train.microbatches={first}", *mesh)
        found[pretrain] = Stage("hint", f"{begin},stage=hyperpretrain", pod, given)
        given = (f"train.microbatches={second}", *mesh)
        found[f"hint_{size}_sni"] = Stage("hint", begin, pod, given, pretrain)
        defined = (*given, "data.variant=def")
        found[f"hint_{size}_sni_def"] = Stage(
            "hint", begin, pod, defined, pretrain, f"hint_{size}_sni"
        )
    parts = ("train.microbatches=8", ALL_ROWS)
    found["hint_xl_p3"] = Stage(
        "hint", "configs/hint.py:size=xl,mixture=p3", "v5p:4x4x4", parts, "hint_xl_hyperpretrain"
    )
    found |= _tk("base", "v5p:2x2x1") | _tk("xxl", "v5p:2x2x4")
    found["t0_xl_p3"] = Stage(
        "t0",
        "configs/baselines.py:system=concat,size=xl,mixture=p3",
        "v5p:4x4x4",
        (
            *("data.tasks_per_batch=2048", "train.microbatches=4", "train.steps=20000"),
            *("optimizer.name=adafactor", "optimizer.learning_rate=1e-3"),
            *("optimizer.clip_norm=0", "model.dropout_rate=0.1", ALL_ROWS),
        ),
    )
    return found


def _hyperdecoder() -> dict[str, Stage]:
    config, pod = "configs/hyperdecoder.py:mixture=glue", "v5p:2x2x1"
    learned = ("hyperdecoder.decoder=learned", "adapter.bottleneck_sizes=230,230")
    return {
        "hyperdecoder_large_glue": Stage("glue", config, pod),
        "adapter_large_glue": Stage("glue", config, pod, learned),
        "full_large_glue": Stage("glue_full", config, pod, ("system=concat",)),
    }


STAGES: dict[str, Stage] = {**_hyper_t5(), **_hint(), **_hyperdecoder()}

# -------------------------------------------------------------------------------- published tables

P3_TASKS = ("ANLI", "HSwag", "CB", "COPA", "RTE", "WiC", "WSC", "WGD")
TABLES = {
    "hyper_t5_p3": Table(
        "HyperT5 on P3: accuracy by rank classification, HyperTuning's eight held-out tasks",
        (*P3_TASKS, "mean"),
        "HART (55.0) and HyperLoRA (57.3) are other systems. Per-task numbers of T5-MTF are "
        "[HLoRA]'s.",
    ),
    "hyper_t5_sni": Table(
        "HyperT5 on Super-NaturalInstructions: ROUGE-L, 119 test tasks",
        ("ROUGE-L",),
        "[HLoRA] and [TAGI] print 45.0 and 48.6 for one row, XL by definition and two examples. "
        "[HLoRA]'s row on P3 is digit for digit that of HyperT5-LoRA, so 42.0 and 45.0 are most "
        "probably LoRA and 48.6 Prefix; neither source says so. Which of them 38.9 is, is "
        f"{NOT_FOUND}.",
    ),
    "hint_sni": Table(
        "HINT on Super-NaturalInstructions: ROUGE-L, 119 test tasks",
        ("ROUGE-L",),
        "Without fine-tuning 8.8, 14.3, 26.2 by definition and 9.4, 13.6, 30.5 with two examples "
        "at base, XL, XXL: `hyper-t5 evaluate --config` of the Tk-Instruct rows, untrained. TAGI, "
        "Hypter, GPT-2 XL and OPT-13B are other systems.",
    ),
    "hint_p3": Table(
        "HINT on P3: accuracy by rank classification, T0's held-out tasks",
        (*P3_TASKS, "StoryCloze", "mean"),
        f"HINT's per-task numbers are {NOT_FOUND}; [TAGI] files its 60.3 once under 11 tasks and "
        "once under eight. Hypter (56.2) is another system.",
    ),
    "hyperdecoder_glue": Table(
        "Hyperdecoder on GLUE, T5 1.1 large: official metrics",
        ("CoLA", "SST-2", "STS-B", "MRPC", "QQP", "MNLI", "QNLI", "RTE", "mean"),
        "HyperFormer (71.5) is another system.",
    ),
}

# ------------------------------------------------------------------------ where numbers are from

OURS = "ours: not published"
T5 = "[HLoRA] table 5, of HyperLoRA; HyperTuning's own are " + NOT_FOUND
HLORA = "[HLoRA] table 5, of HyperLoRA; the row's own are " + NOT_FOUND
TK_ROWS = "[Tk]: 100 rows a task, definition and its first two examples"
JUDGED = "[Tk], [HINT]: the first 100 rows of each of the 119 test tasks"
KEPT = "ours: official rows of which the answer is nothing, and definitions longer than any input"
QUERY = "third-party notes on the paper: a T5 decoder over learned tokens, then MLPs"
HYPER_ADAPTERS = {
    "hypermodel.reader": QUERY,
    "adapter.lora_rank": T5,
    "adapter.lora_alpha": T5 + "; its text says 0.8",
    "adapter.prefix_length": f"ours: {NOT_FOUND}",
    "adapter.prefix_sites": "from memory of the paper's appendix C, not verified",
}
ADAMW = {
    "optimizer.learning_rate": T5,
    "optimizer.schedule": T5,
    "optimizer.warmup_steps": OURS,
}
SIZES_OF_BATCH = ("data.hyper_length", "data.input_length", "data.target_length")
MTF = {
    **HYPER_ADAPTERS,
    **ADAMW,
    **dict.fromkeys((*SIZES_OF_BATCH, "data.tasks_per_batch", "train.steps"), T5),
    "data.examples_per_task": T5,
    "eval.max_decode_length": "[Tk]",
}
SNI = {
    "data.variant": "[TAGI] section 4.1, [HLoRA] section 4.2: Def, Def+2Pos",
    "data.max_instances_per_task": TK_ROWS,
    "data.empty_targets": KEPT,
    "data.on_long_instruction": KEPT,
    "eval.max_rows_per_task": JUDGED,
}
P3 = {
    "data.variant": f"pos_16: 16 examples from memory, {NOT_FOUND}",
    "eval.max_rows_per_task": "[T5] its metrics: all validation rows",
}
BASELINE = {
    **dict.fromkeys(MTF, HLORA),
    **P3,
    "data.variant": "the row's name",
    "data.concat_length": "the input alone, or with the examples",
    "data.use_instruction": "the row's name: P3's prompts say the task themselves",
    "data.shots": "the row's name",
    "eval.shots": "the row's name",
    "adapter.prefix_sites": "not used",
    "adapter.prefix_length": "not used",
    "hypermodel.reader": "not used",
    "eval.max_decode_length": "[Tk]",
    "optimizer.learning_rate": "T5-MTF: [HLoRA] table 5; one LoRA: ours",
    "optimizer.warmup_steps": OURS,
}
GINS = "[HINT] gins/hyper_SIZE.gin"
HD = "[HD] configs/glue_ablations/glue_manual_generated.json"

SOURCES: dict[str, dict[str, str]] = {
    "caclm": {
        **HYPER_ADAPTERS,
        **ADAMW,
        "data.text_split": "third-party notes on the paper: A|B|C|D",
        "data.chunk_length": "[HINT] c4/c4_registry_4part.py",
        "data.hyper_length": "[HINT] c4/c4_registry_4part.py: the whole chunk",
        "data.input_length": 'ours: B and C are "short" in [HINT]',
        "data.target_length": 'ours: B and C are "short" in [HINT]',
        "data.segment_shares": 'ours: B and C are "short" in [HINT]',
        "data.tasks_per_batch": T5,
        "data.examples_per_task": "a chunk is a task with one example",
        "train.steps": T5,
    },
    "mtf_p3": {**MTF, **P3},
    "mtf_sni": {**MTF, **SNI},
    "baseline_p3": BASELINE,
    "tk": {
        **SNI,
        "data.encoding": "[Tk] its collator",
        "data.input_length": "[Tk]: 1,024 in all",
        "data.concat_length": "[Tk]: 1,024 in all",
        "data.hyper_length": "not used: data.concat_length is the limit",
        "data.target_length": "[Tk]",
        "data.tasks_per_batch": "[Tk]: 16",
        "data.examples_per_task": "[Tk]: rows of any tasks",
        "train.steps": "[Tk]: two epochs of 75,417 rows",
        "optimizer.learning_rate": "[Tk]: 5e-5, constant",
        "eval.max_decode_length": "[Tk]",
        "adapter.prefix_sites": "not used",
    },
    "t0": {
        "data.tasks_per_batch": "[HINT] scripts: 2,048",
        "data.examples_per_task": "[HINT] scripts: rows of any tasks",
        "data.input_length": "[HINT] scripts",
        "data.concat_length": "[HINT] scripts",
        "data.target_length": "[HINT] scripts",
        "data.hyper_length": "not used",
        "data.use_instruction": "P3's prompts say the task themselves",
        "data.shots": "P3's prompts say the task themselves",
        "eval.shots": "P3's prompts say the task themselves",
        "train.steps": "[CARD]: 20,000",
        "optimizer.name": "[HINT], as T0",
        "optimizer.learning_rate": "[HINT], as T0: 1e-3, constant",
        "optimizer.clip_norm": "Adafactor clips updates itself",
        "model.dropout_rate": "[HINT], as T0",
        "eval.max_rows_per_task": P3["eval.max_rows_per_task"],
        "eval.max_decode_length": "not used: options are ranked",
        "adapter.prefix_sites": "not used",
    },
    "hint": {
        **SNI,
        "data.variant": "[HINT] ni_tasks: Def, Def+2Pos; P3: prompts with masked fields",
        "adapter.bottleneck_sizes": GINS,
        "adapter.prefix_length": GINS,
        "adapter.prefix_sites": "[HINT] modeling: all three attentions",
        "adapter.position_bias": "[HINT] modeling: no bias over prefixes",
        "model.dropout_rate": "[HINT] 0.1; 0 while pretraining, where its generators keep 0.1",
        **dict.fromkeys(SIZES_OF_BATCH, "[HINT] scripts"),
        "data.text_split": "[HINT] c4/c4_registry.py",
        "data.chunk_length": "[HINT] c4/c4_registry.py",
        "data.tasks_per_batch": "[HINT] scripts",
        "data.examples_per_task": "[HINT] scripts: rows of any tasks",
        "train.steps": "[HINT] README: 10,000, then 1,000; for P3 ours, as [CARD]'s T0 baselines",
        "train.save_every": "[HINT] scripts",
        "optimizer.name": "[HINT] gins/partial_train_adafactor_dual.gin",
        "optimizer.clip_norm": "[HINT] the same: Adafactor clips updates itself",
        "optimizer.first_step": "[HINT] the same",
        "optimizer.hypermodel_step_offset": "[HINT] the same",
        "optimizer.backbone_step_offset": "ours: T5's own second moments are not restored",
        "eval.max_decode_length": "[HINT] scripts",
    },
    "glue": {
        "adapter.bottleneck_sizes": f"{HD}; 230 in both stacks by the count of parameters",
        "adapter.bottleneck_activation": "[HD] modeling",
        "adapter.bottleneck_input": HD,
        "data.use_instruction": "[HD]: the input says its task itself",
        "data.shots": "[HD]: the input says its task itself",
        "eval.shots": "[HD]: the input says its task itself",
        "data.hyper_length": "not used",
        "data.input_length": HD,
        "data.target_length": HD,
        "data.tasks_per_batch": f"{HD}: 128",
        "data.examples_per_task": "[HD]: rows of any tasks, by size",
        "train.steps": f"{HD}; the best by validation, every 1,000",
        "train.save_every": HD,
        "train.label_smoothing": HD,
        "train.z_loss": "[HD] has none",
        "optimizer.learning_rate": HD,
        "optimizer.schedule": HD,
        "optimizer.warmup_steps": HD,
        "eval.max_rows_per_task": "[HD]: all rows",
        "eval.max_decode_length": HD,
        "hyperdecoder.decoder": "[HD] configs/glue_ablations/glue_manual_manual.json",
    },
}
SOURCES["glue_full"] = SOURCES["glue"] | {
    "optimizer.learning_rate": f"as Hyperdecoder's; its own is {NOT_FOUND}",
}
# What is no choice of a paper: names, folders, T5's sizes, and how it is computed and written down.
UNCITED = re.compile(
    r"stage|system|data\.(mixture|text)|train\.(log_every|save_every|microbatches)|mesh\..*"
    r"|backbone\.dtype|model\.(?!dropout_rate).*"
)
