"""Templates: grammar, lint, choice by hash, held-out paraphrases; names that single objects out."""

from collections import Counter

import pytest

from spatialvlm.errors import SynthesisError
from spatialvlm.scenes.rooms.build import RenderConfig, RoomSpec, build_room
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.plan import make_plan
from spatialvlm.synthesis.referral import refer
from spatialvlm.synthesis.rows import Draws, Reject
from spatialvlm.synthesis.tasks import TASKS
from spatialvlm.synthesis.tasks.base import OPENSPATIAL
from spatialvlm.synthesis.wording import (
    PhraseBook,
    Ref,
    Template,
    Wording,
    indefinite,
    lint,
    phrase_book,
    plural,
)


def test_grammar():
    assert [plural(w) for w in ("chair", "box", "bookshelf", "floor lamp", "toy box", "pantry")] == [
        "chairs", "boxes", "bookshelves", "floor lamps", "toy boxes", "pantries",
    ]  # fmt: skip
    assert (indefinite("armchair"), indefinite("sofa")) == ("an armchair", "a sofa")


def test_filling_records_where_objects_are_named():
    template = Template.compile("t", "{a} or {objects}, {label|plural}?")
    refs = [Ref(i, f"the {w}", w, "label") for i, w in enumerate(("sofa", "bed", "lamp"))]
    text, spans = template.fill({"a": refs[0], "objects": refs[1:], "label": "chair"})
    assert text == "The sofa or the bed and the lamp, chairs?"
    for obj, ranges in spans.items():
        for start, end in ranges:
            assert text[start:end].lower() == refs[obj].phrase


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"t": {"YN": ["a?", "b?"]}}, "2 paraphrases"),
        ({"t": {"YN": ["Is it?", "is it", "b?", "c?", "d?"]}}, "equal"),
        ({"t": {"NUM@cm": ["how many meters", "2", "3", "4", "5"]}}, "says 'cm'"),
        ({"t": {"NUM@m": ["in centimeters", "2", "3", "4", "5"]}}, "says 'm'"),
        ({"t": {"MCQ": ["Is it A. left", "2", "3", "4", "5"]}}, "option letter"),
        ({"t": {"yes": ["1", "2", "3", "4", "5"]}}, "a key is"),
        ({"t": {"YN": ["{a|upper}?", "2", "3", "4", "5"]}}, "'upper'"),
        ({"t": {"YN": ["{a?", "2", "3", "4", "5"]}}, "brace"),
        ({"t": {"YN": ["word " * 61, "2", "3", "4", "5"]}}, "more than 60"),
    ],
)
def test_lint_names_what_is_wrong(texts, problem):
    assert any(problem in text for text in lint(texts))


def test_shipped_templates_are_clean_and_users_can_add_their_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("left_right:\n  YN:\n    - Tell me whether {a} is {word} of {b}.\n")
    book = PhraseBook([path])
    assert len(book.find("left_right", "YN")) == len(phrase_book().find("left_right", "YN")) + 1
    path.write_text("left_right:\n  YN:\n    - '{a} {word} {b} in meters {'\n")
    with pytest.raises(SynthesisError, match="brace"):
        PhraseBook([path])
    with pytest.raises(SynthesisError, match="no template"):
        book.find("left_right", "NUM", unit="m")


def test_the_last_paraphrase_is_kept_for_held_out_splits():
    book = phrase_book()

    def seen(split, wording=None):
        draws = [Draws(i) for i in range(300)]
        return {book.choose(d, wording or Wording(), split, "left_right", "YN").id for d in draws}

    assert len(seen("train")) == 4
    assert len(seen("val")) == 1
    assert seen("train").isdisjoint(seen("val"))
    assert seen("train", Wording.plain()) == seen("val", Wording.plain())


def test_draws_are_uniform_and_depend_on_their_words_only():
    counts = Counter(Draws("x", i).integer(4) for i in range(4000))
    assert all(abs(count - 1000) < 120 for count in counts.values())
    orders = Counter(tuple(Draws("y", i).shuffled("abc")) for i in range(3000))
    assert len(orders) == 6
    assert all(abs(count - 500) < 100 for count in orders.values())
    stream = Draws("z")
    assert [stream.integer(10) for _ in range(30)] == [
        value for draws in [Draws("z")] for value in [draws.integer(10) for _ in range(30)]
    ]


def test_every_openspatial_subtask_has_a_task():
    assert len(OPENSPATIAL) == 19
    assert OPENSPATIAL.keys() <= TASKS.keys()
    assert "openspatial:Cam-pose" in TASKS["cam_pose"].all_tags()


def fits(ctx, ref, obj, frames):
    """Independent check of a phrase: does it describe this object?"""
    words = ref.phrase.split()
    label, item = ctx.labels[obj], ctx.objects[obj]
    if label != ref.label:
        return False
    same = ctx.by_label[label]
    if ref.how == "colour":
        return item.color_name == words[1]
    if ref.how == "size":
        others = [o for o in same if o != obj]
        if words[1] == "tallest":
            return all(item.size[2] > ctx.objects[o].size[2] for o in others)
        volume = item.size.prod()
        sign = 1 if words[1] == "largest" else -1
        return all(sign * volume > sign * ctx.objects[o].size.prod() for o in others)
    if ref.how == "nearest":
        landmark = next(
            o
            for o in range(len(ctx.labels))
            if ref.phrase.endswith(f" the {ctx.labels[o]}")
            and len(ctx.by_label[ctx.labels[o]]) == 1
        )
        distances = {o: ctx.distances[landmark][o] for o in same}
        best = min if "nearest" in ref.phrase else max
        return obj == best(distances, key=distances.get)
    return None


def test_phrases_single_out_one_object():
    config = RenderConfig(num_frames=4, width=64, height=64, depth=False)
    checked = Counter()
    for seed in (1010, 1033, 1009):
        scene = build_room(RoomSpec(seed=seed, split="train"), config)
        ctx = SceneContext(scene)
        frames = list(range(4))
        for video in (False, True):
            for obj in ctx.targets:
                try:
                    ref = refer(ctx, obj, frames, Draws(seed, obj), video=video)
                except Reject:
                    continue
                if ref.how == "label":
                    pool = (
                        ctx.by_label[ref.label]
                        if video
                        else [
                            o
                            for o in ctx.by_label[ref.label]
                            if any(ctx.view(f).state(o) != "hidden" for f in frames)
                        ]
                    )
                    assert pool in ([obj], []) or obj not in pool
                else:
                    answers = [o for o in range(len(ctx.objects)) if fits(ctx, ref, o, frames)]
                    if ref.how in ("colour", "size", "nearest"):
                        assert answers == [obj], (ref, answers)
                checked[ref.how] += 1
    assert checked["label"] > 20
    assert len(checked) >= 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("left_right:\n  YN: ['Is {a} {word} of {z}?']\n", r"unknown slot \{z\}"),
        ("left_right:\n  YN: ['Is {a} {word}?']\n", r"slot \{b\} is missing"),
        ("left_rigth:\n  YN: ['Is {a} {word} of {b}?']\n", "did you mean 'left_right'"),
        ("left_right: 3\n", "expected task"),
        ("- left_right\n", "expected task"),
        ("left_right: {\n", "not valid YAML"),
    ],
)
def test_bad_template_files_end_the_command_before_any_scene(tmp_path, text, problem):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SynthesisError, match=problem):
        make_plan("left_right", overrides={"templates": [str(path)]})
