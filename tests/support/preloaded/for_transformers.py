"""Imports of the commands that read finished models: torch and transformers, and no megatron."""

import importlib
import os

from tests.support.own_warnings import raise_own_warnings

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
raise_own_warnings()

LIBRARIES = """
    fastapi matplotlib.figure numpy pydantic safetensors.torch sentencepiece tokenizers torch
    torch._dynamo tqdm transformers uvicorn yaml transformers.generation.utils
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.llama.modeling_llama transformers.models.mistral.modeling_mistral
    transformers.models.qwen2.modeling_qwen2 transformers.models.qwen3.modeling_qwen3
    transformers.tokenization_utils_sentencepiece
"""
OURS = """
    megatron_sorted.conversion.exporting megatron_sorted.conversion.importing
    megatron_sorted.conversion.verifying.comparison megatron_sorted.data.preparation.prepare
    megatron_sorted.decoding.strategies megatron_sorted.decoding.text_generator
    megatron_sorted.evaluation.evaluate megatron_sorted.exported.load
    megatron_sorted.exported.tokenizer megatron_sorted.settings.load
"""

for name in (LIBRARIES + OURS).split():
    importlib.import_module(name)
