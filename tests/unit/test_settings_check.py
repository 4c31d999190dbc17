"""Every rule between settings: one run just within it, one just outside."""

from dataclasses import fields, replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE, check_settings
from megatron_sorted.settings.run import Settings

BASE = replace(Settings(), mock_data=True, vocab_size=100)
REAL = replace(Settings(), data_path=("corpus",), tokenizer_model="tokenizer.model")
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
CHUNKS = {**PP2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 4}
SERIAL = {"overlap_p2p_communication": False}
FSDP = {"data_parallel": "fsdp"}
MUON = {"optimizer": "muon"}
EXITS = {"exit_layer_nums": (2, 4)}
UNIFORM = {**EXITS, "exit_sampling": "uniform"}
DRAWN = {**EXITS, "exit_sampling": "probabilities", "exit_probabilities": (0.25, 0.25, 0.5)}

ALLOWED = [
    (BASE, {}, 1),
    (BASE, {**MUON, **PP2, "muon_tp_mode": "blockwise", "bf16": True}, 2),
    (REAL, {}, 1),
    (REAL, {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 9}, 1),
    (REAL, {"valid_data_path": ("other",), "split": "100,0"}, 1),
    (REAL, {"split": "100,0"}, 1),
    (REAL, {"split": "969,30,1"}, 1),
    (REAL, {"data_path": ("0.3", "a", "0.7", "b")}, 1),
    (REAL, {"data_path": (), "test_data_path": ("t",), "skip_train": True, "load": "run"}, 1),
    (BASE, {"hidden_size": 250, "kv_channels": 32}, 1),
    (BASE, {"group_query_attention": True, "num_query_groups": 2, **TP2}, 2),
    (
        BASE,
        {"use_rope_scaling": True, "rope_scaling_factor": 1.0, "rope_scaling_low_freq_factor": 3.9},
        1,
    ),
    (BASE, {"rotary_seq_len_interpolation_factor": 1.0}, 1),
    (BASE, {"sliding_window": 1}, 1),
    (BASE, {"sliding_window": 256, "context_parallel_size": 2}, 2),
    (BASE, {**TP2, "sequence_parallel": True}, 4),
    (BASE, {"device": "cuda", "distributed_backend": "gloo"}, 1),
    (BASE, {"device": "npu", "distributed_backend": "hccl", "npu_kernels": ("attention",)}, 1),
    (
        BASE,
        {
            "device": "npu",
            "npu_kernels": (),
            "npu_adaptor": "mindspeed",
            "npu_adaptor_arguments": "--x",
        },
        1,
    ),
    (BASE, {"npu_adaptor": "mindspeed"}, 1),
    (BASE, {"npu_adaptor": "megatron_adaptor", "npu_adaptor_arguments": "--x"}, 1),
    (BASE, {"context_parallel_size": 2}, 2),
    (BASE, {**EXITS, "exit_layer_weight": (0.1, 0.2)}, 1),
    (BASE, {"exit_layer_nums": (4, 8, 2), "exit_layer_weight": (0.1, 0.2, 0.3)}, 1),
    (BASE, {**EXITS, "exit_layer_weight_init": (0.1, 0.2), "exit_layer_weight_warmup_iters": 5}, 1),
    (BASE, DRAWN, 1),
    (BASE, {**DRAWN, "num_sampled_exits": 3}, 1),
    (BASE, {**DRAWN, "exit_probabilities": (1 / 3, 1 / 3, 1 / 3)}, 1),
    (BASE, {**DRAWN, "exit_layer_weight_warmup_iters": 5}, 1),
    (BASE, CHUNKS, 2),
    (
        BASE,
        {**CHUNKS, "num_layers_per_virtual_pipeline_stage": 4, "overlap_p2p_communication": False},
        2,
    ),
    (
        BASE,
        {
            **CHUNKS,
            "pipeline_model_parallel_size": 4,
            "num_layers_per_virtual_pipeline_stage": 1,
            **SERIAL,
        },
        4,
    ),
    (BASE, {**PP2, "decoder_first_pipeline_num_layers": 3}, 2),
    (BASE, {**PP2, "pipeline_model_parallel_layout": "Et*5|t*3L"}, 2),
    (BASE, {**PP2, "pipeline_model_parallel_layout": "Ett|t|ttt|ttL", "global_batch_size": 4}, 2),
    (BASE, {"use_sandwich_norm": True, "attn_post_norm_scale": 0.5}, 1),
    (BASE, {"bf16": True, "device": "cpu"}, 1),
    (BASE, {"fp16": True, "device": "cpu", "loss_scale": 8.0}, 1),
    (
        BASE,
        {"num_experts": 4, "expert_model_parallel_size": 2, **TP2, "sequence_parallel": True},
        4,
    ),
    (
        BASE,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        2,
    ),
    (
        BASE,
        {
            **FSDP,
            **EXITS,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
            "bf16": True,
            "recompute_granularity": "full",
        },
        4,
    ),
    (BASE, {"recompute_granularity": "full", "recompute_num_layers": 8}, 1),
    (
        BASE,
        {
            "recompute_granularity": "selective",
            "recompute_modules": ("core_attn", "mlp", "layernorm"),
        },
        1,
    ),
    (BASE, {"train_iters": 0}, 1),
    (
        BASE,
        {"profile_step_start": 5, "profile_step_end": 5, "profile_ranks": (9,)},
        1,
    ),  # not asked for
    (
        BASE,
        {
            "profile": True,
            "profile_dir": "p",
            "profile_step_start": 0,
            "profile_step_end": 2,
            "profile_ranks": (1,),
        },
        2,
    ),
    (BASE, {"skip_train": True, "load": "run", "train_iters": 0}, 1),
    (REAL, {"data_path": (), "valid_data_path": ("v",), "skip_train": True, "load": "run"}, 1),
]

