"""Programs that stand in for llama.cpp's converter and quantiser, for tests without llama.cpp.

The converter writes float32 GGUF files of LLaMA, Mistral and Qwen directories. It shares no code
with the project: names, the order of rows and the file's format are written down here again. A
fault makes it do wrong.
"""

import sys
from pathlib import Path

CONVERTER = """\
import argparse, json, struct, sys
from pathlib import Path
from safetensors.numpy import load_file

FAULT = "{fault}"
parser = argparse.ArgumentParser()
parser.add_argument("source", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype")
parser.add_argument("--vocab-only", action="store_true")
parser.add_argument("--model-name")
values = parser.parse_args()
with open(Path(__file__).with_name("seen.txt"), "a") as seen:
    for path in sorted(values.source.iterdir()):
        print(path.name, file=seen)
config = json.loads((values.source / "config.json").read_text())
if FAULT == "vocabulary" and values.vocab_only:
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
tensors = dict()
for path in [] if values.vocab_only else values.source.glob("*.safetensors"):
    for name, tensor in load_file(path).items():
        tensors[name] = tensor.astype("float32")
if FAULT == "fails" and tensors:
    values.outfile.write_bytes(b"GGUF")
    for number in range(30):
        print("reading tensor", number)
    sys.exit("RuntimeError: out of luck")

def name_of(name):
    for theirs, ours in (
        ("model.embed_tokens.", "token_embd."), ("model.norm.", "output_norm."),
        ("lm_head.", "output."), ("model.layers.", "blk."), ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"), ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ):
        name = name.replace(theirs, ours)
    return name

def pairs_first(rows):  # channel c of a head, then channel c + size / 2, one after the other
    size = config["head_dim"]
    order = [h * size + c + half * size // 2 for h in range(len(rows) // size)
             for c in range(size // 2) for half in (0, 1)]
    return rows[order]

def text(word):
    data = word.encode()
    return struct.pack("<Q", len(data)) + data

def number(key, value):
    return text(key) + struct.pack("<II", 4, value)

kind = config["model_type"].replace("mistral", "llama")
tokens = [f"t{{n}}" for n in range(config["vocab_size"])]
facts = [
    text("general.architecture") + struct.pack("<I", 8) + text(kind),
    number(kind + ".block_count", config["num_hidden_layers"]),
    number(kind + ".context_length", config["max_position_embeddings"]),
    number(kind + ".embedding_length", config["hidden_size"]),
    number(kind + ".attention.head_count", config["num_attention_heads"]),
    number("tokenizer.ggml.bos_token_id", config["bos_token_id"]),
    number("tokenizer.ggml.eos_token_id", 9 if FAULT == "end" else config["eos_token_id"]),
    text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("llama"),
    text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens))
    + b"".join(map(text, tokens)),
]
if kind == "llama" and FAULT != "order":
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] = pairs_first(tensors[name])
if FAULT == "value" and tensors:
    tensors["model.norm.weight"][3] += 1e-6
if FAULT == "missing" and tensors:
    del tensors["model.layers.0.mlp.up_proj.weight"]
header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)) + b"".join(facts)
data = b""
for name, tensor in tensors.items():
    shape = list(tensor.shape)[::-1]
    header += text(name_of(name)) + struct.pack(f"<I{{len(shape)}}Q", len(shape), *shape)
    header += struct.pack("<IQ", 0, len(data))
    data += tensor.tobytes()
    data += bytes(-len(data) % 32)
values.outfile.write_bytes(header + bytes(-len(header) % 32) + data)
"""
QUANTISER = """\
import shutil, sys
shutil.copy(sys.argv[1], sys.argv[2])
"""


def write_llama_cpp(folder: Path, fault: str = "", with_quantiser: bool = True) -> Path:
    """Write a folder as a clone of llama.cpp with a build in it looks; return it.

    Args:
        folder: The folder.
        fault: What the converter does wrong: "vocabulary", "fails", "order", "value", "missing"
            or "end".
        with_quantiser: Whether there is a llama-quantize; it copies.
    """
    programs = folder / "build" / "bin"
    programs.mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(fault=fault))
    if with_quantiser:
        path = programs / "llama-quantize"
        path.write_text(f"#!{sys.executable}\n{QUANTISER}")
        path.chmod(0o700)
    return folder


def seen_files(folder: Path) -> set[str]:
    """Return the names of all files that the converter found in its directories."""
    return set((folder / "seen.txt").read_text().split())
