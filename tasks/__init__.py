"""The registry of datasets: one file in this folder and one line here for each.

`seqio_tasks` wraps every dataset as SeqIO Tasks and Mixtures; `text` has plain text, `store` the
datasets that `hyper-t5 build` wrote as TFRecords.
"""

from __future__ import annotations

from hyper_t5.scoring import benchmarks
from hyper_t5.tasks import (
    extractive_qa,
    glue,
    metaicl,
    p3,
    rules,
    super_ni,
    synthetic,
    task_files,
)
from hyper_t5.tasks.dataset import Dataset as Dataset
from hyper_t5.tasks.dataset import TaskSet as TaskSet

MIXTURES: dict[str, Dataset] = {
    "synthetic": Dataset(
        synthetic.load_rows,
        splits=synthetic.SPLITS,
        held_out=synthetic.HELD_OUT,
        benchmark=benchmarks.SYNTHETIC,
        vocab_file=synthetic.VOCAB_FILE,
    ),
    "rules": Dataset(
        rules.load_rows,
        splits=rules.SPLITS,
        held_out=rules.HELD_OUT,
        benchmark=benchmarks.SYNTHETIC,
        vocab_file=synthetic.VOCAB_FILE,
    ),
    "sni": Dataset(
        super_ni.load_rows,
        splits=super_ni.SPLITS,
        # The folder that holds tasks/ and splits/ of Super-NaturalInstructions.
        options={"sni_dir": ""},
        paths=("sni_dir",),
        settings={  # Tk-Instruct: its rows, definition and two positive examples
            "variant": "def_pos_2",
            "max_instances_per_task": 100,
            "empty_targets": "keep",  # six official rows: nothing is the right answer
            "on_long_instruction": "truncate",  # a few definitions are longer than any input
        },
        benchmark=benchmarks.SNI,
    ),
    "p3": Dataset(
        p3.load_rows,
        splits=p3.SPLITS,
        held_out=p3.HELD_OUT,
        # The folder of bigscience/P3, and a file of prompts with their fields masked.
        options={"p3_dir": "", "p3_prompts": ""},
        paths=("p3_dir", "p3_prompts"),
        # k = 16 examples of the same prompt, as MetaICL and FiD-ICL; "def" needs data.p3_prompts.
        settings={"variant": "pos_16"},
        benchmark=benchmarks.P3,
        aliases={name: split for split, name in p3.MIXTURE_NAMES.items()},
    ),
    "metaicl": Dataset(
        metaicl.load_rows,
        splits=metaicl.SPLITS,
        held_out=metaicl.HELD_OUT,
        # The folder that holds data/ and config/, and a file of its config/.
        options={"metaicl_dir": "", "metaicl_setting": "hr_to_lr"},
        paths=("metaicl_dir",),
        settings={
            "variant": "pos_16",
            "template": "metaicl",
            "example_length": 256,
            "on_long_examples": "cut_left",
        },
        benchmark=benchmarks.METAICL,
        parse_name=metaicl.parse_name,
    ),
    "glue": Dataset(
        glue.load_rows,
        splits=glue.SPLITS,
        held_out=glue.HELD_OUT,
        options={"glue_dir": ""},  # GLUE as jsonl files
        paths=("glue_dir",),
        benchmark=benchmarks.GLUE,
    ),
    "extractive_qa": Dataset(
        extractive_qa.load_rows,
        splits=extractive_qa.SPLITS,
        held_out=extractive_qa.HELD_OUT,
        options={"qa_dir": ""},  # SQuAD or MRQA files
        paths=("qa_dir",),
        benchmark=benchmarks.EXTRACTIVE_QA,
    ),
    "task_files": Dataset(
        task_files.load_rows,
        options={"task_files": ""},  # a task file, a folder of them, or a glob
        paths=("task_files",),
    ),
}


def benchmark_of(mixture: str) -> benchmarks.Benchmark:
    """Return the benchmark of a mixture; the default one for an unknown mixture."""
    return MIXTURES[mixture].benchmark if mixture in MIXTURES else benchmarks.Benchmark()
