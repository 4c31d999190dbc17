"""Parts of ``lab.prove_vllm``: what runs inside vLLM's Python, and what it is compared with."""
