"""tools/import_scenes.py: writes scenes, counts, lists failures, leaves evaluation scenes out."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from spatialvlm.scenes.io import iter_scenes
from tests.unit.scenes.scan_files import write_arkit

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


def test_another_video_of_an_evaluation_room_is_left_out(tmp_path, command):
    """47334096 is a VSI-Bench scene; a training video of the same visit shows the same room."""
    write_arkit(tmp_path / "raw")
    (tmp_path / "raw" / "metadata.csv").write_text(
        "video_id,visit_id,fold,sky_direction\n40000002,420001,Training,Up\n47334096,420001,Validation,Up\n"
    )
    arguments = ("--source", "arkitscenes", "--root", tmp_path / "raw", "--out", tmp_path / "out")
    assert command(*arguments) == 0
    summary = json.loads((tmp_path / "out" / "import.json").read_text())
    assert summary["counters"]["blacklisted"] == 1
    assert "scenes" not in summary["counters"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "TypeError"),
        ('{"data": {}}', "no usable frame"),
        ('{"data": [{"uid": "a", "label": "x"}]}', "KeyError: 'segments'"),
        ('{"data": [{"uid": "a", "label": "x", "segments": {"obbAligned": 3}}]}', "TypeError"),
        ("{torn", "not a 3DOD annotation"),
    ],
)
def test_annotations_of_another_shape_fail_their_scene_only(
    tmp_path, command, capsys, text, message
):
    frames = write_arkit(tmp_path / "raw")
    folder = frames.parent
    broken = tmp_path / "raw" / "Training" / "40000009"
    shutil.copytree(folder, broken)
    (broken / "40000002_3dod_annotation.json").unlink()
    (broken / "40000009_3dod_annotation.json").write_text(text)
    (broken / "40000002_frames").rename(broken / "40000009_frames")
    for path in (broken / "40000009_frames").rglob("*.png"):
        path.unlink()
    arguments = ("--source", "arkitscenes", "--root", tmp_path / "raw", "--out", tmp_path / "out")
    assert command(*arguments, "--max-failed", "0.6") == 0
    assert message in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "import.json").read_text())
    assert list(summary["failed"]) == ["Training/40000009"]
    assert summary["counters"]["scenes"] == 1


def test_borrowed_frames_are_for_vla3d(tmp_path, command, capsys):
    with pytest.raises(SystemExit):
        command(
            "--source", "scannet", "--root", tmp_path, "--rgb-root", tmp_path, "--out", tmp_path
        )
    assert "--rgb-root is for --source vla3d" in capsys.readouterr().err
