"""tools/import_scenes.py: writes scenes, counts, lists failures, leaves evaluation scenes out."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from spatialvlm.scenes.io import iter_scenes

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "import_scenes", ROOT / "tools" / "import_scenes.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["import_scenes.py", *map(str, arguments)])
        return module.main()

    return run


def table(folder, scene, rows=1, header="object_id,region_id,raw_label,nyu_label,object_front_heading,"
          "object_bbox_cx,object_bbox_cy,object_bbox_cz,object_bbox_xlength,object_bbox_ylength,"
          "object_bbox_zlength,object_bbox_heading"):  # fmt: skip
    path = folder / "ScanNet" / scene / f"{scene}_object_result.csv"
    path.parent.mkdir(parents=True)
    lines = [f"{i},0,chair,chair,_,{i * 2},0,0.5,1,0.5,1,0.2" for i in range(rows)]
    path.write_text("\n".join([header, *lines]) + "\n")


def test_import(tmp_path, command, capsys):
    table(tmp_path / "raw", "scene9000_00", rows=3)
    table(tmp_path / "raw", "scene0251_01")  # a re-scan of a VSI-Bench room
    table(tmp_path / "raw", "scene9001_00", header="object_id,region_id")
    arguments = ("--source", "vla3d", "--root", tmp_path / "raw", "--out", tmp_path / "out")
    assert command(*arguments) == 1
    assert "column 'raw_label' is missing" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "import.json").read_text())
    expected = {"blacklisted": 1, "no_frames": 2, "objects": 3, "scenes": 1}
    assert summary["counters"] == expected
    assert list(summary["failed"]) == ["ScanNet/scene9001_00"]
    assert [scene.scene_id for scene in iter_scenes(tmp_path / "out")] == ["scannet/scene9000_00"]
    assert command(*arguments, "--max-failed", "0.5", "--allow-contaminated") == 0
    assert len(list(iter_scenes(tmp_path / "out"))) == 2


def test_nothing_to_import(tmp_path, command, capsys):
    assert command("--source", "scannet", "--root", tmp_path, "--out", tmp_path / "out") == 2
    assert "no scannet scene" in capsys.readouterr().err
