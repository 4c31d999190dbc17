"""vLLM's forms in the measurement of servers: their commands, their ratios, page and picture."""

import json
import sys
from pathlib import Path

from lab.contests.contenders import OURS
from lab.serving.contenders import FULL, SPECULATIVE, Setting
from lab.serving.page import page
from lab.serving.parts import THROUGHPUT
from lab.serving.picture import draw
from lab.serving.ratios import ratio_of, target_lines
from lab.serving.rows import COLUMNS, efficiency, speed
from lab.serving.vllm_servers import BY_LOAD, PLUG_IN, VLLM, schedule_text, vllm_contenders
from megatron_sorted.conversion.hugging_face.families import read_config
from megatron_sorted.decoding.tuning.tuned_options import TUNED_FILE, write_draft_schedule
from tests.support.model_directories import save_model

BY_LOAD_NAME = f"{PLUG_IN}, exit 2 {BY_LOAD}"


def row(name, case, number, tokens, cpu_seconds=2.0):
    """Return a row of one second."""
    engine, _, strategy = name.partition(", ")
    values = {
        "match": THROUGHPUT, "case": case, "round": number, "name": name, "engine": engine,
        "kind": "float32", "strategy": strategy or FULL, "seconds": 1.0, "tokens": tokens,
        "cpu_seconds": cpu_seconds, "texts": 1, "same": 1, "short": 0,
    }  # fmt: skip
    return {**dict.fromkeys(COLUMNS, 0.5), **values}


def test_all_forms_of_vllm_differ_by_what_drafts_alone(tmp_path):
    model = tmp_path / "model"
    save_model(model, "llama", True, exit_layer_indices=[1, 2, 4])
    setting = Setting(model, 1, 32, 256, draft_tokens=3)
    contenders = vllm_contenders(setting, Path(sys.executable), 2, tmp_path, ["--enforce-eager"])
    assert [one.engine for one in contenders] == [VLLM, VLLM, PLUG_IN, PLUG_IN]
    plain, draft, fixed, by_load = (list(one.launch.command) for one in contenders)
    assert draft[: len(plain)] == plain and plain[-1] == "--enforce-eager"
    config = json.loads(draft[draft.index("--speculative-config") + 1])
    assert config["num_speculative_tokens"] == 3
    assert read_config(Path(config["model"]))["num_hidden_layers"] == 2
    for command in (fixed, by_load):
        ours, own = command[: command.index("--")], command[command.index("--") + 1 :]
        assert ours[ours.index("--exit-layer") + 1] == "2" and "vllm" in ours
        assert plain[-len(own) :] == own  # vLLM's own options are the same
    assert fixed[fixed.index("--num-draft-tokens") + 1] == "3"
    assert "--num-draft-tokens" not in by_load  # as tuned
    assert len({one.name for one in contenders}) == len({one.launch for one in contenders}) == 4
    assert len({one.launch.variables for one in contenders}) == 1
    assert all(one.dialect.fields["skip_special_tokens"] is False for one in contenders)
    assert schedule_text(model, 2) == "not tuned"
    write_draft_schedule(model / TUNED_FILE, "vllm", 2, {"schedule": [[1, 8, 4], [9, 32, 0]]})
    assert schedule_text(model, 2) == "1 to 8 texts 4 tokens, 9 to 32 texts 0 tokens"
    assert len(vllm_contenders(setting, Path(sys.executable), None, tmp_path, [])) == 1


def test_ratios_are_taken_within_rounds_and_compared_with_the_aim(tmp_path):
    rows = [
        row(f"{OURS}, {SPECULATIVE}", 1, 0, 120),
        *(row(VLLM, case, number, tokens)
          for case, number, tokens in ((1, 0, 10), (1, 1, 100), (8, 0, 100), (8, 1, 100))),
        *(row(BY_LOAD_NAME, case, number, tokens, 1.0)
          for case, number, tokens in ((1, 0, 14), (1, 1, 140), (8, 0, 96), (8, 1, 97))),
    ]  # fmt: skip
    ratio = ratio_of(rows, BY_LOAD_NAME, 1, speed)
    assert (ratio.least, ratio.most) == (1.4, 1.4)
    assert ratio_of(rows, BY_LOAD_NAME, 1, efficiency).median == 2.8
    assert ratio_of(rows, f"{OURS}, {SPECULATIVE}", 8, speed) is None
    line = " ".join(target_lines(rows, [1, 8]))
    assert "1.40 times vLLM alone with 1 client (wanted: 1.3; met)" in line
    text = page(rows, {"absent": {}}, {"threads": 1, "model": "m", "num_tokens": 8}, "c", "engines")
    flat = " ".join(text.split())
    assert "0.96 at the load where it gains least (wanted: 0.97; missed)" in flat
    assert "1.40 (1.40 to 1.40)" in text and "engines.json" in text and "engines.png" in text
    draw(rows, tmp_path / "engines.png")
    assert (tmp_path / "engines.png").stat().st_size > 5000
