"""Item scores and aggregates against the public scorers, for the table in docs/parity.md.

The references were written by the benchmarks' own scorers on synthetic rows (``tests/data/scorers``). Scores are sums of
a few floats, so 1e-12 admits only another order of summation; choices must be equal.
"""

import numpy as np
import pytest

from spatialvlm.evaluation.benchmarks.vsi import vsi_path
from spatialvlm.evaluation.metrics import estimate
from tests.unit.evaluation.test_golden import CHOICE_COLUMNS, aggregate, rows, scored

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
def test_scores(bench, name, protocol, column, key, reference, record):
    result = scored(bench, name, protocol)
    pairs = zip(result.scored, rows(name), strict=True)
    worst = max(abs(s.verdict.score - float(row[column])) for s, row in pairs)
    record("scorers", f"{bench}, {protocol}: items", worst, 1e-12, reference)
    overall = abs(result.headline["value"] - aggregate(name)[key])
    record("scorers", f"{bench}, {protocol}: overall (points)", overall, 1e-9, reference)


@pytest.mark.parametrize("column", CHOICE_COLUMNS)
def test_extractors(column, record):
    different = 0
    for name in ("mcq_edges", "mcq_extractors"):
        for row in rows(name):
            options = dict(zip("ABCDEFGH", row["choices"][: row["n_options"]], strict=False))
            different += CHOICE_COLUMNS[column](row["text"], options) != (row[column] or None)
    record("scorers", f"extractor {column}, answers that differ", different, 0, "its scorer")


def test_clustered_error_against_a_bootstrap(record):
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
    record(
        "scorers", "clustered standard error (relative)", difference, 0.12, "bootstrap over scenes"
    )
