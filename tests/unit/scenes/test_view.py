"""The scene page: every object, frame and question of the scene, self-contained."""

import json
import subprocess
import sys
from pathlib import Path

from spatialvlm.scenes.io import load_scene
from spatialvlm.scenes.view import scene_page

ROOT = Path(__file__).parents[3]


def row(scene_id, task="left_right", **changes):
    return {
        "scene_id": scene_id,
        "task": task,
        "variant": "",
        "form": "YN",
        "messages": [
            {"role": "user", "content": "<image>\nIs the <b>chair</b> left of the table?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "frame_ids": ["F0"],
        "marks": json.dumps([{"image": 0, "kind": "box", "color": "red", "bbox": [1, 2, 30, 40]}]),
        "margin": {"kind": "gap_m", "value": 0.35, "threshold": 0.15},
        "evidence": json.dumps([{"args": {"a": 2}}]),
        **changes,
    }


def test_page_shows_objects_frames_and_own_questions(data_dir):
    scene = load_scene(data_dir / "scenes" / "hand_room.json")
    page = scene_page(scene, [row(scene.scene_id), row("rooms/other", task="not_this_one")])
    for item in scene.objects:
        assert f"{item.color_name} {item.label}" in page
    assert page.count("<figure>") == 3
    assert "Is the &lt;b&gt;chair&lt;/b&gt; left of the table?" in page
    assert "not_this_one" not in page
    assert "<rect x='1.0' y='2.0' width='29.0' height='38.0'" in page
    assert "http" not in page


def test_command(tmp_path, data_dir):
    out = tmp_path / "page.html"
    command = [sys.executable, str(ROOT / "tools/view_scene.py"), "--out", str(out)]
    scene = str(data_dir / "scenes" / "hand_room.json")
    done = subprocess.run([*command, scene], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "rooms/hand-H, 3 frames" in done.stdout
    assert out.read_text().startswith("<!doctype html>")
    failed = subprocess.run(
        [*command, str(tmp_path / "no")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert failed.returncode == 2
    assert "no such scene file" in failed.stderr
