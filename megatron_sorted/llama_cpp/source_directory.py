"""The directory that llama.cpp's converter reads: an ordinary model, with nothing that runs.

The converter opens tokenizers with ``trust_remote_code=True``. Therefore it never sees the user's
directory: it gets weights, a config.json of known keys and tokenizer files without modules.
"""

import json
from pathlib import Path
from typing import Any

from megatron_sorted.conversion.exporting import export_model, write_descriptions
from megatron_sorted.conversion.hugging_face.config_settings import config_of_settings
from megatron_sorted.conversion.hugging_face.families import (
    CONFIG_FILE,
    EXITS_FILE,
    GENERATION_FILE,
)
from megatron_sorted.conversion.origins import NetworkOrigin
from megatron_sorted.conversion.tokenizers.export import CLASS, MODULE, write_settings
from megatron_sorted.conversion.tokenizers.prompt_form_files import form_of, trained_ends
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.files import write_text_atomically
from megatron_sorted.llama_cpp.limits import context_length
from megatron_sorted.reading.json_text import read_optional_object
from megatron_sorted.text.tokenizer.files import PIECES
from megatron_sorted.text.tokenizer.template_files import CONFIG as TOKENIZER_CONFIG

BLANK = "\u2581"
"""How sentencepiece writes a blank."""
OWN_MODULE = {"AutoTokenizer": [None, f"{MODULE.removesuffix('.py')}.{CLASS}"]}
"""The only entry of a tokenizer's auto_map that stays: it names a module that is written here."""


def converter_variables(folder: Path) -> dict[str, str]:
    """Return the environment in which the converter fetches nothing and keeps nothing."""
    return {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": str(folder),
        "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def end_ids(network: NetworkOrigin) -> tuple[int, ...]:
    """Return the tokens that end a text, the most important one first."""
    model = network.model
    tokenizer = model.open_tokenizer()
    ends = trained_ends(model, form_of(model))
    own = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys([*ends, *own]))


def puts_blank_before(network: NetworkOrigin) -> bool:
    """Return whether a sentencepiece tokenizer puts a blank before a text, or a conversation.

    llama.cpp puts one before every text and after every control token, or never does
    (tokenizer.ggml.add_space_prefix). Here it depends on the place: none after a control token. A
    model with a template was trained on conversations, so their beginning decides.
    """
    tokenizer, form = network.model.open_tokenizer(), form_of(network.model)
    probe, begin = "How", form and form.is_conversation and form.begin
    if begin:
        probe = f"{begin.text}{probe}"
    ids = tokenizer.encode_rendered(probe)
    first = next((one for one in ids if one not in tokenizer.special_ids), ids[-1])
    return tokenizer.token_text(first).startswith(BLANK)


def write_vocabulary(network: NetworkOrigin, directory: Path) -> None:
    """Write config.json and tokenizer files without weights, to try the converter with them."""
    directory.mkdir(parents=True)
    config = _config(network)
    write_descriptions(directory, network.model, config)
    make_harmless(network, directory, config)


def write_source(network: NetworkOrigin, directory: Path) -> None:
    """Write the whole directory, weights as stored, without verifying it: the file is verified."""
    export_model(network, directory, WriteOptions(verify=False))
    make_harmless(network, directory, _config(network))


def _config(network: NetworkOrigin) -> dict[str, Any]:
    """Return a config.json of the keys that describe a network, and no others."""
    model, settings = network.model, network.settings
    whole = config_of_settings(settings, "float32", model.config)
    known = config_of_settings(settings, "float32", None)
    names = {*known, "sliding_window", "rope_parameters", "dtype"}
    config = {name: value for name, value in whole.items() if name in names}
    config["max_position_embeddings"] = context_length(settings)
    tokenizer, ends = model.open_tokenizer(), end_ids(network)
    if tokenizer is not None and tokenizer.bos_id is not None:
        config["bos_token_id"] = tokenizer.bos_id
    if ends:
        config["eos_token_id"] = ends[0]
    return config


def make_harmless(network: NetworkOrigin, directory: Path, config: dict[str, Any]) -> None:
    """Remove what the converter does not need or must not run, and name the end of a text."""
    for path in directory.iterdir():
        if path.suffix in (".py", ".md") or path.name in (EXITS_FILE, GENERATION_FILE):
            path.unlink()
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    settings = read_optional_object(directory / TOKENIZER_CONFIG)
    module = settings.pop("auto_map", None)
    if (directory / PIECES).is_file():
        settings["add_prefix_space"] = puts_blank_before(network)
    tokenizer, ends = network.model.open_tokenizer(), end_ids(network)
    if tokenizer is not None and ends and tokenizer.eos_id != ends[0]:
        settings.pop("eos_token", None)  # the one of config.json counts
    if module == OWN_MODULE:
        write_settings(directory, settings, config["model_type"])
    else:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        write_text_atomically(directory / TOKENIZER_CONFIG, text)
