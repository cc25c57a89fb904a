"""Score predictions of a benchmark, compare two results, and write both down."""

import csv
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.chance import chance_scores
from spatialvlm.evaluation.extract import strip_think as drop_thinking
from spatialvlm.evaluation.metrics import estimate, group_scores, half_width_percent, p_value
from spatialvlm.evaluation.predictions import Key, Prediction, join
from spatialvlm.evaluation.registry import find_spec
from spatialvlm.evaluation.schema import (
    PROTOCOLS,
    Benchmark,
    BenchmarkSpec,
    Item,
    Judge,
    Scored,
    Verdict,
    closest,
)

UNPARSED = ("wrong", "expected", "random")


@dataclass(frozen=True)
class Result:
    """Scores of one benchmark; every number is in percent unless its name says otherwise."""

    benchmark: str
    protocol: str
    headline: dict[str, Any]
    """``name``, ``value``, ``se``, ``ci95``."""
    n: int
    n_expected: int
    unparsed_rate: float
    """Share in [0, 1] of answers that could not be read."""
    n_truncated: int
    n_failed: int
    clusters: str
    """What the standard errors are clustered by, with the number of clusters."""
    per_type: dict[str, dict[str, Any]]
    micro: float
    macro: float
    chance: dict[str, Any]
    extra: dict[str, Any]
    deviations: list[str]
    conventions: dict[str, Any]
    """Other than the authors', e.g. ``{"mra": "strict"}``."""
    settings: dict[str, Any]
    partial: bool
    missing_types: list[str]
    warnings: list[str]
    data_sha256: str
    pred_sha256: str
    scored: tuple[Scored, ...] = field(default=(), repr=False)

    @property
    def coverage(self) -> float:
        """Share in [0, 1] of the benchmark's items that were scored."""
        return self.n / self.n_expected if self.n_expected else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything but the items, as JSON values."""
        content = {key: value for key, value in vars(self).items() if key != "scored"}
        head = dict(self.headline)
        if math.isnan(head["value"]):
            head["value"] = None  # JSON has no NaN: a mean error without one readable answer
        return {**content, "headline": head, "coverage": self.coverage}

    def line(self) -> str:
        """One line for a terminal."""
        h = self.headline
        se = "" if h["se"] is None else f" ± {h['se']:.2f}"
        return (
            f"{self.benchmark}  {h['value']:.2f}{se}  ({h['name']}, SE by {self.clusters})  n {self.n}/"
            f"{self.n_expected}  unparsed {100 * self.unparsed_rate:.1f} %  protocol {self.protocol}"
            + "".join(f"  {key}={value}" for key, value in self.conventions.items())
            + ("  PARTIAL" if self.partial else "")
        )


def check_protocol(protocol: str) -> str:
    """Return the protocol if it exists.

    Raises:
        ConfigError: Unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"protocol {protocol!r} is not one of: {', '.join(PROTOCOLS)}{closest(protocol, PROTOCOLS)}"
        )
    return protocol


def _resolve_unparsed(item: Item, verdict: Verdict, policy: str, seed: int) -> Verdict:
    """Score an unreadable choice by policy; other answers stay as they are."""
    if not verdict.unparsed or policy == "wrong" or not item.options:
        return verdict
    letters = list(item.options)
    if policy == "expected":
        return replace(verdict, score=1 / len(letters))
    digest = hashlib.sha256(f"{seed}:{item.id}".encode()).hexdigest()
    guess = letters[int(digest, 16) % len(letters)]
    return replace(verdict, score=float(guess == item.gold))


def _judge_all(
    pairs: Sequence[tuple[Item, Prediction]],
    judge: Judge,
    *,
    unparsed: str,
    seed: int,
    strip_think: bool,
    use_extracted: bool,
) -> list[Scored]:
    scored = []
    for item, prediction in pairs:
        text = drop_thinking(prediction.text) if strip_think else prediction.text
        if use_extracted and prediction.extracted is not None:
            text = prediction.extracted
        verdict = _resolve_unparsed(item, judge(item, text), unparsed, seed)
        scored.append(Scored(item, verdict, prediction.finish, bool(prediction.error)))
    return scored


def _per_type(scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Scored]] = defaultdict(list)
    for s in scored:
        groups[s.item.question_type].append(s)
    table = {}
    for name, part in sorted(groups.items()):
        found = estimate([s.verdict.score for s in part], [s.item.cluster for s in part])
        table[name] = {
            "value": found.value,
            "se": found.se,
            "n": found.n,
            "clusters": found.clusters,
            "unparsed_rate": sum(s.verdict.unparsed for s in part) / len(part),
            "n_truncated": sum(s.finish == "length" for s in part),
        }
    return table


def predictions_hash(pairs: Sequence[tuple[Item, Prediction]]) -> str:
    """SHA-256 over ids and texts in item order."""
    digest = hashlib.sha256()
    for _, prediction in pairs:
        digest.update(json.dumps([prediction.id, prediction.variant, prediction.text]).encode())
    return digest.hexdigest()


