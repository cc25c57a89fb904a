"""Reference scores of the public scorers, row by row: choices exact, floats to 1e-12, aggregates to 1e-9.

The rows are synthetic; the reference columns were written by the benchmarks' own scorers.
"""

import json
from functools import cache
from pathlib import Path

import pytest

from spatialvlm.evaluation import extract
from spatialvlm.evaluation.benchmarks.circular import dsr_summary, mmsi_variants
from spatialvlm.evaluation.benchmarks.multiview import inline_options
from spatialvlm.evaluation.metrics import caa, mra
from spatialvlm.evaluation.predictions import Prediction
from spatialvlm.evaluation.reading import load_items
from spatialvlm.evaluation.registry import find_spec
from spatialvlm.evaluation.scoring import score

FOLDER = Path(__file__).resolve().parents[2] / "data" / "scorers"


@cache
def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def aggregate(name):
    return json.loads((FOLDER / f"{name}.agg.json").read_text())


def scored(bench, name, protocol, **options):
    """Result on a golden file, whose rows are both benchmark and predictions."""
    benchmark = load_items(find_spec(bench), FOLDER / f"{name}.jsonl")
    predictions = {}
    for item, row in zip(benchmark.items, rows(name), strict=True):
        text = row["prediction"]
        text = text if isinstance(text, str) else text[0]
        predictions[item.key] = Prediction(item.id, text)
    return score(benchmark, predictions, protocol, **options)


CHOICE_COLUMNS = {
    "viewspatial": extract.last_line_letter,
    "mmsi": extract.backtick_letter,
    "mindcube": extract.mindcube,
    "dsr3_lmms": extract.dsr3,
    "blink_cv_emb_lmms": extract.leading_letter,
    "lmms_mcq": extract.ranked,
    "easi": extract.easi_match,
    "vlmevalkit": extract.vlmk_infer,
    "site": extract.mmmu_style,
}


def read_choices(name, column):
    """What our extractor finds in every text of a file."""
    extractor = CHOICE_COLUMNS[column]
    return [
        extractor(
            row["text"], dict(zip("ABCDEFGH", row["choices"][: row["n_options"]], strict=False))
        )
        for row in rows(name)
    ]


@pytest.mark.parametrize("name", ["mcq_edges", "mcq_extractors"])
@pytest.mark.parametrize("column", CHOICE_COLUMNS)
def test_choice_extractors(name, column):
    found = read_choices(name, column)
    pairs = zip(found, rows(name), strict=True)
    assert [(row["text"], row[column], x) for x, row in pairs if x != (row[column] or None)] == []
    rate = sum(x is not None for x in found) / len(found)
    assert rate == pytest.approx(aggregate(name)["found_rate"][column], abs=1e-9)


@pytest.mark.parametrize("name", ["mcq_edges", "mcq_extractors"])
def test_agreement_of_extractors(name):
    found = {column: read_choices(name, column) for column in CHOICE_COLUMNS}
    compared = 0
    for pair, reference in aggregate(name)["pairwise_agreement"].items():
        a, b = pair.split("~")
        if a in found and b in found:
            compared += 1
            agree = sum(x == y for x, y in zip(found[a], found[b], strict=True)) / len(found[a])
            assert agree == pytest.approx(reference, abs=1e-9), pair
    assert compared == 28


@pytest.mark.parametrize("name", ["mcq_edges", "mcq_extractors"])
def test_first_token(name):
    for row in rows(name):
        assert extract.first_token(row["text"]) == (row["vsi_fuzzy"] or "")


@pytest.mark.parametrize("name", ["num_edges", "num_extractors"])
@pytest.mark.parametrize(
    ("column", "extractor"),
    [
        ("official", extract.float_first_word),
        ("lmms", extract.first_number_or_words),
        ("easi", extract.last_number),
    ],
)
def test_number_extractors(name, column, extractor):
    found = [extractor(row["text"]) for row in rows(name)]
    assert found == [row[column] for row in rows(name)]
    rate = sum(value is not None for value in found) / len(found)
    assert rate == pytest.approx(aggregate(name)[f"{column}_parse_rate"], abs=1e-9)


