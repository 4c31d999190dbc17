"""PosGen: sequences against a slow reference, files, steps, and the page of rows by hand."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lab.posgen import read_arguments
from lab.posgen_task.outcomes import NAMES, Outcomes, Row
from lab.posgen_task.page import verdict
from lab.posgen_task.plan import PosGenPlan
from lab.posgen_task.scaled import write_scaled
from lab.posgen_task.sequences import TASKS, draw_beginnings, extend
from lab.posgen_task.sequences import main as write_files
from lab.studies.outcomes import Estimate
from megatron_sorted.conversion.hugging_face.families import read_config
from megatron_sorted.conversion.hugging_face.rope_keys import rope_of_config
from megatron_sorted.errors import SettingsError
from tests.support.evaluated import write_model


def number_by_definition(task, place, given, modulus):
    """Return one number of a sequence by recursion from the paper's words, counted from 1.

    x_1 .. x_4 are given; from the fifth on x_l = (far + x_(l-3) + x_(l-2) + x_(l-1)) mod M.
    """
    if place <= 4:
        return given[place - 1]
    if task == "recursive":  # the one before the three near ones
        far = place - 4
    elif task == "cot":  # the first of all
        far = 1
    else:  # x_5 and x_6 use x_1, x_7 and x_8 use x_2, ...
        far = next(
            number for number in range(1, place) if place in (2 * number + 3, 2 * number + 4)
        )
    parts = [far, place - 3, place - 2, place - 1]
    return sum(number_by_definition(task, one, given, modulus) for one in parts) % modulus


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize(("given", "modulus"), [((1, 2, 3, 4), 5), ((16, 0, 9, 13), 17)])
def test_sequences_are_those_of_the_definition(task, given, modulus):
    wanted = [number_by_definition(task, place, given, modulus) for place in range(1, 15)]
    assert extend(task, given, 14, modulus) == wanted
    assert extend(task, given, 40, modulus)[:14] == wanted


def test_tasks_differ_and_far_numbers_are_where_the_paper_has_them():
    made = {task: extend(task, (1, 2, 3, 4), 64, 17) for task in TASKS}
    assert len({tuple(numbers) for numbers in made.values()}) == 3
    places = {task: [TASKS[task](place) for place in (4, 5, 6, 63)] for task in TASKS}
    assert places == {
        "recursive": [0, 1, 2, 59],
        "cot": [0, 0, 0, 0],
        "semi_recursive": [0, 0, 1, 29],
    }


def test_no_beginning_is_both_trained_and_tested():
    train, test = draw_beginnings((500, 125), 5, seed=3)
    assert len(set(train)) == 500 and len(set(test)) == 125 and not set(train) & set(test)
    assert {number for given in train for number in given} == set(range(5))
    with pytest.raises(SettingsError, match="626 sequences are more than the 625 beginnings"):
        draw_beginnings((500, 126), 5, seed=3)


def test_files_hold_the_sequences_and_a_token_for_each_number(tmp_path):
    options = "--task semi_recursive --modulus 7 --length 16 --times 4 --train 6 --test 3"
    write_files([*options.split(), "--output", str(tmp_path)])
    for name, count, length in (("train", 6, 16), ("test", 3, 64)):
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        assert len(records) == count
        for record in records:
            given = [int(word) for word in record["instruction"].split()]
            numbers = given + [int(word) for word in record["output"].split()]
            assert len(given) == 4 and numbers == extend("semi_recursive", given, length, 7)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.encode("0 6\n3").tokens == ["<s>", "0", "6", "3"]
    assert tokenizer.get_vocab_size() == 10


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--modulus", 1, "--modulus: 1 is not at least 2"), ("--length", 4, "--length: 4 is not")],
)
def test_sequences_that_cannot_be_are_refused(tmp_path, option, value, message):
    with pytest.raises(SettingsError, match=message):
        write_files(["--task", "cot", "--output", str(tmp_path), option, str(value)])
    with pytest.raises(SettingsError, match="--seeds: 0 is not at least 1"):
        read_arguments(["--seeds", "0"])


def test_models_are_read_with_yarn_of_the_same_weights(tmp_path):
    model = write_model(tmp_path / "m", max_position_embeddings=64)
    write_scaled(model, tmp_path / "new", 4.0, 64)
    rope = rope_of_config(read_config(tmp_path / "new"), "config.json")
    assert (rope.kind, rope.factor, rope.context, rope.beta_fast) == ("yarn", 4.0, 64, 2.0)
    assert rope.longest == read_config(tmp_path / "new")["max_position_embeddings"] == 256
    weights = "model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (model / weights).read_bytes()


def test_every_step_needs_the_steps_whose_files_it_reads():
    plan = PosGenPlan(Path("out"), seeds=2)
    steps = [
        *plan.data_steps("cot"),
        *(plan.train_step("cot", trained, 2) for trained in ("rope", "resonance")),
        plan.scale_step("cot", 2),
        plan.evaluate_step("cot", 2),
    ]
    makers = {str(path.parent): step.name for step in steps[2:] for path in step.makes}
    known = {step.name: set(step.needs) for step in steps}
    for name, needs in known.items():  # what a step needs includes what that needs
        known[name] = needs.union(*(known[need] for need in needs))
    for step in steps:
        read = {part for word in step.command for part in word.replace("=", ":").split(":")}
        made = {str(path.parent) for path in step.makes}
        assert {makers[path] for path in (read - made) & set(makers)} <= known[step.name]
    models = [word.split("=")[0] for word in steps[-1].command if "/models/" in word]
    assert models == list(NAMES) and len(set(steps[-1].command)) == len(steps[-1].command)
    assert "--rope-resonance" not in steps[2].command and "--rope-resonance" in steps[3].command
    assert known[steps[-1].name] == {step.name for step in steps[:-1]}


def rows():
    """Return rows of two seeds with two buckets within and one beyond 64 positions."""
    beyond = {name: 0.5 + 0.05 * place for place, name in enumerate(NAMES)}
    return [
        Row(
            "cot",
            seed,
            name,
            depth,
            [32, 64, 80],
            [30, 10, 16],
            [0.8, 0.4, beyond[name] + 0.01 * seed],
            [0.1, 0.2, 0.3],
        )
        for seed in (1, 2)
        for name in NAMES
        for depth in (1, 2)
    ]


def test_accuracies_weigh_tokens_and_split_at_the_training_length():
    outcomes = Outcomes(rows())
    assert outcomes.accuracy("cot", "rope", 1, beyond=False).value == pytest.approx(70.0)
    assert outcomes.accuracy("cot", "rope", 1, beyond=True).value == pytest.approx(51.5)
    difference = outcomes.difference("cot", "resonance", "rope", 2)
    assert difference.value == pytest.approx(15.0) and difference.half_width < 1e-6
    assert verdict(difference) == "yes" and verdict(Estimate(1.0, 2.0)) == "open"
    assert outcomes.curve("cot", "rope", 1) == ([32, 64, 80], pytest.approx([0.8, 0.4, 0.515]))
