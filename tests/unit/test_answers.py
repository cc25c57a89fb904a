"""Typed answers: terse text, round trips, comparisons."""

import pytest

from spatialvlm.answers import (
    decimals_of,
    format_answer,
    number_text,
    parse_answer,
    round_half_up,
    same_answer,
)
from spatialvlm.errors import DataError

OPTIONS = ("the table", "the chair", "the lamp")
BOXES = [{"label": "chair", "bbox_3d": [1.905, -0.001, 3, 0.5, 0.5, 0.9, -0.93]}]


@pytest.mark.parametrize(
    ("answer_type", "answer", "text", "more"),
    [
        ("mcq", "the chair", "B", {"options": OPTIONS}),
        ("yesno", False, "No", {}),
        ("number", 1.85, "1.85", {"places": 2}),
        ("number", 200, "200", {}),
        ("number", 24.0, "24.0", {"places": 1}),
        ("text", "behind the sofa", "behind the sofa", {}),
        ("list", ["table", "chair", "lamp"], "table, chair, lamp", {}),
        ("coord", [7, 3], "[7, 3]", {}),
        ("box", [222, 645, 364, 944], "[222, 645, 364, 944]", {}),
    ],
)
def test_every_type_survives_the_round_trip(answer_type, answer, text, more):
    assert format_answer(answer_type, answer, **more) == text
    options = more.get("options", ())
    assert parse_answer(answer_type, text, options=options) == answer
    assert same_answer(answer_type, parse_answer(answer_type, text, options=options), answer)


def test_boxes_are_real_json_with_two_decimals_and_may_be_fenced():
    text = format_answer("json", BOXES)
    assert text == '[{"label": "chair", "bbox_3d": [1.91, 0.00, 3.00, 0.50, 0.50, 0.90, -0.93]}]'
    assert same_answer("json", parse_answer("json", text), BOXES, tolerance=0.005)
    assert parse_answer("json", f"```json\n{text}\n```") == parse_answer("json", text)
    assert not same_answer("json", parse_answer("json", text), BOXES)


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [(0.125, 2, "0.13"), (0.12499999999, 2, "0.13"), (-0.001, 2, "0.00"), (2.5, 0, "3")],
)
def test_numbers_round_half_up(value, places, text):
    assert number_text(value, places) == text
    assert round_half_up(value, places) == float(text)
    assert decimals_of(text) == places


@pytest.mark.parametrize(
    ("answer_type", "text"),
    [
        ("mcq", "D"),
        ("yesno", "maybe"),
        ("number", "about 3"),
        ("coord", "[1, 2, 3]"),
        ("json", "[{'a': 1}]"),
    ],
)
def test_text_of_another_type_is_refused_by_name(answer_type, text):
    with pytest.raises(DataError, match=answer_type):
        parse_answer(answer_type, text, options=OPTIONS)


def test_values_of_another_type_are_refused():
    with pytest.raises(DataError, match="the bin"):
        format_answer("mcq", "the bin", options=OPTIONS)
    with pytest.raises(DataError, match="unknown answer type"):
        format_answer("colour", "red")


def test_comparison_ignores_case_and_full_stop_but_not_order():
    assert same_answer("text", "Left.", "left")
    assert same_answer("list", ["Table", "lamp"], ["table", "Lamp."])
    assert not same_answer("list", ["lamp", "table"], ["table", "lamp"])
    assert same_answer("number", 1.85, 1.849, tolerance=0.005)
    assert not same_answer("number", 1.85, 1.84, tolerance=0.005)
