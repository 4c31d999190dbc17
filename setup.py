"""Installs megatron_sorted; `constraints.txt` pins the tested versions."""

import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SUPPORTED = runpy.run_path(str(ROOT / "megatron_sorted" / "platform" / "supported.py"))
PACKAGE = (ROOT / "megatron_sorted" / "__init__.py").read_text(encoding="utf-8")
# folders of a clone that are installed inside the package; `megatron-sorted examples` copies them
SHIPPED = {"megatron_sorted.examples": "examples", "megatron_sorted.slurm": "slurm"}


def supported(name: str) -> str:
    """Return the oldest supported version of a package."""
    return SUPPORTED["shown"](SUPPORTED[name])


TORCH, TRANSFORMERS = f"torch>={supported('TORCH')}", f"transformers>={supported('TRANSFORMERS')}"
# psutil: megatron's checkpoint writer needs it
TRAIN = [
    TORCH,
    f"megatron-core{SUPPORTED['MEGATRON_CORE_RANGE']}",
    "numpy",
    "psutil",
    "sentencepiece",
    "tokenizers",
    "safetensors",
]
MONITORING = ["wandb", "tensorboard", "matplotlib"]
CONVERT = [TORCH, "numpy", "safetensors", TRANSFORMERS, "tokenizers", "sentencepiece"]
EVALUATE = [
    *CONVERT,
    "lm-eval>=0.4.13",
    "accelerate",  # lm-eval's models of transformers need it
    "datasets",
    "matplotlib",
]
SERVE = [*CONVERT, "fastapi", "uvicorn", "prometheus_client"]
DEMO = ["Babel", "matplotlib"]
DOCS = ["sphinx", "myst-parser", "furo"]
DEV = [
    "pytest",
    "pytest-xdist",
    "ruff",
    "import-linter",
    "httpx2",  # for tests of the server
    "hypothesis",
]


class CleanBuild(build_py):
    """A build without files of earlier builds, which setuptools would put into a wheel."""

    def run(self) -> None:
        """Remove the earlier build, then build."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    name="megatron_sorted",
    version=re.search(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[1],
    description="Train nested (sorted) language models on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(
            f"Programming Language :: Python :: {SUPPORTED['shown'](version)}"
            for version in SUPPORTED["PYTHON_TRIED"]
        ),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={
        "console_scripts": ["megatron-sorted = megatron_sorted.__main__:main"],
        "vllm.general_plugins": ["megatron_sorted = megatron_sorted.serving.vllm.plugin:register"],
    },
    cmdclass={"build_py": CleanBuild},
    python_requires=f">={supported('PYTHON')}",
    packages=[*find_packages(include=["megatron_sorted", "megatron_sorted.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "megatron_sorted.decoding.native": ["source/*"],
        "megatron_sorted.examples": ["*.yaml", "sites/*.site", "serving/*.service"],
        "megatron_sorted.serving": ["page/index.html"],
        "megatron_sorted.slurm": ["*.sh", "*.awk", "*.sbatch"],
    },
    install_requires=["pydantic>=2", "pyyaml", "tqdm", "jinja2"],
    extras_require={
        "train": TRAIN,
        "convert": CONVERT,
        "evaluate": EVALUATE,
        "serve": SERVE,
        # beside vLLM itself, or its build for CPUs; never beside [serve]: it pins an older fastapi
        "vllm": [f"vllm{SUPPORTED['VLLM_RANGE']}"],
        "monitoring": MONITORING,
        "demo": DEMO,
        "cuda": ["transformer-engine[pytorch]"],
        # Muon; the package is for Python 3.12 and newer
        "muon": [f"emerging-optimizers>={supported('EMERGING_OPTIMIZERS')}"],
        "npu": ["torch_npu"],  # of torch's own version; on Ascend hosts alone
        "docs": DOCS,
        "dev": DEV + DOCS + DEMO + TRAIN + MONITORING + EVALUATE + SERVE,
    },
)
