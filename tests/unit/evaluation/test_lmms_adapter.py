"""The lmms-eval adapter without lmms-eval: messages, order, errors, task files."""

import csv
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation import lmms_adapter as adapter
from spatialvlm.evaluation.__main__ import main
from spatialvlm.evaluation.generate import Completion
from spatialvlm.evaluation.predictions import Prediction, by_row_number
from spatialvlm.evaluation.prompts import prompt_text
from spatialvlm.evaluation.registry import find_spec, load_benchmark
from spatialvlm.evaluation.schema import Item
from spatialvlm.evaluation.scoring import score

TASKS = Path(adapter.__file__).parent / "lmms_tasks"


class Echo:
    """Answers with the question; counts the groups it prepares."""

    def __init__(self):
        self.groups = []

    def prepare(self, group):
        self.groups.append(len(group))
        return group

    def generate(self, prepared, config):
        return [
            [
                Completion(f"{m[-1]['content'][-1]['text']} ({config.max_new_tokens})\n\nmore")
                for m in group
            ]
            for group in prepared
        ]


def request(doc_id, limit=8, **options):
    def to_messages(doc):
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": doc["image"]},
                    {"type": "text", "text": doc["q"]},
                ],
            }
        ]

    return SimpleNamespace(
        args=("", to_messages, {"max_new_tokens": limit, **options}, doc_id, "task", "test")
    )


DOCS = {"task": {"test": [{"image": f"{n % 2}.png", "q": f"Q{n}"} for n in range(6)]}}


def test_answers_come_back_in_request_order():
    model = Echo()
    requests = [request(n, limit=8 if n < 4 else 16) for n in (3, 0, 5, 1, 4, 2)]
    found = adapter.run_requests(requests, DOCS, model, batch_size=4)
    assert [text.split()[0] for text in found] == ["Q3", "Q0", "Q5", "Q1", "Q4", "Q2"]
    assert "(16)" in found[2]
    assert sorted(model.groups) == [1, 1, 2, 2]  # questions on one picture share a group
    stopped = adapter.run_requests([request(0, until=["\n\n"])], DOCS, model, batch_size=1)
    assert stopped == ["Q0 (8)"]


def test_other_versions_and_sampling_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9")
    bad = SimpleNamespace(args=("", None, {}, 0, "task"))
    with pytest.raises(
        ConfigError, match=r"lmms-eval 0.9 passes 5 request arguments, this adapter knows 6"
    ):
        adapter.run_requests([bad], DOCS, Echo(), 1)
    with pytest.raises(ConfigError, match="asks for sampling"):
        adapter.run_requests([request(0, do_sample=True)], DOCS, Echo(), 1)


def test_messages():
    image = Image.new("RGB", (4, 4))
    found = adapter.convert_messages(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image", "url": image}, {"type": "video", "video": "v.mp4"}],
            },
        ]
    )
    assert found[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert found[1]["content"][0]["image"].startswith(b"\x89PNG")
    assert found[1]["content"][1]["video"] == str(Path("v.mp4").resolve())
    with pytest.raises(ConfigError, match="part 'audio'"):
        adapter.convert_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])


def test_without_lmms_eval_the_reason_is_named(capsys):
    code = adapter.main()
    if code:  # lmms-eval is not part of the development environment
        assert 'pip install -e ".[lmms]"' in capsys.readouterr().err
    with pytest.raises(AttributeError, match="no attribute 'NOTHING'"):
        adapter.NOTHING  # noqa: B018


class TaskLoader(yaml.SafeLoader):
    pass


TaskLoader.add_constructor(
    "!function", lambda loader, node: ("function", loader.construct_scalar(node))
)


def task_functions():
    return SimpleNamespace(**runpy.run_path(str(TASKS / "utils.py")))


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda p: p.stem)
def test_task_files_name_existing_functions(path):
    task = yaml.load(path.read_text(), Loader=TaskLoader)
    utils = task_functions()
    named = [value[1] for value in task.values() if isinstance(value, tuple)]
    named += [metric["aggregation"][1] for metric in task["metric_list"]]
    assert len(named) >= 5
    for name in named:
        assert callable(getattr(utils, name.removeprefix("utils.")))
    assert task["task"] == path.stem
    assert task["generation_kwargs"]["do_sample"] is False


def test_tasks_use_our_prompts_and_scores():
    utils = task_functions()
    doc = {
        "index": 3,
        "question": "Q?",
        "A": "x",
        "B": "y",
        "answer": "AB",
        "category": "c",
        "image": "['a.jpg']",
    }
    spec = find_spec("space10")
    item = spec.parse(doc, "3")
    content = utils.space10_messages(doc)[0]["content"]
    assert content[-1]["text"] == prompt_text(item, spec, "lmms") == utils.space10_text(doc)
    assert utils.space10_visual(doc) == ["a.jpg"]
    right, wrong = (utils.space10_process(doc, [text])["score"] for text in ("A. B.", "A."))
    assert (right["score"], wrong["score"]) == (1.0, 0.0)
    assert utils.micro([right, wrong]) == 50.0
    one = {"type": "a", "score": 1.0, "cluster": "s", "pair": ""}
    assert utils.macro([one, one, {**one, "type": "b", "score": 0.0}]) == 50.0


