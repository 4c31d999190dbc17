"""Installs megatron_sorted; `constraints.txt` pins the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = (Path(__file__).parent / "megatron_sorted" / "__init__.py").read_text(encoding="utf-8")

# psutil: megatron's checkpoint writer needs it
TRAIN = ["torch>=2.6", "megatron-core>=0.12.1,<0.17", "numpy", "psutil", "sentencepiece", "safetensors", "jinja2"]
MONITORING = ["wandb", "tensorboard"]
CONVERT = ["torch>=2.6", "numpy", "safetensors", "transformers>=5", "tokenizers", "sentencepiece", "jinja2"]
EVALUATE = [*CONVERT, "lm-eval", "accelerate", "datasets", "matplotlib"]  # lm-eval's models of transformers need accelerate
SERVE = [*CONVERT, "fastapi", "uvicorn"]
DEMO = ["Babel", "matplotlib"]
DEV = ["pytest", "pytest-xdist", "ruff", "import-linter", "httpx2", "hypothesis"]  # httpx2: for tests of the server

setup(
    name="megatron_sorted",
    version=re.search(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[1],
    description="Train nested (sorted) language models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_sorted", "megatron_sorted.*"]),
    install_requires=["pydantic>=2", "pyyaml", "tqdm"],
    extras_require={
        "train": TRAIN,
        "convert": CONVERT,
        "evaluate": EVALUATE,
        "serve": SERVE,
        "monitoring": MONITORING,
        "demo": DEMO,
        "cuda": ["transformer-engine[pytorch]"],
        "npu": ["torch_npu"],  # of torch's own version; on Ascend hosts alone
        "dev": DEV + DEMO + TRAIN + MONITORING + EVALUATE + SERVE,
    },
)
