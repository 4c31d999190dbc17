"""Trains or fine-tunes a nested language model.

    torchrun --nproc-per-node 8 pretrain_sorted.py --config examples/llama2_7b_8gpu.yaml --data-path my_text_document ...
    python pretrain_sorted.py --config examples/quickstart.yaml        one process
    python pretrain_sorted.py --help                                   every setting
"""

import os
import sys
import warnings

from megatron_sorted.errors import SortedError
from megatron_sorted.settings.check import check_settings
from megatron_sorted.settings.load import load_settings


def main() -> None:
    """Reads and checks the settings, then runs them."""
    settings = load_settings()
    check_settings(settings, int(os.environ.get("WORLD_SIZE", 1)))
    # Megatron says at every import that Apex and Transformer Engine are missing; both are optional here
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from megatron_sorted.training.loop import run

    run(settings)


def report_error(kind: type, error: BaseException, trace) -> None:
    """Prints a user's mistake as one line, once for all processes of a host; anything else with its traceback."""
    if not issubclass(kind, SortedError):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0" or not getattr(error, "same_on_all_ranks", True):
        print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.excepthook = report_error
    if "WORLD_SIZE" in os.environ:
        # gives torchrun the error of the rank that failed first, which it shows last
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main()
