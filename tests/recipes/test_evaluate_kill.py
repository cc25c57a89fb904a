"""recipes/evaluate.py with a geometry branch, and killed while it asks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from spatialvlm.testing.rig import FAMILIES, Rig
from tests.recipes.test_evaluate import ROOT, arguments, predictions, recipe, rows  # noqa: F401


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_branch_shares_prefixes_and_changes_answers(
    family,
    recipe,  # noqa: F811
    rows,  # noqa: F811
    tiny_checkpoint,
    tiny_vggt,
    tmp_path,
):
    rig = Rig.load(family, tiny_checkpoint(family), vggt=tiny_vggt, geometry={})
    rig.randomise_fusion()  # the branch starts neutral
    checkpoint = rig.model.save_pretrained(tmp_path / "final")
    assert recipe(arguments(rows, checkpoint, tmp_path / "shared")) == 0
    single = ["evaluation.shared_prefix=false", "evaluation.batch_size=1"]
    assert recipe(arguments(rows, checkpoint, tmp_path / "single", *single)) == 0
    assert predictions(tmp_path / "shared") == predictions(tmp_path / "single")
    assert recipe(arguments(rows, tiny_checkpoint(family), tmp_path / "plain")) == 0
    assert predictions(tmp_path / "plain") != predictions(tmp_path / "shared")


@pytest.mark.fault
def test_a_killed_process_asks_nothing_twice(
    recipe,  # noqa: F811
    rows,  # noqa: F811
    tiny_checkpoint,
    tmp_path,
):
    """SIGKILL after the first answers; the rest is asked once and the file is that of an undisturbed run."""
    checkpoint = tiny_checkpoint("qwen3vl")
    slow = ["evaluation.batch_size=1", "evaluation.shared_prefix=false"]
    slow += ["evaluation.max_new_tokens=48"]
    assert recipe(arguments(rows, checkpoint, tmp_path / "whole", *slow)) == 0
    out = tmp_path / "killed"
    shard = out / "spatialvlm_rows" / "predictions.rank0.jsonl"
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py")]
    process = subprocess.Popen(
        [*command, *arguments(rows, checkpoint, out, *slow)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while not (shard.is_file() and shard.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = shard.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n")]
    assert 3 <= len(kept) < 24
    marked = [line.replace('"prediction": "', '"prediction": "kept ') for line in kept]
    shard.write_text("".join(marked) + '{"id": "q2')  # and the line that was being written
    assert recipe(arguments(rows, checkpoint, out, *slow)) == 0
    found = [json.loads(line) for line in predictions(out).splitlines()]
    whole = [json.loads(line) for line in predictions(tmp_path / "whole").splitlines()]
    done = {json.loads(line)["id"] for line in kept}
    assert {row["id"] for row in found if row["prediction"].startswith("kept ")} == done
    for row in found:
        row["prediction"] = row["prediction"].removeprefix("kept ")
    assert found == whole
