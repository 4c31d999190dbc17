"""The NPU path without an NPU: the real torch_npu package over stand-in libraries, its kernels computed by the CPU."""
