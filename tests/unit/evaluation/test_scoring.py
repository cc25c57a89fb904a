"""Joining, invariances, policies, and one test per kind of bad input."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.__main__ import main
from spatialvlm.evaluation.metrics import estimate
from spatialvlm.evaluation.predictions import Prediction, join, read_predictions
from spatialvlm.evaluation.prompts import safe_path
from spatialvlm.evaluation.registry import check_media, find_spec, load_benchmark
from spatialvlm.evaluation.runs import headline_weights, read_runs
from spatialvlm.evaluation.schema import as_list, lettered, present
from spatialvlm.evaluation.scoring import compare, score, write_result

FOLDER = Path(__file__).resolve().parents[2] / "data" / "scorers"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def golden(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def as_predictions(rows):
    return {(str(r["id"]), ""): Prediction(str(r["id"]), r["prediction"]) for r in rows}


VSI_ROW = {
    "id": 1,
    "dataset": "scannet",
    "scene_name": "scene0000_00",
    "question_type": "object_rel_distance",
    "options": ["A. chair", "B. bed"],
    "ground_truth": "A",
    "question": "Which is closer?",
}
NUMBER_ROW = {
    **VSI_ROW,
    "id": 2,
    "question_type": "object_counting",
    "options": None,
    "ground_truth": "3",
}


@pytest.fixture
def vsi(tmp_path):
    return load_benchmark("vsi_bench", write(tmp_path / "vsi.jsonl", [VSI_ROW, NUMBER_ROW]))


GOOD = {("1", ""): Prediction("1", "A"), ("2", ""): Prediction("2", "3")}


# ------------------------------------------------------------------------------------------------ invariances


def test_presets_agree_on_clean_answers(tmp_path):
    rng = random.Random(0)
    rows = golden("vsibench_official")
    for row in rows:
        options = row["options"]
        row["prediction"] = rng.choice(options)[0] if options else f"{rng.uniform(0.5, 9):.1f}"
    bench = load_benchmark("vsi_bench", write(tmp_path / "rows.jsonl", rows))
    results = [
        score(bench, as_predictions(rows), protocol) for protocol in ("official", "lmms", "easi")
    ]
    scores = [[s.verdict.score for s in r.scored] for r in results]
    assert scores[0] == scores[1] == scores[2]
    assert len({r.headline["value"] for r in results}) == 1


def test_order_and_type_of_ids_do_not_matter(tmp_path):
    rows = golden("vsibench_easi")
    first = score(
        load_benchmark("vsi_bench", write(tmp_path / "a.jsonl", rows)), as_predictions(rows), "easi"
    )
    shuffled = [{**row, "id": str(row["id"])} for row in rows]
    random.Random(1).shuffle(shuffled)
    answers = list(as_predictions(rows).items())
    random.Random(2).shuffle(answers)
    second = score(
        load_benchmark("vsi_bench", write(tmp_path / "b.jsonl", shuffled)), dict(answers), "easi"
    )
    assert second.headline["value"] == pytest.approx(first.headline["value"], abs=1e-12)
    assert second.headline["se"] == pytest.approx(first.headline["se"], abs=1e-12)
    assert {s.item.id: s.verdict.score for s in first.scored} == {
        s.item.id: s.verdict.score for s in second.scored
    }


def test_clustered_error_agrees_with_a_cluster_bootstrap(tmp_path):
    rows = golden("vsibench_easi")
    result = score(
        load_benchmark("vsi_bench", write(tmp_path / "a.jsonl", rows)), as_predictions(rows), "easi"
    )
    by_scene = {}
    for s in result.scored:
        by_scene.setdefault(s.item.cluster, []).append(s)
    scenes = list(by_scene)
    rng = np.random.default_rng(0)
    means = []
    from spatialvlm.evaluation.benchmarks.vsi import vsi_path

    for _ in range(500):
        drawn = [s for k in rng.integers(0, len(scenes), len(scenes)) for s in by_scene[scenes[k]]]
        found = estimate(
            [s.verdict.score for s in drawn],
            range(len(drawn)),
            [vsi_path(s.item.question_type) for s in drawn],
        )
        means.append(found.value)
    assert np.std(means) == pytest.approx(result.headline["se"], rel=0.12)


# --------------------------------------------------------------------------------------------------- policies


def test_policies_for_unparsed_choices(vsi):
    answers = {**GOOD, ("1", ""): Prediction("1", "no idea")}
    assert score(vsi, answers).scored[0].verdict.score == 0
    assert score(vsi, answers, unparsed="expected").scored[0].verdict.score == 0.5
    guesses = {
        score(vsi, answers, unparsed="random", seed=s).scored[0].verdict.score for s in range(8)
    }
    assert guesses == {0.0, 1.0}
    same = [
        score(vsi, answers, unparsed="random", seed=3).scored[0].verdict.score for _ in range(2)
    ]
    assert same[0] == same[1]
    numeric = {**GOOD, ("2", ""): Prediction("2", "none")}
    assert score(vsi, numeric, unparsed="expected").scored[1].verdict.score == 0


def test_think_and_external_answers(vsi):
    thinking = {**GOOD, ("1", ""): Prediction("1", "<think>B</think>A")}
    assert score(vsi, thinking).scored[0].verdict.score == 0
    assert score(vsi, thinking, strip_think=True).scored[0].verdict.score == 1
    judged = {**GOOD, ("1", ""): Prediction("1", "long text", extracted="A")}
    assert score(vsi, judged).scored[0].verdict.score == 0
    found = score(vsi, judged, use_extracted=True)
    assert (found.scored[0].verdict.score, found.settings["extractor"]) == (1, "external")


def test_partial_results_say_so(vsi):
    result = score(vsi, GOOD)
    assert result.partial
    assert "room_size_estimation" in result.missing_types
    assert "5130" in result.warnings[0]
    one = score(vsi, {("1", ""): GOOD["1", ""]}, allow_partial=True)
    assert (one.n, one.headline["se"]) == (1, None)


def test_protocol_mismatch_is_reported(vsi):
    result = score(vsi, GOOD, "easi", manifest={"protocol": "official", "frames": 32})
    assert result.settings["protocol_mismatch"] is True
    assert result.settings["frames"] == 32


def test_compare(vsi):
    a = score(vsi, GOOD)
    b = score(vsi, {**GOOD, ("1", ""): Prediction("1", "B")})
    found = compare(a, b)
    assert (found.difference, found.n, found.name) == (50.0, 2, "macro of 8")
    with pytest.raises(DataError, match="1 common items of 2 and 1"):
        compare(a, score(vsi, {("1", ""): GOOD["1", ""]}, allow_partial=True))


def test_paired_difference_is_that_of_the_headlines(tmp_path, capsys):
    """By the headline's rule: VSI's three direction levels count as one entry; also from written folders."""
    rows = golden("vsibench_easi")
    bench = load_benchmark("vsi_bench", write(tmp_path / "vsi.jsonl", rows))
    constant = [{**row, "prediction": "A" if row["options"] else "2"} for row in rows]
    results = [score(bench, as_predictions(part), "easi") for part in (rows, constant)]
    expected = results[0].headline["value"] - results[1].headline["value"]
    found = compare(*results)
    assert found.difference == pytest.approx(expected, abs=1e-9)
    assert compare(results[0], results[0]).se == 0
    for name, result in zip("ab", results, strict=True):
        write_result(result, tmp_path / name)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"vsi_bench: {expected:+.2f} points (macro of 8)" in capsys.readouterr().out

    part = dict(list(as_predictions(rows).items())[:400])
    write_result(score(bench, part, "easi", allow_partial=True), tmp_path / "c")
    command = ["compare", str(tmp_path / "a"), str(tmp_path / "c")]
    assert main(command) == 1
    assert "400 common items of 450 and 400" in capsys.readouterr().err
    assert main([*command, "--allow-partial"]) == 0
    assert "n 400" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["official", "easi"])
def test_weights_make_the_headline(protocol, tmp_path):
    for name, file in (("vsi_bench", "vsibench_easi"), ("mindcube", "mindcube_official")):
        rows = golden(file)
        bench = load_benchmark(name, write(tmp_path / "rows.jsonl", rows))
        result = score(bench, as_predictions(rows), protocol)
        write_result(result, tmp_path / name / protocol)
        (run,) = read_runs([tmp_path / name / protocol])[name]
        weights = headline_weights(run)
        total = sum(weights[row.id] * row.score for row in run.items())
        assert 100 * total == pytest.approx(result.headline["value"], abs=1e-9)


def test_paired_difference_of_groups(tmp_path):
    """Rotations of a question count once, as the worst of them."""
    rows = [
        {"index": q + 1_000_000 * j, "A": "xy"[j], "B": "yx"[j], "answer": "AB"[j]}
        for q in range(4)
        for j in range(2)
    ]
    bench = load_benchmark("circular_mcq", write(tmp_path / "rows.jsonl", rows))
    right = {(str(r["index"]), ""): Prediction(str(r["index"]), r["answer"]) for r in rows}
    a, b = score(bench, right), score(bench, {k: Prediction(k[0], "A") for k in right})
    found = compare(a, b)
    assert (found.difference, found.n, found.name) == (100.0, 4, "mean of groups")


def test_row_numbers_of_two_files_are_not_paired(tmp_path):
    row = {"answer": "A. x", "choices": "A. x\nB. y", "question_type": "t"}
    results = []
    for name in ("one", "two"):
        path = write(tmp_path / f"{name}.jsonl", [{**row, "question": name}])
        answers = {("0", ""): Prediction("0", "A")}
        results.append(score(load_benchmark("viewspatial", path), answers))
    with pytest.raises(DataError, match="no id column and the two runs used different files"):
        compare(*results)


def test_scored_folders_can_be_scored_again(tmp_path):
    """What the predictions say about their making is kept."""
    data = write(tmp_path / "vsi.jsonl", [VSI_ROW, NUMBER_ROW])
    rows = [
        {"id": 1, "prediction": "A", "finish": "length", "num_new_tokens": 16},
        {"id": 2, "prediction": "", "error": "broken"},
    ]
    preds, out = write(tmp_path / "preds.jsonl", rows), tmp_path / "out"
    command = ["score", "--bench", "vsi_bench", "--data", str(data), "--out", str(out), "--pred"]
    for source in (preds, out / "predictions.jsonl"):
        assert main([*command, str(source)]) == 0
        result = json.loads((out / "result.json").read_text())
        assert (result["n_truncated"], result["n_failed"]) == (1, 1)


def test_written_files(vsi, tmp_path):
    write_result(score(vsi, GOOD), tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["n"] == 2
    assert set(result["chance"]["per_type"]) == {"object_rel_distance", "object_counting"}
    header = (tmp_path / "out" / "per_item.csv").read_text().splitlines()[0]
    assert (
        header
        == "id,variant,cluster,question_type,category,gold,extracted,score,unparsed,finish,group"
    )


# -------------------------------------------------------------------------------------------------- bad input


def predictions_file(tmp_path, text):
    path = tmp_path / "preds.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"id": 1, "prediction": "A"}\n{"id": "1", "prediction": "B"}\n',
            r"'1' has two.*:1 and .*:2",
        ),
        ('{"id": 1, "prediction": "A"}\n{"id": 1, "prediction": "A"}\n', r"two predictions"),
        ("", r"preds.jsonl are empty"),
        ('{"id": 1, "prediction": "A"}\n{"id": 2, pre', r":2, column 11: not JSON .*id.: 2, pre"),
        ('{"id": 1, "prediction": null}\n', r":1: 'prediction' must be a string, found NoneType"),
        ('{"id": 1}\n', r":1: 'prediction' must be a string"),
        ('{"id": 1.5, "prediction": "A"}\n', r":1: 'id' must be a string or an integer, found 1.5"),
        ('["A"]\n', r":1: expected an object, found list"),
        (b'{"id": 1, "prediction": "\xff"}\n', r"not UTF-8 \(byte 25\)"),
    ],
)
def test_bad_prediction_files(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_predictions(predictions_file(tmp_path, text))


def test_an_external_answer_is_text(tmp_path):
    path = predictions_file(tmp_path, '{"id": 1, "prediction": "A", "extracted": 2}\n')
    with pytest.raises(DataError, match=r":1: 'extracted' must be a string or null, found int"):
        read_predictions(path)


def test_a_row_without_a_column_that_others_have(tmp_path):
    rows = [VSI_ROW, {k: v for k, v in NUMBER_ROW.items() if k != "ground_truth"}]
    with pytest.raises(
        DataError, match=r"row 1 of vsi_bench has no column 'ground_truth'; found: id"
    ):
        load_benchmark("vsi_bench", write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("embspatial", {"question_id": 1, "answer": "B", "answer_options": ["x", "y"], "relation": "r",
                        "data_source": "s"}, "invalid literal for int"),
        ("internspatial", {"id": 1, "category": "size", "answer": "big", "judge": "good"}, "could not convert"),
        ("spatialvlm_rows", {"id": 1, "task": "t", "answer_type": "mcq", "answer_json": '"x"', "messages": None},
         "not iterable"),
    ],
)  # fmt: skip
def test_rows_of_the_wrong_kind_are_one_line(name, row, reason, tmp_path):
    with pytest.raises(DataError, match=rf"row 0 is no row of {name}: .*{reason}.*fix the row"):
        load_benchmark(name, write(tmp_path / "rows.jsonl", [row]))


def test_mindcube_without_its_prompts_says_so(tmp_path):
    row = {"id": "around_1", "gt_answer": "A", "question": "Q? A. x B. y"}
    for given, expected in ((row, True), ({**row, "input_prompt": "P"}, False)):
        bench = load_benchmark("mindcube_tiny", write(tmp_path / "rows.jsonl", [given]))
        found = score(bench, {("around_1", ""): Prediction("around_1", "A")})
        assert any("prompt_parity: false" in text for text in found.deviations) is expected


def test_internspatial_states_pairs_and_both_counting_means(tmp_path):
    rows = [
        {"id": "e1", "category": "existence", "answer": "yes", "pair_id": "p"},
        {"id": "e2", "category": "existence", "answer": "no", "pair_id": "p"},
        {"id": "c", "category": "counting", "answer": 2},
    ]
    bench = load_benchmark("internspatial", write(tmp_path / "rows.jsonl", rows))
    said = {"e1": "yes", "e2": "yes", "c": "8"}
    found = score(bench, {(k, ""): Prediction(k, v) for k, v in said.items()})
    assert found.extra["categories"] == {"existence": 0.0, "counting": -200.0}
    assert found.headline["value"] == -100
    assert found.extra["mean_with_clipped_counting"] == 0


def test_shards_merge_identical_duplicates(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"id": 1, "prediction": "A"}])
    b = write(tmp_path / "b.jsonl", [{"id": 1, "prediction": "A"}, {"id": 2, "prediction": "B"}])
    found, _ = read_predictions([a, b])
    assert [p.text for p in found.values()] == ["A", "B"]


def test_unknown_missing_and_foreign_ids(vsi):
    with pytest.raises(DataError, match=r"1 prediction ids .* e.g. 9: wrong split or benchmark\?"):
        join(vsi.items, {**GOOD, ("9", ""): Prediction("9", "A")})
    with pytest.raises(
        DataError, match=r"1 of 2 items have no prediction, e.g. 2; .*--allow-partial"
    ):
        join(vsi.items, {("1", ""): GOOD["1", ""]})
    with pytest.raises(DataError, match="no prediction belongs"):
        join(vsi.items, {("9", ""): Prediction("9", "A")}, allow_partial=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"question_type": "object_size"},
            r"item 1: unknown question_type 'object_size'; allowed: .*route",
        ),
        ({"ground_truth": "C"}, r"item 1: gold 'C' is not among .*chair"),
        ({"options": None}, r"item 1: gold 'A' is not among the offered options \{\}"),
        ({"options": ["A. chair", "A. bed"]}, r"distinct letters"),
        (
            {"question_type": "object_counting", "ground_truth": "many"},
            r"'many' is not a finite number",
        ),
        ({"question_type": "object_counting", "ground_truth": "nan"}, r"\(MRA undefined\)"),
        ({"question_type": "object_counting", "ground_truth": "inf"}, r"not a finite number"),
    ],
)
def test_bad_rows(change, message, tmp_path):
    path = write(tmp_path / "vsi.jsonl", [{**VSI_ROW, **change}])
    with pytest.raises(DataError, match=message):
        load_benchmark("vsi_bench", path)


def test_gold_of_zero_needs_easi(tmp_path):
    path = write(tmp_path / "vsi.jsonl", [VSI_ROW, {**NUMBER_ROW, "ground_truth": "0"}])
    bench = load_benchmark("vsi_bench", path)
    with pytest.raises(DataError, match=r"item 2: gold 0.0 is not positive \(MRA undefined\)"):
        score(bench, GOOD)
    assert (
        score(bench, {**GOOD, ("2", ""): Prediction("2", "0")}, "easi").scored[1].verdict.score == 1
    )


def test_bad_benchmark_files(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        load_benchmark("vsi_bench", write(tmp_path / "a.jsonl", []))
    with pytest.raises(DataError, match=r"does not exist"):
        load_benchmark("vsi_bench", tmp_path / "nothing.jsonl")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_benchmark("vsi_bench", tmp_path / "b.json")
    (tmp_path / "c.bin").write_text("x")
    with pytest.raises(DataError, match="unknown file type"):
        load_benchmark("vsi_bench", tmp_path / "c.bin")
    row = {**VSI_ROW, "question_typ": VSI_ROW["question_type"]}
    del row["question_type"]
    with pytest.raises(
        DataError,
        match=r"vsi_bench needs column 'question_type'; found: .*did you mean 'question_typ'",
    ):
        load_benchmark("vsi_bench", write(tmp_path / "d.jsonl", [row]))
    with pytest.raises(DataError, match=r"1 ids occur more than once: 1"):
        load_benchmark("vsi_bench", write(tmp_path / "e.jsonl", [VSI_ROW, VSI_ROW]))
    with pytest.raises(DataError, match="--strict"):
        load_benchmark("vsi_bench", write(tmp_path / "f.jsonl", [VSI_ROW]), strict=True)


def test_debiased_subset(tmp_path):
    rows = [{**VSI_ROW, "id": i} for i in range(5)]
    with pytest.raises(DataError, match=r"5 items without a 'pruned' column"):
        load_benchmark("vsi_debiased", write(tmp_path / "a.jsonl", rows))
    flagged = [{**row, "pruned": row["id"] < 2} for row in rows]
    with pytest.raises(DataError, match=r"3 of 5 items are kept by 'pruned', expected 2362"):
        load_benchmark("vsi_debiased", write(tmp_path / "b.jsonl", flagged))
    many = [{**VSI_ROW, "id": i, "pruned": i >= 2362} for i in range(2400)]
    assert len(load_benchmark("vsi_debiased", write(tmp_path / "c.jsonl", many)).items) == 2362
    plain = [{**VSI_ROW, "id": i} for i in range(2400)]
    ids = {str(i) for i in range(2362)}
    bench = load_benchmark("vsi_debiased", write(tmp_path / "d.jsonl", plain), ids=ids)
    assert not bench.warnings


def test_row_index_benchmarks_pin_their_file(tmp_path):
    row = {
        "answer": "A. right",
        "choices": "A. right\nB. left",
        "question_type": "Camera perspective",
        "question": "Where?",
        "image_path": ["x/scannet/scene0000_00/1.jpg"],
    }
    bench = load_benchmark("viewspatial", write(tmp_path / "v.jsonl", [row]))
    assert bench.items[0].cluster == "scene0000_00"
    answers = {("0", ""): Prediction("0", "A")}
    assert score(bench, answers, allow_partial=True, manifest={"data_sha256": bench.sha256}).n == 1
    with pytest.raises(DataError, match=rf"{bench.sha256}.*made from other"):
        score(bench, answers, manifest={"data_sha256": "other"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: score(b, GOOD, "official1"), r"protocol 'official1' .* did you mean 'official'"),
        (lambda b: score(b, GOOD, unparsed="ignore"), r"unparsed='ignore' is not one of: wrong"),
        (lambda b: find_spec("vsi"), r"unknown benchmark 'vsi'; known: all_angles"),
    ],
)
def test_unknown_names(call, message, vsi):
    with pytest.raises(ConfigError, match=message):
        call(vsi)


CIRCULAR_ROW = {"index": 5, "question": "Q", "answer": "A", "A": "x", "B": "y", "g_index": 5}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "dsr3",
            [{"qid": "short", "answer": "A", "category": "c"}],
            r"qid 'short' is not eight characters",
        ),
        ("circular_mcq", [{**CIRCULAR_ROW, "index": 1000005}], r"group 5: rotation 0 is missing"),
        (
            "circular_mcq",
            [CIRCULAR_ROW, {**CIRCULAR_ROW, "index": 1000005, "answer": "B"}],
            r"group 5: the gold option differs",
        ),
        ("grounding7dof", [{"id": "g", "gt_box": [0, 0, 0, 1, 1, 0, 0]}], r"item g: gold box"),
        ("grounding7dof", [{"id": "g", "gt_box": [0, 0, 0, 1, 1, 1]}], r"item g: gold box"),
        ("localcogmap", [{"id": "m", "gt_cell": [3, 10]}], r"item m: gold cell \[3, 10\]"),
        ("counting", [{"id": "c", "gt": -1}], r"item c: gold count -1.0 is negative"),
        (
            "site",
            [{"options": ["x"], "answer": "A", "category": "c", "dataset": "d"}],
            r"at least two",
        ),
        (
            "cv_bench",
            [{"idx": 1, "answer": "(A)", "source": "KITTI", "type": "3D", "task": "D"}],
            "KITTI",
        ),
    ],
)
def test_bad_rows_of_other_benchmarks(name, rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_benchmark(name, write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/passwd", "..\\x.png"])
def test_media_stay_below_their_root(path):
    with pytest.raises(DataError, match="leaves its root"):
        safe_path(Path("/data"), path)


def test_cells_of_tables():
    assert [present(v) for v in (None, "", "nan", float("nan"), " NaN ", 0, "x")] == [False] * 5 + [
        True
    ] * 2
    assert as_list("['a', \"b\"]") == ["a", "b"]
    assert as_list('["a"]') == ["a"]
    assert as_list("__import__('os')") == ["__import__('os')"]
    assert lettered(["(A) x", "(B) y"]) == {"A": "x", "B": "y"}
    assert lettered(["x", "y"]) == {"A": "x", "B": "y"}
    assert lettered(["A. x", "A. y"]) == {}


def test_tables_with_letter_columns(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(
        "index\tquestion\tA\tB\tC\tanswer\tcategory\timage\n1\tQ?\tx\ty\t\tB\tc\t['s/1.jpg', 's/2.jpg']\n"
    )
    item = load_benchmark("all_angles", path).items[0]
    assert (dict(item.options), item.gold, item.cluster) == ({"A": "x", "B": "y"}, "B", "s")


def test_missing_media_are_listed(tmp_path):
    rows = [{**VSI_ROW, "id": n, "scene_name": f"s{n}"} for n in range(30)]
    bench = load_benchmark("vsi_bench", write(tmp_path / "vsi.jsonl", rows))
    (tmp_path / "scannet").mkdir()
    (tmp_path / "scannet" / "s0.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"29 media files of vsi_bench are missing") as error:
        check_media(bench)
    assert str(error.value).count("scannet/s") == 20


# ---------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path, capsys):
    rows = str(FOLDER / "vsibench_official.jsonl")
    code = main(
        [
            "score",
            "--bench",
            "vsi_bench",
            "--data",
            rows,
            "--pred",
            rows,
            "--out",
            str(tmp_path / "out"),
        ]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert printed.startswith("vsi_bench  21.03 ± 1.98  (macro of 8, SE by 48 scenes)  n 450/5130")
    assert "unparsed 68.7 %" in printed
    assert "protocol official" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"result.json", "per_item.csv", "report.html", "predictions.jsonl"} <= names
    assert (
        main(["score", "--bench", "vsi_bench", "--data", rows, "--pred", rows, "--protocol", "esi"])
        == 1
    )
    assert "did you mean 'easi'" in capsys.readouterr().err
    assert main(["list"]) == 0
    assert "mindcube_tiny" in capsys.readouterr().out


def test_lmms_samples(tmp_path, capsys):
    data = write(tmp_path / "vsi.jsonl", [VSI_ROW, NUMBER_ROW])
    samples = [{"doc_id": 0, "filtered_resps": ["A"]}, {"doc_id": 1, "filtered_resps": "3"}]
    pred = write(tmp_path / "x_samples_vsi.jsonl", samples)
    assert (
        main(
            [
                "score",
                "--bench",
                "vsi_bench",
                "--data",
                str(data),
                "--pred",
                str(pred),
                "--format",
                "lmms",
            ]
        )
        == 0
    )
    assert "100.00" in capsys.readouterr().out


def test_imports_stay_light():
    code = (
        "import sys, spatialvlm.evaluation, spatialvlm.evaluation.scoring, spatialvlm.evaluation.report;"
        "print([m for m in ('torch', 'matplotlib', 'sklearn', 'lmms_eval', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
