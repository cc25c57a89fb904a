"""Exports of generated rows go straight into training."""

import pytest

from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, write_room
from spatialvlm.synthesis.engine import synthesize
from spatialvlm.synthesis.export import export_rows
from spatialvlm.synthesis.plan import make_plan
from tests.recipes.conftest import read_jsonl, recipe_text


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Rows about two small rooms as ShareGPT lines and as tar shards."""
    folder = tmp_path_factory.mktemp("exports")
    for seed in range(2):
        config = RenderConfig(num_frames=4, width=64, height=64)
        write_room(RoomSpec(seed, "train", "small"), folder / "scenes", config)
    plan = make_plan("left_right,front_behind,is_count,size_rel,vsi_count", per_task=6)
    synthesize(folder / "scenes", folder / "rows", plan, executor="serial")
    for kind in ("sharegpt", "webdataset"):
        export_rows(
            folder / "rows", folder / "scenes", folder / kind, kind,
            render_marks=True, shard_bytes=200_000,
        )  # fmt: skip
        for drawn in (folder / kind / "images").glob("*.jpg"):
            target = folder / "scenes" / "images" / drawn.name
            target.parent.mkdir(exist_ok=True)
            drawn.rename(target)  # one base folder for pictures of rooms and drawn copies
    return folder


def losses(run, exports, rows, model, out, source):
    text = recipe_text(1, "qwen3vl", model, rows).replace(
        f"{{name: squares, family: spatial, files: [spatial.jsonl], root: {rows}}}",
        f"{{name: squares, family: spatial, root: {exports}, {source}}}",
    )
    config = out.with_suffix(".yaml")
    changed = text.replace("max_tokens: 256", "max_tokens: 512").replace("steps: 6", "steps: 3")
    config.write_text(changed.replace(f"{rows}/index", f"{out}_index"))
    assert run(1, config, f"run.dir={out}") == 0
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]
    return [line["loss/source/squares"] for line in lines]


def test_every_export_trains(run, exports, rows, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("qwen3vl")
    forms = {
        "sharegpt": "files: [sharegpt/rows.jsonl], base: scenes",
        # Every row of a tar has its own copy of the pictures, so rows are not grouped by picture and the
        # samples come in another order.
        "webdataset": "files: ['webdataset/*.tar']",
    }
    for name, source in forms.items():
        found = losses(run, exports, rows, model, tmp_path / name, source)
        assert len(found) == 3
        assert all(0 < loss < 20 for loss in found)
