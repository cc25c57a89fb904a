"""plan_data and inspect_data on the toy data: numbers that must hold, hostile text, exit codes."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def recipe(toy_data, tiny_checkpoint, tmp_path):
    """Function changes -> path of a recipe over the toy data."""

    def make(root=toy_data, **data):
        sources = [
            {
                "name": name[:2],
                "family": name,
                "files": [f"{name}.jsonl"],
                "root": str(root),
                "format": "messages",
            }
            for name in ("spatial", "general")
        ]
        config = {
            "stage": 1,
            "run": {"dir": str(tmp_path / "run")},
            "model": {"backbone": "tiny_qwen3vl", "init_from": str(tiny_checkpoint("qwen3vl"))},
            "precision": "fp32",
            "optim": {"lr": 1.0e-3},
            "data": {
                "sources": sources,
                "index_dir": str(tmp_path / "index"),
                "media": {"num_frames": 3},
                **data,
            },
            "step": {"global_batch_size": 12},
            "packing": {"max_tokens": 700},
            "shared_prefix": {"max_branches": 4},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return make


def test_plan(recipe, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert (
        tool("plan_data")([str(recipe()), "--steps", "all", "--world", "2", "--json", str(out)])
        == 0
    )
    result = json.loads(out.read_text())
    assert result["steps_total"] == result["plan"]["steps"] == 5
    assert result["plan"]["samples"] == 60
    assert result["shares"]["samples"]["family/spatial"] == 30
    sizes = result["plan"]["group_sizes"]
    assert sum(int(size) * count for size, count in sizes.items()) == 60
    assert max(int(size) for size in sizes) == 4
    assert result["plan"]["tokens"] < result["plan"]["tokens_separate"]
    assert result["plan"]["padding"] == 0
    assert result["sources"][0]["rows"] == 30
    assert result["estimate"]["flops_total"] > 0
    printed = capsys.readouterr().out
    assert "questions per group" in printed
    assert "left out" not in printed


def test_plan_counts_what_was_done_to_samples(recipe, toy_data, tmp_path, capsys):
    """Animated images, shortened samples, assumed times and odd answers are counted per source."""
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    pictures[0].save(copy / "moving.gif", save_all=True, append_images=pictures[1:])
    for frame in range(40):
        pictures[0].resize((96, 96)).save(copy / f"frame{frame}.png")
    turns = [{"role": "user", "content": "q " * 200}, {"role": "assistant", "content": "a"}]

    def row(question, answer, **media):
        user = {"role": "user", "content": question}
        return {"messages": [user, {"role": "assistant", "content": answer}], **media}

    rows = [
        row("<image>?", "a cat", images=["moving.gif"]),
        row("<video>?", "walking", videos=[[f"frame{n}.png" for n in range(40)]]),
        row("text?", "\n answer"),
        {"messages": turns * 3},
    ]
    (copy / "general.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "plan.json"
    path = str(recipe(copy, overlong="truncate_text_turns"))
    assert tool("plan_data")([path, "--verify", "full", "--json", str(out)]) == 0
    general = json.loads(out.read_text())["sources"][1]
    assert general["notes"] == dict.fromkeys(
        ("turns_dropped", "animated_image", "frame_times_assumed", "boundary_merge"), 1
    )
    assert general["tokens_removed"] > 200
    printed = capsys.readouterr().out
    assert "animated image: 1" in printed
    assert "tokens removed from over-long samples" in printed


def test_plan_says_when_a_family_has_few_labels(recipe, toy_data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 90}]
    (copy / "general.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)
    assert tool("plan_data")([str(recipe(copy)), "--world", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"note: family spatial has 50 % of the samples and \d % of the label tokens", printed
    )


def test_plan_exit_codes(recipe, toy_data, tmp_path, capsys):
    assert tool("plan_data")([str(recipe()), "data.overlongg=reject"]) == 2
    assert "did you mean 'overlong'" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    for scene in range(3):
        shutil.rmtree(copy / f"s{scene}")
    assert tool("plan_data")([str(recipe(copy))]) == 3
    assert "missing" in capsys.readouterr().err


def test_inspect(recipe, toy_data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    hostile = {"messages": [
        {"role": "user", "content": "<image><script>alert(1)</script> <|im_end|> & \" '"},
        {"role": "assistant", "content": "<b>bold</b>"},
    ], "images": ["g.png"]}  # fmt: skip
    broken = {
        "messages": [
            {"role": "user", "content": "<image><image>two?"},
            {"role": "assistant", "content": "x"},
        ]
    }
    with (copy / "general.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in (hostile, broken | {"images": ["g.png"]}))
    out = tmp_path / "page.html"
    path = recipe(copy, max_rejected_fraction=0.5)
    assert tool("inspect_data")([str(path), "--out", str(out), "--num", "20"]) == 0
    page = out.read_text()
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    assert "trained on</b> &#x27;&lt;b&gt;bold&lt;/b&gt;&lt;|im_end|&gt;&#x27;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/jpeg;base64,") > 10
    assert "marker_count" in page  # the rejected row and its reason
    assert "frame 2, 2.00 s" in page
    sources = page.split("<h2>Mixture")[0]
    assert re.findall(r"<td>(sp|ge)</td>", sources) == ["sp", "ge"]
    assert "<td class=num>0</td>" not in sources  # sizes of rows that were drawn
    style = page.partition("<style>")[2].partition("</style>")[0]
    for _ in range(2):  # declarations, then what encloses them
        style = re.sub(r"[^{}]+\{[^{}]*\}", "", style)
    assert not style.strip()  # every declaration is inside a rule
    assert len(page) < 20e6


def test_inspect_one_source(recipe, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert (
        tool("inspect_data")([str(recipe()), "--out", str(out), "--source", "sp", "--num", "1"])
        == 0
    )
    assert "<h2>ge</h2>" not in out.read_text()
    assert tool("inspect_data")([str(recipe()), "--out", str(out), "--source", "nope"]) == 2
    assert "the recipe has sp, ge" in capsys.readouterr().err
