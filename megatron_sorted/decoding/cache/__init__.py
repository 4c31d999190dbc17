"""The KV cache and hidden states of a batch, and the layers that fill them."""
