"""The loop itself on a small model: skips, stops, empty steps, data faults, failed saves, and what is recorded."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from spatialvlm.errors import CheckpointError, DataError, NonFiniteError, OutOfMemoryError
from spatialvlm.models.device import HOST_READ, to_device
from spatialvlm.training.checkpoint import CheckpointStore, Snapshot
from spatialvlm.training.checkpoint_files import checkpoints_in
from spatialvlm.training.distributed import Processes, StepHeader, exchange
from spatialvlm.training.engines import make_engine
from spatialvlm.training.finish import describe_end
from spatialvlm.training.guard import Guard
from spatialvlm.training.loop import Fetcher, Run, train
from spatialvlm.training.loss import LossSums
from spatialvlm.training.metrics import Interval, Meter, pack_size
from spatialvlm.training.optim import make_schedule
from spatialvlm.training.progress import describe
from spatialvlm.training.recorder import Recorder
from spatialvlm.training.saver import Saver
from spatialvlm.training.signals import StopFlag
from spatialvlm.training.state import RunFolder, TrainState
from spatialvlm.training.trackers import JsonLines, Trackers
from spatialvlm.training.watchdog import Heartbeat, Watchdog, diagnose
from spatialvlm.typing import Batch, CostCoefficients
from tests.unit.training.fakes import FakeLoader, FakeVLM, make_batch, prepare

ONE = Processes(0, 1, torch.device("cpu"))


class Bench:
    """Everything `train` needs around a fake model."""

    def __init__(
        self, folder, loader, *, steps=8, every=3, on_error="retry", guard=None, background=False
    ):
        model = FakeVLM()
        _, groups, factory = prepare(model)
        self.engine = make_engine("ddp", model, groups, factory, ONE, max_grad_norm=1.0, bf16=False)
        self.folder = RunFolder(folder, private=False)
        self.folder.open()
        self.guard = guard or Guard()
        self.state = TrainState()
        self.store = CheckpointStore(folder / "checkpoints", ONE)
        snapshot = lambda state: Snapshot(state.to_json(), self.guard.state_dict(), "", {})  # noqa: E731
        self.save = Saver(
            self.store, snapshot, every=every, on_error=on_error, background=background
        )
        sums = LossSums(("a", "b"), ("spatial", "general"), (), ONE.device)
        meter = Meter(ONE, sums, total_steps=steps, max_tokens=64, peak=None)
        self.trackers = Trackers([JsonLines(folder / "metrics.jsonl", attempt=1)])
        self.record = Recorder(
            ONE, meter, trackers=self.trackers, progress=None, guard=self.guard, folder=self.folder, log_every=4,
            total_steps=steps, cost=CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0), save=self.save, max_grad_norm=1.0,
        )  # fmt: skip
        self.run = Run(ONE, make_schedule("constant", steps, warmup_steps=0))
        self.stop = StopFlag()
        self.watch = Watchdog(folder, 0, 1, timeout_s=60, first_timeout_s=60)
        self.steps = Fetcher(loader, ONE.device)
        self.path = folder

    def train(self, **kwargs):
        return train(
            self.run, self.state, self.engine, self.steps, record=self.record, save=self.save, guard=self.guard,
            stop=self.stop, watch=self.watch, **kwargs,
        )  # fmt: skip

    def lines(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def weights(self):
        return {k: v.clone() for k, v in self.engine.model.state_dict().items()}


def test_a_run_counts_logs_and_saves(tmp_path):
    bench = Bench(tmp_path, FakeLoader())
    assert bench.train() == "finished"
    state = bench.state
    assert (state.step, state.adam_step, state.samples, state.skipped) == (8, 8, 32, 0)
    assert state.loader == {"step": 8}
    assert [line["step"] for line in bench.lines()] == [
        0,
        1,
        2,
        3,
        4,
        7,
    ]  # five first ones, then every fourth
    assert [p.name for p in checkpoints_in(tmp_path / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]
    last = bench.lines()[-1]
    assert (
        last["tokens"] == sum(8 + 3 * i for i in range(4)) * 3
    )  # three steps since the line before
    assert last["loss/source/a"] != last["loss/source/b"]
    weighted = [last["loss/family/spatial"], last["loss/family/general"]]
    assert min(weighted) < last["loss"] < max(weighted)
    assert last["optimizer_s"] > 0
    assert last["forward_backward_s"] > 0
    assert last["straggler"] == 0


def test_a_non_finite_step_changes_nothing_and_names_its_samples(tmp_path):
    bench = Bench(tmp_path, FakeLoader(poison={(2, 1)}), steps=3)
    bench.run = Run(ONE, bench.run.schedule, stop_after_steps=2)
    assert bench.train() == "preempted"
    before, moments = (
        bench.weights(),
        bench.engine.optimizer.state_dict()["state"][0]["exp_avg"].clone(),
    )
    bench.run, bench.stop = Run(ONE, bench.run.schedule), StopFlag()
    bench.steps = Fetcher(FakeLoader(poison={(2, 1)}, start=2), ONE.device)
    assert bench.train() == "finished"
    assert all(torch.equal(v, before[k]) for k, v in bench.weights().items())
    assert torch.equal(moments, bench.engine.optimizer.state_dict()["state"][0]["exp_avg"])
    assert (bench.state.step, bench.state.adam_step, bench.state.skipped) == (3, 2, 1)
    records = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    bad = [r for r in records if not r["loss_finite"]]
    assert [(r["step"], r["micro_step"], r["uids"]) for r in bad] == [(2, 1, ["fake#201"])]


def test_five_bad_steps_in_a_row_end_the_run_with_a_diagnosis(tmp_path):
    bench = Bench(tmp_path, FakeLoader(poison={(s, 0) for s in range(3, 9)}), steps=12)
    with pytest.raises(NonFiniteError, match=r"steps 3-7 .*All parameters are finite") as caught:
        bench.train()
    assert "Every output was finite" in str(caught.value)  # the poison sits in the loss weights
    assert [p.name for p in checkpoints_in(tmp_path / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]


def test_an_infinite_weight_is_named(tmp_path):
    bench = Bench(tmp_path, FakeLoader(), guard=Guard(max_skipped_in_row=1))
    with torch.no_grad():
        bench.engine.model.layers[1].linear.weight[0, 0] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"First bad output: layers\.1.*\['layers\.1\.linear\.weight'\]"
    ):
        bench.train()


def test_nan_from_the_geometry_branch_ends_the_run_at_the_log_line(tmp_path, monkeypatch):
    bench = Bench(tmp_path, FakeLoader(), steps=12)
    plain = FakeVLM.forward

    def forward(self, batch):
        value = float("nan") if batch["uids"] == ["fake#602"] else 0.5
        return plain(self, batch)._replace(geometry_norm_ratio=torch.tensor([value, 1.0]))

    monkeypatch.setattr(FakeVLM, "forward", forward)
    with pytest.raises(
        NonFiniteError, match=r"nan in steps 5-7: .* samples \['fake#602'\] on rank 0\. Look"
    ):
        bench.train()
    assert bench.state.step == 8
    assert bench.lines()[-1]["geometry/norm_ratio"] == 0.5
    assert bench.lines()[-1]["step"] == 4


def test_clipping_is_a_share_of_the_steps_whose_norms_were_read(tmp_path):
    """Under ZeRO these are the steps that end an interval."""
    bench = Bench(tmp_path, FakeLoader())
    every = bench.engine.grad_norms
    bench.record.max_grad_norm = 0.0

    def as_zero(*, due):
        bench.engine._norms = every(due=True)
        return bench.engine._norms if due else None

    apply = bench.engine.step
    bench.engine.grad_norms = as_zero
    bench.engine.step = lambda norms: apply(bench.engine._norms)
    assert bench.train() == "finished"
    assert [line["clipped"] for line in bench.lines()] == [1.0] * 6


def test_evaluation_is_no_time_of_a_step(tmp_path, monkeypatch):
    """One second of evaluation on a clock that stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    bench = Bench(tmp_path, FakeLoader(), steps=4, every=9)
    bench.run = Run(ONE, bench.run.schedule, eval_every=2)
    meter = bench.record.meter
    meter.gemm, meter.interval = 1.0, Interval(started=0.0)

    def evaluate(state, engine):
        now[0] += 1.0
        return {"eval/loss": 1.0}

    assert bench.train(eval_fn=evaluate) == "finished"
    assert [line["step_s"] for line in bench.lines() if "loss" in line] == pytest.approx(
        [0.0] * 4, abs=1e-6
    )
    assert bench.state.wall_s == 1.0  # the evaluation after the last step is after the last line


