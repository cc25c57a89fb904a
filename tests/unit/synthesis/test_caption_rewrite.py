"""Rewritten captions: facts survive or the caption stays; verified by the same rule; local endpoint."""

import importlib.util
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, write_room
from spatialvlm.synthesis.caption_rewrite import REWRITTEN, lost_fact, rewrite_rows
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.verify import verify
from tests.unit.chat_server import serve

ROOT = Path(__file__).parents[3]
CAPTION = "There are two chairs. The lamp stands on the desk. The sofa is 1.85 meters to the left of the table."
LABELS = ["chair", "lamp", "desk", "sofa", "table", "coffee table", "plant"]


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "The sofa is found 1.85 meters to the left of the table; we see 2 chairs, and a lamp sits on the desk.",
            "order",
        ),
        (
            "The sofa is found 1.85 meters to the left of the table; we see 2 chairs. A lamp sits on the desk.",
            None,
        ),
        (CAPTION.replace("sofa", "x").replace("table", "sofa").replace("x", "table"), "order"),
        (CAPTION.replace("lamp", "x").replace("desk", "lamp").replace("x", "desk"), "order"),
        (CAPTION.replace("lamp", "x").replace("sofa", "lamp").replace("x", "sofa"), "order"),
        (CAPTION.replace("to the left of the table", "from the table's left"), "relations"),
        (CAPTION.replace("is 1.85", "is not 1.85"), "relations"),
        (CAPTION.replace("is 1.85", "isn\u2019t 1.85"), "relations"),
        (CAPTION.replace("1.85", "1.9"), "numbers"),
        (CAPTION.replace("two", "three"), "numbers"),
        (CAPTION + " The room has 4 walls.", "numbers"),
        (CAPTION.replace("lamp", "light"), "labels"),
        (CAPTION.replace("table", "coffee table"), "labels"),
        (CAPTION + " A plant stands nearby.", "labels"),
        (CAPTION.replace("left", "right"), "relations"),
        ("", "numbers"),
    ],
)
def test_facts_must_survive(text, lost):
    assert lost_fact(CAPTION, text, LABELS) == lost


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    for seed in range(2):
        write_room(
            RoomSpec(seed), folder / "scenes", RenderConfig(num_frames=4, width=96, height=96)
        )
    plan = make_plan("scene_caption,left_right", per_task=3)
    synthesize(folder / "scenes", folder / "rows", plan, executor="serial")
    return folder


def rows(folder):
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_rewriting_through_an_endpoint(made, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("rewrite", ROOT / "tools/rewrite_captions.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)

    def answer(body):
        """Puts the sentences in another order; for captions with a room, invents a number."""
        caption = body["messages"][0]["content"].split("\n\n", 1)[1]
        sentences = re.split(r"(?<=[a-z]\.) ", caption)
        turned = "In short: " + " ".join(sentences[::-1])
        return turned + " It is 99 years old." if "square meters" in caption else turned

    arguments = [str(made / "rows"), "--scenes", str(made / "scenes"), "--out", str(tmp_path)]
    with serve(answer) as (url, requests):
        assert command.main([*arguments, "--endpoint", url, "--model", "m"]) == 0
        asked = len(requests)
        assert command.main([*arguments, "--endpoint", url, "--model", "m"]) == 0
        assert len(requests) == asked  # finished files are not asked for again
    printed = capsys.readouterr().out
    assert re.search(r"rewritten +\d", printed)
    assert re.search(r"kept: numbers +\d", printed)
    before, after = rows(made / "rows"), rows(tmp_path)
    assert [row["id"] for row in before] == [row["id"] for row in after]
    counts = json.loads((tmp_path / "rewrite.json").read_text())  # the second run asked nothing
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert counts["rewritten"] == len(changed) > 0
    for old, new in changed:
        assert old["task"] == "scene_caption"
        assert new["tags"] == [*old["tags"], REWRITTEN]
        assert new["messages"][-1]["content"] == new["answer_text"]
        assert new["answer_text"].startswith("In short:")
    report = verify(tmp_path, made / "scenes", executor="serial")
    assert (report.checked, report.mismatches) == (len(after), [])


def test_verification_finds_a_rewritten_lie(made, tmp_path):
    rewrite_rows(made / "rows", made / "scenes", tmp_path, lambda text: f"So: {text}")
    for path in tmp_path.glob("*.parquet"):
        table = pq.read_table(path)
        lies = table.to_pylist()
        row = next(row for row in lies if REWRITTEN in row["tags"])
        row["answer_text"] = row["answer_text"].replace("left", "right") + " 7"
        pq.write_table(type(table).from_pylist(lies, schema=table.schema), path)
    problems = " ".join(
        m["problem"] for m in verify(tmp_path, made / "scenes", executor="serial").mismatches
    )
    assert "the rewritten caption changes the numbers" in problems
    assert "the reply is not the rewritten caption" in problems


def test_a_missing_endpoint_is_one_line(made, tmp_path):
    spec = importlib.util.spec_from_file_location("rewrite", ROOT / "tools/rewrite_captions.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    with serve(lambda _: "x", statuses=[401]) as (url, _):
        code = command.main(
            [str(made / "rows"), "--scenes", str(made / "scenes"), "--out", str(tmp_path),
             "--endpoint", url, "--model", "m"]
        )  # fmt: skip
    assert code == 2
    assert not list(tmp_path.glob("*.parquet"))
