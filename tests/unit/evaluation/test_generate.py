"""The engine: sharding, resuming, failures, batches; with a fake model and synthetic rows."""

import json
from pathlib import Path

import pytest

from spatialvlm.errors import (
    BudgetError,
    ConfigError,
    DataError,
    EvaluationError,
    MediaError,
    OutOfMemoryError,
)
from spatialvlm.evaluation import asks as asking
from spatialvlm.evaluation import generate as gen
from spatialvlm.evaluation.blank import blank_copy
from spatialvlm.evaluation.predictions import read_predictions
from spatialvlm.evaluation.registry import load_benchmark


def write_rows(folder: Path, num: int = 24, per_image: int = 4) -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {
            "id": f"q{i:02d}",
            "messages": [
                {"role": "user", "content": f"<image>\nIs object {i} left?"},
                {"role": "assistant", "content": "Yes"},
            ],
            "images": [f"img{i // per_image}.png"],
            "media_kind": "images",
            "task": ["left", "right", "count"][i % 3],
            "answer_type": "yesno",
            "answer_json": "true" if i % 2 else "false",
            "options": [],
            "choice_idx": None,
            "scene_id": f"s{i // per_image}",
            "evidence": "{}",
            "form": "YN",
        }
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Fake:
    """Answers yes to odd questions; counts what it is asked."""

    def __init__(self, stop_after=None, broken=(), memory=None, prompts=None, text=""):
        self.batches, self.asked, self.prepared = [], [], 0
        self.prompts, self.text, self.overflows = prompts, text, 0
        self.stop_after, self.broken, self.memory = stop_after, broken, memory

    def prepare(self, group):
        self.prepared += 1
        image = group[0][0]["content"][0].get("image", "")
        if Path(image).name in self.broken:
            raise MediaError(f"{image} is broken")
        return group

    def generate(self, prepared, config):
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        if self.memory is not None and len(prepared) > self.memory:
            raise OutOfMemoryError("too many")
        if self.prompts is not None and sum(map(len, prepared)) > self.prompts:
            self.overflows += 1
            raise OutOfMemoryError("too many")
        self.batches.append([len(group) for group in prepared])
        answers = []
        for group in prepared:
            texts = [messages[-1]["content"][-1]["text"] for messages in group]
            self.asked += texts
            numbers = [int(text.split()[2]) for text in texts]
            answers.append(
                [gen.Completion(self.text or ("Yes." if n % 2 else "No."), 2) for n in numbers]
            )
        return answers


@pytest.fixture
def bench(tmp_path):
    return load_benchmark("spatialvlm_rows", write_rows(tmp_path))


def asks_of(bench, **options):
    return asking.make_asks(bench, bench.items, protocol="official", **options)


def answer(bench, asks, fake, folder, **options):
    options = {"quiet": True, "num_workers": 1, "batch_size": 8, **options}
    return gen.answer(bench, asks, fake, folder, **options)


def test_groups_share_media_and_are_not_split_over_ranks(bench):
    groups = asking.group_asks(asks_of(bench))
    assert [len(group) for group in groups] == [4] * 6
    for group in groups:
        assert len({ask.messages[0]["content"][0]["image"] for ask in group}) == 1


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_batches_hold_every_prompt_once(bench, size):
    groups = asking.group_asks(asks_of(bench))
    found = list(asking.batches(groups, size))
    assert all(sum(map(len, batch)) <= size for batch in found)
    ids = [ask.item.id for batch in found for group in batch for ask in group]
    assert sorted(ids) == [item.id for item in bench.items]


def test_without_sharing_every_prompt_is_its_own_group(bench):
    found = list(asking.batches(asking.group_asks(asks_of(bench)), 8, shared_prefix=False))
    assert {len(group) for batch in found for group in batch} == {1}


def test_any_number_of_processes_gives_the_same_file(bench, tmp_path):
    asks = asks_of(bench)
    texts = []
    for world in (1, 2, 3):
        folder = tmp_path / f"w{world}"
        for rank in range(world):
            answer(bench, asks, Fake(), folder, place=gen.Place(rank, world), batch_size=4 + rank)
        texts.append(gen.merge(folder, asks).read_bytes())
    assert texts[0] == texts[1] == texts[2]
    predictions, _ = read_predictions(tmp_path / "w1" / "predictions.jsonl")
    assert [p.text for p in predictions.values()] == ["No.", "Yes."] * 12