def test_the_printed_summary_says_what_happened_and_where_it_is():
    values = {
        "outcome": "finished", "steps": 2000, "samples": 16000, "tokens": 3_200_000, "tokens_per_s": 4437.1, "mfu": 0.412, "mfu_gemm": 0.7,
        "wall_s": 721.0, "device_hours": 1.6, "final": {"loss": 0.3712}, "skipped": 1, "empty": 0, "spikes": 3,
        "faults": {"media": 2.0}, "checkpoint": "checkpoints/step-00002000", "export": "final",
    }  # fmt: skip
    assert describe_end(Path("runs/a"), values).splitlines() == [
        "finished at step 2,000: 16,000 samples, 3,200,000 tokens in 12:01 (1.60 device hours, 4,437 tokens/s, MFU 41.2%)",
        "last loss 0.3712; steps: 1 skipped, 0 empty, 3 spikes; broken samples: 2",
        "checkpoint runs/a/checkpoints/step-00002000",
        "model runs/a/final",
    ]
    stopped = values | {"mfu": None, "mfu_gemm": 0.6, "outcome": "preempted", "export": None}
    text = describe_end(Path("runs/a"), stopped)
    assert text.startswith("preempted at step 2,000")
    assert "60% of this machine's matrix products" in text
    assert "model" not in text


