"""Exact prompt text of every benchmark and protocol, and where pictures go."""

import json
from pathlib import Path

import pytest

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.__main__ import main
from spatialvlm.evaluation.asks import make_asks
from spatialvlm.evaluation.prompts import (
    build_messages,
    derangement,
    frame_indices,
    interleave,
    prompt_text,
)
from spatialvlm.evaluation.registry import BENCHMARKS, find_spec, load_benchmark

OPTIONS = {"A": "chair", "B": "bed"}
LETTERS = {"A": "chair", "B": "bed", "question": "Which?", "answer": "A"}
BRIEF = "Answer with the option's letter from the given choices directly"
VSI_MC = {
    "id": 1,
    "dataset": "d",
    "scene_name": "s",
    "question_type": "route_planning",
    "options": ["A. chair", "B. bed"],
    "ground_truth": "A",
    "question": "Which?",
}
VSI_NA = {**VSI_MC, "question_type": "object_counting", "options": None, "ground_truth": "3"}
VSTI = {
    **VSI_MC,
    "question_type": "camera_movement_direction",
    "mc_answer": "A",
    "video_path": "v.mp4",
}
MMSI = {
    "id": 1,
    "question_type": "Attribute",
    "answer": "A",
    "question": "Q? Options: A: chair, B: bed",
}
QUOTE = f"{BRIEF}. Enclose the option's letter within ``."
VIEW = {
    "question": "Where?",
    "choices": "A. left\nB. right",
    "answer": "A. left",
    "question_type": "x",
    "image_path": [],
}
SITE = {
    "options": ["chair", "bed"],
    "answer": "A",
    "category": "c",
    "dataset": "d",
    "question": "Which?",
}
SITE_TEXT = "Question: Which?\nOptions:\nA: chair\nB: bed\nGive me the answer letter directly. The best answer is:"
SITE_VIDEO = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter of the correct option.\n"
)
BLINK = {
    "idx": "val_Counting_1",
    "answer": "(A)",
    "choices": ["chair", "bed"],
    "prompt": "Which?\n(A) chair",
    "question": "Which?",
}
NOTE = "Note: You only need to respond with A, B, … without providing any additional information.\n"
GENERIC = "Question: Which?\nOptions:\nA. chair\nB. bed\nPlease select the correct answer from the options above. \n"
CV = {**BLINK, "idx": 1, "source": "COCO", "type": "2D", "task": "Count"}
EMB = {
    "question_id": "e",
    "answer": 0,
    "answer_options": ["chair", "bed"],
    "relation": "left",
    "data_source": "mp3d",
    "question": "Which?",
}
MMSTAR = {
    "index": 1,
    "answer": "A",
    "category": "c",
    "l2_category": "l",
    "question": "Which?",
    **OPTIONS,
}
MMMU = {
    "id": "validation_Art_1",
    "answer": "A",
    "options": "['chair', 'bed']",
    "question_type": "multiple-choice",
    "question": "Which?",
}
SPACE = {"index": 1, **LETTERS}