def test_killed_run_continues_with_another_number_of_processes(bench, tmp_path):
    asks = asks_of(bench)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    answer(bench, asks, Fake(), straight)
    reference = gen.merge(straight, asks).read_bytes()

    with pytest.raises(KeyboardInterrupt):
        answer(bench, asks, Fake(stop_after=1), broken)
    shard = broken / "predictions.rank0.jsonl"
    shard.write_bytes(shard.read_bytes() + b'{"id": "q23", "predic')  # killed while writing
    before = {key[0] for key in gen.finished(broken)}
    assert len(before) == 8
    fakes = [Fake(), Fake()]
    for rank, fake in enumerate(fakes):
        answer(bench, asks, fake, broken, place=gen.Place(rank, 2))
    again = {f"q{int(text.split()[2]):02d}" for fake in fakes for text in fake.asked}
    assert not again & before
    assert len(again | before) == 24
    assert gen.merge(broken, asks).read_bytes() == reference
    assert sorted(p.name for p in broken.glob("predictions*")) == ["predictions.jsonl"]


def test_changed_settings_are_named(tmp_path):
    gen.check_manifest(tmp_path, {"frames": 32, "checkpoint": "a", "world_size": 1})
    gen.check_manifest(tmp_path, {"frames": 32, "checkpoint": "a", "world_size": 8})
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"frames: 32 before, 16 now[\s\S]*overwrite"):
        gen.check_manifest(tmp_path, {"frames": 16, "checkpoint": "a", "world_size": 1})
    gen.check_manifest(tmp_path, {"frames": 16, "checkpoint": "a"}, overwrite=True)
    assert not (tmp_path / "predictions.jsonl").exists()


def test_unreadable_media_are_retried_recorded_and_limited(bench, tmp_path):
    asks = asks_of(bench)
    fake = Fake(broken=("img2.png",))
    answer(bench, asks, fake, tmp_path / "a", max_failures=0.2)
    assert fake.prepared == 7  # six groups, one of them twice
    predictions, _ = read_predictions(gen.merge(tmp_path / "a", asks, max_failures=0.2))
    failed = [p for p in predictions.values() if p.error]
    assert [p.id for p in failed] == ["q08", "q09", "q10", "q11"]
    assert {p.text for p in failed} == {""}
    with pytest.raises(BudgetError, match=r"4 of 24 items[\s\S]*max_failures=0.005[\s\S]*q08"):
        answer(bench, asks, Fake(broken=("img2.png",)), tmp_path / "b")


def test_memory_halves_the_batch_only_on_request(bench, tmp_path):
    asks = asks_of(bench)
    fake = Fake(memory=1)
    answer(bench, asks, fake, tmp_path / "a", batch_size=16, adapt_batch=True)
    assert max(map(len, fake.batches)) == 1
    with pytest.raises(OutOfMemoryError):
        answer(bench, asks, Fake(memory=1), tmp_path / "b", batch_size=16)


def test_a_smaller_batch_lasts_and_cuts_groups(bench, tmp_path):
    """Questions on one video are one group: without cutting it, a batch of one group could not shrink."""
    asks = asks_of(bench)
    fake = Fake(prompts=3)
    answer(bench, asks, fake, tmp_path, batch_size=8, adapt_batch=True)
    assert fake.overflows == 2  # 8 and 4 prompts, once each; not again for every batch
    assert max(sum(sizes) for sizes in fake.batches) == 2
    texts = [p.text for p in read_predictions(gen.merge(tmp_path, asks))[0].values()]
    assert texts == ["No.", "Yes."] * 12
    with pytest.raises(OutOfMemoryError):
        answer(bench, asks, Fake(prompts=1), tmp_path / "b", batch_size=32, adapt_batch=True)


def test_failures_are_counted_over_all_processes(bench, tmp_path):
    """Each process stays within the budget, together they do not."""
    asks = asks_of(bench)
    for rank in range(2):
        fake = Fake(broken=("img2.png", "img3.png"))
        answer(bench, asks, fake, tmp_path, place=gen.Place(rank, 2), max_failures=0.2)
    with pytest.raises(BudgetError, match=r"8 of 24 items[\s\S]*max_failures=0.2"):
        gen.merge(tmp_path, asks, max_failures=0.2)


