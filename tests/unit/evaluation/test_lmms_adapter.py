"""The lmms-eval adapter without lmms-eval: messages, order, errors, task files."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from spatialvlm.errors import ConfigError
from spatialvlm.evaluation import lmms_adapter as adapter
from spatialvlm.evaluation.generate import Completion
from spatialvlm.evaluation.prompts import prompt_text
from spatialvlm.evaluation.registry import find_spec

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
    monkeypatch.setattr(adapter, "require_lmms", lambda: SimpleNamespace(__version__="0.9"))
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
        assert 'pip install "spatialvlm[lmms]"' in capsys.readouterr().err
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
    one = {"type": "a", "score": 1.0, "cluster": "s"}
    assert utils.macro([one, one, {**one, "type": "b", "score": 0.0}]) == 50.0
