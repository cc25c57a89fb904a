"""tools/render_rooms.py: the same files for any number of workers, resumable, errors before any work."""

import importlib.util
import sys
from pathlib import Path

import pytest

from spatialvlm.scenes.io import iter_scenes

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "render_rooms", ROOT / "tools" / "render_rooms.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(
        sys.modules, "render_rooms", module
    )  # spawned workers look the job up by name
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["render_rooms.py", *map(str, arguments)])
        return module.main()

    return run


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_workers_do_not_change_files_and_a_second_run_does_nothing(tmp_path, command, capsys):
    common = (
        "--num",
        3,
        "--frames",
        2,
        "--size",
        64,
        "--preset",
        "small",
        "--twins",
        0.5,
        "--seed",
        4,
    )
    assert command(*common, "--workers", 1, "--out", tmp_path / "one") == 0
    assert command(*common, "--workers", 2, "--out", tmp_path / "two") == 0
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two
    ids = [scene.scene_id for scene in iter_scenes(tmp_path / "one")]
    assert {"rooms/train-0000004", "rooms/train-0000005", "rooms/train-0000006"} <= set(ids)
    capsys.readouterr()
    (tmp_path / "one" / "train-0000005" / "scene.json").unlink()  # as after a kill
    assert command(*common, "--workers", 1, "--out", tmp_path / "one") == 0
    assert "1 rooms rendered" in capsys.readouterr().out
    assert files(tmp_path / "one") == two


@pytest.mark.parametrize(
    "wrong", [("--workers", 0), ("--size", 0), ("--seed", -1), ("--twins", 2), ("--split", "dev")]
)
def test_wrong_arguments_end_with_status_2(tmp_path, command, wrong):
    with pytest.raises(SystemExit) as end:
        command("--out", tmp_path / "x", *wrong)
    assert end.value.code == 2
    assert not (tmp_path / "x").exists()