EXPECTED = [
    ("vsi_bench", VSI_MC, ("official", "lmms"), f"These are frames of a video.\nWhich?\nOptions:\nA. chair\nB. bed\n{BRIEF}."),
    ("vsi_bench", VSI_MC, ("easi",), f"These are frames of a video.\nWhich?\nA. chair\nB. bed\n{BRIEF}."),
    ("vsi_bench", VSI_NA, ("official", "lmms"), "These are frames of a video.\nWhich?\nPlease answer the question using a single word or phrase."),
    ("vsi_bench", VSI_NA, ("easi",), "These are frames of a video.\nWhich?\nAnswer briefly and directly in one float number."),
    ("vsti_bench", VSTI, ("official",), f"These are frames of a video.\nWhich?\nOptions:\nA. chair\nB. bed\n{BRIEF}."),
    ("mmsi", MMSI, ("official",), f"{MMSI['question']}\n{QUOTE}"),
    ("mmsi", MMSI, ("lmms",), MMSI["question"]),
    ("mmsi", MMSI, ("easi",), f"Q?\nOptions: A: chair, B: bed, \n{QUOTE}"),
    ("mindcube", {"id": "among_1", "gt_answer": "A", "question": "Q? A. x B. y", "input_prompt": "[Task]\nx", "images": []}, ("official", "lmms", "easi"), "[Task]\nx"),
    ("viewspatial", VIEW, ("official",), "Where?A. left\nB. right\nReply only to the corresponding option.\nAnswer:"),
    ("viewspatial", VIEW, ("lmms", "easi"), "Question: Where?\nChoices: A. left\nB. right\nReply only to the corresponding option.\nAnswer:"),
    ("site", {**SITE, "visual": ["a.jpg", "b.jpg"]}, ("official", "lmms", "easi"), f"<image><image>\n{SITE_TEXT}"),
    ("site", {**SITE, "visual": ["a.mp4"]}, ("official",), SITE_VIDEO + SITE_TEXT),
    ("blink", BLINK, ("official",), "Which?\n(A) chair"),
    ("blink", BLINK, ("lmms",), f"{NOTE}Which?\n(A) chair"),
    ("blink", BLINK, ("easi",), GENERIC),
    ("cv_bench", CV, ("official",), "Which?\n(A) chair"),
    ("cv_bench", CV, ("lmms",), f"{NOTE}\nWhich?\n(A) chair"),
    ("cv_bench", CV, ("easi",), GENERIC),
    ("dsr3", {"qid": "AAAAAAAA", "category": "c", **LETTERS}, ("official", "lmms", "easi"), GENERIC),
    ("all_angles", {"index": 1, "category": "c", "image": "[]", "hint": "Look.", **LETTERS}, ("official",), f"Hint: Look.\n{GENERIC}"),
    ("circular_mcq", {"index": 1, **LETTERS}, ("official",), GENERIC),
    ("embspatial", EMB, ("official", "easi"), SITE_TEXT),
    ("embspatial", EMB, ("lmms",), "Note: You only need to respond with A, B, C, D without providing any additional information.\nWhich?\nA) chair\nB) bed"),
    ("realworldqa", {"answer": "A", "question": " Which?\n"}, ("official", "lmms", "easi"), "Which?"),
    ("mmstar", MMSTAR, ("official", "lmms"), f"Which?\n{BRIEF}"),
    ("mmstar", MMSTAR, ("easi",), GENERIC),
    ("mmmu", MMMU, ("official",), f"Which?\nA. chair\nB. bed\n{BRIEF}"),
    ("mmmu", {**MMMU, "question_type": "open"}, ("official",), "Which?\nAnswer the question using a single word or phrase."),
    ("space10", SPACE, ("official",), "Which? There are several options:\nA. chair\nB. bed\n\nPlease use the letters provided as the answer. You only need to output one choice, not multiple choices."),
    ("space10", {**SPACE, "answer": "AB"}, ("official",), "Which? There are several options:\nA. chair\nB. bed\n\nPlease use the letters provided as the answer. You need to choose two options."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "protocols", "text"), EXPECTED)
def test_exact_text(name, row, protocols, text):
    spec = find_spec(name)
    item = spec.parse(row, str(row.get(spec.id_key, 0)))
    for protocol in protocols:
        assert prompt_text(item, spec, protocol) == text


def test_pictures_of_mmmu_follow_their_numbers():
    """Markers in the question and in the options, one of them twice; picture 4 is named nowhere."""
    spec = find_spec("mmmu")
    row = {
        **MMMU,
        "question": "<image 3> beside <image 1>",
        "options": "['<image 2>', '<image 3>']",
    }
    row |= {f"image_{n}": f"{n}.png" for n in range(1, 5)}
    (message,) = build_messages(spec.parse(row, row["id"]), spec, media="real")
    parts = [part.get("image", part.get("text")) for part in message["content"]]
    assert parts[:7] == ["3.png", "beside", "1.png", "A.", "2.png", "B.", "3.png"]
    assert parts[7] == "4.png"
    (message,) = build_messages(spec.parse(row, row["id"]), spec, media="drop")
    assert "<image" not in message["content"][0]["text"]
    opened = {**row, "question_type": "open", "image_2": None}  # its options are not shown
    (message,) = build_messages(spec.parse(opened, row["id"]), spec)
    assert [part["image"] for part in message["content"] if "image" in part] == [
        "3.png", "1.png", "4.png"
    ]  # fmt: skip
    with pytest.raises(DataError, match="names <image 2>, its pictures"):
        spec.media({**row, "image_2": None})


def test_every_benchmark_has_a_prompt_and_a_limit():
    covered = {name for name, *_ in EXPECTED}
    own = {"erqa", "mindcube_tiny", "vsi_debiased", "spatialvlm_rows", "internspatial"}
    own |= {"localcogmap", "globalmap", "grounding7dof", "counting", "rotation"}
    assert set(BENCHMARKS) == covered | own
    assert find_spec("vsi_debiased").prompt is find_spec("vsi_bench").prompt
    assert find_spec("mindcube_tiny").prompt is find_spec("mindcube").prompt
    limits = {name: spec.max_new_tokens for name, spec in BENCHMARKS.items()}
    assert (limits["vsi_bench"], limits["mmsi"], limits["mindcube"]) == (16, 2048, 4096)
    assert (limits["viewspatial"], limits["space10"], limits["realworldqa"]) == (100, 256, 16)