def test_progress_shows_the_utilisation_that_is_known():
    line = {
        "loss": 0.5,
        "lr/lora": 1e-4,
        "tokens_per_s": 4437.0,
        "mfu_gemm": 0.61,
        "data_wait": 0.02,
        "eta_s": 3723.0,
    }
    assert (
        describe(line) == "loss 0.5000  lr 1.00e-04  4,437 tok/s  61% of gemm  wait 2%  eta 1:02:03"
    )
    assert "tok/s  mfu 41.2%  wait" in describe(line | {"mfu": 0.412})


def test_tensors_read_on_the_host_stay_there():
    batch = make_batch(0)
    moved = to_device(batch, torch.device("meta"))
    stayed = {k for k, v in moved.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    assert stayed == HOST_READ & set(batch) == {
        "segment_start", "segment_len", "segment_parent", "media_grid_thw",
    }  # fmt: skip
    assert moved["uids"] is batch["uids"]
    assert set(Batch.__annotations__) >= HOST_READ
    assert to_device(batch, torch.device("cpu")) is batch


def test_steps_without_labels_are_counted_not_trained(tmp_path):
    class Empty(FakeLoader):
        def __iter__(self):
            for step in super().__iter__():
                step.batches, step.denominator_local, step.label_tokens = (
                    [make_batch(1, labels=0)],
                    0.0,
                    0,
                )
                yield step

    bench = Bench(tmp_path, Empty(), steps=3)
    before = bench.weights()
    assert bench.train() == "finished"
    assert (bench.state.empty, bench.state.adam_step, bench.state.samples) == (3, 0, 0)
    assert all(torch.equal(v, before[k]) for k, v in bench.weights().items())


def test_a_data_fault_and_an_early_end_stop_the_run(tmp_path):
    class Broken(FakeLoader):
        def __iter__(self):
            yield from ()
            raise DataError("row 7 of x.jsonl is broken")

    with pytest.raises(DataError, match="row 7"):
        Bench(tmp_path / "a", Broken()).train()

    class Short(FakeLoader):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="ended before the last planned step"):
        Bench(tmp_path / "b", Short()).train()


def test_a_signal_saves_at_the_next_border(tmp_path):
    bench = Bench(tmp_path, FakeLoader())
    bench.stop.install()
    try:

        def send(state, engine):
            os.kill(os.getpid(), signal.SIGUSR1)
            return {}

        bench.run = Run(ONE, bench.run.schedule, eval_every=4)
        assert bench.train(eval_fn=send) == "preempted"
    finally:
        bench.stop.uninstall()
    assert bench.stop.name == "SIGUSR1"
    assert bench.state.step == 4
    state = json.loads(
        (tmp_path / "checkpoints" / "step-00000004" / "train_state.json").read_text()
    )
    assert state["counters"]["loader"] == {
        "step": 4
    }  # the step that was fetched but not trained comes again


