"""The text-only stress test trains tiny adapters fold by fold and finds a planted shortcut."""

import json
import random
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_planted_shortcut_is_learned_from_text(tiny_checkpoint, tmp_path):
    rng = random.Random(0)
    rows = []
    for n in range(120):
        texts = rng.sample(["bed", "sofa", "lamp", "desk"], 1)
        texts.insert(rng.randrange(2), "chair")
        rows.append(
            {
                "id": n,
                "dataset": "d",
                "scene_name": f"s{n % 30}",
                "question_type": "route_planning",
                "question": "Which?",
                "options": [f"{x}. {t}" for x, t in zip("AB", texts, strict=True)],
                "ground_truth": "B",
            }
        )
    data = tmp_path / "vsi.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main = runpy.run_path(str(ROOT / "tools" / "audit_shortcuts.py"))["main"]
    code = main(
        ["--bench", "vsi_bench", "--data", str(data), "--mode", "tst-llm", "--folds", "2",
         "--model", str(tiny_checkpoint("qwen3vl")), "--backbone", "tiny_qwen3vl", "--out", str(tmp_path / "out"),
         "--set", "optim.lr=1.0e-2"]
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert result["trained_score"] > 90 > result["zero_shot_score"]
    assert result["micro"]["accuracy"] > 95
