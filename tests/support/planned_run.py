"""The run file of tests of the planning tool."""

RUN = """world-size: {world_size}
num-layers: 8
hidden-size: 64
num-attention-heads: 4
seq-length: 32
vocab-size: 1000
mock-data: true
exit-layer-nums: [2, 4, 6]
micro-batch-size: 2
"""
