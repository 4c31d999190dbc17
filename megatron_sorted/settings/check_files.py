"""Rules between data, tokenizer and checkpoints."""

from megatron_sorted.settings.derived import NUMBER, data_blend, split_ranges
from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings


def check_files(settings: Settings) -> None:
    """Returns nothing if the run knows where its tokens, vocabulary and weights come from.

    Raises:
        SettingsError: it does not.
    """
    _check_data(settings)
    _check_tokenizer(settings)
    require(settings.save_interval is None or settings.save is not None, "--save-interval: nowhere to save. Give --save or leave it out.")
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
    require(settings.save_hf is None or settings.save is not None, "--save-hf: it is made of the last checkpoint. Give --save as well.")
    require(
        settings.save_hf is None or not settings.skip_train,
        "--save-hf: beside --skip-train, which saves nothing. Use tools/convert.py export.",
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
        require(not given or settings.load is not None, f"{name}: no checkpoint to take weights from. Give --load or leave it out.")


def _check_data(settings: Settings) -> None:
    require(
        not (settings.data_path and settings.mock_data),
        "--mock-data: made-up tokens beside real ones (--data-path). Give one of them.",
    )
    if settings.skip_train:
        require(
            bool(settings.data_path or settings.valid_data_path or settings.test_data_path or settings.mock_data),
            "--skip-train: nothing to evaluate on. Give --valid-data-path, --test-data-path, --data-path or --mock-data.",
        )
    else:
        require(
            bool(settings.data_path or settings.mock_data),
            "--data-path: nothing to train on. Give it, or --mock-data to try a layout.",
        )
    for name, prefixes in (("--valid-data-path", settings.valid_data_path), ("--test-data-path", settings.test_data_path)):
        weight = next((word for word in prefixes if NUMBER.fullmatch(word)), None)
        require(weight is None, f"{name}: {weight} is a number, but each set is evaluated by itself, without weights. Give prefixes alone.")
    require(
        not settings.reset_attention_mask or settings.context_parallel_size == 1,
        f"--reset-attention-mask: beside --context-parallel-size {settings.context_parallel_size}, and attention across context parallel "
        "processes knows no documents. Use 1, or leave the flag out.",
    )
    data_blend(settings)
    if settings.data_path:
        split_ranges(settings)


def _check_tokenizer(settings: Settings) -> None:
    require(
        not settings.mock_data or settings.vocab_size is not None,
        "--mock-data: made-up tokens have no tokenizer to tell the vocabulary. Give --vocab-size.",
    )
    if settings.tokenizer_type == "NullTokenizer":
        require(settings.vocab_size is not None, "--tokenizer-type: a NullTokenizer does not know its vocabulary. Give --vocab-size.")
        require(
            settings.tokenizer_model is None,
            "--tokenizer-model: a NullTokenizer reads no file. Leave it out or change --tokenizer-type.",
        )
    elif settings.data_path or settings.valid_data_path or settings.test_data_path:
        require(settings.tokenizer_model is not None, f"--tokenizer-model: {settings.tokenizer_type} needs its file or directory. Give it.")
