"""Where a run reads its data and writes its results."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.derived import NUMBER, data_blend, split_ranges
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class FileSettings:
    """Data, tokenizer, checkpoints and reports, in Megatron-LM's words."""

    data_path: tuple[str, ...] = setting(
        (),
        "Prefixes of the indexed training data (PREFIX.bin, PREFIX.idx) written by megatron-sorted prepare; a blend is WEIGHT PREFIX "
        "WEIGHT PREFIX ...",
    )
    valid_data_path: tuple[str, ...] = setting(
        (), "Prefixes of indexed data for evaluation; each is evaluated and reported by its name."
    )
    test_data_path: tuple[str, ...] = setting(
        (), "Prefixes of indexed data that are evaluated once, after the last step."
    )
    split: str = setting(
        "98,2",
        "Shares of --data-path for training, validation and test, where no data of their own are given.",
    )
    allow_changed_data: bool = setting(
        False,
        "Continue a checkpoint although data files, their weights or their order are not those it was trained on.",
    )
    reset_attention_mask: bool | None = setting(
        None,
        "Text: tokens attend to their own document only. By default so, except with context parallelism; a run that continues a "
        "checkpoint goes on as it was trained. Packed instructions are always kept apart.",
    )
    reset_position_ids: bool | None = setting(
        None,
        "Text: positions start again with each document (rotary ones are relative, so this changes learned ones only). By default "
        "as --reset-attention-mask.",
    )
    eod_mask_loss: bool | None = setting(
        None,
        "Text: no loss where the last token of a document would predict the first one of the next. By default as "
        "--reset-attention-mask.",
    )
    mock_data: bool = setting(
        False, "Train on made-up tokens (needs --vocab-size), to try a layout without data."
    )
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"] = (
        setting("SentencePieceTokenizer", "Kind of tokenizer.")
    )
    tokenizer_model: str | None = setting(
        None, "Tokenizer file (sentencepiece) or directory (Hugging Face)."
    )
    save: str | None = setting(None, "Directory for checkpoints and reports.")
    load: str | None = setting(
        None,
        "Directory of checkpoints to continue from; with weights alone (an import) the run starts at step 0. Or a Hugging Face "
        "directory whose weights are taken: the network's settings that are not given then come from its config.json.",
    )
    use_checkpoint_args: bool = setting(
        False,
        "Take the network's settings that are not given from the checkpoint of --load or --pretrained-checkpoint.",
    )
    save_hf: str | None = setting(
        None,
        "Hugging Face directory that is made of the last checkpoint once training is done; needs --save.",
    )
    pretrained_checkpoint: str | None = setting(
        None,
        "Directory of checkpoints, or Hugging Face directory, whose (newest) weights a run starts from at step 0, as long as --load "
        "holds none of its own.",
    )
    save_interval: int | None = setting(
        None, "Steps between checkpoints; the last step is always saved when --save is given."
    )
    async_save: bool = setting(True, "Write checkpoints in the background while training goes on.")
    save_retain: int | None = setting(
        None, "Keep this many of the newest checkpoints; by default all."
    )
    save_retain_interval: int | None = setting(
        None, "With --save-retain, also keep every checkpoint whose step is a multiple of this."
    )
    save_failure: Literal["continue", "stop"] = setting(
        "continue",
        "What a checkpoint that could not be written does to training (the last one always ends in an error).",
    )
    ckpt_step: int | None = setting(
        None, "Step of the checkpoint to load; by default the newest complete one."
    )
    verify_checkpoint: bool = setting(
        True,
        "Compare every file of a checkpoint with its hash, after writing and before loading; "
        "without it, before loading only the small ones.",
    )
    finetune: bool = setting(False, "Take only the weights from --load; start at step 0.")
    no_load_optim: bool = setting(False, "Do not load optimizer state.")
    no_load_rng: bool = setting(False, "Do not load random state.")
    exit_on_missing_checkpoint: bool = setting(
        False, "Stop if --load holds no checkpoint, instead of starting afresh."
    )
    ckpt_format: Literal["torch_dist"] = setting("torch_dist", "Checkpoint format.")
    eval_interval: int | None = setting(
        None, "Steps between evaluations of every exit; also evaluated at the end."
    )
    eval_iters: int = setting(10, "Global batches of one evaluation.")
    full_validation: bool = setting(
        False, "Evaluate on the whole of each validation set instead of --eval-iters batches."
    )


