"""What must be settled before torch is imported. Nothing heavy is imported here."""

import os


def keep_device_packages_out() -> None:
    """Stops torch from loading device packages by itself: torch_npu is loaded for --device npu alone, and where CANN is missing it
    would make ``import torch`` fail."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
