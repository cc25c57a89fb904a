"""Evaluation between training steps: scalars, best step, random states, several processes."""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spatialvlm.errors import BudgetError
from spatialvlm.evaluation.generate import Completion
from spatialvlm.evaluation.registry import BENCHMARKS, load_benchmark
from spatialvlm.evaluation.while_training import BenchmarkProbe, together


class Alone:
    rank, size = 0, 1
    elsewhere = None
    """Error of an imagined other rank."""

    def gather(self, value):
        return [value, self.elsewhere]

    def barrier(self):
        pass

    def on_main(self, function):
        return function()


class Engine:
    """Weights are whole only inside the pause."""

    whole = False

    @contextmanager
    def whole_weights(self):
        self.whole = True
        try:
            yield
        finally:
            self.whole = False


ENGINE = Engine()


class Model:
    """Right for the first ``right`` questions; draws random numbers as a sampler would."""

    def __init__(self):
        self.right = 0

    def prepare(self, group):
        return group

    def generate(self, prepared, config):
        assert ENGINE.whole
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        numbers = [[int(m[-1]["content"][-1]["text"].split()[-1]) for m in g] for g in prepared]
        return [
            [Completion("yes" if n < self.right else "no", 1) for n in group] for group in numbers
        ]


@pytest.fixture
def probe(tmp_path):
    rows = [
        {
            "id": f"q{n}",
            "messages": [
                {"role": "user", "content": f"Is it {n}"},
                {"role": "assistant", "content": "Yes"},
            ],
            "images": [],
            "media_kind": "none",
            "task": f"task{n % 2}",
            "answer_type": "yesno",
            "answer_json": "true",
            "options": [],
            "scene_id": f"s{n}",
        }
        for n in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, calls = Model(), []
    found = BenchmarkProbe(
        [load_benchmark("spatialvlm_rows", path)],
        lambda _: model,
        tmp_path / "eval",
        Alone(),
        restore=lambda: calls.append("train"),
        select="spatialvlm_rows",
        on_best=lambda: calls.append("best" if ENGINE.whole else "cut"),
    )
    return found, model, calls


def test_scalars_best_step_and_modes(probe, tmp_path):
    run, model, calls = probe
    values = []
    for step, right in ((10, 4), (20, 8), (30, 6), (40, 8)):
        model.right = right
        values.append(run(SimpleNamespace(step=step), ENGINE)["eval/spatialvlm_rows"])
    assert values == pytest.approx([40, 80, 60, 80])
    assert calls == ["train", "best", "train", "best", "train", "train"]
    best = json.loads((tmp_path / "eval" / "best.json").read_text())
    assert best == {"step": 20, "benchmark": "spatialvlm_rows", "value": 80.0}
    assert (tmp_path / "eval" / "step_00000030" / "spatialvlm_rows" / "result.json").is_file()


def test_the_best_step_of_an_error_is_the_lowest(probe, tmp_path):
    run = probe[0]
    (tmp_path / "eval").mkdir()
    kept = []
    for step, value in enumerate((float("nan"), 2.0, 1.5, 3.0, float("nan"))):
        run._mark(step, value, lower=True)
        path = tmp_path / "eval" / "best.json"
        kept.append(json.loads(path.read_text())["step"] if path.is_file() else None)
    assert kept == [None, 1, 2, 2, 2]
    errors = {name for name, spec in BENCHMARKS.items() if spec.lower_is_better}
    assert errors == {"localcogmap", "globalmap"}


def test_a_full_disk_leaves_the_best_step_readable(probe, tmp_path, monkeypatch):
    run, path = probe[0], tmp_path / "eval" / "best.json"
    path.parent.mkdir()
    run._mark(1, 1.0, lower=False)
    before = path.read_text()

    def half(self, text, **options):
        self.open("w").write(text[:5])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        run._mark(2, 2.0, lower=False)
    assert path.read_text() == before


def test_types_are_logged(probe):
    run, model, _ = probe
    model.right = 1
    scalars = run(SimpleNamespace(step=1), ENGINE)
    assert scalars.pop("evaluation/pause_s") > 0
    assert scalars == {
        "eval/spatialvlm_rows": 10,
        "eval/spatialvlm_rows/task0": 20,
        "eval/spatialvlm_rows/task1": 0,
    }


def test_curves_reach_every_tracker(probe, tmp_path):
    """JSON lines, TensorBoard and offline wandb hold the same scores, under the step that was just trained."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from spatialvlm.training.recorder import Recorder
    from spatialvlm.training.trackers import JsonLines, TensorBoard, Trackers, read_metrics

    run, model, _ = probe
    sent = []
    wandb = SimpleNamespace(log=lambda step, scalars: sent.append((step, dict(scalars))))
    trackers = Trackers(
        [JsonLines(tmp_path / "metrics.jsonl", attempt=0), TensorBoard(tmp_path / "tb"), wandb]
    )
    recorder = Recorder.__new__(Recorder)
    recorder.trackers = trackers
    for step, right in ((10, 4), (20, 8)):
        model.right = right
        state = SimpleNamespace(step=step)
        recorder.evaluation(state, run(state, ENGINE))
    trackers._live[1].close()
    name = "eval/spatialvlm_rows"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line[name]) for line in lines] == [(9, 40), (19, 80)]
    assert [(step, scalars[name]) for step, scalars in sent] == [(9, 40), (19, 80)]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars(name)] == [(9, 40), (19, 80)]


def test_an_error_on_another_rank_ends_the_pause_here_too(probe):
    run, _, calls = probe
    run.ranks.elsewhere = BudgetError("too many unreadable items")
    with pytest.raises(BudgetError, match="unreadable"):
        run(SimpleNamespace(step=1), ENGINE)
    assert calls == ["train"]  # the model is in training mode again
    assert not ENGINE.whole


def test_random_states_are_put_back(probe):
    run, _, _ = probe
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    run(SimpleNamespace(step=1), ENGINE)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_together():
    assert together(None, None) is None
    both = together(lambda s, e: {"a": 1.0}, None, lambda s, e: {"b": 2.0})
    assert both(None, None) == {"a": 1.0, "b": 2.0}


@pytest.mark.smoke
def test_weights_are_whole_inside_the_pause_and_training_does_not_notice(tmp_path):
    """ZeRO-2, ZeRO-3 and FSDP2 on two processes; also after a pause that ended with an error."""
    worker = Path(__file__).with_name("whole_weights_worker.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(worker), str(tmp_path / "result.json")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"zero2", "zero3", "fsdp2"}
    for strategy, found in result.items():
        assert found == {"whole": True, "equal": True, "same": True}, strategy