def test_background_saves_hold_what_waiting_saves_hold(tmp_path):
    digests = []
    for background in (False, True):
        bench = Bench(tmp_path / str(background), FakeLoader(), background=background)
        bench.train()
        bench.save(bench.state, bench.engine, final=True)
        assert not bench.save.written()
        folder = tmp_path / str(background) / "checkpoints"
        digests.append(
            {
                f"{path.name}/{file.name}": file.read_bytes()
                for path in checkpoints_in(folder)
                for file in path.glob("*.safetensors")
            }
        )
    assert digests[0] == digests[1]
    assert {name.split("/")[0] for name in digests[0]} == {"step-00000006", "step-00000008"}


def test_a_full_disk_during_a_background_save_is_survived_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPATIALVLM_FAULT", "save.write@3:0:nospace")
    bench = Bench(tmp_path, FakeLoader(), background=True)
    assert bench.train() == "finished"
    assert "Training goes on; next try after step" in capsys.readouterr().err
    bench.save(bench.state, bench.engine, final=True)
    assert checkpoints_in(tmp_path / "checkpoints")[-1].name == "step-00000008"


def test_a_full_disk_is_survived_twice_then_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPATIALVLM_FAULT", "save.write@3:0:nospace")
    bench = Bench(tmp_path / "once", FakeLoader())
    assert bench.train() == "finished"
    assert [p.name for p in checkpoints_in(tmp_path / "once" / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]
    assert "next try after step 4" in capsys.readouterr().err
    broken = Bench(tmp_path / "always", FakeLoader())
    monkeypatch.setattr(
        "spatialvlm.training.checkpoint.fault_point",
        lambda name, **_: (
            (_ for _ in ()).throw(OSError(28, "No space left")) if name == "save.write" else None
        ),
    )
    with pytest.raises(CheckpointError, match="Older checkpoints are untouched"):
        broken.train()
    assert broken.state.step == 6  # tried after 3, 4 and 6
    with pytest.raises(CheckpointError):
        Bench(tmp_path / "stop", FakeLoader(), on_error="stop").train()


def test_out_of_memory_names_the_step_the_samples_and_what_to_lower(tmp_path, monkeypatch):
    bench = Bench(tmp_path, FakeLoader())
    bench.run = Run(ONE, bench.run.schedule, expected_gb=61.5)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(bench.engine), "__call__", full)
    with pytest.raises(
        OutOfMemoryError,
        match=r"step 0: pack of 8 tokens, samples \['fake#0'\], peak 0\.0 GB \(61\.5 GB were expected\)\. Lower packing\.max_tokens",
    ):
        bench.train()


def test_header_sums_and_pack_sizes():
    assert exchange(ONE, StepHeader(denominator=3.0, stop=1.0)) == StepHeader(
        denominator=3.0, stop=1.0
    )
    batch = make_batch(3, length=12, labels=4)
    batch["segment_start"] = torch.tensor([0, 6, 9], dtype=torch.int32)
    batch["segment_len"] = torch.tensor([6, 3, 3], dtype=torch.int32)
    batch["segment_parent"] = torch.tensor([-1, 0, 0], dtype=torch.int32)
    size = pack_size(batch)
    assert (size.tokens, size.pairs, size.label_tokens) == (12, 21 + 2 * (6 + 18), 4)
    assert size.saved == 6  # two branches read their prefix of 6 once
    assert (size.patches, size.patch_pairs) == (3, 9)
    dummy = pack_size(make_batch(1, labels=0))
    assert (dummy.samples, dummy.tokens, dummy.head_rows) == (0, 0, 0)


def test_the_late_rank_is_the_one_behind():
    beats = [Heartbeat(r, "n", 812, 1, "backward", (), 90.0) for r in range(4)]
    beats[2] = Heartbeat(2, "node3", 812, 0, "data", ("vsi#4417",), 40.0)
    text = diagnose(beats, 60.0, 100.0)
    assert "Rank 2 (node3) is in 'data' of step 812 since 60 s, samples [vsi#4417]" in text
    assert "3 ranks wait in 'backward' of step 812" in text


def test_watchdog_is_patient_while_saving(tmp_path):
    watch = Watchdog(tmp_path, 0, 1, timeout_s=10, first_timeout_s=100, patient_s=1000)
    assert watch.limit() == 100
    watch.at(1, "forward")
    assert watch.limit() == 10
    watch.at(1, "save")
    assert watch.limit() == 1000
