"""Installs megatron_sorted; `constraints.txt` pins the tested versions."""

from setuptools import find_packages, setup

# psutil: megatron's checkpoint writer needs it
TRAIN = ["torch>=2.6", "megatron-core==0.16.1", "numpy", "psutil", "sentencepiece", "safetensors"]
MONITORING = ["wandb", "tensorboard"]
CONVERT = ["torch>=2.6", "numpy", "safetensors", "transformers>=5", "tokenizers", "sentencepiece"]
EVALUATE = [*CONVERT, "lm-eval", "accelerate", "datasets", "matplotlib"]  # lm-eval's models of transformers need accelerate
DEMO = ["Babel", "matplotlib"]
DEV = ["pytest", "ruff", "import-linter"]

setup(
    name="megatron_sorted",
    version="0.4.0",
    description="Train nested (sorted) language models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_sorted", "megatron_sorted.*"]),
    install_requires=["pydantic>=2", "pyyaml", "tqdm"],
    extras_require={
        "train": TRAIN,
        "convert": CONVERT,
        "evaluate": EVALUATE,
        "monitoring": MONITORING,
        "demo": DEMO,
        "cuda": ["transformer-engine[pytorch]"],
        "dev": DEV + DEMO + TRAIN + MONITORING + EVALUATE,
    },
)