def check_files(settings: AllSettings) -> None:
    """Returns nothing if the run knows where its tokens, vocabulary and weights come from.

    Raises:
        SettingsError: it does not.
    """
    _check_data(settings)
    _check_tokenizer(settings)
    require(
        settings.save_interval is None or settings.save is not None,
        "--save-interval: nowhere to save. Give --save or leave it out.",
    )
    require(
        settings.save_retain is None or settings.save is not None,
        "--save-retain: nothing is saved. Give --save or leave it out.",
    )
    require(
        settings.save_retain_interval is None or settings.save_retain is not None,
        "--save-retain-interval: all checkpoints are kept anyway. Give --save-retain as well, or leave it out.",
    )
    require(
        settings.pretrained_checkpoint is None or not settings.finetune,
        "--pretrained-checkpoint: beside --finetune, which takes the weights of --load each time. Give one of them.",
    )
    require(
        settings.save_hf is None or settings.save is not None,
        "--save-hf: it is made of the last checkpoint. Give --save as well.",
    )
    require(
        settings.save_hf is None or not settings.skip_train,
        "--save-hf: beside --skip-train, which saves nothing. Use megatron-sorted convert export.",
    )
    require(
        not settings.use_checkpoint_args or bool(settings.load or settings.pretrained_checkpoint),
        "--use-checkpoint-args: no checkpoint to take them from. Give --load or --pretrained-checkpoint.",
    )
    needs_load = {
        "--ckpt-step": settings.ckpt_step is not None,
        "--finetune": settings.finetune,
        "--exit-on-missing-checkpoint": settings.exit_on_missing_checkpoint,
        "--skip-train": settings.skip_train,
    }
    for name, given in needs_load.items():
        require(
            not given or settings.load is not None,
            f"{name}: no checkpoint to take weights from. Give --load or leave it out.",
        )


def _check_data(settings: AllSettings) -> None:
    require(
        not (settings.data_path and settings.mock_data),
        "--mock-data: made-up tokens beside real ones (--data-path). Give one of them.",
    )
    if settings.skip_train:
        require(
            bool(
                settings.data_path
                or settings.valid_data_path
                or settings.test_data_path
                or settings.mock_data
            ),
            "--skip-train: nothing to evaluate on. Give --valid-data-path, --test-data-path, --data-path or --mock-data.",
        )
    else:
        require(
            bool(settings.data_path or settings.mock_data),
            "--data-path: nothing to train on. Give it, or --mock-data to try a layout.",
        )
    for name, prefixes in (
        ("--valid-data-path", settings.valid_data_path),
        ("--test-data-path", settings.test_data_path),
    ):
        weight = next((word for word in prefixes if NUMBER.fullmatch(word)), None)
        require(
            weight is None,
            f"{name}: {weight} is a number, but each set is evaluated by itself, without weights. Give prefixes alone.",
        )
    require(
        not settings.reset_attention_mask or settings.context_parallel_size == 1,
        f"--reset-attention-mask: beside --context-parallel-size {settings.context_parallel_size}, and attention across context parallel "
        "processes knows no documents. Use 1, or leave the flag out.",
    )
    data_blend(settings)
    if settings.data_path:
        split_ranges(settings)


def _check_tokenizer(settings: AllSettings) -> None:
    require(
        not settings.mock_data or settings.vocab_size is not None,
        "--mock-data: made-up tokens have no tokenizer to tell the vocabulary. Give --vocab-size.",
    )
    if settings.tokenizer_type == "NullTokenizer":
        require(
            settings.vocab_size is not None,
            "--tokenizer-type: a NullTokenizer does not know its vocabulary. Give --vocab-size.",
        )
        require(
            settings.tokenizer_model is None,
            "--tokenizer-model: a NullTokenizer reads no file. Leave it out or change --tokenizer-type.",
        )
    elif settings.data_path or settings.valid_data_path or settings.test_data_path:
        require(
            settings.tokenizer_model is not None,
            f"--tokenizer-model: {settings.tokenizer_type} needs its file or directory. Give it.",
        )
