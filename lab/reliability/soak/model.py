"""The model of a soak: a small random one whose exits often agree, with a tokenizer."""

from pathlib import Path

from lab.contests.models import Shape, write_model
from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece

SHAPE = Shape("soaked", 4, 64, 128, 4, 300)
CONTEXT = 1024
DEPTHS = (1, 2, 3)
"""Exits beside the last layer's; they are read with the last norm and head."""
TEXTS = (
    "Once upon a time there was a small red cat.\nIt sat on a mat.",
    "The big dog ran 12 miles, and the cat did not!",
    'Other signs: "yes", replied the mother. Größer 猫!',
    "A bird flew over the house. The bird sang.\n\nThen it was night.",
)


def write_soaked_model(folder: Path) -> Path:
    """Write the model into a folder and return its directory."""
    model = write_model(SHAPE, folder, CONTEXT, agreeing=True)
    train_sentencepiece(lambda: TEXTS, str(model / "tokenizer.model"), SHAPE.vocabulary)
    return model
