"""Files that do not fit, given to the command line: one line that names the error, or a counted ``unparsed``."""

import json

import pytest

from spatialvlm.evaluation.__main__ import main

ROWS = [
    {"id": 1, "question_type": "route_planning", "options": ["A. x", "B. y"], "ground_truth": "A",
     "dataset": "d", "scene_name": "s1"},
    {"id": 2, "question_type": "object_counting", "options": None, "ground_truth": "3",
     "dataset": "d", "scene_name": "s2"},
]  # fmt: skip
GOOD = [{"id": 1, "prediction": "A"}, {"id": 2, "prediction": "3"}]


@pytest.fixture
def run(tmp_path, capsys):
    def call(predictions, *flags, rows=ROWS, bench="vsi_bench"):
        data, pred = tmp_path / "data.jsonl", tmp_path / "pred.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if not isinstance(predictions, bytes):
            predictions = "".join(json.dumps(row) + "\n" for row in predictions).encode()
        pred.write_bytes(predictions)
        out = tmp_path / "out"
        command = ["score", "--bench", bench, "--data", str(data), "--pred", str(pred)]
        code = main([*command, "--out", str(out), *flags])
        told = capsys.readouterr()
        result = json.loads((out / "result.json").read_text()) if code == 0 else {}
        return code, told.out, told.err, result

    return call


def changed(index, **cells):
    return [{**row, **(cells if n == index else {})} for n, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("predictions", "rows", "message"),
    [
        ([*GOOD, {"id": "1", "prediction": "B"}], ROWS, "id '1' has two predictions"),
        (GOOD[:1], ROWS, "1 of 2 items have no prediction, e.g. 2"),
        ([*GOOD, {"id": 9, "prediction": "A"}], ROWS, "1 prediction ids are not in the benchmark, e.g. 9"),
        (b"", ROWS, "are empty"),
        (b'{"id": 1, "prediction": "\xff"}\n', ROWS, "is not UTF-8"),
        (GOOD, [{"id": 1, "answer": "A"}], "needs column 'question_type'"),
        (GOOD, changed(0, ground_truth="C"), "gold 'C' is not among the offered options"),
        (GOOD, changed(0, options=["A. x", "A. y"]), "must have distinct letters"),
        (GOOD, changed(1, ground_truth="nan"), "gold 'nan' is not a finite number"),
        (GOOD, changed(1, ground_truth="0"), "gold 0.0 is not positive"),
    ],
    ids=["duplicate", "missing", "unknown", "empty", "utf8", "wrong_file", "out_of_range", "twice", "nan", "zero"],
)  # fmt: skip
def test_refused_in_one_line(run, predictions, rows, message):
    code, out, err, _ = run(predictions, rows=rows)
    assert (code, out) == (1, "")
    assert message in err
    last = [line for line in err.splitlines() if not line.startswith("warning")]
    assert len(last) == 1
    assert last[0].startswith("DataError: ")


def test_answer_index_out_of_range(run):
    row = {
        "question_id": 1,
        "answer": 4,
        "answer_options": ["x", "y"],
        "relation": "left",
        "data_source": "mp3d",
    }
    code, _, err, _ = run([{"id": 1, "prediction": "A"}], rows=[row], bench="embspatial")
    assert code == 1
    assert "gold 'E' is not among the offered options" in err


@pytest.mark.parametrize(
    ("predictions", "n"), [(GOOD[:1], 1), ([*GOOD, {"id": 9, "prediction": "A"}], 2)]
)
def test_partial_scores_tell_their_coverage(run, predictions, n):
    code, out, _, result = run(predictions, "--allow-partial")
    assert code == 0
    assert f"coverage {50 * n:.1f} % of 2 items" in out
    assert (result["n"], result["partial"]) == (n, True)


@pytest.mark.parametrize("text", ["", "nan", "inf", "-", "\x00", "no idea"])
def test_unreadable_answers_are_counted(run, text):
    code, out, _, result = run([{"id": 1, "prediction": text}, {"id": 2, "prediction": text}])
    assert code == 0
    assert "unparsed 100.0 %" in out
    assert (result["headline"]["value"], result["unparsed_rate"]) == (0.0, 1.0)


def test_a_damaged_parquet_file_is_named(tmp_path, capsys):
    (tmp_path / "part.parquet").write_bytes(b"PAR1 cut off")
    for data in (tmp_path / "part.parquet", tmp_path):
        command = ["score", "--bench", "mmmu", "--data", str(data), "--pred", "none"]
        assert main(command) == 1
        assert "part.parquet is not a readable parquet file" in capsys.readouterr().err
