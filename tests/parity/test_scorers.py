"""Item scores and aggregates against the public scorers, for the table in docs/parity.md.

The references were written by the benchmarks' own scorers on synthetic rows (``tests/data/scorers``). Scores are sums of
a few floats, so 1e-12 admits only another order of summation; choices must be equal.
"""

import numpy as np
import pytest

from spatialvlm.evaluation import extract
from spatialvlm.evaluation.benchmarks.circular import dsr_summary, mmsi_variants
from spatialvlm.evaluation.benchmarks.vsi import vsi_path
from spatialvlm.evaluation.metrics import estimate, mra
from tests.unit.evaluation import test_seed_tables as papers
from tests.unit.evaluation.test_golden import CHOICE_COLUMNS, STRUCTURED, aggregate, rows, scored

pytestmark = pytest.mark.parity

SCORED = [
    ("vsi_bench", "vsibench_official", "official", "score", "overall", "VSI-Bench scorer"),
    ("vsi_bench", "vsibench_lmmseval073", "lmms", "score", "overall", "lmms-eval 0.7.3"),
    ("vsi_bench", "vsibench_easi", "easi", "score", "overall", "EASI"),
    ("vsti_bench", "vstibench_official", "official", "score", "overall", "VSTI-Bench scorer"),
    ("mindcube", "mindcube_official", "official", "correct", "overall", "MindCube scorer"),
    ("cv_bench", "cvbench", "lmms", "correct", "official_formula", "lmms-eval 0.7.3"),
    ("mmstar", "mmstar", "official", "score", "average", "MMStar scorer"),
    ("space10", "space10_evaluator", "official", "correct", "all", "SpaCE-10 scorer"),
    ("circular_mcq", "mmbench_circular", "official", "correct", "hard_circular", "VLMEvalKit"),
]


@pytest.mark.parametrize(("bench", "name", "protocol", "column", "key", "reference"), SCORED)
def test_scores(bench, name, protocol, column, key, reference, check):
    result = scored(bench, name, protocol)
    pairs = zip(result.scored, rows(name), strict=True)
    worst = max(abs(s.verdict.score - float(row[column])) for s, row in pairs)
    check("scorers", f"{bench}, {protocol}: items", worst, 1e-12, reference)
    overall = abs(result.headline["value"] - aggregate(name)[key])
    check("scorers", f"{bench}, {protocol}: overall (points)", overall, 1e-9, reference)


@pytest.mark.parametrize("column", CHOICE_COLUMNS)
def test_extractors(column, check):
    different = 0
    for name in ("mcq_edges", "mcq_extractors"):
        for row in rows(name):
            options = dict(zip("ABCDEFGH", row["choices"][: row["n_options"]], strict=False))
            different += CHOICE_COLUMNS[column](row["text"], options) != (row[column] or None)
    check("scorers", f"extractor {column}, answers that differ", different, 0, "its scorer")


NUMBER_COLUMNS = {
    "official": extract.float_first_word,
    "lmms": extract.first_number_or_words,
    "easi": extract.last_number,
}


@pytest.mark.parametrize("column", NUMBER_COLUMNS)
def test_numbers(column, check):
    data = [row for name in ("num_edges", "num_extractors") for row in rows(name)]
    different = sum(NUMBER_COLUMNS[column](row["text"]) != row[column] for row in data)
    check("scorers", f"numbers {column}, answers that differ", different, 0, "its scorer")


def test_mean_relative_accuracy(check):
    data = rows("mra")
    predicted, target = ([row[key] for row in data] for key in ("pred", "target"))
    for column, signed, reference in (
        ("mra", True, "VSI-Bench scorer"),
        ("mra_easi", False, "EASI"),
    ):
        found = mra(predicted, target, signed=signed)
        worst = max(abs(found - [row[column] for row in data]))
        check("scorers", f"mean relative accuracy, {column}", worst, 0, reference)


def test_chance_adjusted_accuracy(check):
    """Unreadable answers are left to chance upstream; here they count as wrong, or as 1/k."""
    for policy in ("wrong", "expected"):
        result = scored("site", "site_official", "official", unparsed=policy)
        golden = aggregate("site_official")[f"unparsed_{policy}"]["overall"]["caa"]
        error = abs(result.headline["value"] - golden)
        check("scorers", f"site, unparsed {policy}: CAA (points)", error, 1e-9, "SITE-Bench scorer")


def test_groups_and_variants(check):
    data, golden = rows("3dsrbench"), aggregate("3dsrbench")
    found, _ = dsr_summary(*([row[key] for row in data] for key in ("qid", "hit", "category")))
    worst = max(abs(value.value - golden[name]) for name, value in found.items())
    check("scorers", "dsr3: vanilla, flip, circular (points)", worst, 1e-9, "3DSRBench scorer")
    different = sum(
        mmsi_variants({key: row[key] for key in ("index", "question", "answer")}) != row["variants"]
        for row in rows("mmsi_circular")
    )
    check("scorers", "mmsi, circular variants that differ", different, 0, "published files")


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_answers(name, check):
    result, golden = scored(name, name, "official"), aggregate(name)
    worst = 0.0
    for row, s in zip(rows(name), result.scored, strict=True):
        for column, key in STRUCTURED[name][1].items():
            if row[column] is not None and key in s.verdict.details:
                worst = max(worst, abs(s.verdict.details[key] - row[column]))
    check("scorers", f"{name}: items", worst, 1e-12, "reference arithmetic")
    numbers = [key for key, value in golden.items() if isinstance(value, float)]
    worst = max(abs(result.extra[key] - golden[key]) for key in numbers)
    check("scorers", f"{name}: aggregates", worst, 1e-9, "reference arithmetic")


@pytest.mark.parametrize(
    ("table", "source"),
    [("vsi", "SSR, Tables 2 and 3"), ("intern", "InternSpatial-Bench"), ("vsi7", "InternSpatial, VSI-Bench"),
     ("3d", "OpenSpatial, Tables 1, 4, 5")],
)  # fmt: skip
def test_printed_averages(table, source, check):
    """Columns are printed to 0.1, so a printed mean may differ by 0.1; the three known misprints must differ by more."""
    gaps = {
        name: abs(papers.nested_mean(table, columns) - printed)
        for kind, name, columns, _, printed in papers.rows()
        if kind == table
    }
    misprints = {name for kind, name in papers.INCONSISTENT if kind == table}
    assert all((gap > 0.10) == (name in misprints) for name, gap in gaps.items())
    consistent = [gap for name, gap in gaps.items() if name not in misprints]
    feature = f"{source}: {len(consistent)} printed averages (points)"
    check("scorers", feature, max(consistent), 0.10, "the paper")


def test_clustered_error_against_a_bootstrap(check):
    """2,000 draws over scenes estimate the standard error to about 2 %; 12 % also admits the small-sample bias."""
    result = scored("vsi_bench", "vsibench_easi", "easi")
    scenes = {}
    for s in result.scored:
        scenes.setdefault(s.item.cluster, []).append(s)
    names = list(scenes)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(2000):
        drawn = [s for k in rng.integers(0, len(names), len(names)) for s in scenes[names[k]]]
        paths = [vsi_path(s.item.question_type) for s in drawn]
        means.append(estimate([s.verdict.score for s in drawn], range(len(drawn)), paths).value)
    difference = abs(np.std(means) / result.headline["se"] - 1)
    check(
        "scorers", "clustered standard error (relative)", difference, 0.12, "bootstrap over scenes"
    )