def erqa(offsets, images):
    row = {
        "question_id": "q",
        "answer": "A",
        "question_type": "t",
        "question": "See here and there?",
    }
    row |= {"visual_indices": offsets, "images": images}
    spec = find_spec("erqa")
    return build_messages(spec.parse(row, "q"), spec)[0]["content"]


def kinds(content):
    return [part.get("image") or part["text"] for part in content]


def test_erqa_offsets():
    assert kinds(erqa([4, 13], ["a.jpg", "b.jpg"])) == [
        "See",
        "a.jpg",
        "here and",
        "b.jpg",
        "there?",
    ]
    assert kinds(erqa([0, 0], ["a.jpg", "b.jpg"])) == ["a.jpg", "b.jpg", "See here and there?"]
    assert kinds(erqa([4], ["a.jpg", "b.jpg"])) == ["a.jpg", "b.jpg", "See here and there?"]


def pictures(count):
    return [{"type": "image", "image": f"{n}"} for n in range(count)]


def test_interleaving():
    def shown(text, count, **options):
        return kinds(interleave(text, pictures(count), **options))

    assert shown("Q", 0) == ["Q"]
    assert shown("Q", 2) == ["0", "1", "Q"]
    assert shown("<image> a <image>b", 2) == ["0", "a", "1", "b"]
    assert shown("x <image> a", 2) == ["x", "0", "1", "a"]  # surplus before the trailing text
    assert shown("<image>\nQ\n", 1, verbatim=True) == ["0", "\nQ\n"]
    assert shown("<image><image>Q", 1) == ["0", "Q"]  # surplus markers go


def test_frames():
    assert frame_indices(10, 4) == [0, 3, 6, 9]
    assert frame_indices(7, 4) == [0, 2, 4, 6]
    assert frame_indices(3, 32) == [0, 1, 2]
    assert frame_indices(10, 1, "uniform_tail") == [0, 9]
    assert frame_indices(10, 4, "uniform_tail") == [0, 3, 6, 9]
    with pytest.raises(DataError, match="zero frames"):
        frame_indices(0, 4)


def test_unknown_media_mode_and_missing_columns():
    spec = find_spec("vsi_bench")
    item = spec.parse(VSI_MC, "1")
    with pytest.raises(ConfigError, match=r"'dropp' is not one of.*did you mean 'drop'"):
        build_messages(item, spec, media="dropp")
    bare = {k: v for k, v in VSI_MC.items() if k != "question"}
    with pytest.raises(DataError, match="prompts of vsi_bench need column 'question'"):
        build_messages(spec.parse(bare, "1"), spec)


def test_one_builder_for_everyone():
    """The engine (recipe, training-time evaluation, audits) calls this very function."""
    assert make_asks.__globals__["build_messages"] is build_messages


def test_dropping_media_leaves_the_text_alone():
    """A blind arm must not differ in its text, not even in white space at the end."""
    spec = find_spec("all_angles")
    row = {"index": 1, "question": "Q?", "A": "x", "B": "y", "answer": "A", "category": "c"}
    item = spec.parse({**row, "image": ["s/a.jpg"]}, "1")
    real, dropped = (
        build_messages(item, spec, media=mode)[0]["content"] for mode in ("real", "drop")
    )
    assert dropped == [part for part in real if part["type"] == "text"]
    assert dropped[0]["text"].endswith("above. \n")


def test_shuffled_media_are_never_the_own_ones(tmp_path, capsys):
    """Also for a type with one scene, and in the command that prints prompts."""
    row = {"question": "Q?", "options": ["A. x", "B. y"], "ground_truth": "A", "dataset": "d"}
    rows = [
        {**row, "id": 1, "scene_name": "s1", "question_type": "route_planning"},
        {**row, "id": 2, "scene_name": "s2", "question_type": "object_rel_distance"},
    ]
    path = tmp_path / "vsi.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["prompts", "--bench", "vsi_bench", "--data", str(path), "--media", "shuffle"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    videos = [s["messages"][0]["content"][0]["video"] for s in shown]
    assert [Path(v).name for v in videos] == ["s2.mp4", "s1.mp4"]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ConfigError, match=r"all items of vsi_bench show d/s1"):
        derangement(load_benchmark("vsi_bench", path))
