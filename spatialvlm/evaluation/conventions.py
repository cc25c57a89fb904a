"""Conventions of single papers that change how a benchmark is read or scored; all are off by default and recorded."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from spatialvlm.errors import ConfigError
from spatialvlm.evaluation.benchmarks.perception import parse_site
from spatialvlm.evaluation.benchmarks.structured import INTERN_CATEGORIES
from spatialvlm.evaluation.protocols import macro_by_type, strictly
from spatialvlm.evaluation.schema import BenchmarkSpec, Item, Judge, Verdict


def with_conventions(
    spec: BenchmarkSpec,
    *,
    strict_mra: bool = False,
    single_existence: bool = False,
    default_options: int | None = None,
) -> BenchmarkSpec:
    """The benchmark under other conventions than its authors'.

    Args:
        spec: Benchmark.
        strict_mra: Mean relative accuracy with ``<`` instead of ``<=`` (Benchmark Designers Should Train on the Test
            Set, arXiv 2511.04655); VSI family.
        single_existence: Every existence question counts by itself, pairs are ignored; InternSpatial-Bench.
        default_options: Number of options assumed where a row's do not parse, as EASI does with 4; SITE-Bench.

    Raises:
        ConfigError: The benchmark has nothing that a convention changes.
    """
    if strict_mra:
        _only(spec, "--mra strict", ("vsi_bench", "vsi_debiased", "vsti_bench"))
        spec = _with(spec, {"mra": "strict"}, judge=_strict(spec.judge))
    if single_existence:
        _only(spec, "--existence single", ("internspatial",))
        each = macro_by_type("mean of 5 categories", INTERN_CATEGORIES)
        spec = _with(spec, {"existence": "single"}, summarise=each)
    if default_options is not None:
        _only(spec, "--caa-default-options", ("site",))
        if default_options < 2:
            raise ConfigError(f"--caa-default-options {default_options}: needs at least 2 options")
        count = default_options
        spec = _with(
            spec,
            {"caa_default_options": count},
            parse=lambda row, item_id: parse_site(row, item_id, default_options=count),
        )
    return spec


def _only(spec: BenchmarkSpec, switch: str, names: tuple[str, ...]) -> None:
    if spec.name not in names:
        raise ConfigError(f"{switch} changes nothing in {spec.name}; it is for {', '.join(names)}")


def _with(spec: BenchmarkSpec, settings: Mapping[str, Any], **changes: Any) -> BenchmarkSpec:
    return replace(spec, settings={**spec.settings, **settings}, **changes)


def _strict(judge_for: Callable[[str], Judge]) -> Callable[[str], Judge]:
    def for_protocol(protocol: str) -> Judge:
        judge = judge_for(protocol)

        def strict(item: Item, text: str) -> Verdict:
            return strictly(item, judge(item, text), signed=protocol != "easi")

        return strict

    return for_protocol
