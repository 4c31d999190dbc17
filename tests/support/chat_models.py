"""Small chat models for tests: tokenizer with template, random network, questions with answers."""

import json
import subprocess
from pathlib import Path

from megatron_sorted.conversion.tokenizers.export import add_fast_tokenizer
from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.support.chat_templates import write_fast_tokenizer
from tests.support.commands import run_command

ANSWERS = {
    "say hi": "hi there",
    "name a pet": "a dog",
    "two plus two": "four",
    "who reads": "the cat reads",
    "what is red": "an apple",
    "name a tree": "oak",
    "is it late": "no",
    "count": "one two three",
}
ADDED = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def write_tokenizer(directory: Path, kind: str, template: str | None) -> None:
    """Write a tokenizer of one kind with a template."""
    if kind == "tokenizer.json":
        write_fast_tokenizer(directory, template)
        return
    directory.mkdir()
    train_sentencepiece(
        lambda: [*ANSWERS, *ANSWERS.values(), "user assistant system INST"],
        str(directory / "tokenizer.model"),
        320,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if template is not None and "im_start" in template:
        config["added_tokens_decoder"] = {
            str(320 + place): {"content": word, "special": word.startswith("<|")}
            for place, word in enumerate(ADDED)
        }
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "both":
        assert "the same ids" in add_fast_tokenizer(directory)


def write_model(directory: Path, family: str) -> None:
    """Write a small random model beside its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": open_tokenizer(directory).vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    } | ({"head_dim": 16} if family == "qwen3" else {})
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).save_pretrained(
        directory
    )


def write_talks(path: Path) -> None:
    """Write the questions and answers as ``messages``."""
    talks = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in ANSWERS.items()
    ]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))


def done(*arguments, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Run a command that has to succeed."""
    ended = run_command(*arguments, cwd=cwd, **more)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended
