"""Broken media are recorded, replaced by a fixed rule, and change nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from spatialvlm.data.build import build_data
from spatialvlm.data.sample import World
from spatialvlm.errors import BudgetError, DataError, MediaError
from spatialvlm.models.build import build_layout
from spatialvlm.typing import CostCoefficients

COST = CostCoefficients(1.0, 0.0, 0.0, 0.0, 0.0)


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3vl")


@pytest.fixture
def broken(toy_data, tmp_path):
    """Function -> a copy of the data in which the pixels of some media are cut off; headers stay readable."""

    def make(*names):
        copy = tmp_path / "copy"
        shutil.copytree(toy_data, copy)
        for name in names:
            path = copy / name
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return copy

    return make


def sources(root, **options):
    return [
        {"name": "sp", "family": "spatial", "files": ["spatial.jsonl"], "root": str(root), **options},
        {"name": "ge", "family": "general", "files": ["general.jsonl"], "root": str(root)},
    ]  # fmt: skip


def run(config, folder, tmp_path, name="run", world=None, **options):
    config.run.dir = str(tmp_path / name)
    (tmp_path / name).mkdir(exist_ok=True)
    return build_data(config, folder, build_layout(folder), COST, world or World(), **options)


def events(tmp_path, name="run"):
    path = tmp_path / name / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def uids(steps):
    return [[batch["uids"] for batch in step.batches] for step in steps]


TOLERANT = {"max_bad_fraction": 0.9}


def test_a_broken_unit_is_replaced_by_the_next_one(broken, folder, toy_config, tmp_path):
    clean = list(run(toy_config(), folder, tmp_path, "clean"))
    root = broken("s0/v0_0.5.png")
    steps = list(run(toy_config(sources=sources(root), data=TOLERANT), folder, tmp_path))
    found = events(tmp_path)
    bad = {f"sp/spatial#{row}" for row in range(5)}  # all questions about the broken image
    assert {event["uid"] for event in found} == bad
    assert {event["reason"] for event in found} == {"truncated"}
    assert {event["media"] for event in found} == {"s0/v0_0.5.png"}
    # the next unit in file order is the other single image
    assert all(event["replaced_by"].startswith(("sp/spatial#5", "sp/spatial#6", "sp/spatial#7", "sp/spatial#8",
                                                "sp/spatial#9")) for event in found)  # fmt: skip
    swap = {event["uid"]: event["replaced_by"] for event in found}
    expected = [[sorted(swap.get(u, u) for u in batch) for batch in step] for step in uids(clean)]
    assert [[sorted(batch) for batch in step] for step in uids(steps)] == expected
    for step, reference in zip(steps, clean, strict=True):
        assert step.plan == reference.plan
        assert step.shares == reference.shares
        assert step.label_tokens == sum(int((b["loss_weight"] > 0).sum()) for b in step.batches)
        assert step.denominator_local == step.label_tokens


def test_a_fault_keeps_no_pictures_alive(broken, folder, toy_config, tmp_path, monkeypatch):
    """An error's traceback leads to the pack's arrays; a worker must not hold them until the next collection."""
    seen = []
    monkeypatch.setattr(
        "spatialvlm.data.faults.Quarantine.add",
        lambda self, sample, error, **_: seen.append(error.__traceback__),
    )
    root = broken("s0/v0_0.5.png")
    list(run(toy_config(sources=sources(root), data=TOLERANT), folder, tmp_path))
    assert len(seen) > 1
    assert set(seen) == {None}


def test_workers_and_ranks_make_the_same_choices(broken, folder, toy_config, tmp_path):
    root = broken("s0/v0_0.5.png", "s4/v1_1.5.png", "g.png")
    config = {"sources": sources(root), "data": TOLERANT}
    inline = list(run(toy_config(**config), folder, tmp_path, "a"))
    forked = list(run(toy_config(loader={"num_workers": 1}, **config), folder, tmp_path, "b"))
    assert uids(inline) == uids(forked)
    assert events(tmp_path, "a") == events(tmp_path, "b")
    for a, b in zip(inline, forked, strict=True):
        for x, y in zip(a.batches, b.batches, strict=True):
            assert torch.equal(x["frames_u8"], y["frames_u8"])
    ranks = [
        list(run(toy_config(**config), folder, tmp_path, f"r{r}", World(r, 2))) for r in range(2)
    ]
    for step, *parts in zip(inline, *ranks, strict=True):
        together = sorted(u for part in parts for b in part.batches for u in b["uids"])
        assert together == sorted(u for b in step.batches for u in b["uids"])
    names = [{e["uid"] for e in events(tmp_path, f"r{r}")} for r in range(2)]
    assert names[0] | names[1] == {e["uid"] for e in events(tmp_path, "a")}


def test_budget(broken, folder, toy_config, tmp_path):
    root = broken(*(f"s{scene}/v0_0.5.png" for scene in range(3)))
    with pytest.raises(
        BudgetError, match=r"all sources: \d+ of \d+ drawn .*truncated.*sp/spatial#"
    ) as caught:
        list(run(toy_config(sources=sources(root)), folder, tmp_path))
    assert "max_bad_fraction 0.001" in str(caught.value)


def test_the_budget_is_one_of_all_ranks(broken, folder, toy_config, tmp_path):
    """No rank judges alone; the loop sums the counts, and then every rank comes to the same end."""
    root = broken(*(f"s{scene}/v0_0.5.png" for scene in range(4)))
    config = toy_config(sources=sources(root), data={"length": {"epochs": 2.0}})
    loaders = [run(config, folder, tmp_path, f"r{r}", World(r, 2)) for r in range(2)]
    raised = 0
    for number, _ in enumerate(zip(*loaders, strict=True), start=1):
        total = sum(loader.own_faults() for loader in loaders)
        try:
            for loader in loaders:
                loader.check_budget(total)
                assert loader.state_dict()["faults"] == total.tolist()
        except BudgetError as error:
            raised = 1
            with pytest.raises(BudgetError, match="all sources: ") as other:
                loaders[1].check_budget(total)
            assert f"all sources: {total.sum()} of {12 * number} drawn" in str(error)  # noqa: PT017
            assert str(other.value).split("broken")[0] == str(error).split("broken")[0]  # noqa: PT017
            break
    assert raised
    for loader in loaders:
        loader.close()


def test_a_strict_source_tolerates_nothing(broken, folder, toy_config, tmp_path):
    root = broken("s0/v0_0.5.png")
    with pytest.raises(MediaError, match="tolerates no broken sample"):
        list(
            run(
                toy_config(sources=sources(root, max_bad_fraction=0.0), data=TOLERANT),
                folder,
                tmp_path,
            )
        )


def test_rows_found_unusable_while_planning(toy_data, folder, toy_config, tmp_path):
    """With lazy lengths, a missing file or an overlong row gives way when its step is planned."""
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    (copy / "s1" / "v0_0.5.png").unlink()
    data = {"lengths": "lazy", **TOLERANT}
    loader = run(toy_config(sources=sources(copy), data=data), folder, tmp_path)
    assert loader.mixture.drawn_rows["sp"] == 30  # nobody knows yet
    steps = list(loader)
    found = events(tmp_path)
    assert {event["uid"] for event in found} == {f"sp/spatial#{row}" for row in range(5, 10)}
    assert {event["reason"] for event in found} == {"missing"}
    assert [sum(len(b["uids"]) for b in step.batches) for step in steps] == [12] * 5
    used = {u for step in uids(steps) for batch in step for u in batch}
    assert not used & {event["uid"] for event in found}


@pytest.mark.parametrize("damage", ["gone", "empty", "another size"])
def test_media_that_changed_after_they_were_measured(
    damage, toy_data, folder, toy_config, tmp_path
):
    """Lengths come from the cache; the header of the broken file cannot be read any more."""
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    config = toy_config(sources=sources(copy), data={"lengths": "exact", **TOLERANT})
    run(config, folder, tmp_path, "before")
    path = copy / "s0" / "v0_0.5.png"
    if damage == "another size":
        Image.open(path).resize((250, 250)).save(path)
        with pytest.raises(DataError, match=r"sp/spatial#\d has \d+ tokens but was planned"):
            list(run(config, folder, tmp_path))
        return
    path.unlink() if damage == "gone" else path.write_bytes(b"")
    steps = list(run(config, folder, tmp_path))
    found = events(tmp_path)
    assert {event["uid"] for event in found} == {f"sp/spatial#{row}" for row in range(5)}
    assert {event["reason"] for event in found} == {
        "missing" if damage == "gone" else "not_an_image"
    }
    assert all(event["replaced_by"] for event in found)
    assert [sum(len(b["uids"]) for b in step.batches) for step in steps] == [12] * 5


def test_rows_of_a_window_are_recorded_once(toy_data, folder, toy_config, tmp_path):
    """Also when the run is continued inside the window, or its plans were looked at before."""
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    (copy / "s1" / "v0_0.5.png").unlink()
    config = toy_config(
        sources=sources(copy),
        data={"lengths": "lazy", "length": {"steps": 4}, **TOLERANT},
        step={"unit": "packs", "lookahead": 60, "packs_per_step": 2, "global_batch_size": 12},
        packing={"max_tokens": 300},
    )
    loader = run(config, folder, tmp_path, "whole")
    assert len(list(loader.plans())) == 4
    for _ in loader:
        if loader.state_dict()["step"] == 2:
            state = loader.state_dict()
    assert state["pack"] == 2
    recorded = events(tmp_path, "whole")
    assert {event["uid"] for event in recorded} == {f"sp/spatial#{row}" for row in range(5, 10)}
    assert len(recorded) == 5
    again = run(config, folder, tmp_path, "again", state=state)
    list(again)
    assert events(tmp_path, "again") == []
    assert again.state_dict()["faults"] == loader.state_dict()["faults"] == [5, 0]


def test_only_unusable_rows_of_a_unit_without_replacement_are_left_out(
    toy_data, folder, toy_config, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    rows = (copy / "spatial.jsonl").read_text().splitlines()[:4]  # one unit
    (copy / "spatial.jsonl").write_text(
        "\n".join(rows).replace('"left left "', f'"{"long " * 2000}"')
    )
    config = toy_config(
        sources=sources(copy)[:1],
        data={"families": {"spatial": 1}, "lengths": "lazy", "max_bad_fraction": 1.0},
        step={"global_batch_size": 4},
        shared_prefix={"min_media_per_step": 1},
    )
    (step,) = run(config, folder, tmp_path)
    assert sorted(uids([step])[0][0]) == [f"sp/spatial#{row}" for row in (0, 2, 3)]
    assert [event["uid"] for event in events(tmp_path)] == ["sp/spatial#1"]
    assert events(tmp_path)[0]["reason"] == "overlong"


def test_exact_lengths_take_unusable_rows_out_of_the_order(toy_data, folder, toy_config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    (copy / "s1" / "v0_0.5.png").unlink()
    config = toy_config(sources=sources(copy), data={"lengths": "exact", **TOLERANT})
    loader = run(config, folder, tmp_path)
    assert loader.mixture.drawn_rows["sp"] == 25
    assert loader.lengths.rejected(0) == {"missing": 5}
    list(loader)
    assert events(tmp_path) == []


def test_nothing_to_replace_with_leaves_the_slot_empty(broken, folder, toy_config, tmp_path):
    root = broken("s4/v1_1.5.png", "s5/v1_1.5.png", *(f"s{s}/v0_0.5.png" for s in range(4)))
    config = toy_config(
        sources=sources(root)[:1],
        data={"families": {"spatial": 1}, "max_bad_fraction": 1.0},
        step={"global_batch_size": 6},
    )
    steps = list(run(config, folder, tmp_path))
    assert all(step.label_tokens == 0 and step.denominator_local == 0 for step in steps)
    assert all(event["replaced_by"] is None for event in events(tmp_path))
    assert all(
        np.all(batch["loss_weight"].numpy() == 0) for step in steps for batch in step.batches
    )


def test_too_many_unusable_rows_stop_the_run_before_it_starts(
    toy_data, folder, toy_config, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    for scene in range(2):
        (copy / f"s{scene}" / "v0_0.5.png").unlink()
    with pytest.raises(BudgetError, match=r"10 of 30 rows .* missing 10 .*s0/v0_0\.5\.png"):
        run(toy_config(sources=sources(copy)), folder, tmp_path)
    with pytest.raises(BudgetError, match=r"overlong.*max_length=60.*median \d+"):
        run(toy_config(packing={"max_length": 60}), folder, tmp_path)


def test_a_repaired_file_is_used_again(toy_data, folder, toy_config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy_data, copy)
    (copy / "s0" / "v0_0.5.png").rename(copy / "away.png")
    config = toy_config(sources=sources(copy), data=TOLERANT)
    assert run(config, folder, tmp_path).mixture.drawn_rows["sp"] == 25
    (copy / "away.png").rename(copy / "s0" / "v0_0.5.png")
    assert run(config, folder, tmp_path).mixture.drawn_rows["sp"] == 30