PROFILE = {"profile": True, "save": "run"}

REFUSED = [
    # checkpoints
    (BASE, {"save_retain": 2}, 1, "--save-retain: nothing is saved"),
    (
        BASE,
        {"save": "run", "save_retain_interval": 2},
        1,
        "--save-retain-interval: all checkpoints are kept anyway",
    ),
    (BASE, {"ckpt_step": 2}, 1, "--ckpt-step: no checkpoint to take weights from"),
    (
        BASE,
        {"pretrained_checkpoint": "p", "finetune": True, "load": "l"},
        1,
        "--pretrained-checkpoint: together with --finetune",
    ),
    # profile
    (
        BASE,
        {**PROFILE, "profile_step_end": 10},
        1,
        "--profile-step-end: 10 is not above --profile-step-start 10",
    ),
    (
        BASE,
        {**PROFILE, "profile_step_start": 0, "profile_step_end": 1},
        1,
        "--profile-step-end: 1 is not above --profile-step-start 0",
    ),
    (BASE, {**PROFILE, "profile_ranks": ()}, 1, "--profile-ranks: empty, so no rank records"),
    (
        BASE,
        {**PROFILE, "profile_ranks": (0, 2)},
        2,
        "--profile-ranks: 2 is not one of the 2 processes. Use 0..1.",
    ),
    (
        BASE,
        {**PROFILE, "profile_ranks": (-1,)},
        2,
        "--profile-ranks: -1 is not one of the 2 processes",
    ),
    (BASE, {**PROFILE, "save": None}, 1, "--profile: nowhere to write"),
    # model
    (BASE, {"num_attention_heads": 7}, 1, "--hidden-size: 256 is not a multiple of 7"),
    (BASE, {"num_query_groups": 2}, 1, "--num-query-groups: 2 with --group-query-attention off"),
    (
        BASE,
        {"group_query_attention": True},
        1,
        "--num-query-groups: None with --group-query-attention on",
    ),
    (
        BASE,
        {"group_query_attention": True, "num_query_groups": 3},
        1,
        "--num-attention-heads: 8 is not a multiple of 3",
    ),
    (
        BASE,
        {"tensor_model_parallel_size": 16},
        16,
        "--num-attention-heads: 8 is not a multiple of 16",
    ),
    (
        BASE,
        {"group_query_attention": True, "num_query_groups": 1, **TP2},
        2,
        "--num-query-groups: 1 is not a multiple of 2",
    ),
    (BASE, {"ffn_hidden_size": 101, **TP2}, 2, "--ffn-hidden-size: 101 is not a multiple of 2"),
    (BASE, {"kv_channels": 33}, 1, "needs pairs"),
    (BASE, {"rotary_percent": 0.01}, 1, "needs pairs"),
    (BASE, {"rotary_percent": 1.5}, 1, "--rotary-percent: 1.5 is above 1"),
    (
        BASE,
        {"use_rope_scaling": True, "position_embedding_type": "none"},
        1,
        "--use-rope-scaling: there are no rotary frequencies with",
    ),
    (
        BASE,
        {"rotary_seq_len_interpolation_factor": 2.0, "position_embedding_type": "learned_absolute"},
        1,
        "--rotary-seq-len-interpolation-factor: there are no rotary frequencies with "
        "--position-embedding-type learned_absolute",
    ),
    (
        BASE,
        {"rotary_seq_len_interpolation_factor": 0.9},
        1,
        "--rotary-seq-len-interpolation-factor: 0.9 would shorten",
    ),
    (
        BASE,
        {"rope_scaling_factor": 32.0},
        1,
        "--rope-scaling-factor: 32.0 has no effect with --rope-scaling-type default; it is a "
        "parameter of linear, llama3, yarn, dynamic.",
    ),
    (
        BASE,
        {"rope_scaling_original_max_position_embeddings": 9},
        1,
        "--rope-scaling-original-max-position-embeddings: 9 has no effect",
    ),
    (
        BASE,
        {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2.0},
        1,
        "2.0 together with --use-rope-scaling",
    ),
    (
        BASE,
        {"use_rope_scaling": True, "rope_scaling_factor": 0.9},
        1,
        "--rope-scaling-factor: 0.9 would shorten",
    ),
    (
        BASE,
        {"use_rope_scaling": True, "rope_scaling_low_freq_factor": 4.0},
        1,
        "4.0 is not below --rope-scaling-high-freq-factor 4.0",
    ),
    (
        BASE,
        {"sliding_window": 255, "context_parallel_size": 2},
        2,
        "--sliding-window: 255 is shorter than --seq-length 256",
    ),
    (
        BASE,
        {"max_position_embeddings": 255},
        1,
        "--max-position-embeddings: 255 is less than --seq-length 256",
    ),
    # experts
    (BASE, {"expert_model_parallel_size": 2}, 2, "--expert-model-parallel-size: 2 without experts"),
    (
        BASE,
        {"num_experts": 3, "expert_model_parallel_size": 2},
        2,
        "--num-experts: 3 is not a multiple of 2",
    ),
    (BASE, {"num_experts": 4, "moe_router_topk": 5}, 1, "--moe-router-topk: 5 of 4 experts"),
    (
        BASE,
        {"num_experts": 4, "expert_model_parallel_size": 4},
        2,
        "number of processes: 2 is not a multiple of 4",
    ),
    (BASE, {"num_experts": 4, **TP2}, 2, "needs --sequence-parallel"),
    (
        BASE,
        {"num_experts": 4, **TP2, "sequence_parallel": True, "disable_bias_linear": False},
        2,
        "experts with biases",
    ),
    (
        BASE,
        {"num_experts": 4, **TP2, "sequence_parallel": True, "moe_ffn_hidden_size": 5},
        2,
        "--moe-ffn-hidden-size: 5 is not a multiple",
    ),
    # exits
    (BASE, {"exit_layer_nums": (9,)}, 1, "9 is not a layer of this model"),
    (BASE, {"exit_layer_nums": (2, 2)}, 1, "2 is listed more than once"),
    (BASE, {**EXITS, "exit_layer_weight": (0.1,)}, 1, "1 values for 3 exits"),
    (BASE, {**EXITS, "exit_layer_weight": (0.1, -0.1)}, 1, "-0.1 is negative"),
    (BASE, {**EXITS, "exit_layer_weight": (0.0, 0.0, 0.0)}, 1, "every coefficient is 0"),
    (
        BASE,
        {**EXITS, "exit_layer_weight": (0.1, 0.1), "exit_layer_weight_rule": "sum"},
        1,
        "sum together with a list",
    ),
    (
        BASE,
        {**EXITS, "exit_layer_weight_init": (0.1,), "exit_layer_weight_warmup_iters": 5},
        1,
        "--exit-layer-weight-init: 1 values",
    ),
    (BASE, {**EXITS, "exit_layer_weight_init": (0.1, 0.1)}, 1, "no effect without a warm-up"),
    (
        BASE,
        {**EXITS, "exit_probabilities": (0.5, 0.5, 0.0)},
        1,
        "not used with --exit-sampling all",
    ),
    (BASE, {**DRAWN, "exit_probabilities": (0.5, 0.5)}, 1, "2 values for 3 exits"),
    (BASE, {**DRAWN, "exit_probabilities": (0.5, 0.75, -0.25)}, 1, "-0.25 is negative"),
    (BASE, {**DRAWN, "exit_probabilities": (0.5, 0.25, 0.24999)}, 1, "they sum to 0.99999, not 1"),
    (BASE, {**DRAWN, "num_sampled_exits": 4}, 1, "--num-sampled-exits: 4 of 3"),
    (
        BASE,
        {**DRAWN, "exit_probabilities": (0.5, 0.0, 0.5), "num_sampled_exits": 3},
        1,
        "--num-sampled-exits: 3 of 2",
    ),
    (
        BASE,
        {**UNIFORM, "exit_layer_weight": (0.0, 1.0), "num_sampled_exits": 3},
        1,
        "--num-sampled-exits: 3 of 2",
    ),
    (
        BASE,
        {**DRAWN, "exit_probabilities": (0.5, 0.5, 0.0), "exit_layer_weight_warmup_iters": 5},
        1,
        "at step 0 every exit",
    ),
    # layout
    (BASE, {}, 0, "number of processes: 0 is not above 0"),
    (BASE, TP2, 3, "number of processes: 3 is not a multiple of 2"),
    (
        BASE,
        {**TP2, **PP2, "context_parallel_size": 2},
        12,
        "number of processes: 12 is not a multiple of 8",
    ),
    (
        BASE,
        {"device": "cpu", "distributed_backend": "nccl"},
        1,
        "nccl cannot move data of --device cpu. Use gloo or auto.",
    ),
    (
        BASE,
        {"device": "cuda", "distributed_backend": "hccl"},
        1,
        "hccl cannot move data of --device cuda. Use nccl or gloo or auto.",
    ),
    (
        BASE,
        {"device": "npu", "distributed_backend": "nccl"},
        1,
        "nccl cannot move data of --device npu. Use hccl or auto.",
    ),
    (
        BASE,
        {
            "recompute_granularity": "selective",
            "recompute_modules": ("mlp",),
            "disable_bias_linear": False,
        },
        1,
        "--recompute-modules: mlp cannot be recomputed with biases",
    ),
    (
        BASE,
        {"device": "cpu", "npu_coalesced_collectives": False},
        1,
        "--no-npu-coalesced-collectives: it concerns HCCL, not",
    ),
    (
        BASE,
        {"npu_kernels": ("atention",)},
        1,
        "--npu-kernels: 'atention' is not a fused operation. Use some of attention, rms_norm,",
    ),
    (
        BASE,
        {"device": "cuda", "npu_adaptor": "mindspeed"},
        1,
        "--npu-adaptor: mindspeed patches Megatron for NPUs, not for --device cuda",
    ),
    (
        BASE,
        {"device": "cpu", "npu_adaptor": "megatron_adaptor"},
        1,
        "--npu-adaptor: megatron_adaptor patches Megatron for NPUs, not for --device cpu",
    ),
    (
        BASE,
        {"device": "npu", "npu_adaptor_arguments": "--x"},
        1,
        "--npu-adaptor-arguments: '--x' has no effect without an adaptor",
    ),
    (
        BASE,
        {"device": "cpu", "transformer_impl": "transformer_engine"},
        1,
        "--transformer-impl: transformer_engine cannot",
    ),
    (
        BASE,
        {"sequence_parallel": True},
        1,
        "--sequence-parallel: with --tensor-model-parallel-size 1 there is one rank to split over",
    ),
    (
        BASE,
        {**TP2, "sequence_parallel": True, "seq_length": 255},
        2,
        "--seq-length: 255 is not a multiple of 2",
    ),
    (
        BASE,
        {"context_parallel_size": 2, "transformer_impl": "local"},
        2,
        "--transformer-impl local",
    ),
    (BASE, {"context_parallel_size": 2, "device": "cpu"}, 2, "--device cpu"),
    (
        BASE,
        {"context_parallel_size": 2, "seq_length": 254},
        2,
        "--seq-length: 254 is not a multiple of 4",
    ),
    (
        BASE,
        {"micro_batch_size": 2, "global_batch_size": 6},
        2,
        "--global-batch-size: 6 is not a multiple of 4",
    ),
    (BASE, {"pipeline_model_parallel_size": 3}, 3, "8 layers do not divide over 3 stages"),
    (BASE, {**PP2, "decoder_first_pipeline_num_layers": 8}, 2, "0 layers are left for 1 stages"),
    (BASE, {**PP2, "pipeline_model_parallel_layout": "Et*5|t*4L"}, 2, "2 chunks with 9 layers"),
    (
        BASE,
        {**PP2, "pipeline_model_parallel_layout": "t*8"},
        2,
        "is not chunks of layers from the embedding to the loss",
    ),
    (
        BASE,
        {
            **PP2,
            "pipeline_model_parallel_layout": "Et*5|t*3L",
            "decoder_first_pipeline_num_layers": 5,
        },
        2,
        "--decoder-first-pipeline-num-layers: 5 together with --pipeline-model-parallel-layout",
    ),
    (
        BASE,
        {"pipeline_model_parallel_layout": "Et*5|t*3L"},
        1,
        "--pipeline-model-parallel-layout: 2 chunks need several stages",
    ),
    (
        BASE,
        {**PP2, "pipeline_model_parallel_layout": "Ett|t|ttt|ttL", "global_batch_size": 3},
        2,
        "number of micro-batches: 3",
    ),
    (
        BASE,
        {
            **PP2,
            "pipeline_model_parallel_layout": "Ett|t|ttt|ttL",
            **SERIAL,
            "global_batch_size": 4,
        },
        2,
        "mixes up messages",
    ),
    (
        BASE,
        {"attn_post_norm_scale": 0.5},
        1,
        "--attn-post-norm-scale: 0.5 has no effect without --use-sandwich-norm",
    ),
    (
        BASE,
        {"use_sandwich_norm": True, "num_experts": 4},
        1,
        "--use-sandwich-norm: not supported with experts",
    ),
    (BASE, {"decoder_last_pipeline_num_layers": 8}, 1, "there is only one stage"),
    (BASE, {"num_layers_per_virtual_pipeline_stage": 2}, 1, "needs several stages"),
    (
        BASE,
        {**CHUNKS, "num_layers_per_virtual_pipeline_stage": 3},
        2,
        "--num-layers: 8 is not a multiple of 6",
    ),
    (
        BASE,
        {**CHUNKS, "decoder_first_pipeline_num_layers": 4},
        2,
        "chunks need stages of equal size",
    ),
    (BASE, {**CHUNKS, "overlap_p2p_communication": False}, 2, "gradients are silently wrong"),
    (
        BASE,
        {**CHUNKS, "global_batch_size": 3},
        2,
        "number of micro-batches: 3 is not a multiple of 2",
    ),
    (
        BASE,
        {**PP2, "recompute_granularity": "full", "recompute_num_layers": 5},
        2,
        "5 is more than the 4 layers of a chunk",
    ),
    (
        BASE,
        {**CHUNKS, "recompute_granularity": "full", "recompute_num_layers": 3},
        2,
        "3 is more than the 2 layers of a chunk",
    ),
    (
        BASE,
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mla_up_proj")},
        1,
        "'mla_up_proj' cannot be",
    ),
    (
        BASE,
        {"recompute_granularity": "selective", "recompute_modules": ()},
        1,
        "--recompute-modules: empty",
    ),
    (
        BASE,
        {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
        1,
        "moe without experts",
    ),
    # training
    (BASE, {"bf16": True, "fp16": True}, 1, "a run has one precision"),
    (BASE, {"loss_scale": 8.0}, 1, "--loss-scale: 8.0 has an effect with --fp16 only"),
    (
        BASE,
        {"initial_loss_scale": 0.5},
        1,
        "--initial-loss-scale: 0.5 is below --min-loss-scale 1.0",
    ),
    (
        BASE,
        {**FSDP, **TP2},
        2,
        "fsdp with --tensor-model-parallel-size 2: parameters are sharded over data parallel "
        "ranks alone. Use 1",
    ),
    (BASE, {**FSDP, **PP2}, 2, "fsdp with --pipeline-model-parallel-size 2: "),
    (BASE, {**FSDP, "context_parallel_size": 2}, 2, "fsdp with --context-parallel-size 2: "),
    (
        BASE,
        {**FSDP, "use_distributed_optimizer": True},
        2,
        "fsdp with --use-distributed-optimizer: the optimizer state is sharded",
    ),
    (
        BASE,
        {**FSDP, "overlap_grad_reduce": True},
        2,
        "fsdp with --overlap-grad-reduce: torch overlaps",
    ),
    (
        BASE,
        {**FSDP, **EXITS, "use_exit_mlp": True},
        2,
        "fsdp with --use-exit-mlp: layers of exits run in backward",
    ),
    (
        BASE,
        {**FSDP, **EXITS, "exit_kd_weight": 0.5},
        2,
        "fsdp with --exit-kd-weight 0.5: the teacher's norm",
    ),
    (BASE, {**FSDP, "lora_rank": 8}, 2, "fsdp with --lora-rank 8: most parameters are frozen"),
    (BASE, {**FSDP, "optimizer": "sgd"}, 2, "fsdp with --optimizer sgd: only the state of adam"),
    (
        BASE,
        {"use_distributed_optimizer": True, "optimizer": "sgd"},
        1,
        "splits the state of adam only, not of sgd",
    ),
    (
        BASE,
        {**MUON, "use_distributed_optimizer": True},
        1,
        "splits the state of adam only, not of muon",
    ),
    (BASE, {**MUON, **FSDP}, 2, "fsdp with --optimizer muon: only the state of adam"),
    (BASE, {**MUON, "fp16": True}, 1, "--optimizer: muon with --fp16: megatron's Muon has no"),
    (BASE, {**MUON, "lora_rank": 8}, 1, "--optimizer: muon with --lora-rank 8: Muon on the two"),
    (BASE, {**MUON, "num_experts": 4}, 1, "--optimizer: muon with --num-experts 4: Muon on the"),
    (
        BASE,
        {"muon_tp_mode": "blockwise"},
        1,
        "--muon-tp-mode: has an effect with --optimizer muon only, not with adam",
    ),
    (BASE, {**MUON, "muon_momentum": 1.0}, 1, "--muon-momentum: 1.0 is not in [0, 1)"),
    (BASE, {**MUON, "muon_num_ns_steps": 0}, 1, "--muon-num-ns-steps: 0 is not above 0"),
    (
        BASE,
        {"use_distributed_optimizer": True, "overlap_param_gather": True},
        1,
        "--overlap-param-gather: needs",
    ),
    (
        BASE,
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        1,
        "--overlap-param-gather: needs",
    ),
    (BASE, {"min_lr": 1.0}, 1, "--min-lr: 1.0 is above --lr 0.0003"),
    (BASE, {"lr_warmup_init": 1.0}, 1, "--lr-warmup-init: 1.0 is above --lr 0.0003"),
    (
        BASE,
        {"lr_warmup_iters": 100},
        1,
        "--lr-warmup-iters: 100 is not below the 100 steps of the decay",
    ),
    (
        BASE,
        {"lr_warmup_iters": 50, "lr_decay_iters": 50},
        1,
        "--lr-warmup-iters: 50 is not below the 50 steps",
    ),
    # files
    (BASE, {"mock_data": False}, 1, "--data-path: nothing to train on"),
    (REAL, {"mock_data": True}, 1, "--mock-data: random tokens together with real ones"),
    (BASE, {"vocab_size": None}, 1, "--mock-data: random tokens have no tokenizer"),
    (
        REAL,
        {"tokenizer_model": None},
        1,
        "--tokenizer-model: SentencePieceTokenizer needs its file",
    ),
    (
        REAL,
        {"tokenizer_type": "NullTokenizer", "tokenizer_model": None},
        1,
        "a NullTokenizer does not know its vocabulary",
    ),
    (
        REAL,
        {"tokenizer_type": "NullTokenizer", "vocab_size": 9},
        1,
        "a NullTokenizer reads no file",
    ),
    (REAL, {"split": "0,100"}, 1, "--split: '0,100' is not one to three shares"),
    (
        REAL,
        {"data_path": ("0.5", "a", "b")},
        1,
        "--data-path: '0.5 a b' mixes prefixes with and without a weight",
    ),
    (REAL, {"data_path": ("0", "a", "1", "b")}, 1, "--data-path: weight 0 of a is not above 0"),
    (REAL, {"valid_data_path": ("0.5", "a")}, 1, "--valid-data-path: 0.5 is a number"),
    (REAL, {"test_data_path": ("a", "3")}, 1, "--test-data-path: 3 is a number"),
    (REAL, {"test_data_path": ("a",), "split": "8,1,1"}, 1, "--split: '8,1,1' takes a test share"),
    (
        REAL,
        {
            "data_path": (),
            "test_data_path": ("t",),
            "skip_train": True,
            "load": "r",
            "tokenizer_model": None,
        },
        1,
        "--tokenizer-model",
    ),
    (BASE, {"save_interval": 5}, 1, "--save-interval: nowhere to save"),
    (BASE, {"finetune": True}, 1, "--finetune: no checkpoint"),
    (BASE, {"exit_on_missing_checkpoint": True}, 1, "--exit-on-missing-checkpoint: no checkpoint"),
    (BASE, {"skip_train": True}, 1, "--skip-train: no checkpoint"),
    (
        REAL,
        {"data_path": (), "skip_train": True, "load": "run"},
        1,
        "--skip-train: nothing to evaluate on",
    ),
]


@pytest.mark.parametrize(("base", "changes", "world_size"), ALLOWED)
def test_a_run_within_the_rules_passes(base, changes, world_size):
    check_settings(replace(base, **changes), world_size)


@pytest.mark.parametrize(("base", "changes", "world_size", "message"), REFUSED)
def test_a_run_outside_a_rule_is_refused(base, changes, world_size, message):
    with pytest.raises(SettingsError) as error:
        check_settings(replace(base, **changes), world_size)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_every_number_has_a_range():
    checked = {*POSITIVE, *NOT_NEGATIVE, *BELOW_ONE}
    numbers = {
        field.name
        for field in fields(Settings)
        if field.type in (int, float, int | None, float | None)
    }
    assert checked == numbers


@pytest.mark.parametrize(
    ("names", "outside", "rule"),
    [
        (POSITIVE, 0, "is not above 0"),
        (NOT_NEGATIVE, -1, "is negative"),
        (BELOW_ONE, 1.0, "is not in [0, 1)"),
    ],
)
def test_every_number_outside_its_range_is_refused(names, outside, rule):
    for name in names:
        with pytest.raises(SettingsError) as error:
            check_settings(replace(BASE, **{name: outside}), 1)
        assert str(error.value).startswith(f"--{name.replace('_', '-')}: {outside} {rule}")


@pytest.mark.parametrize(
    "flag",
    [
        "--use-flash-attn",
        "--no-bias-swiglu-fusion",
        "--cross-entropy-loss-fusion",
        "--attention-softmax-in-fp32",
        "--recompute-activations",
        "--no-rope-fusion",
    ],
)
def test_a_flag_of_megatron_lm_is_not_taken_for_one_that_changes_the_network(flag):
    with pytest.raises(SettingsError, match=rf"{flag}: there is no such flag\. See --help"):
        load_settings([flag])
