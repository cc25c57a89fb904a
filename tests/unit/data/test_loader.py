"""Steps: complete, equal for every world size and worker count, resumable by one integer."""

import json
import shutil

import numpy as np
import pytest
import torch

from spatialvlm.data.build import build_data
from spatialvlm.data.sample import World
from spatialvlm.errors import ConfigError, DataError, MarkError, StateError
from spatialvlm.models.build import build_layout
from spatialvlm.typing import CostCoefficients

COST = CostCoefficients(
    per_token=1e6, per_pair=1e2, per_head_row=1e5, per_patch=1e5, per_patch_pair=10.0
)


def build(config, folder, world=None, state=None, **options):
    return build_data(
        config, folder, build_layout(folder), COST, world or World(), state=state, **options
    )


def uids(step):
    return sorted(uid for batch in step.batches for uid in batch["uids"])


def equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


@pytest.mark.parametrize("family", ["qwen2_5vl", "qwen3vl", "internvl3"])
def test_batches_are_well_formed(family, tiny_checkpoint, toy_config):
    loader = build(toy_config(), tiny_checkpoint(family))
    steps = list(loader)
    assert len(steps) == loader.num_steps == 5
    shared = 0
    for step in steps:
        assert len(uids(step)) == 12
        total = 0
        for batch in step.batches:
            size = batch["input_ids"].shape[1]
            assert size <= 700
            assert batch["segment_len"].sum() == size
            assert torch.equal(
                batch["segment_start"], batch["segment_len"].cumsum(0) - batch["segment_len"]
            )
            assert (batch["labels"][0, batch["segment_start"].long()] == -100).all()
            supervised = (batch["labels"][0] != -100).nonzero()[:, 0]
            assert torch.equal(supervised, batch["logit_index"] + 1)
            assert torch.equal(batch["labels"][0, supervised], batch["target_ids"])
            assert (batch["token_kind"][0, supervised] == 0).all()
            visual = ((batch["token_kind"] == 1) | (batch["token_kind"] == 2)).sum()
            assert visual == batch["media_grid_thw"].prod(1).sum() // 4
            assert batch["frames_u8"].numel() == batch["frame_shapes"].prod(1).sum() * 3
            shared += int((batch["segment_parent"] >= 0).sum())
            total += len(supervised)
        assert total == step.label_tokens == step.denominator_local
        assert step.shares.samples["family/spatial"] == 6
        assert step.plan.flags[-1].boundary
    assert shared > 10


def test_plan_does_not_depend_on_rank_and_covers_the_step(tiny_checkpoint, toy_config):
    folder, config = tiny_checkpoint("qwen3vl"), toy_config()
    alone = build(config, folder)
    ranks = [build(config, folder, World(rank, 3)) for rank in range(3)]
    for step, (whole, *parts) in enumerate(zip(alone, *ranks, strict=True)):
        assert len({part.plan for part in parts}) == 1
        assert len({len(part.batches) for part in parts}) == 1
        assert sorted(uid for part in parts for uid in uids(part)) == uids(whole)
        assert sum(part.denominator_local for part in parts) == whole.denominator_local
        if step == 2:
            break


