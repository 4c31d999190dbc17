"""Layouts whose plans are compared with measurements."""

from dataclasses import replace

from megatron_sorted.settings.run import Settings

MEMORY = Settings(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    seq_length=512,
    vocab_size=8192,
    mock_data=True,
    device="cpu",
    micro_batch_size=1,
    global_batch_size=2,
    exit_layer_nums=(1, 2),
    train_iters=100,
    lr=1e-4,
)
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
FULLY = {"data_parallel": "fsdp"}
SHORT = {
    "seq_length": 64,
    "hidden_size": 768,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 12,
    "vocab_size": 16384,
    "untie_embeddings_and_output_weights": True,
}
FULL = {"recompute_granularity": "full"}
MEMORY_CASES = {
    "one process": (1, {}),
    "full recomputation": (1, FULL),
    "selective recomputation of MLPs": (
        1,
        {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    ),
    "micro-batch of 4, untied, an exit after every layer": (
        1,
        {
            "micro_batch_size": 4,
            "global_batch_size": 4,
            "untie_embeddings_and_output_weights": True,
            "exit_layer_nums": (1, 2, 3),
        },
    ),
    "dp2": (2, {}),
    "dp2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "dp2, distributed optimizer, short samples": (2, {**SHORT, "use_distributed_optimizer": True}),
    "dp2, fully sharded": (2, FULLY),
    "dp2, fully sharded, untied, 4 micro-batches": (
        2,
        {**FULLY, "untie_embeddings_and_output_weights": True, "global_batch_size": 8},
    ),
    "dp2, fully sharded, short samples": (2, {**SHORT, **FULLY}),
    "tp2, sequence parallel, sandwich norm": (
        2,
        {
            **TP2,
            "sequence_parallel": True,
            "use_sandwich_norm": True,
            "micro_batch_size": 4,
            "global_batch_size": 4,
        },
    ),
    "pp2": (2, PP2),
    "pp2 of 2 chunks": (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    "tp2 pp2, full recomputation": (4, {**TP2, **PP2, **FULL}),
}
"""Name -> number of processes, settings that differ from ``MEMORY``."""

TIME = Settings(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    seq_length=256,
    vocab_size=6144,
    mock_data=True,
    device="cpu",
    micro_batch_size=1,
    global_batch_size=4,
    train_iters=1000,
    lr=1e-4,
    untie_embeddings_and_output_weights=True,
)
SEVEN = {"exit_layer_nums": (1, 2, 3, 4, 5, 6, 7)}
TIME_CASES = {
    "one process": (1, {}),
    "one process, exits everywhere, recomputation": (1, {**SEVEN, **FULL}),
    "dp2": (2, {}),
    "dp2, exits everywhere": (2, SEVEN),
    "tp2, recomputation": (2, {**TP2, **FULL}),
    "pp2, micro-batch of 2": (2, {**PP2, "micro_batch_size": 2}),
    "pp2, 7 and 1 layers": (2, {**PP2, "decoder_first_pipeline_num_layers": 7}),
    "pp2, exits everywhere": (2, {**PP2, **SEVEN}),
}
"""Name -> number of processes, settings that differ from ``TIME``; samples are equal."""

BALANCE = replace(
    TIME,
    num_layers=10,
    exit_layer_nums=(1, 2, 3),
    pipeline_model_parallel_size=2,
    global_batch_size=8,
)
"""Four exits, three of them at the beginning, on two stages."""

FOUR_STAGES = replace(TIME, num_layers=16, pipeline_model_parallel_size=4, global_batch_size=16)
FOUR_EXITS = replace(FOUR_STAGES, exit_layer_nums=(4, 8, 12))
"""A pipeline of four: a plain model, and one with an exit on every stage."""
