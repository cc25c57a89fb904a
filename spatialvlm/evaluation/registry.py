"""All benchmarks by name. A new one is a file in ``benchmarks`` and an entry in its ``SPECS``."""

from collections.abc import Collection
from pathlib import Path

from spatialvlm.errors import ConfigError, DataError
from spatialvlm.evaluation.benchmarks import (
    circular,
    general,
    global_map,
    multiview,
    perception,
    rows,
    structured,
    vsi,
)
from spatialvlm.evaluation.reading import load_items
from spatialvlm.evaluation.schema import Benchmark, BenchmarkSpec, closest

BENCHMARKS: dict[str, BenchmarkSpec] = {
    spec.name: spec
    for family in (vsi, multiview, perception, general, circular, structured, global_map, rows)
    for spec in family.SPECS
}


def find_spec(name: str) -> BenchmarkSpec:
    """A benchmark by name.

    Raises:
        ConfigError: Unknown name.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            f"unknown benchmark {name!r}; known: {', '.join(sorted(BENCHMARKS))}"
            f"{closest(name, BENCHMARKS)}"
        )
    return BENCHMARKS[name]


def load_benchmark(
    name: str,
    path: str | Path,
    *,
    media_root: str | Path | None = None,
    ids: Collection[str] | None = None,
    strict: bool = False,
) -> Benchmark:
    """Read a benchmark's local file; see :func:`~spatialvlm.evaluation.reading.load_items`."""
    return load_items(find_spec(name), path, media_root=media_root, ids=ids, strict=strict)


def check_media(benchmark: Benchmark, limit: int = 20) -> None:
    """Check that the media of all items exist.

    Raises:
        DataError: Lists the first missing files and their number.
    """
    missing: dict[str, None] = {}
    for item in benchmark.items:
        for medium in benchmark.spec.media(item.row):
            if medium.data is None:
                names = [f"{medium.path}/{frame}" for frame in medium.frames] or [medium.path]
                missing |= {n: None for n in names if not (benchmark.media_root / n).exists()}
    if missing:
        shown = "\n  ".join(list(missing)[:limit])
        raise DataError(
            f"{len(missing)} media files of {benchmark.spec.name} are missing under "
            f"{benchmark.media_root}:\n  {shown}"
        )
