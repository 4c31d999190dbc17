"""Settings of data, tokenizer, checkpoints and evaluation, with their rules."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.derived import NUMBER, data_blend, split_ranges
from megatron_sorted.settings.field import AllSettings, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class FileSettings:
    """Data, tokenizer, checkpoints and evaluation, named as in Megatron-LM."""

    data_path: tuple[str, ...] = setting(
        (),
        "Prefixes of the indexed training data (PREFIX.bin and PREFIX.idx, written by "
        "megatron-sorted prepare), or a blend of them: WEIGHT PREFIX WEIGHT PREFIX ...",
    )
    valid_data_path: tuple[str, ...] = setting(
        (),
        "Prefixes of indexed data for evaluation; each is evaluated by itself and reported by its "
        "name.",
    )
    test_data_path: tuple[str, ...] = setting(
        (), "Prefixes of indexed data that are evaluated once, after the last step."
    )
    split: str = setting(
        "98,2",
        "Shares of --data-path for training, validation and test, for sets without data of their "
        "own.",
    )
    allow_changed_data: bool = setting(
        False,
        "Resume from a checkpoint even if the data files, their weights or their order differ "
        "from those it was trained on.",
    )
    reset_attention_mask: bool | None = setting(
        None,
        "Text: let tokens attend to their own document only. The default is yes, except with "
        "context parallelism; a run that resumes keeps what its checkpoint was trained with. "
        "Packed conversations are always separate.",
    )
    reset_position_ids: bool | None = setting(
        None,
        "Text: start positions again with each document (this changes learned positions only, "
        "since rotary ones are relative). By default as --reset-attention-mask.",
    )
    eod_mask_loss: bool | None = setting(
        None,
        "Text: leave out the loss where the last token of a document would predict the first one "
        "of the next. By default as --reset-attention-mask.",
    )
    mock_data: bool = setting(
        False, "Train on random tokens (needs --vocab-size), to try a layout without data."
    )
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"] = (
        setting(
            "SentencePieceTokenizer",
            "Type of the tokenizer; NullTokenizer means none (needs --vocab-size).",
        )
    )
    tokenizer_model: str | None = setting(
        None, "Tokenizer file (sentencepiece) or directory (Hugging Face)."
    )
    save: str | None = setting(None, "Directory for checkpoints and reports.")
    load: str | None = setting(
        None,
        "Directory of checkpoints to resume from; if they hold weights alone (an import), the run "
        "starts at step 0. Or a Hugging Face directory whose weights the run starts from: "
        "settings of the network that are not given then come from its config.json.",
    )
    use_checkpoint_args: bool = setting(
        False,
        "Take settings of the network that are not given from the checkpoint of --load or "
        "--pretrained-checkpoint.",
    )
    save_hf: str | None = setting(
        None,
        "Hugging Face directory to which the last checkpoint is exported when training is done; "
        "needs --save.",
    )
    pretrained_checkpoint: str | None = setting(
        None,
        "Directory of checkpoints, or Hugging Face directory, whose (newest) weights a run starts "
        "from at step 0, as long as --load holds no checkpoint.",
    )
    save_interval: int | None = setting(
        None, "Steps between checkpoints; the last step is always saved when --save is given."
    )
    async_save: bool = setting(
        True, "Write checkpoints in the background while training continues."
    )
    save_retain: int | None = setting(
        None, "Number of the newest checkpoints to keep; by default all."
    )
    save_retain_interval: int | None = setting(
        None, "With --save-retain: also keep every checkpoint whose step is a multiple of this."
    )
    save_failure: Literal["continue", "stop"] = setting(
        "continue",
        "What happens when a checkpoint cannot be written: training continues or stops (for the "
        "last checkpoint it is always an error).",
    )
    ckpt_step: int | None = setting(
        None, "Step of the checkpoint to load; by default the newest complete one."
    )
    verify_checkpoint: bool = setting(
        True,
        "Compare every file of a checkpoint with its hash, after writing and before loading; if "
        "off, only the small files, before loading.",
    )
    finetune: bool = setting(False, "Load only the weights of --load and start at step 0.")
    no_load_optim: bool = setting(False, "Do not load the optimizer state.")
    no_load_rng: bool = setting(False, "Do not load the state of the random number generators.")
    exit_on_missing_checkpoint: bool = setting(
        False, "Stop if --load holds no checkpoint, instead of starting from the beginning."
    )
    ckpt_format: Literal["torch_dist"] = setting("torch_dist", "Checkpoint format.")
    eval_interval: int | None = setting(
        None, "Steps between evaluations of every exit; the last step is always evaluated."
    )
    eval_iters: int = setting(10, "Number of global batches in one evaluation.")
    full_validation: bool = setting(
        False, "Evaluate on the whole of each validation set instead of --eval-iters batches."
    )


def check_files(settings: AllSettings) -> None:
    """Check that the run has data, vocabulary and weights, and a place for what it saves.

    Raises:
        SettingsError: It does not.
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
        "--save-retain-interval: all checkpoints are kept anyway. Give --save-retain as well, or "
        "leave it out.",
    )
    require(
        settings.pretrained_checkpoint is None or not settings.finetune,
        "--pretrained-checkpoint: together with --finetune, which loads the weights of --load "
        "each time. Give one of them.",
    )
    require(
        settings.save_hf is None or settings.save is not None,
        "--save-hf: it exports the last checkpoint. Give --save as well.",
    )
    require(
        settings.save_hf is None or not settings.skip_train,
        "--save-hf: together with --skip-train, which saves nothing. Use megatron-sorted convert "
        "export.",
    )
    require(
        not settings.use_checkpoint_args or bool(settings.load or settings.pretrained_checkpoint),
        "--use-checkpoint-args: no checkpoint to take them from. Give --load or "
        "--pretrained-checkpoint.",
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
        "--mock-data: random tokens together with real ones (--data-path). Give one of them.",
    )
    if settings.skip_train:
        require(
            bool(
                settings.data_path
                or settings.valid_data_path
                or settings.test_data_path
                or settings.mock_data
            ),
            "--skip-train: nothing to evaluate on. Give --valid-data-path, --test-data-path, "
            "--data-path or --mock-data.",
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
        weight = next((item for item in prefixes if NUMBER.fullmatch(item)), None)
        require(
            weight is None,
            f"{name}: {weight} is a number, but each set is evaluated by itself, without weights. "
            "Give prefixes alone.",
        )
    require(
        not settings.reset_attention_mask or settings.context_parallel_size == 1,
        f"--reset-attention-mask: with --context-parallel-size {settings.context_parallel_size}, "
        "attention across context parallel processes cannot separate documents. Use 1, or leave "
        "the flag out.",
    )
    data_blend(settings)
    if settings.data_path:
        split_ranges(settings)


def _check_tokenizer(settings: AllSettings) -> None:
    require(
        not settings.mock_data or settings.vocab_size is not None,
        "--mock-data: random tokens have no tokenizer that gives the vocabulary. Give "
        "--vocab-size.",
    )
    if settings.tokenizer_type == "NullTokenizer":
        require(
            settings.vocab_size is not None,
            "--tokenizer-type: a NullTokenizer does not know its vocabulary. Give --vocab-size.",
        )
        require(
            settings.tokenizer_model is None,
            "--tokenizer-model: a NullTokenizer reads no file. Leave it out or change "
            "--tokenizer-type.",
        )
    elif settings.data_path or settings.valid_data_path or settings.test_data_path:
        require(
            settings.tokenizer_model is not None,
            f"--tokenizer-model: {settings.tokenizer_type} needs its file or directory. Give it.",
        )
