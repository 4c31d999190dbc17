"""Trains or fine-tunes a nested language model.

    torchrun --nproc-per-node 8 pretrain_sorted.py --config examples/llama2_7b_8gpu.yaml --data-path my_text_document ...
    python pretrain_sorted.py --config examples/quickstart.yaml        one process
    python pretrain_sorted.py --help                                   every setting
"""

import faulthandler
import os

from megatron_sorted.platform.quiet import silence_library_warnings
from megatron_sorted.settings.check import check_settings
from megatron_sorted.settings.load import load_settings
from megatron_sorted.training.failure import report_and_exit


def main(words: list[str] | None = None) -> None:
    """Reads and checks the settings, by default those of the command line, then runs them."""
    settings = load_settings(words)
    check_settings(settings, int(os.environ.get("WORLD_SIZE", 1)))
    silence_library_warnings()
    from megatron_sorted.training.loop import run

    run(settings)


if __name__ == "__main__":
    faulthandler.enable()
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        report_and_exit(error)
