"""recipes/evaluate.py on a tiny random model: files, equality of batch shapes, resume, scoring without torch."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(ROOT / "recipes" / "evaluate.py"))["run"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight questions each about two pictures and one clip."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "clip").mkdir()
    clip = [f"clip/{i:03d}.png" for i in range(4)]
    for name in ("a.png", "b.png", *clip):
        Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(folder / name)
    lines = []
    for number in range(24):
        images = [["a.png"], ["b.png"], clip][number % 3]
        marker = "<video>\n" if len(images) > 1 else "<image>\n"
        task = ["left_right", "object_colour", "is_count"][number // 8]
        kind, answer = [("yesno", "true"), ("mcq", '"red"'), ("number", "3")][number // 8]
        question = f"Question {'very ' * (number % 5)}{number}?"
        lines.append(
            {
                "id": f"q{number:02d}",
                "messages": [
                    {"role": "user", "content": marker + question},
                    {"role": "assistant", "content": "x"},
                ],
                "media_kind": "video" if len(images) > 1 else "images",
                "images": images,
                "task": task,
                "form": "OE",
                "answer_type": kind,
                "answer_json": answer,
                "options": ["red", "blue"] if kind == "mcq" else [],
                "choice_idx": 0 if kind == "mcq" else None,
                "scene_id": f"s{number % 3}",
                "evidence": "{}",
                "marks": "[]",
            }
        )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(rows, checkpoint, out, *extra):
    return [
        str(ROOT / "configs" / "eval" / "demo.yaml"),
        f"evaluation.files.spatialvlm_rows={rows}",
        f"evaluation.media_root.spatialvlm_rows={rows.parent}",
        f"model.init_from={checkpoint}",
        f"run.dir={out}",
        "evaluation.max_new_tokens=6",
        "evaluation.quiet=true",
        *extra,
    ]


def predictions(out):
    return (out / "spatialvlm_rows" / "predictions.jsonl").read_text()


def test_files_and_batch_shapes(recipe, rows, tiny_checkpoint, tmp_path, capsys):
    checkpoint = tiny_checkpoint("qwen3vl")
    out = tmp_path / "eval_a"
    assert recipe(arguments(rows, checkpoint, out)) == 0
    assert "macro over tasks" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.resolved.yaml",
        "environment.json",
        "report.html",
        "report_plots",
        "run.json",
        "spatialvlm_rows",
        "summary.csv",
    ]
    assert sorted(path.name for path in (out / "spatialvlm_rows").iterdir()) == [
        "manifest.json",
        "per_item.csv",
        "predictions.jsonl",
        "report.csv",
        "report.html",
        "report_plots",
        "result.json",
    ]
    assert json.loads((out / "run.json").read_text())["state"] == "done"
    result = json.loads((out / "spatialvlm_rows" / "result.json").read_text())
    assert (result["n"], result["clusters"]) == (24, "3 scenes")
    assert set(result["per_type"]) == {"left_right", "object_colour", "is_count"}

    for name, extra in {
        "single": ["evaluation.batch_size=1"],
        "four": ["evaluation.batch_size=4"],
        "separate": ["evaluation.shared_prefix=false"],
    }.items():
        assert recipe(arguments(rows, checkpoint, tmp_path / name, *extra)) == 0
        assert predictions(tmp_path / name) == predictions(out), name


@pytest.mark.parametrize("family", ["qwen2_5vl", "internvl3"])
def test_other_families_share_prefixes(family, recipe, rows, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(family)
    assert recipe(arguments(rows, checkpoint, tmp_path / "shared")) == 0
    separate = ["evaluation.shared_prefix=false", "evaluation.batch_size=1"]
    assert recipe(arguments(rows, checkpoint, tmp_path / "single", *separate)) == 0
    assert predictions(tmp_path / "shared") == predictions(tmp_path / "single")


def test_adapters_are_merged_into_the_base_they_name(recipe, rows, tiny_checkpoint, tmp_path):
    import torch

    from spatialvlm.models.export import export
    from spatialvlm.models.lora import add_adapters, save_adapters
    from spatialvlm.models.spatial_vlm import SpatialVLM

    base = tiny_checkpoint("qwen3vl")
    model = SpatialVLM.from_pretrained(base)
    add_adapters(model, rank=4, alpha=64, parts=["language_model"])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapters(model, tmp_path / "adapters")
    export(base, tmp_path / "merged", variant="2d", adapters=tmp_path / "adapters")
    texts = {}
    for name, folder in {"adapters": "adapters", "merged": "merged", "base": base}.items():
        assert recipe(arguments(rows, tmp_path / folder, tmp_path / f"eval_{name}")) == 0
        texts[name] = predictions(tmp_path / f"eval_{name}")
    assert texts["adapters"] == texts["merged"] != texts["base"]


def test_resume_and_changed_settings(recipe, rows, tiny_checkpoint, tmp_path, capsys):
    checkpoint = tiny_checkpoint("qwen3vl")
    out = tmp_path / "run"
    assert recipe(arguments(rows, checkpoint, out)) == 0
    before = predictions(out)
    shard = out / "spatialvlm_rows" / "predictions.jsonl"
    lines = before.splitlines(keepends=True)
    marked = [line.replace('"prediction": "', '"prediction": "kept ') for line in lines[:10]]
    shard.write_text("".join(marked))  # ten answers are there: only fourteen are asked
    assert recipe(arguments(rows, checkpoint, out)) == 0
    assert predictions(out) == "".join(marked + lines[10:])

    assert recipe(arguments(rows, checkpoint, out, "evaluation.media=drop")) == 2
    message = capsys.readouterr().err
    assert "media: 'real' before, 'drop' now" in message
    assert json.loads((out / "run.json").read_text())["state"] == "failed"
    assert (
        recipe(arguments(rows, checkpoint, out, "evaluation.media=drop", "run.overwrite=true")) == 0
    )
    assert predictions(out) != before

    # The same path with other weights: answers of the old ones must not be scored as theirs.
    copy, again = tmp_path / "model", tmp_path / "again"
    shutil.copytree(checkpoint, copy)
    assert recipe(arguments(rows, copy, again)) == 0
    weights = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert recipe(arguments(rows, copy, again)) == 2
    assert "checkpoint_sha256" in capsys.readouterr().err


def test_failed_benchmarks_leave_no_scores_and_say_so(recipe, rows, tmp_path, capsys):
    """Two benchmarks without predictions: the run has failed, and scores of an earlier one are gone."""
    out = tmp_path / "run"
    stale = out / "spatialvlm_rows" / "result.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    row = {"id": 1, "gt": 3, "question": "How many?"}
    (tmp_path / "counting.jsonl").write_text(json.dumps(row) + "\n")
    extra = ["evaluation.benchmarks=[spatialvlm_rows,counting]", "evaluation.score_only=true"]
    extra.append(f"evaluation.files.counting={tmp_path / 'counting.jsonl'}")
    assert recipe(arguments(rows, "unused", out, *extra)) == 1
    assert not stale.exists()
    assert json.loads((out / "run.json").read_text())["state"] == "failed"


def test_score_only_needs_no_torch(rows, tmp_path):
    folder = tmp_path / "run" / "spatialvlm_rows"
    folder.mkdir(parents=True)
    answers = [{"id": f"q{n:02d}", "prediction": "yes"} for n in range(24)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'accelerate'])); "
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", blocked, str(ROOT / "recipes" / "evaluate.py")]
    command += arguments(rows, "unused", tmp_path / "run", "evaluation.score_only=true")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert result["per_type"]["left_right"]["value"] == 100


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("evaluation.benchmarks=[vsi_bnch]", 2, "did you mean 'vsi_bench'"),
        ("evaluation.protocl=easi", 2, "did you mean 'protocol'"),
        ("evaluation.files.spatialvlm_rows=/nowhere.jsonl", 3, "/nowhere.jsonl does not exist"),
        ("model.init_from=/nowhere", 1, "/nowhere"),
    ],
)
def test_bad_settings(change, code, message, recipe, rows, tmp_path, capsys):
    found = recipe(arguments(rows, tmp_path, tmp_path / "run", change))
    assert (found, message in capsys.readouterr().err) == (code, True)


def test_a_folder_that_holds_something_else(recipe, rows, tmp_path, capsys):
    folder = tmp_path / "run" / "spatialvlm_rows"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text('{"id": "q00", "prediction": "x"}\n')
    (folder / "manifest.json").write_text("{")
    change = ["evaluation.score_only=true", "evaluation.limit=1"]
    assert recipe(arguments(rows, tmp_path, tmp_path / "run", *change)) == 3
    assert f"{folder / 'manifest.json'} is no manifest" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert recipe(arguments(rows, tmp_path, tmp_path / "file", *change)) == 1
    assert f"File exists: '{tmp_path / 'file'}'" in capsys.readouterr().err


def test_absolute_media_need_permission(recipe, rows, tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows.read_text().replace('"a.png"', f'"{rows.parent / "a.png"}"'))
    checkpoint, out = tiny_checkpoint("qwen3vl"), tmp_path / "run"
    asked = arguments(rows, checkpoint, out, f"evaluation.files.spatialvlm_rows={path}")
    assert recipe(asked) == 3
    assert "evaluation.allow_absolute_media=true" in capsys.readouterr().err
    assert recipe([*asked, "evaluation.allow_absolute_media=true"]) == 0
    assert len(predictions(out).splitlines()) == 24


@pytest.mark.smoke
def test_two_processes_give_the_same_file(recipe, rows, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("qwen3vl")
    assert recipe(arguments(rows, checkpoint, tmp_path / "one")) == 0
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        str(ROOT / "configs" / "accelerate" / "cpu2_ddp.yaml"),
        str(ROOT / "recipes" / "evaluate.py"),
        *arguments(rows, checkpoint, tmp_path / "two", "evaluation.batch_size=4"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert predictions(tmp_path / "two") == predictions(tmp_path / "one")