SCORED = {
    "vsti": (
        "vsti_bench",
        [
            {"question_type": "camera_displacement", "options": None, "ground_truth": "2",
             "mc_answer": "", "question": "Q", "video_path": f"{n // 2}.mp4"}
            if n < 3 else
            {"question_type": "obj_obj_relative_pos_lr", "options": ["A. x", "B. y"],
             "ground_truth": "x", "mc_answer": "A", "question": "Q", "video_path": "1.mp4"}
            for n in range(5)
        ],
        ["2", "3", "zwei", "A", "B"],
        "macro",
    ),
    "space10": (
        "space10",
        [
            {"index": n, "question": "Q", "A": "x", "B": "y", "C": "z", "answer": gold, "image": "a"}
            for n, gold in enumerate(("A", "B", "BC"))
        ],
        ["A.", "C.", "B. C."],
        "micro",
    ),
    "angles": (
        "all_angles",
        [
            {"index": n, "question": "Q", "A": "x", "B": "y", "answer": "A", "category": "c",
             "image": f"s{n % 2}/0.jpg"}
            for n in range(3)
        ],
        ["A", "B", "The answer is A"],
        "micro",
    ),
    "rows": (
        "spatialvlm_rows",
        [
            {"id": str(n), "task": f"t{n % 2}", "answer_type": "yesno", "answer_json": "true",
             "options": [], "scene_id": f"s{n}", "images": [], "media_kind": "none",
             "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Yes"}]}
            for n in range(5)
        ],
        ["yes", "no", "yes", "yes", "well"],
        "macro",
    ),
    "intern": (
        "internspatial",
        [
            {"id": f"{kind}{n}", "category": kind, "question": "Q", "image": f"{n}.png",
             "options": None if kind == "counting" else ["A. x", "B. y"],
             "answer": "4" if kind == "counting" else "A",
             "pair_id": "p" if kind == "existence" else None}
            for kind in ("position", "size", "rotation", "counting", "existence") for n in range(2)
        ],
        ["A", "A", "A", "B", "A", "", "3", "9", "A", "B"],
        "macro",
    ),
}  # fmt: skip
"""Functions of the task files -> benchmark, rows, answers, aggregation."""


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_the_tasks_are_those_of_our_scorer(name, tmp_path):
    bench, rows, answers, aggregation = SCORED[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load_benchmark(bench, path).items
    predictions = {item.key: Prediction(item.id, t) for item, t in zip(items, answers, strict=True)}
    expected = score(load_benchmark(bench, path), predictions, "lmms").headline["value"]
    utils = task_functions()
    process = getattr(utils, f"{name}_process")
    found = [process(row, [text])["score"] for row, text in zip(rows, answers, strict=True)]
    assert getattr(utils, aggregation)(found) == pytest.approx(expected, abs=1e-9)
    assert expected not in (0, 100)


def test_sample_logs_hold_row_numbers(tmp_path, capsys):
    """lmms-eval writes no ids: its numbers count the rows of the file."""
    bench, rows, answers, _ = SCORED["angles"]
    data, log = tmp_path / "rows.jsonl", tmp_path / "x_samples_y.jsonl"
    data.write_text(
        "".join(json.dumps({**row, "index": f"q{n}"}) + "\n" for n, row in enumerate(rows))
    )
    lines = [{"doc_id": n, "filtered_resps": [text]} for n, text in enumerate(answers)]
    log.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    command = [
        "score",
        "--bench",
        bench,
        "--data",
        str(data),
        "--pred",
        str(log),
        "--format",
        "lmms",
    ]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "66.67" in told.out
    assert "row numbers" in told.err
    log.write_text(json.dumps({"doc_id": 3, "filtered_resps": ["A"]}) + "\n")
    assert main(command) == 1
    assert "row 3" in capsys.readouterr().err


class Docs(list):
    """The one method of a data set that task files use."""

    def filter(self, keep):
        return Docs(doc for doc in self if keep(doc))


def test_rows_without_a_score_are_not_asked(tmp_path, capsys):
    """lmms-eval numbers the rows that our engine asks; ``--ids`` and a limited log change no number."""
    _, rows, _, _ = SCORED["rows"]
    rows = [{**rows[0], "id": "caption", "task": "scene_caption"}, *rows]
    task = yaml.load((TASKS / "spatialvlm_jsonl.yaml").read_text(), Loader=TaskLoader)
    chosen = getattr(task_functions(), task["process_docs"][1].removeprefix("utils."))
    asked = [row["id"] for row in chosen(Docs(rows))]
    data, log, ids = (tmp_path / name for name in ("rows.jsonl", "x_samples_y.jsonl", "ids.txt"))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert asked == [item.id for item in load_benchmark("spatialvlm_rows", data).items]

    lines = [{"doc_id": n, "filtered_resps": ["yes" if n == 2 else "no"]} for n in range(4)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids.write_text("2 3")
    command = ["score", "--bench", "spatialvlm_rows", "--data", str(data), "--pred", str(log)]
    assert (
        main([*command, "--format", "lmms", "--ids", str(ids), "--out", str(tmp_path / "o")]) == 0
    )
    with (tmp_path / "o" / "per_item.csv").open() as file:
        assert {r["id"]: float(r["score"]) for r in csv.DictReader(file)} == {"2": 1.0, "3": 0.0}
    capsys.readouterr()


def test_answers_by_row_number():
    items = [Item(name, "text", "x", "t", name) for name in ("a", "b", "c")]
    found = by_row_number(
        items, {("2", ""): Prediction("2", "two"), ("0", ""): Prediction("0", "")}
    )
    assert {key: answer.text for key, answer in found.items()} == {("c", ""): "two", ("a", ""): ""}
    for bad in ("3", "-1", "b"):
        with pytest.raises(DataError, match=f"answers row {bad}, the benchmark file has 3 items"):
            by_row_number(items, {(bad, ""): Prediction(bad, "")})
