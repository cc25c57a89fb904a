"""Evaluation scenes are found before the first step, and nothing about them is silent."""

import json

import pytest

from spatialvlm.data.build import build_data
from spatialvlm.data.sample import World
from spatialvlm.errors import DataError
from spatialvlm.models.build import build_layout
from spatialvlm.typing import CostCoefficients

COST = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)


def check(text):
    """Folders ``s0`` and ``s1`` are evaluation scenes; of ``g.png`` nobody knows where it is from."""
    if not text.startswith("s"):
        return None
    return ("held_out",) if text.startswith(("s0", "s1")) else ()


@pytest.fixture
def build(tiny_checkpoint, toy_config):
    def build(**rules):
        folder = tiny_checkpoint("qwen3vl")
        config = toy_config(data={"decontamination": rules})
        return build_data(
            config, folder, build_layout(folder), COST, World(), blocked=check, blocked_key="1"
        )

    return build


def test_a_hit_stops_the_run_and_names_its_rows(build):
    with pytest.raises(DataError) as caught:
        build()
    text = str(caught.value)
    assert "source sp holds rows of evaluation scenes: 10 of held_out" in text
    assert "first sp/spatial#0, sp/spatial#1, sp/spatial#2, sp/spatial#3, sp/spatial#4. Set" in text
    assert "drop" in text
    assert "allow" in text


def test_hits_can_be_dropped_or_allowed(build, tmp_path):
    dropped = build(on_hit="drop")
    assert dropped.mixture.drawn_rows == {"sp": 20, "ge": 14}
    drawn = {uid for step in dropped for batch in step.batches for uid in batch["uids"]}
    assert not drawn & {f"sp/spatial#{n}" for n in range(10)}
    (record,) = json.loads((tmp_path / "data.json").read_text()).values()
    assert record["sources"]["sp"]["blocked"] == {"held_out": 10}
    assert build(on_hit="allow").mixture.drawn_rows == {"sp": 30, "ge": 14}


def test_media_of_unknown_origin_can_be_refused(build):
    with pytest.raises(
        DataError, match="source ge has 2 rows with media but without a known scene"
    ):
        build(on_hit="allow", unknown="error")
