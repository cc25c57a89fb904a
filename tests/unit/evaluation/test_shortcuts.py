"""Planted shortcuts are found, shuffled answers are not, held-out answers never leak, pruning beats chance."""

import json
import random
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spatialvlm.errors import ConfigError
from spatialvlm.evaluation.__main__ import main as score_main
from spatialvlm.evaluation.prompts import build_messages
from spatialvlm.evaluation.registry import load_benchmark
from spatialvlm.evaluation.schema import Item
from spatialvlm.evaluation.shortcuts import (
    Diagnosis,
    Features,
    diagnose_forest,
    diagnose_priors,
    largest_remainder,
    make_folds,
    prune,
    summary,
)

ROOT = Path(__file__).resolve().parents[3]
NOUNS = ["chair", "bed", "sofa", "lamp", "table", "desk", "shelf", "plant"]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "audit_shortcuts.py"))["main"]


def choice_items(num=240, planted=1.0, seed=0):
    """Questions whose answer is "chair" whenever it is offered, in a share ``planted`` of the items."""
    rng = random.Random(seed)
    items = []
    for n in range(num):
        texts = rng.sample(NOUNS[1:], 3)
        texts.insert(rng.randrange(4), "chair")
        options = dict(zip("ABCD", texts, strict=True))
        shortcut = rng.random() < planted
        gold = "ABCD"[texts.index("chair")] if shortcut else rng.choice("ABCD")
        row = {
            "question": f"Which object is {rng.choice(['near', 'far', 'left'])}?",
            "planted": shortcut,
        }
        items.append(Item(f"q{n}", "choice", gold, f"type{n % 2}", f"s{n % 40}", options, row=row))
    return items


def shuffled(items, seed=1):
    """The same items with answers drawn at random."""
    rng = random.Random(seed)
    return [replace(item, gold=rng.choice(list(item.options))) for item in items]


def test_folds_keep_scenes_together_and_balance_answers():
    items = choice_items()
    fold = make_folds(items, 5)
    by_scene = {}
    for item, f in zip(items, fold, strict=True):
        assert by_scene.setdefault(item.cluster, f) == f
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= 6
    assert (make_folds(items, 5) == fold).all()
    assert len(np.unique(make_folds(items, 5, group="item"))) == 5
    with pytest.raises(ConfigError, match="cannot be split into 50 folds"):
        make_folds(items, 50)


@pytest.mark.parametrize("diagnose", [diagnose_priors, diagnose_forest])
def test_planted_shortcut_is_found(diagnose):
    items = choice_items(160)
    found = summary(diagnose(items, make_folds(items, 3)))
    assert found["micro"]["accuracy"] > 95
    assert found["micro"]["chance"] == 25


@pytest.mark.parametrize("diagnose", [diagnose_priors, diagnose_forest])
def test_shuffled_answers_give_chance(diagnose):
    items = shuffled(choice_items(240))
    found = summary(diagnose(items, make_folds(items, 3)))["micro"]
    assert abs(found["accuracy"] - 25) < 3 * found["accuracy_se"]


def test_majority_letter_and_numbers():
    items = [
        Item(f"q{n}", "choice", "B" if n % 4 else "A", "t", f"s{n}", {"A": "x", "B": "y"})
        for n in range(40)
    ]
    items += [Item(f"n{n}", "number", 3.0 if n % 5 else 9.0, "count", f"s{n}") for n in range(40)]
    found = summary(diagnose_priors(items, make_folds(items), prior="majority_letter"))
    assert found["per_type"]["t"]["accuracy"] == 75
    assert found["per_type"]["count"]["accuracy"] == 80


def test_held_out_answers_change_no_feature():
    items = choice_items(80) + [
        Item(
            f"n{n}",
            "number",
            float(1 + n % 7),
            "count",
            f"s{n % 40}",
            row={"question": f"How many {NOUNS[n % 8]}?"},
        )
        for n in range(40)
    ]
    fold = make_folds(items, 3)
    train = [item for item, f in zip(items, fold, strict=True) if f != 0]
    held = [item for item, f in zip(items, fold, strict=True) if f == 0]
    features = Features(train)
    rng = random.Random(3)
    for item in held:
        other = replace(
            item, gold=rng.choice(list(item.options)) if item.options else item.gold + 5
        )
        build = features.choice if item.options else features.number
        assert (build(item) == build(other)).all()
    # The same through the whole diagnostic: predictions on a fold ignore that fold's answers.
    changed = [
        replace(i, gold="A") if f == 0 and i.options else i
        for i, f in zip(items, fold, strict=True)
    ]
    before, after = (diagnose_forest(part, fold) for part in (items, changed))
    for a, b in zip(before, after, strict=True):
        if a.fold == 0 and a.item.options:
            assert a.predicted == b.predicted


