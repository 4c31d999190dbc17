"""The benchmark's count of operations, by hand."""

from lab.benchmarks.flops import forward_flops_per_token, step_attention_flops, step_flops
from megatron_sorted.settings.run import Settings


def test_by_hand():
    # h 4, 2 heads of 2, one group: projections 2*4*(4+4) + 2*4*4 = 96; attention 4*3*4 = 48;
    # SwiGLU 3 products of 2*4*10 = 240
    settings = Settings(
        num_layers=5,
        hidden_size=4,
        num_attention_heads=2,
        group_query_attention=True,
        num_query_groups=1,
        ffn_hidden_size=10,
        seq_length=3,
        vocab_size=30,
        make_vocab_size_divisible_by=16,
        micro_batch_size=2,
        global_batch_size=2,
    )
    layer, head = 96 + 48 + 240, 2 * 4 * 32  # the vocabulary is padded to 32 rows
    assert forward_flops_per_token(settings) == (layer, head)
    assert step_attention_flops(settings) == 3 * 6 * 5 * 48
    assert step_flops(settings, num_heads=2) == 3 * 6 * (5 * layer + 2 * head)
