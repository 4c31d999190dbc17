"""Options and counts of decoding many texts at once. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchingOptions:
    """Limits of what is decoded at once.

    Attributes:
        max_num_seqs: Maximum number of texts that are decoded at once.
        cache_bytes: Memory for keys, values and hidden states of running and kept texts; None: a
            share of the memory that is free when the first text comes.
        max_wait_seconds: Longest time that a request waits before its first text is begun; then
            it is refused.
        prefill_tokens: Number of tokens of prompts that are read between two steps of texts that
            are being written.
        prefix_caching: Whether texts that have ended are kept, so that later ones with the same
            beginning need not be read again.
        drafts_by_load: Whether speculative strategies draft less while many texts are written,
            by costs that are measured at the start.
        share_prefixes: Whether texts of one API key may use beginnings of another one's.
    """

    max_num_seqs: int = 32
    cache_bytes: int | None = None
    max_wait_seconds: float = 600.0
    prefill_tokens: int = 128
    prefix_caching: bool = True
    share_prefixes: bool = False
    drafts_by_load: bool = False


@dataclass
class BatchingCounts:
    """Counts since the start, and what is so now; one thread writes them, any thread may read.

    Attributes:
        requests_waiting, requests_running: Numbers of requests now.
        texts_waiting, texts_running: Numbers of texts now.
        requests_finished, requests_cancelled, requests_refused, requests_failed: Numbers of
            requests by how they ended; refused ones had waited too long, or the queue was full.
        prompt_tokens: Number of tokens of prompts.
        cached_tokens: Number of those that were not read, since their beginning was kept.
        generated_tokens: Number of new tokens.
        drafted_tokens, accepted_tokens: Numbers of drafted tokens, and of those in texts.
        layers_run: Number of layers that ran, summed over all tokens that ran through them.
        rounds: Number of joined forward passes.
        cache_bytes_running, cache_bytes_kept: Memory of running texts, and of kept beginnings.
        cache_bytes_budget: Limit on both together; 0 before it is known.
    """

    requests_waiting: int = 0
    requests_running: int = 0
    texts_waiting: int = 0
    texts_running: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_refused: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    layers_run: int = 0
    rounds: int = 0
    cache_bytes_running: int = 0
    cache_bytes_kept: int = 0
    cache_bytes_budget: int = 0
