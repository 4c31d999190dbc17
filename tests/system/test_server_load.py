"""Many clients at random: every text is the one written alone, and nothing is left behind.

The long form is ``python -m lab.soak_serving``.
"""

import asyncio
import random

import pytest

pytest.importorskip("uvicorn", reason="serving is an extra")
pytest.importorskip("prometheus_client", reason="counts of a server need it")
from lab.reliability.soak.alone import Alone
from lab.reliability.soak.bad_bodies import bad_requests
from lab.reliability.soak.checks import Bounds, Check, all_checks
from lab.reliability.soak.load import Load, Seen
from lab.reliability.soak.model import DEPTHS, write_soaked_model
from lab.reliability.soak.requests import Pool
from lab.reliability.soak.served import write_keys
from megatron_sorted.decoding.open_model import open_text_generator
from tests.support.served_models import served

SECONDS, CLIENTS, POOL = 10, 64, 60
MAX_WAIT = 60


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict[str, tuple[Seen, list[Check]]]:
    """Return what clients saw, and the checks of it, by the part of the soak."""
    folder = tmp_path_factory.mktemp("load")
    model, keys = write_soaked_model(folder), write_keys(folder / "keys")
    generator = open_text_generator(model, depths=DEPTHS)
    depths, context = generator.network.depths, generator.network.max_positions
    options = ("--api-key-file", folder / "keys", "--max-wait", MAX_WAIT, "--cache-memory", 0.05)
    with served(model, *options) as server:

        async def run() -> dict[str, Seen]:
            name = await server.model_name(keys[0])
            pool = Pool(random.Random(0), POOL, name, depths, context)
            load = Load(server, pool, bad_requests(name, depths, context), keys, CLIENTS, 120)
            once = await load.each_once()
            return {"once": once, "at random": await load.at_random(SECONDS, 0)}

        seen = asyncio.run(run())
        assert server.stop(30) == 0
    alone, log = Alone(generator, model), server.log.read_text()
    bounds = Bounds(MAX_WAIT, probe_seconds=20)  # tenths of a second on an idle machine
    return {
        name: (one, all_checks(one, alone, bounds, log, exact=name == "once"))
        for name, one in seen.items()
    }


@pytest.mark.parametrize("part", ["once", "at random"])
def test_many_clients_get_the_texts_that_are_written_alone(checked, part):
    seen, checks = checked[part]
    assert len(seen.outcomes) >= POOL and seen.probes and seen.refused
    faults = {one.name: (one.figures, one.faults) for one in checks if one.faults}
    assert not faults


def test_the_load_has_all_kinds_of_requests_and_clients(checked):
    outcomes = [one for seen, _ in checked.values() for one in seen.outcomes]
    fields = [one.request.fields for one in outcomes]
    assert {one.get("strategy") for one in fields} > {"full", "fixed", "early_exit", "tree"}
    for name in ("depth", "confidence", "top_p", "top_k", "repetition_penalty", "n", "stop"):
        assert any(name in one for one in fields), name
    assert {one.leave.moment for one in outcomes if one.leave} and any(
        len(one.get("messages", ())) > 3 for one in fields
    )
    kept = checked["at random"][0].num_of("cached_tokens")
    assert kept > 0, "conversations and beginnings are kept"