def test_mra():
    golden = rows("mra")
    predicted, target = ([row[key] for row in golden] for key in ("pred", "target"))
    assert mra(predicted, target).tolist() == [row["mra"] for row in golden]
    assert mra(predicted, target, signed=False).tolist() == [row["mra_easi"] for row in golden]
    assert mra(predicted, target).mean() == pytest.approx(aggregate("mra")["mean_mra"], abs=1e-9)


@pytest.mark.parametrize(
    ("bench", "name", "protocol"),
    [
        ("vsi_bench", "vsibench_official", "official"),
        ("vsi_bench", "vsibench_lmmseval073", "lmms"),
        ("vsi_bench", "vsibench_easi", "easi"),
        ("vsti_bench", "vstibench_official", "official"),
    ],
)
def test_vsi_family(bench, name, protocol):
    result = scored(bench, name, protocol)
    found = [s.verdict.score for s in result.scored]
    assert found == pytest.approx([row["score"] for row in rows(name)], abs=1e-12)
    golden = aggregate(name)
    assert result.headline["value"] == pytest.approx(golden["overall"], abs=1e-9)
    assert result.headline["se"] == pytest.approx(golden["overall_se_clustered"], abs=1e-9)
    assert result.micro == pytest.approx(golden["micro"], abs=1e-9)
    assert result.clusters == f"{golden['n_clusters']} scenes"
    assert sum(s.verdict.unparsed for s in result.scored) == golden["n_unparsed"]
    for cell, mean in golden["per_cell_mean"].items():
        assert result.per_type[cell]["value"] / 100 == pytest.approx(mean, abs=1e-9)
    for entry, value in result.extra.get("entries", {}).items():
        reference = next(golden[key] for key in golden if key.startswith(entry + "_"))
        assert value == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize(
    ("bench", "name", "protocol", "column", "key"),
    [
        ("mindcube", "mindcube_official", "official", "correct", "overall"),
        ("mindcube", "mindcube_official", "lmms", "correct", "lmms_overall"),
        ("cv_bench", "cvbench", "lmms", "correct", "official_formula"),
        ("mmstar", "mmstar", "official", "score", "average"),
        ("space10", "space10_evaluator", "official", "correct", "all"),
        ("circular_mcq", "mmbench_circular", "official", "correct", "hard_circular"),
    ],
)
def test_accuracy_benchmarks(bench, name, protocol, column, key):
    result = scored(bench, name, protocol)
    assert [s.verdict.score for s in result.scored] == [float(row[column]) for row in rows(name)]
    golden = aggregate(name)
    assert result.headline["value"] == pytest.approx(golden[key], abs=1e-9)
    flat = {**golden, **{"double": golden.get("multiple")}}
    for name_, value in result.extra.items():
        if isinstance(value, (int, float)) and flat.get(name_) is not None:
            assert value == pytest.approx(flat[name_], abs=1e-9)


def test_chance_is_aggregated_like_the_headline():
    chance = scored("vsi_bench", "vsibench_official", "official").chance
    types = dict(chance["per_type"])
    levels = [types.pop(f"object_rel_direction_{level}") for level in ("easy", "medium", "hard")]
    assert len(types) == 7
    assert chance["macro"] == pytest.approx((sum(types.values()) + sum(levels) / 3) / 8)
    assert scored("site", "site_official", "official").chance["macro"] == pytest.approx(0, abs=1e-9)


def test_mindcube_settings_and_parsed():
    result = scored("mindcube", "mindcube_official", "official")
    golden = aggregate("mindcube_official")
    for row, s in zip(rows("mindcube_official"), result.scored, strict=True):
        assert (s.verdict.extracted, s.item.question_type) == (row["parsed"], row["setting"])
    assert sum(s.verdict.unparsed for s in result.scored) == golden["n_unparsed"]
    for setting, reference in golden["settings"].items():
        assert result.extra["settings"][setting]["n"] == reference["n"]
        found = result.extra["settings"][setting]["accuracy"]
        assert found == pytest.approx(reference["accuracy"], abs=1e-9)