def test_an_answer_after_a_failure_survives_another_kill(bench, tmp_path):
    asks = asks_of(bench)
    answer(bench, asks, Fake(broken=("img2.png",)), tmp_path, max_failures=0.2)
    answer(bench, asks, Fake(), tmp_path)  # the picture is back; killed before the merge
    assert len(gen.finished(tmp_path)) == 24
    assert answer(bench, asks, Fake(), tmp_path) == 0
    assert all(not p.error for p in read_predictions(gen.merge(tmp_path, asks))[0].values())


@pytest.mark.parametrize("cut", [1, 4, 5, 30])
def test_a_line_cut_anywhere_is_asked_again(bench, tmp_path, cut):
    """Before its newline, inside a character, inside its JSON."""
    asks = asks_of(bench)
    answer(bench, asks, Fake(), tmp_path)
    shard = tmp_path / "predictions.rank0.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    row = {**json.loads(lines[-1]), "zz": "三"}
    last = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    shard.write_bytes("".join(lines[:-1]).encode() + last[:-cut])
    assert answer(bench, asks, Fake(), tmp_path, place=gen.Place(0, 1)) == 1
    assert len(read_predictions(gen.merge(tmp_path, asks))[0]) == 24


def test_answers_with_unicode_line_separators_are_one_line(bench, tmp_path):
    asks = asks_of(bench)
    answer(bench, asks, Fake(text="a\u2028b\x85c\u2029"), tmp_path)
    predictions, _ = read_predictions(gen.merge(tmp_path, asks))
    assert {p.text for p in predictions.values()} == {"a\u2028b\x85c\u2029"}


def test_merge_refuses_missing_items(bench, tmp_path):
    asks = asks_of(bench)
    answer(bench, asks[:20], Fake(), tmp_path)
    with pytest.raises(EvaluationError, match="4 items were not answered"):
        gen.merge(tmp_path, asks)


def test_limit_is_stratified_nested_and_in_file_order(bench):
    small, large = (asking.limited(bench.items, n) for n in (6, 12))
    assert {i.id for i in small} < {i.id for i in large}
    assert [sum(i.question_type == t for i in small) for t in ("left", "right", "count")] == [2] * 3
    assert [i.id for i in large] == sorted(i.id for i in large)
    assert asking.limited(bench.items, None) == list(bench.items)


def test_a_limit_keeps_groups_whole(tmp_path):
    """Half of the rotations of a question would be easier than all of them."""
    rows = [
        {
            "index": q + 1_000_000 * j,
            "A": f"x{(0 + j) % 2}",
            "B": f"x{(1 + j) % 2}",
            "answer": "AB"[j],
        }
        for j in range(2)
        for q in range(10)
    ]
    path = tmp_path / "circular.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load_benchmark("circular_mcq", path).items
    chosen = asking.limited(items, 7)
    assert len(chosen) == 6
    assert all(sum(i.group == item.group for i in chosen) == 2 for item in chosen)
    assert len(asking.limited(items, 1)) == 2


def test_media_modes(bench):
    real = asks_of(bench)[5].messages[0]["content"]
    dropped = asks_of(bench, media="drop")[5].messages[0]["content"]
    shuffled = asks_of(bench, media="shuffle")
    assert [part["type"] for part in real] == ["image", "text"]
    assert real[1]["text"] == "\nIs object 5 left?"  # white space as in training
    assert dropped == [{"type": "text", "text": "Is object 5 left?"}]
    for ask in shuffled:
        image = ask.messages[0]["content"][0]["image"]
        assert Path(image).name != ask.item.row["images"][0]
    assert asks_of(bench, media="blank")[5].messages[0]["content"][0]["blank"] is True


def test_grey_copies_of_broken_media_are_a_media_error(tmp_path):
    """Which is retried, recorded and counted; any other error would end the run."""
    for name in ("broken.mp4", "broken.png"):
        (tmp_path / name).write_bytes(b"no media at all")
        with pytest.raises(MediaError, match=f"{name}' cannot be read"):
            blank_copy(str(tmp_path / name), [], tmp_path / "grey")


def test_a_dropped_last_line_of_another_shard_only_warns(tmp_path):
    shard = tmp_path / "predictions.rank1.jsonl"
    shard.write_text('{"id": 1, "prediction": "A"}\n{"id": 2, "pre')
    assert list(gen.finished(tmp_path)) == [("1", "")]
    with pytest.raises(DataError, match=r"predictions.rank1.jsonl:2, column"):
        read_predictions(shard)
