"""The steps of PosGen: data, trainings, models read with YaRN, measurements."""

from dataclasses import dataclass
from pathlib import Path

from lab.posgen_task.sequences import TASKS
from lab.results.steps import OURS, PYTHON, Step

LENGTH, TIMES = 64, 4
"""Numbers of a training sequence, and how many times longer test sequences are."""
BUCKET = 16
"""Positions of a bucket; the training length is a multiple of it."""
TRAINED = {"rope": (), "resonance": ("--rope-resonance",)}
"""Frequencies in training -> flags."""
READ = {"": None, " + yarn": LENGTH, f" + yarn {LENGTH * TIMES}": LENGTH * TIMES}
"""What is read beside the trained frequencies -> original context of YaRN's formula."""
NETWORK = (
    "--num-layers 2 --exit-layer-nums 1 --hidden-size 64 --ffn-hidden-size 128 "
    "--num-attention-heads 2 --kv-channels 32 --init-method-std 0.1"
)


@dataclass(frozen=True)
class PosGenPlan:
    """Names and commands of one run of the benchmark.

    Attributes:
        folder: Folder of everything, as commands name it.
        tasks: Names of the tasks.
        seeds: Number of trainings of each task and kind of frequencies, with seeds 1, 2, ...
        num_steps: Steps of a training, of 32 sequences.
        modulus: Number of different numbers.
        num_train, num_test: Sequences of the two sets.
    """

    folder: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 3
    num_steps: int = 400
    modulus: int = 5
    num_train: int = 400
    num_test: int = 200

    def data_steps(self, task: str) -> list[Step]:
        """Return the steps that make sequences and token files of a task."""
        data = self.folder / task / "data"
        write = (
            *(PYTHON, "-m", "lab.posgen_task.sequences", "--task", task, "--output", str(data)),
            *f"--modulus {self.modulus} --length {LENGTH} --times {TIMES}".split(),
            *f"--train {self.num_train} --test {self.num_test}".split(),
        )
        prepare = (
            *(*OURS, "prepare", "--input", str(data / "train.jsonl")),
            *("--output-prefix", str(data / "train"), "--tokenizer-model", str(data / "tokenizer")),
            *f"--seq-length {LENGTH} --workers 1 --overwrite --no-append-eod".split(),
        )
        return [
            Step(
                f"sequences-{task}",
                "Write sequences and their tokenizer",
                write,
                (data / "train.jsonl", data / "test.jsonl"),
            ),
            Step(
                f"prepare-{task}",
                "Turn them into tokens",
                prepare,
                (data / "train_text_document.bin",),
                needs=(f"sequences-{task}",),
            ),
        ]

    def train_step(self, task: str, trained: str, seed: int) -> Step:
        """Return one training, which writes a Hugging Face directory."""
        data, save = self.folder / task / "data", self.folder / task / "runs" / f"{trained}-{seed}"
        model = self.model(task, trained, "", seed)
        command = (
            *(PYTHON, "pretrain_sorted.py", *NETWORK.split(), *TRAINED[trained]),
            *("--tokenizer-model", str(data / "tokenizer"), "--seq-length", str(LENGTH)),
            *("--data-path", str(data / "train_text_document"), "--split", "100"),
            *f"--device cpu --micro-batch-size 32 --train-iters {self.num_steps}".split(),
            *f"--lr 3e-3 --min-lr 1e-4 --lr-warmup-iters {min(50, self.num_steps // 2)}".split(),
            *f"--adam-beta2 0.98 --log-interval 100 --seed {seed}".split(),
            *("--save", str(save), "--save-hf", str(model)),
        )
        return Step(
            f"train-{task}-{trained}-{seed}",
            f"Train on sequences of {LENGTH} numbers, seed {seed}",
            command,
            (model / "config.json",),
            (save, model),
            (f"prepare-{task}",),
        )

    def scale_step(self, task: str, seed: int) -> Step:
        """Return the step that writes the trained models again with YaRN's frequencies."""
        copies = {
            self.model(task, trained, read, seed): (self.model(task, trained, "", seed), original)
            for trained in TRAINED
            for read, original in READ.items()
            if original is not None
        }
        arguments = [f"{model}:{original}:{new}" for new, (model, original) in copies.items()]
        return Step(
            f"scale-{task}-{seed}",
            "Write the same weights with YaRN's frequencies",
            (PYTHON, "-m", "lab.posgen_task.scaled", "--factor", str(TIMES), *arguments),
            tuple(new / "config.json" for new in copies),
            needs=tuple(f"train-{task}-{trained}-{seed}" for trained in TRAINED),
        )

    def evaluate_step(self, task: str, seed: int) -> Step:
        """Return the measurement of all models of a task and seed by position."""
        data, output = self.folder / task / "data", self.measured(task, seed).parent
        models = [
            f"{trained}{read}={self.model(task, trained, read, seed)}"
            for trained in TRAINED
            for read in READ
        ]
        command = (
            *(*OURS, "evaluate", *models, "--text", str(data / "test.jsonl"), "--by-position"),
            *f"--length {LENGTH * TIMES} --position-buckets {BUCKET}".split(),
            *("--output", str(output)),
        )
        return Step(
            f"evaluate-{task}-{seed}",
            f"Measure every exit on sequences of {LENGTH * TIMES} numbers",
            command,
            (output / "evaluation.json",),
            needs=(f"scale-{task}-{seed}",),
        )

    def model(self, task: str, trained: str, read: str, seed: int) -> Path:
        """Return the directory of a model."""
        original = READ[read]
        ending = "" if original is None else f"-yarn{original}"
        return self.folder / task / "models" / f"{trained}{ending}-{seed}"

    def measured(self, task: str, seed: int) -> Path:
        """Return the file of the measurements of a task and seed."""
        return self.folder / task / "evaluation" / str(seed) / "evaluation.json"