def score(
    benchmark: Benchmark,
    predictions: Mapping[Key, Prediction],
    protocol: str = "official",
    unparsed: str = "wrong",
    seed: int = 0,
    *,
    allow_partial: bool = False,
    strip_think: bool = False,
    use_extracted: bool = False,
    manifest: Mapping[str, Any] | None = None,
) -> Result:
    """Score predictions.

    Args:
        benchmark: Items of a local file.
        predictions: From :func:`~spatialvlm.evaluation.predictions.read_predictions`.
        protocol: ``official``, ``lmms`` or ``easi``.
        unparsed: ``wrong`` (0), ``expected`` (1/k for choices), ``random`` (a seeded letter).
        seed: Of ``unparsed="random"``.
        allow_partial: Accept missing and unknown ids; the result is marked partial.
        strip_think: Cut everything through the last ``</think>`` first.
        use_extracted: Prefer the ``extracted`` column (an external judge) over our extractor.
        manifest: How the predictions were made; a different prompt protocol is reported.

    Raises:
        DataError: Ids do not fit, or the data file is not the one that was asked.
        ConfigError: Unknown protocol or policy.
    """
    check_protocol(protocol)
    if unparsed not in UNPARSED:
        raise ConfigError(f"unparsed={unparsed!r} is not one of: {', '.join(UNPARSED)}")
    warnings = list(benchmark.warnings)
    deviations = list(benchmark.spec.notes.get(protocol, ()))
    deviations += [f"{key}={value} by choice" for key, value in benchmark.spec.settings.items()]
    settings: dict[str, Any] = {"unparsed": unparsed, "strip_think": strip_think}
    if unparsed == "random":
        settings["seed"] = seed
    if use_extracted:
        settings["extractor"] = "external"
    if manifest:
        _check_manifest(benchmark, manifest, protocol, settings, warnings)

    pairs = join(benchmark.items, predictions, allow_partial=allow_partial)
    scored = _judge_all(
        pairs,
        benchmark.spec.judge(protocol),
        unparsed=unparsed,
        seed=seed,
        strip_think=strip_think,
        use_extracted=use_extracted,
    )
    summary = benchmark.spec.summarise(scored, protocol)
    head = summary.headline
    deviations += summary.deviations
    per_type = _per_type(scored)
    expected = benchmark.spec.expected_n or len(benchmark.items)
    if head.se is None:
        warnings.append("a single cluster: no standard error")
    extra = dict(summary.extra)
    if benchmark.unscored:
        extra["unscored_rows"] = benchmark.unscored
    clustered = len({s.item.cluster for s in scored}) < len(scored)
    return Result(
        benchmark=benchmark.spec.name,
        protocol=protocol,
        headline={
            "name": summary.name,
            "value": head.value,
            "se": head.se,
            "ci95": list(head.ci95) if head.ci95 else None,
            "half_width_iid": half_width_percent(len(scored)),
        },
        n=len(scored),
        n_expected=expected,
        unparsed_rate=sum(s.verdict.unparsed for s in scored) / len(scored),
        n_truncated=sum(s.finish == "length" for s in scored),
        n_failed=sum(s.failed for s in scored),
        clusters=f"{head.clusters} {'scenes' if clustered else 'items'}",
        per_type=per_type,
        micro=estimate([s.verdict.score for s in scored], [s.item.cluster for s in scored]).value,
        macro=math.fsum(row["value"] for row in per_type.values()) / len(per_type),
        chance=_chance(scored, benchmark.spec, protocol),
        extra=extra,
        deviations=deviations,
        conventions=dict(benchmark.spec.settings),
        settings=settings,
        partial=len(scored) < len(benchmark.items)
        or len(scored) < expected
        or bool(summary.missing),
        missing_types=list(summary.missing),
        warnings=warnings,
        data_sha256=benchmark.sha256,
        pred_sha256=predictions_hash(pairs),
        scored=tuple(scored),
    )


def _chance(scored: Sequence[Scored], spec: BenchmarkSpec, protocol: str) -> dict[str, Any]:
    """Score without looking: 1/k for choices, the best constant answer for everything else.

    ``macro`` stands beside the headline: aggregated by the same rule where that rule is linear in item scores, else
    the mean over question types; ``None`` beside an error.
    """
    values = chance_scores([s.item for s in scored])
    sums: dict[str, list[float]] = defaultdict(list)
    for s, value in zip(scored, values, strict=True):
        sums[s.item.question_type].append(value)
    per_type = {name: 100 * sum(part) / len(part) for name, part in sorted(sums.items())}
    macro: float | None = sum(per_type.values()) / len(per_type)
    if spec.lower_is_better:
        macro = None
    elif all(s.item.kind in ("choice", "number") and not s.item.group for s in scored):
        guessed = [
            replace(s, verdict=replace(s.verdict, score=value))
            for s, value in zip(scored, values, strict=True)
        ]
        macro = spec.summarise(guessed, protocol).headline.value
    return {"macro": macro, "per_type": per_type}


