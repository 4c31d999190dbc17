"""Where a run reads its data and writes its results."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class FileSettings:
    """Data, tokenizer, checkpoints and reports, in Megatron-LM's words."""

    data_path: tuple[str, ...] = setting(
        (), "Prefixes of the indexed training data (PREFIX.bin, PREFIX.idx) written by tools/prepare_data.py; a blend is WEIGHT PREFIX "
        "WEIGHT PREFIX ...")
    valid_data_path: tuple[str, ...] = setting((), "Prefixes of indexed data for evaluation; each is evaluated and reported by its name.")
    test_data_path: tuple[str, ...] = setting((), "Prefixes of indexed data that are evaluated once, after the last step.")
    split: str = setting("98,2", "Shares of --data-path for training, validation and test, where no data of their own are given.")
    allow_changed_data: bool = setting(
        False, "Continue a checkpoint although data files, their weights or their order are not those it was trained on.")
    reset_attention_mask: bool | None = setting(
        None, "Text: tokens attend to their own document only. By default so, except with context parallelism; a run that continues a "
        "checkpoint goes on as it was trained. Packed instructions are always kept apart.")
    reset_position_ids: bool | None = setting(
        None, "Text: positions start again with each document (rotary ones are relative, so this changes learned ones only). By default "
        "as --reset-attention-mask.")
    eod_mask_loss: bool | None = setting(
        None, "Text: no loss where the last token of a document would predict the first one of the next. By default as "
        "--reset-attention-mask.")
    mock_data: bool = setting(False, "Train on made-up tokens (needs --vocab-size), to try a layout without data.")
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"] = setting(
        "SentencePieceTokenizer", "Kind of tokenizer.")
    tokenizer_model: str | None = setting(None, "Tokenizer file (sentencepiece) or directory (Hugging Face).")
    save: str | None = setting(None, "Directory for checkpoints and reports.")
    load: str | None = setting(
        None, "Directory of checkpoints to continue from; with weights alone (an import) the run starts at step 0. Or a Hugging Face "
        "directory whose weights are taken: the network's settings that are not given then come from its config.json.")
    use_checkpoint_args: bool = setting(
        False, "Take the network's settings that are not given from the checkpoint of --load or --pretrained-checkpoint.")
    save_hf: str | None = setting(
        None, "Hugging Face directory that is made of the last checkpoint once training is done; needs --save.")
    pretrained_checkpoint: str | None = setting(
        None, "Directory of checkpoints, or Hugging Face directory, whose (newest) weights a run starts from at step 0, as long as --load "
        "holds none of its own.")
    save_interval: int | None = setting(None, "Steps between checkpoints; the last step is always saved when --save is given.")
    async_save: bool = setting(True, "Write checkpoints in the background while training goes on.")
    save_retain: int | None = setting(None, "Keep this many of the newest checkpoints; by default all.")
    save_retain_interval: int | None = setting(None, "With --save-retain, also keep every checkpoint whose step is a multiple of this.")
    save_failure: Literal["continue", "stop"] = setting(
        "continue", "What a checkpoint that could not be written does to training (the last one always ends in an error).")
    ckpt_step: int | None = setting(None, "Step of the checkpoint to load; by default the newest complete one.")
    verify_checkpoint: bool = setting(True, "Compare every file of a checkpoint with its hash, after writing and before loading; "
                                    "without it, before loading only the small ones.")
    finetune: bool = setting(False, "Take only the weights from --load; start at step 0.")
    no_load_optim: bool = setting(False, "Do not load optimizer state.")
    no_load_rng: bool = setting(False, "Do not load random state.")
    exit_on_missing_checkpoint: bool = setting(False, "Stop if --load holds no checkpoint, instead of starting afresh.")
    ckpt_format: Literal["torch_dist"] = setting("torch_dist", "Checkpoint format.")
    eval_interval: int | None = setting(None, "Steps between evaluations of every exit; also evaluated at the end.")
    eval_iters: int = setting(10, "Global batches of one evaluation.")
    full_validation: bool = setting(False, "Evaluate on the whole of each validation set instead of --eval-iters batches.")
