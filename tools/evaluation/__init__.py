"""What tools/evaluate.py reads and shows: options, tables, the picture.

Nothing is fetched: transformers, datasets and lm-evaluation-harness look at these variables when they are imported.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