def test_cv_bench_sources():
    result, golden = scored("cv_bench", "cvbench", "lmms"), aggregate("cvbench")
    assert result.micro == pytest.approx(golden["micro"], abs=1e-9)
    assert result.extra["source"] == pytest.approx(golden["source"], abs=1e-9)


@pytest.mark.parametrize("policy", ["wrong", "expected"])
def test_site(policy):
    result = scored("site", "site_official", "official", unparsed=policy)
    for row, s in zip(rows("site_official"), result.scored, strict=True):
        assert s.verdict.unparsed == row["guessed"]
        if not row["guessed"]:
            assert (s.verdict.extracted, s.verdict.score) == (row["parsed"], row["score"])
    golden = aggregate("site_official")[f"unparsed_{policy}"]
    found = {**result.extra["category"], "overall": result.extra["overall"]}
    assert set(found) == set(golden)
    for name, reference in golden.items():
        assert found[name] == pytest.approx(reference, abs=1e-9)
    assert result.headline["value"] == pytest.approx(golden["overall"]["caa"], abs=1e-9)


def test_site_recorded_arithmetic():
    golden = aggregate("site_official")["official_recorded"]
    data = rows("site_official")
    for name, reference in golden.items():
        part = [row for row in data if name in ("overall", row["category"])]
        found = caa(
            [row["score"] for row in part], [len(row["options"]) for row in part], range(len(part))
        )
        assert found.value == pytest.approx(reference["caa"], abs=1e-9)


def test_3dsrbench():
    data, golden = rows("3dsrbench"), aggregate("3dsrbench")
    found, main = dsr_summary(*([row[key] for row in data] for key in ("qid", "hit", "category")))
    for name, value in found.items():
        assert value.value == pytest.approx(golden[name], abs=1e-9)
    for name, count in golden["groups"].items():
        assert found[name].n == count
    assert main == pytest.approx(golden["main_category_vanilla"], abs=1e-9)


def test_mmsi_circular():
    data, golden = rows("mmsi_circular"), aggregate("mmsi_circular")
    for row in data:
        parsed = row["parsed_question"], row["parsed_options"]
        assert inline_options(row["question"]) == parsed
        source = {key: row[key] for key in ("index", "question", "answer")}
        assert mmsi_variants(source) == row["variants"]
    assert golden["n_variants"] == 4 * len(data)
    assert golden["n_four_options"] == sum(len(row["parsed_options"]) == 4 for row in data)


STRUCTURED = {
    "localcogmap": ("parsed", {"error": "error", "error_continuous": "error_continuous"}),
    "grounding7dof": (
        "parsed_box",
        {key: key for key in ("center_error", "bev_error", "iou3d", "yaw_error_deg", "size_error")},
    ),
    "counting": ("parsed", {"rel_error": "rel_error"}),
    "rotation": ("parsed_deg", {"error_deg": "error_deg"}),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(name):
    parsed, details = STRUCTURED[name]
    result, golden = scored(name, name, "official"), aggregate(name)
    for row, s in zip(rows(name), result.scored, strict=True):
        assert s.verdict.extracted == (
            pytest.approx(row[parsed], abs=1e-12) if row[parsed] is not None else None
        )
        for column, key in details.items():
            value = s.verdict.details.get(key)
            if row[column] is None or (s.verdict.unparsed and column == "iou3d"):
                assert value is None
            else:
                assert value == pytest.approx(row[column], abs=1e-12)
    assert result.n == golden.pop("n")
    assert sum(s.verdict.unparsed for s in result.scored) == golden.pop("n_unparsed")
    for key, reference in golden.items():
        assert result.extra[key] == pytest.approx(reference, abs=1e-9), key
