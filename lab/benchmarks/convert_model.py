"""A model of any size with random weights, written tensor by tensor, to measure conversions on."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sorted.conversion.exporting import write_config
from megatron_sorted.conversion.hugging_face.config_settings import config_of_settings
from megatron_sorted.conversion.hugging_face.safetensors_files import SafetensorsWriter
from megatron_sorted.conversion.tensors.source import TensorInfo
from megatron_sorted.conversion.tensors.table import tensor_table
from megatron_sorted.settings.run import Settings

SHARD_BYTES = 10**9
DEVIATION = 0.02
"""Standard deviation of the weights, as in training."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA; heads of 64 channels, grouped 8 to 1, an untied head."""

    num_layers: int
    hidden_size: int = 2048
    ffn_hidden_size: int = 5632
    vocab_size: int = 32000

    def settings(self) -> Settings:
        """Return its network."""
        heads = self.hidden_size // 64
        return Settings(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=heads,
            kv_channels=64,
            group_query_attention=True,
            num_query_groups=max(1, heads // 8),
            vocab_size=self.vocab_size,
            untie_embeddings_and_output_weights=True,
            normalization="RMSNorm",
            swiglu=True,
            disable_bias_linear=True,
            position_embedding_type="rope",
            seq_length=2048,
            max_position_embeddings=2048,
            bf16=True,
        )

    def tensors(self) -> dict[str, TensorInfo]:
        """Return its tensors under Hugging Face's names, in bf16."""
        return {
            name: TensorInfo(shape, torch.bfloat16)
            for pair in tensor_table(self.settings())
            for name, shape in zip(pair.theirs, pair.shapes, strict=True)
        }

    @property
    def num_bytes(self) -> int:
        """Return the size of its tensors."""
        return sum(info.num_bytes for info in self.tensors().values())

    @property
    def largest_bytes(self) -> int:
        """Return the size of its largest tensor in a checkpoint, where gate and up are one."""
        return 2 * max(torch.Size(pair.shape).numel() for pair in tensor_table(self.settings()))


def write_model(directory: Path, shape: Shape) -> None:
    """Write a Hugging Face directory in files of 1 GB."""
    directory.mkdir(parents=True)
    tensors, generator = shape.tensors(), torch.Generator("cpu").manual_seed(0)
    writer = SafetensorsWriter(directory, tensors, SHARD_BYTES)
    for name, info in tensors.items():
        numbers = torch.empty(info.shape, dtype=torch.bfloat16, device="cpu").normal_(
            0.0, DEVIATION, generator=generator
        )
        writer.write(name, numbers + 1 if len(info.shape) == 1 else numbers)
    writer.close()
    write_config(directory, config_of_settings(shape.settings(), "bfloat16"))