def test_workers_change_nothing(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen2_5vl")
    inline = list(build(toy_config(), folder))
    with_two = list(build(toy_config(loader={"num_workers": 2, "prefetch_steps": 2}), folder))
    for a, b in zip(inline, with_two, strict=True):
        assert a.plan == b.plan
        for x, y in zip(a.batches, b.batches, strict=True):
            equal(x, y)


def test_resume_continues_exactly(tiny_checkpoint, toy_config):
    folder, config = tiny_checkpoint("qwen3vl"), toy_config()
    loader = build(config, folder)
    whole, states = [], []
    for step in loader:
        whole.append(step)
        states.append(loader.state_dict())
    for done, state in enumerate(states):
        rest = list(build(config, folder, state=state))
        assert [s.plan.step for s in rest] == list(range(done + 1, 5))
        for a, b in zip(rest, whole[done + 1 :], strict=True):
            for x, y in zip(a.batches, b.batches, strict=True):
                equal(x, y)
    other_world = build(config, folder, World(1, 2), state=states[0])
    assert set(uids(next(iter(other_world)))) < set(uids(whole[1]))


def test_state_of_another_order_is_refused(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    state = build(toy_config(), folder).state_dict()
    with pytest.raises(StateError, match="seed"):
        build(toy_config(data={"seed": 1}), folder, state=state)
    with pytest.raises(StateError, match="version"):
        build(toy_config(), folder, state=state | {"version": 99})


def test_a_run_can_go_on_in_another_order(tiny_checkpoint, toy_config, caplog):
    """What the error recommends: the position stays, the draws behind it are those of the new order."""
    folder = tiny_checkpoint("qwen3vl")
    loader = build(toy_config(), folder)
    next(iter(loader))
    state = loader.state_dict()
    other = toy_config(data={"seed": 1})
    rest = list(build(other, folder, state=state, new_order=True))
    assert "continuing at position 12 of a new order; differing: seed" in caplog.text
    expected = list(build(other, folder))[1:]
    assert [step.plan.step for step in rest] == [1, 2, 3, 4]
    assert [uids(step) for step in rest] == [uids(step) for step in expected]


def test_packs_of_a_window_are_not_counted_in_another_packing(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    small, large = (toy_config(step=PACKS, packing={"max_tokens": n}) for n in (300, 400))
    loader = build(small, folder)
    inside, between = None, None
    for _ in loader:
        state = loader.state_dict()
        if state["pack"]:
            inside = state
        else:
            between = between or state
    with pytest.raises(StateError, match=r"differing: packs \(of packing, step\.lookahead"):
        build(large, folder, state=inside)
    fresh = build(large, folder, state=inside, new_order=True)
    assert fresh.state_dict()["position"] == inside["position"] + 20
    assert fresh.state_dict()["pack"] == 0
    assert build(large, folder, state=between).state_dict()["position"] == between["position"]


def test_tail(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    step = {"global_batch_size": 16}
    assert len(list(build(toy_config(step=step), folder))) == 3
    padded = list(build(toy_config(step=step, data={"tail": "pad"}), folder))
    assert [len(uids(s)) for s in padded] == [16] * 4


def test_separate_compute_keeps_the_samples(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    shared = next(iter(build(toy_config(), folder)))
    separate = next(iter(build(toy_config(shared_prefix={"compute": "separate"}), folder)))
    assert [b["uids"] for b in shared.batches] == [b["uids"] for b in separate.batches]
    assert all((b["segment_parent"] == -1).all() for b in separate.batches)
    assert sum(b["input_ids"].numel() for b in separate.batches) > sum(
        b["input_ids"].numel() for b in shared.batches
    )
    assert shared.label_tokens == separate.label_tokens


def test_media_of_a_group_are_sent_once(tiny_checkpoint, toy_config):
    for step in build(toy_config(), tiny_checkpoint("qwen3vl")):
        for batch in step.batches:
            roots = int((batch["segment_parent"] == -1).sum())
            assert len(batch["media_kind"]) <= 2 * roots


def test_overlong_rows_leave_the_order(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    tokens = build(toy_config(), folder).lengths.records[0]["tokens"]
    limit = int(np.sort(tokens)[-11])  # the ten longest are too long
    config = toy_config(packing={"max_length": limit}, data={"max_rejected_fraction": 0.5})
    said = []
    loader = build(config, folder, report=said.append)
    assert loader.lengths.rejected(0) == {"overlong": 10}
    wanted = f"source sp: 10 of 30 rows have more than packing.max_length={limit} tokens; left out"
    assert wanted in said
    too_long = {f"sp/spatial#{row}" for row in np.flatnonzero(tokens > limit)}
    for step in loader:
        assert not too_long & set(uids(step))


@pytest.mark.parametrize("lengths", ["exact", "lazy"])
def test_shortened_samples_are_counted(tiny_checkpoint, toy_config, tmp_path, lengths):
    """Said and recorded before the first step when lengths are known, with every step in any case."""
    folder = tiny_checkpoint("qwen3vl")
    tokens = build(toy_config(), folder).lengths.records[0]["tokens"]
    data = {"overlong": "drop_frames", "media": {"min_frames": 2}, "lengths": lengths}
    limit = int(np.max(tokens)) - 1  # only videos, of three frames, are that long
    said = []
    config = toy_config(
        packing={"max_length": limit}, data=data | {"index_dir": str(tmp_path / "other")}
    )
    loader = build(config, folder, report=said.append)
    found = [step.shares.notes.get("sp/frames_dropped", 0) for step in loader]
    records = loader.lengths.records[0]
    shortened = int(np.sum(records["tokens_removed"] > 0))
    assert 0 < shortened <= sum(found)
    *_, record = json.loads((tmp_path / "data.json").read_text()).values()
    record = record["sources"]["sp"]
    if lengths == "exact":
        removed = int(records["tokens_removed"].sum())
        text = f"(frames_dropped {shortened}; {removed} tokens removed)"
        assert said == ["measuring 30 rows of sp", f"source sp: data.overlong shortened rows {text}",
                        "measuring 14 rows of ge"]  # fmt: skip
        assert record["shortened"] == {"frames_dropped": shortened}
        assert (record["measured"], record["tokens_removed"]) == (30, removed)
    else:
        assert record["measured"] == 0


def test_changed_file_is_noticed(tiny_checkpoint, toy_config, tmp_path, toy_data):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    source = {"name": "sp", "family": "spatial", "files": ["spatial.jsonl"], "root": str(copy)}
    config = toy_config(sources=[source], data={"families": {"spatial": 1}})
    loader = build(config, tiny_checkpoint("qwen3vl"))
    from PIL import Image

    for path in copy.glob("s*/*.png"):
        Image.open(path).resize((250, 250)).save(path)
    for store, _ in loader.lengths.encoder.media:
        store._headers.clear()
    with pytest.raises(DataError, match=r"planned with \d+"):
        list(loader)


def test_loss_weights(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    for weighting, expected in [("sample", 12.0), ("sqrt", None), ("token", None)]:
        step = next(iter(build(toy_config(data={"loss_weighting": weighting}), folder)))
        sums = torch.cat([
            torch.zeros(len(b["uids"])).index_add(0, b["sample_index"], b["loss_weight"]) for b in step.batches
        ])  # fmt: skip
        assert float(sums.sum()) == pytest.approx(step.denominator_local, rel=1e-5)
        if expected:
            assert step.denominator_local == pytest.approx(expected)
            assert np.allclose(sums, 1.0)


def test_alignment_pads_with_an_isolated_segment(tiny_checkpoint, toy_config):
    step = next(iter(build(toy_config(packing={"align": 64}), tiny_checkpoint("qwen3vl"))))
    for batch in step.batches:
        assert batch["input_ids"].shape[1] % 64 == 0
        assert batch["segment_parent"][-1] == -1


def test_more_ranks_than_packs_get_dummies(tiny_checkpoint, toy_config):
    config = toy_config(step={"global_batch_size": 16}, packing={"max_tokens": 16000})
    steps = [next(iter(build(config, tiny_checkpoint("qwen3vl"), World(r, 16)))) for r in (0, 15)]
    empty = [batch for step in steps for batch in step.batches if not batch["uids"]]
    assert empty
    for batch in empty:
        assert batch["input_ids"].shape == (1, 1)
        assert batch["loss_weight"].tolist() == [0.0]
        assert batch["frames_u8"].numel() == 0


def test_boxes_in_the_backbones_convention(tiny_checkpoint, toy_data, toy_config, tmp_path):
    import json

    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    row = {
        "messages": [
            {"role": "user", "content": "<image>box?"},
            {"role": "assistant", "content": '{"bbox_2d": [0, 0, 90, 75]}'},
        ],
        "images": ["g.png"],
    }
    (copy / "boxes.jsonl").write_text(json.dumps(row) + "\n")
    source = {
        "name": "b",
        "family": "spatial",
        "files": ["boxes.jsonl"],
        "root": str(copy),
        "coords": "abs_source",
    }
    said = []
    for family, expected in [("qwen3vl", "[0, 0, 1000, 500]"), ("qwen2_5vl", "[0, 0, 84, 70]")]:
        for mode, text in [("keep", "[0, 0, 90, 75]"), ("native", expected)]:
            config = toy_config(
                sources=[source],
                data={"families": {"spatial": 1}, "coords_to": mode},
                step={"global_batch_size": 1},
            )
            loader = build(config, tiny_checkpoint(family), report=said.append)
            batch = next(iter(loader)).batches[0]
            answer = loader.lengths.encoder.template.decode(batch["target_ids"].tolist())
            assert text in answer, (family, mode)
    assert sum("abs_source" in line and "coords_to: native" in line for line in said) == 2


def test_answers_that_cycle_are_planned_with_the_length_of_their_epoch(
    tiny_checkpoint, toy_data, toy_config
):
    rows = [
        {"question": f"{n}?", "answers": ["one", "a much longer answer"], "scene_id": f"s{n % 6}"}
        for n in range(6)
    ]
    (toy_data / "cycle.json").write_text(json.dumps(rows))
    source = {"name": "sp", "family": "spatial", "files": ["cycle.json"], "root": str(toy_data),
              "answers": "cycle", "media_template": "{scene_id}"}  # fmt: skip
    config = toy_config(
        sources=[source],
        data={"families": {"spatial": 1}, "length": {"epochs": 2}},
        step={"global_batch_size": 6},
    )
    first, second = list(build(config, tiny_checkpoint("qwen3vl")))
    assert uids(first) == uids(second)
    assert second.label_tokens > first.label_tokens
    assert second.denominator_local == second.label_tokens


def test_what_a_run_is_trained_on_is_recorded(tiny_checkpoint, toy_config, tmp_path):
    said = []
    config = toy_config(
        source_options={"repeat": 0}, data={"families": {"spatial": 0, "general": 1}}
    )
    loader = build(
        config,
        tiny_checkpoint("qwen3vl"),
        blocked=lambda text: () if "g.png" in text else None,
        blocked_key="lists",
        report=said.append,
    )
    (record,) = json.loads((tmp_path / "data.json").read_text()).values()
    assert record["order"] == loader.mixture.parts
    assert record["block_lists"] == "lists"
    general = record["sources"]["ge"]
    assert (general["rows"], general["drawn_from"], general["distinct_media"]) == (14, 14, 1)
    assert (general["without_known_scene"], general["blocked"]) == (0, {})
    assert record["sources"]["sp"]["without_known_scene"] == 30
    assert record["warnings"] == ["never drawn because their weight is 0: sp"]
    assert record["warnings"][0] in said


PACKS = {"unit": "packs", "lookahead": 20, "packs_per_step": 2, "global_batch_size": 12}


def test_steps_of_packs(tiny_checkpoint, toy_config):
    """Windows of 20 draws are packed together and consumed two packs at a time."""
    folder, config = tiny_checkpoint("qwen3vl"), toy_config(step=PACKS, packing={"max_tokens": 300})
    loader = build(config, folder)
    steps = list(loader)
    assert len(steps) == loader.num_steps > 5
    assert all(len(step.batches) == 2 for step in steps)
    assert sum(len(uids(step)) for step in steps) == 60  # every draw of the epoch, once
    assert [step.plan.step for step in steps] == list(range(len(steps)))
    assert all(step.plan.flags[-1].boundary and not step.plan.flags[0].boundary for step in steps)
    two = [build(config, folder, World(rank, 2)) for rank in range(2)]
    for step, *parts in zip(steps, *two, strict=True):
        assert uids(step) == sorted(uid for part in parts for uid in uids(part))


def test_resume_inside_a_window(tiny_checkpoint, toy_config):
    folder, config = tiny_checkpoint("qwen3vl"), toy_config(step=PACKS, packing={"max_tokens": 300})
    loader = build(config, folder)
    whole, states = [], []
    for step in loader:
        whole.append(step)
        states.append(loader.state_dict())
    assert any(state["pack"] for state in states)
    for done, state in enumerate(states):
        rest = build(config, folder, state=state)
        assert rest.num_steps == len(whole)
        for a, b in zip(rest, whole[done + 1 :], strict=True):
            assert a.plan == b.plan
            for x, y in zip(a.batches, b.batches, strict=True):
                equal(x, y)


def test_fixed_number_of_steps(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    for step in ({"global_batch_size": 12}, PACKS):
        config = toy_config(step=step, data={"length": {"steps": 9}}, packing={"max_tokens": 400})
        assert [s.plan.step for s in build(config, folder)] == list(range(9))


def test_too_few_for_the_ranks(tiny_checkpoint, toy_config):
    folder = tiny_checkpoint("qwen3vl")
    with pytest.raises(ConfigError, match="global_batch_size=12 is below the 13 ranks"):
        build(toy_config(), folder, World(0, 13))
    with pytest.raises(ConfigError, match="packs_per_step=2 is no multiple of the 3 ranks"):
        build(toy_config(step=PACKS), folder, World(0, 3))


def test_marks_need_a_hook(tiny_checkpoint, toy_config, tmp_path, toy_data):
    """A run without the hook ends before its first batch; it does not replace the rows one by one."""
    turns = [
        {"from": "human", "value": "<image>Where is the red point?"},
        {"from": "gpt", "value": "There."},
    ]
    row = {"conversations": turns, "image": "g.png", "type": "depth_prediction_oc", "red_point": [[5, 5]]}  # fmt: skip
    shutil.copy(toy_data / "g.png", tmp_path)
    rows = [{"conversations": turns, "image": "g.png", "type": "nav"}, row] * 6
    (tmp_path / "spar.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"name": "sp", "family": "spatial", "files": ["spar.jsonl"], "root": str(tmp_path), "format": "spar"}  # fmt: skip
    config = toy_config(
        sources=[source],
        data={"families": {"spatial": 1}, "max_bad_fraction": 1.0},
        shared_prefix={"min_media_per_step": 1},
    )
    folder = tiny_checkpoint("qwen3vl")
    loader = build(config, folder)
    assert next(loader.plans()).plan  # plans need no hook
    with pytest.raises(MarkError, match="6 rows of source sp have marks to draw, first sp/spar#1"):
        next(iter(loader))

    def draw(image, marks, *, stored_size):
        return image

    (step,) = build(config, folder, draw_marks=draw)
    assert len(uids(step)) == 12


def test_diversity(tiny_checkpoint, toy_config, caplog):
    folder = tiny_checkpoint("qwen3vl")
    fewer = {"max_branches": 4, "min_media_per_step": 11}
    loader = build(toy_config(shared_prefix=fewer), folder)
    assert loader.mixture.branches == 1  # only rows drawn singly promise that many
    assert "groups hold at most 1" in loader.mixture.warnings[-1]
    found = [step.shares.notes.get("few_media", 0) for step in loader]
    assert 0 < sum(found) <= len(found)
    assert "distinct media, shared_prefix.min_media_per_step asks for 11" in caplog.text
    with pytest.raises(DataError, match=r"step \d+ holds \d+ distinct media"):
        list(build(toy_config(shared_prefix={**fewer, "diversity": "strict"}), folder))


def test_media_are_decoded_once_per_step(tiny_checkpoint, toy_config):
    loader = build(toy_config(step={"global_batch_size": 40}), tiny_checkpoint("qwen3vl"))
    stores = [store for store, _ in loader.lengths.encoder.media]
    cache = stores[0].cache
    assert all(store.cache is cache for store in stores)
    step = next(iter(loader))
    distinct = {
        (draw.source, ref)
        for packs in step.plan.packs
        for draw in packs[0].draws
        for ref in loader.lengths.encoder.sample(draw.source, draw.row).media
    }
    assert cache.decoded == len(distinct)


def test_budgets_of_one_source(tiny_checkpoint, toy_config):
    """Pixel limits belong to a source, not to the process."""
    small = toy_config(source_options={"media": {"max_pixels": 64 * 64, "num_frames": 2}})
    loader = build(small, tiny_checkpoint("qwen3vl"))
    plain = build(toy_config(), tiny_checkpoint("qwen3vl"))
    ours, theirs = loader.lengths.records, plain.lengths.records
    images = theirs[0]["images"] > 0
    assert np.all(ours[0]["visual_tokens"][images] < theirs[0]["visual_tokens"][images])
    assert ours[0]["frames"].max() == 2
    assert np.array_equal(ours[1], theirs[1])


def test_lengths_are_measured_once(tiny_checkpoint, toy_config, monkeypatch):
    """Another mixture of the same data opens no file; another budget measures again."""
    folder = tiny_checkpoint("qwen3vl")
    build(toy_config(), folder)
    measured = []
    from spatialvlm.data.prepare import SampleEncoder

    original = SampleEncoder.measure

    def counting(self, *args):
        measured.append(args)
        return original(self, *args)

    monkeypatch.setattr(SampleEncoder, "measure", counting)
    build(toy_config(data={"families": {"spatial": 3, "general": 1}, "seed": 5}), folder)
    assert measured == []
    build(toy_config(data={"media": {"num_frames": 2}}), folder)
    assert len(measured) == 44


def test_lengths_measured_by_several_processes_are_equal(
    tiny_checkpoint, toy_config, monkeypatch, tmp_path
):
    from spatialvlm.data import lengths as module

    folder = tiny_checkpoint("qwen3vl")
    one = build(toy_config(), folder).lengths.records
    monkeypatch.setattr(module, "_CHUNK", 7)
    config = toy_config(data={"index_dir": str(tmp_path / "other")})
    two = build(config, folder, workers=2).lengths.records
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_lazily_measured_lengths_are_kept(tiny_checkpoint, toy_config):
    folder, lazy = tiny_checkpoint("qwen3vl"), {"data": {"lengths": "lazy"}}
    loader = build(toy_config(**lazy), folder)
    assert not loader.lengths.complete(0)
    list(loader)
    assert build(toy_config(**lazy), folder).lengths.complete(0)


def test_full_disk_while_lengths_are_written(
    tiny_checkpoint, toy_config, monkeypatch, tmp_path, caplog
):
    from spatialvlm.data import lengths as module

    original = module.np.save

    def full(path, values):
        if "lengths-" in str(path):
            raise OSError(28, "No space left on device")
        original(path, values)

    monkeypatch.setattr(module.np, "save", full)
    folder = tiny_checkpoint("qwen3vl")
    with pytest.raises(DataError, match=r"lengths of sp .*No space left.*nothing was left behind"):
        build(toy_config(), folder)
    assert not list((tmp_path / "index").glob("*/lengths-*/*"))
    # a run that only remembers what it measured on the way goes on
    assert len(list(build(toy_config(data={"lengths": "lazy"}), folder))) == 5
    assert "measures them again" in caplog.text
