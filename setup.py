"""Installs megatron_sorted; `constraints.txt` pins the tested versions."""

from setuptools import find_packages, setup

TRAIN = ["torch>=2.6", "megatron-core==0.16.1", "numpy", "psutil", "sentencepiece"]  # psutil: megatron's checkpoint writer needs it
MONITORING = ["wandb", "tensorboard"]
DEMO = ["Babel", "matplotlib"]
DEV = ["pytest", "ruff", "import-linter"]

setup(
    name="megatron_sorted",
    version="0.2.0",
    description="Train nested (sorted) language models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_sorted", "megatron_sorted.*"]),
    install_requires=["pydantic>=2", "pyyaml", "tqdm"],
    extras_require={
        "train": TRAIN,
        "hf": ["tokenizers"],
        "monitoring": MONITORING,
        "demo": DEMO,
        "cuda": ["transformer-engine[pytorch]"],
        "dev": DEV + DEMO + TRAIN + MONITORING + ["tokenizers"],
    },
)