def test_pruning_removes_planted_items_first_and_beats_random():
    items = choice_items(240, planted=0.4)
    found = prune(items, lambda left: diagnose_priors(left, make_folds(left)), budget=60, batch=20)
    planted = {item.id for item in items if item.options[item.gold] == "chair"}
    assert sum(i in planted for i in found.removed) > 0.9 * len(found.removed)
    assert len(found.removed) == 60
    assert len(found.kept) == 180
    by_id = {item.id: item for item in items}

    def accuracy(ids):
        left = [by_id[i] for i in ids]
        return summary(diagnose_priors(left, make_folds(left)))["micro"]["accuracy"]

    assert accuracy(found.kept) < min(accuracy(kept) for kept in found.control)
    assert all(len(kept) == 180 for kept in found.control)
    types = [
        sum(by_id[i].question_type == "type0" for i in ids)
        for ids in (found.kept, found.control[0])
    ]
    assert types[0] == types[1]


def test_pruning_limits():
    items = choice_items(60)
    diagnose = lambda left: diagnose_priors(left, make_folds(left))  # noqa: E731
    assert prune(items, diagnose, budget=20, threshold=1.0).removed == []
    few = prune(items, diagnose, budget=60, floor=25)
    assert len(few.kept) == 50
    with pytest.raises(ConfigError, match="alloc 'x'"):
        prune(items, diagnose, budget=1, alloc="x")
    assert largest_remainder({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}


def write_vsi(path, items):
    rows = [
        {
            "id": item.id,
            "dataset": "d",
            "scene_name": item.cluster,
            "question_type": "route_planning"
            if item.question_type == "type0"
            else "object_rel_distance",
            "question": item.row["question"],
            "options": [f"{x}. {t}" for x, t in item.options.items()],
            "ground_truth": item.gold,
        }
        for item in items
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_command_line(tool, tmp_path, capsys):
    data = write_vsi(tmp_path / "vsi.jsonl", choice_items(120))
    base = ["--bench", "vsi_bench", "--data", data]
    assert tool([*base, "--mode", "priors", "--out", str(tmp_path / "p")]) == 0
    assert "option text: 100.0" in capsys.readouterr().out
    header = (tmp_path / "p" / "s_x.csv").read_text().splitlines()[0]
    assert header == "id,question_type,format,scene,gold,s,s_base,delta,fold,predicted"
    assert (
        tool(
            [
                *base,
                "--mode",
                "ibp",
                "--diagnostic",
                "priors",
                "--budget",
                "20",
                "--out",
                str(tmp_path / "i"),
            ]
        )
        == 0
    )
    assert len((tmp_path / "i" / "removed_ids.txt").read_text().split()) == 20
    assert "Pruning is not better than random" in (tmp_path / "i" / "summary.json").read_text()
    assert tool([*base, "--mode", "blind", "--out", str(tmp_path / "b")]) == 1
    assert "needs --vision and --blind" in capsys.readouterr().err


def test_a_blind_arm_must_be_blind(tool, tmp_path, capsys):
    """Two runs with media, or arms in the wrong order, would pass as a gap."""
    items = choice_items(8)
    data = write_vsi(tmp_path / "vsi.jsonl", items)
    for name, media, text in (("seen", "real", "A"), ("unseen", "drop", "B")):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"id": item.id, "prediction": text} for item in items]
        (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "manifest.json").write_text(json.dumps({"media": media}))
        arguments = ["--bench", "vsi_bench", "--data", data, "--pred", str(folder / "p.jsonl")]
        assert score_main(["score", *arguments, "--out", str(folder / "scores")]) == 0
    seen, unseen = (str(tmp_path / name / "scores") for name in ("seen", "unseen"))
    base = ["--bench", "vsi_bench", "--data", data, "--mode", "blind", "--out", str(tmp_path / "b")]
    assert tool([*base, "--vision", seen, "--blind", unseen]) == 0
    assert tool([*base, "--vision", seen, "--blind", seen]) == 1
    assert f"--blind {seen} was asked with media=real" in capsys.readouterr().err
    assert tool([*base, "--vision", unseen, "--blind", seen]) == 1
    (tmp_path / "ids").write_text("other")
    ids = ["--ids", str(tmp_path / "ids")]
    assert tool([*base, "--vision", seen, "--blind", unseen, *ids]) == 1
    assert "none of the 1 ids" in capsys.readouterr().err


