"""NPUs without an NPU: the real torch_npu over stand-in libraries, with kernels on the CPU."""