def _check_manifest(
    benchmark: Benchmark,
    manifest: Mapping[str, Any],
    protocol: str,
    settings: dict[str, Any],
    warnings: list[str],
) -> None:
    asked = manifest.get("data_sha256")
    if benchmark.spec.id_key is None and asked and asked != benchmark.sha256:
        raise DataError(
            f"{benchmark.path} has SHA-256 {benchmark.sha256}, the predictions were made from {asked}; "
            f"{benchmark.spec.name} has no id column, so rows can only be joined within one file"
        )
    for key in ("checkpoint", "frames", "frame_policy", "media", "decoding"):
        if key in manifest:
            settings[key] = manifest[key]
    if manifest.get("protocol") not in (None, protocol):
        settings["protocol_mismatch"] = True
        warnings.append(f"prompted with protocol {manifest['protocol']}, scored with {protocol}")


# ------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True, slots=True)
class PairedResult:
    """Mean difference a - b over common items, in points."""

    name: str
    """What is compared: the headline, or the mean of items or groups where the headline is no mean of item scores."""
    difference: float
    se: float | None
    ci95: tuple[float, float] | None
    p: float | None
    n: int
    clusters: int


def paired(
    spec: BenchmarkSpec,
    protocol: str,
    a: Sequence[Scored],
    b: Sequence[Scored],
    *,
    allow_partial: bool = False,
) -> PairedResult:
    """Paired difference of two sets of scored items, by the rule of the headline, clustered.

    Where the headline is not a mean of item scores, items count alike; a group counts once, as its worst row.

    Raises:
        DataError: Different items without ``allow_partial``, or nothing in common.
    """
    left, right = ({s.item.key: s for s in part} for part in (a, b))
    common = [key for key in left if key in right]
    if not common or (not allow_partial and len(common) < max(len(left), len(right))):
        raise DataError(
            f"{len(common)} common items of {len(left)} and {len(right)}; compare runs on the same items "
            "or pass --allow-partial"
        )
    if spec.mean_of_items:
        differences = [
            Scored(left[key].item, Verdict(None, _score(left[key]) - _score(right[key]), True))
            for key in common
        ]
        summary = spec.summarise(differences, protocol)
        name, found = summary.name, summary.headline
    else:
        items = [left[key].item for key in common]
        units = [item.group or f"{item.id}|{item.variant}" for item in items]
        worst = [
            group_scores([_score(side[key]) for key in common], units)[1] for side in (left, right)
        ]
        first = {
            unit: item.cluster for unit, item in reversed(list(zip(units, items, strict=True)))
        }
        name = "mean of groups" if any(item.group for item in items) else "mean of items"
        found = estimate(worst[0] - worst[1], [first[unit] for unit in dict.fromkeys(units)])
    return PairedResult(
        name,
        found.value,
        found.se,
        found.ci95,
        p_value(found.value, found.se),
        found.n,
        found.clusters,
    )


def _score(scored: Scored) -> float:
    return scored.verdict.score


def compare(a: Result, b: Result, *, allow_partial: bool = False) -> PairedResult:
    """Paired difference of two results on the same items, see :func:`paired`.

    Raises:
        DataError: Different benchmarks or items, or other rows under the same numbers.
    """
    spec = find_spec(a.benchmark)
    check_same_questions(spec, b.benchmark, a.data_sha256, b.data_sha256)
    return paired(spec, a.protocol, a.scored, b.scored, allow_partial=allow_partial)


def check_same_questions(spec: BenchmarkSpec, other: str, *hashes: str) -> None:
    """Refuse to pair answers by ids that mean different questions.

    Raises:
        DataError: Two benchmarks, or two files of one without an id column.
    """
    if other != spec.name:
        raise DataError(f"{spec.name} and {other} have different questions; compare one benchmark")
    if spec.id_key is None and len(set(hashes)) > 1:
        raise DataError(
            f"{spec.name} has no id column and the two runs used different files (SHA-256 {', '.join(hashes)}): "
            "their row numbers mean different questions; score both with one file"
        )


# ------------------------------------------------------------------------------------------------------ files

PER_ITEM = (
    "id",
    "variant",
    "cluster",
    "question_type",
    "category",
    "gold",
    "extracted",
    "score",
    "unparsed",
    "finish",
    "group",
)


def write_result(result: Result, folder: Path) -> None:
    """Write ``result.json`` and ``per_item.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False, default=str)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "per_item.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PER_ITEM)
        for s in result.scored:
            item, verdict = s.item, s.verdict
            writer.writerow(
                [
                    item.id,
                    item.variant,
                    item.cluster,
                    item.question_type,
                    item.category,
                    _cell(item.gold),
                    _cell(verdict.extracted),
                    repr(verdict.score),
                    int(verdict.unparsed),
                    s.finish,
                    item.group,
                ]
            )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def letter_distribution(scored: Sequence[Scored]) -> dict[str, dict[str, int]]:
    """How often each letter is gold and predicted, over choice items."""
    choices = [s for s in scored if s.item.options]
    gold = Counter(str(s.item.gold) for s in choices)
    said = Counter(str(s.verdict.extracted) for s in choices if s.verdict.extracted)
    return {x: {"gold": gold[x], "predicted": said[x]} for x in sorted({*gold, *said})}