def test_pruning_by_what_training_adds(tool, tmp_path, monkeypatch, capsys):
    """A trained model ranks by its gain: what it knew before training stays, and the control costs no training."""
    from spatialvlm.evaluation import stress_test

    items = choice_items(80, planted=0.5)
    planted = {item.id for item in items if item.row["planted"]}
    known = {item.id for item in items[:10]} - planted
    trainings = []

    def train(items, fold, model, backbone, out, load, **options):
        trainings.append((len(items), out.name))
        return [
            Diagnosis(
                item,
                0.9 if item.id in planted | known else 0.25,
                "A",
                float(item.id in planted | known),
                int(fold[i]),
                0.9 if item.id in known else 0.25,
            )
            for i, item in enumerate(items)
        ]

    monkeypatch.setattr(stress_test, "run_stress_test", train)
    data = write_vsi(tmp_path / "vsi.jsonl", items)
    command = ["--bench", "vsi_bench", "--data", data, "--mode", "ibp", "--diagnostic", "tst-llm"]
    assert tool([*command, "--out", str(tmp_path / "x")]) == 1
    assert "needs --model DIR and --backbone" in capsys.readouterr().err
    paths = ["--model", "m", "--backbone", "b", "--out", str(tmp_path / "i")]
    assert tool([*command, *paths, "--budget", "20", "--batch", "10"]) == 0
    removed = set((tmp_path / "i" / "removed_ids.txt").read_text().split())
    assert len(removed) == 20
    assert removed <= planted
    assert [size for size, _ in trainings] == [
        80,
        80,
        70,
    ]  # two rounds; the first reading is found again
    assert trainings[0] == trainings[1]
    result = json.loads((tmp_path / "i" / "summary.json").read_text())
    assert result["blind_accuracy_after"] < min(result["blind_accuracy_random_control"])


def test_circular_variants_show_position_bias(tool, tmp_path, capsys):
    data = write_vsi(tmp_path / "vsi.jsonl", choice_items(40))
    out = tmp_path / "c"
    assert (
        tool(["--bench", "vsi_bench", "--data", data, "--mode", "circular", "--out", str(out)]) == 0
    )
    variants = [json.loads(line) for line in (out / "variants.jsonl").read_text().splitlines()]
    assert len(variants) == 160
    answers = [
        {"id": row["index"], "prediction": "A"} for row in variants
    ]  # a model that always says A
    (tmp_path / "pred.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    code = tool(
        ["--bench", "circular_mcq", "--data", str(out / "variants.jsonl"), "--mode", "circular",
         "--pred", str(tmp_path / "pred.jsonl"), "--out", str(tmp_path / "s")]
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert result["hard_circular"] == 0
    assert result["soft_rows"] == 25
    assert result["letter_share"] == {"A": 100.0}
    assert result["consistency"] == 0


def prompts_of(folder):
    """Messages of all variants in a folder."""
    bench = load_benchmark("circular_mcq", folder / "variants.jsonl")
    return [build_messages(i, bench.spec, root=bench.media_root)[0]["content"] for i in bench.items]


def test_variants_keep_their_video(tool, tmp_path):
    data = write_vsi(tmp_path / "vsi.jsonl", choice_items(4))
    out = tmp_path / "c"
    assert (
        tool(["--bench", "vsi_bench", "--data", data, "--mode", "circular", "--out", str(out)]) == 0
    )
    for content in prompts_of(out):
        assert [part["type"] for part in content] == ["video", "text"]
        assert content[0]["video"].endswith(".mp4")


def test_variants_hold_one_list_of_options_and_pictures_from_cells(tool, tmp_path):
    """The list inside MMSI's questions would contradict the rotated one; its pictures lie in parquet cells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": 3, "question": "Q? Options: A: x, B: y", "answer": "B", "question_type": "Attribute",
         "images": [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}]},
        {"id": 4, "question": "Without options", "answer": "B", "question_type": "Attribute",
         "images": [{"bytes": b"one", "path": None}]},
    ]  # fmt: skip
    data, out = tmp_path / "mmsi.parquet", tmp_path / "c"
    pq.write_table(pa.Table.from_pylist(rows), data)
    arguments = ["--bench", "mmsi", "--data", str(data), "--mode", "circular"]
    assert tool([*arguments, "--out", str(out)]) == 0
    first, second = prompts_of(out)
    assert [Path(part["image"]).read_bytes() for part in first[:-1]] == [b"one", b"two"]
    assert "Question: Q?\nOptions:\nA. x\nB. y\n" in first[-1]["text"]
    assert "Question: Q?\nOptions:\nA. y\nB. x\n" in second[-1]["text"]
    assert first[-1]["text"].count("Options:") == 1
    skipped = json.loads((out / "summary.json").read_text())["skipped"]
    assert skipped == {"4": "the row states no texts of its options"}


def test_variants_in_the_form_of_mmsi(tool, tmp_path):
    rows = [
        {"id": 3, "question": "Q? Options: A: x, B: y", "answer": "B", "question_type": "Attribute"}
    ]
    data = tmp_path / "mmsi.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--bench", "mmsi", "--data", str(data), "--mode", "circular", "--style", "mmsi"]
    assert tool([*arguments, "--out", str(tmp_path / "m")]) == 0
    made = [
        json.loads(line) for line in (tmp_path / "m" / "variants.jsonl").read_text().splitlines()
    ]
    assert [row["index"] for row in made] == [3, 1000003, 2000003, 3000003]
    assert [row["answer"] for row in made] == ["B", "A", "D", "C"]
