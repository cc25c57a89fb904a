"""From a folder of scenes to a folder of rows: parts, resume, counters, manifest."""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import shapely

from spatialvlm import __version__
from spatialvlm.errors import ConfigError, SpatialVLMError, SynthesisError
from spatialvlm.scenes.schema import Scene
from spatialvlm.synthesis.executors import Executor, run_parts, run_separately
from spatialvlm.synthesis.generate import Counters, RowMaker, generate_scene, make_context
from spatialvlm.synthesis.parts import (
    Part,
    RowWriter,
    SceneRef,
    finish_part,
    finished_sidecar,
    image_prefix,
    list_scenes,
    read_scene,
    split_into_parts,
    write_text,
)
from spatialvlm.synthesis.plan import SynthesisPlan
from spatialvlm.synthesis.rows import CONTAMINATED, GEN_VERSION, compact_json
from spatialvlm.synthesis.twins import base_of, counterfactual_rows
from spatialvlm.synthesis.verify import check_text, chosen
from spatialvlm.synthesis.wording import PhraseBook, phrase_book

_PART = re.compile(r"part-\d{5}-of-\d{5}")
MAX_FAILED = 0.01
"""Share of scenes that may fail before a run stops."""
SCENE_FAILURES = (
    SpatialVLMError, ArithmeticError, LookupError, ValueError, OSError, MemoryError,
    shapely.errors.ShapelyError,
)  # fmt: skip
"""What one bad scene can raise; it is tried again, recorded, and the others go on."""
SCENE_TIMEOUT_S = 120.0
SELF_CHECK = 0.01
"""Share of the rows whose text is read back before they are written; ``verify_qa.py`` checks all of them."""


@dataclass(frozen=True)
class Job:
    """What a worker needs for one part; sent to other processes."""

    scenes: Path
    out: Path
    plan: SynthesisPlan
    bases: Mapping[str, SceneRef] = field(default_factory=dict)
    """All scenes by id: where twins find their rooms."""
    blocked: tuple[str, ...] = ()
    """Ids of scenes that must not be used (see ``scenes.blacklist``)."""
    allow_blocked: bool = False
    """Use them all the same; their rows carry the tag ``contaminated``."""
    dry_run: bool = False
    scene_timeout_s: float = SCENE_TIMEOUT_S
    """Longest time for one scene; 0 = no limit."""


@dataclass
class Summary:
    """What a run did."""

    rows: int = 0
    parts: int = 0
    skipped_parts: int = 0
    """Parts that were complete from an earlier run."""
    counters: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed_scenes: dict[str, str] = field(default_factory=dict)
    """Scene id -> traceback."""
    skipped_scenes: list[str] = field(default_factory=list)
    """Evaluation scenes, and scenes of splits that the plan does not allow."""

    def table(self) -> str:
        """Rows and rejections per task."""
        by_task: dict[str, list[str]] = defaultdict(list)
        for (task, reason), count in sorted(self.counters.items(), key=lambda i: (i[0][0], -i[1])):
            if reason != "rows":
                by_task[task].append(f"{reason} {count}")
        lines = [f"{'task':<22} {'rows':>8}  rejected"]
        for task in sorted({task for task, _ in self.counters}):
            rejected = ", ".join(by_task[task]) or "-"
            lines.append(f"{task:<22} {self.counters[task, 'rows']:>8}  {rejected}")
        return "\n".join(lines)


def synthesize(
    scenes: Path,
    out: Path,
    plan: SynthesisPlan,
    *,
    executor: Executor = "process",
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    limit: int | None = None,
    overwrite: bool = False,
    blocked: Iterable[str] = (),
    allow_blocked: bool = False,
    dry_run: bool = False,
    max_failed: float = MAX_FAILED,
    scene_timeout_s: float = SCENE_TIMEOUT_S,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Generate all rows; complete parts of an earlier run with the same plan are kept.

    Args:
        scenes: Folder of scenes.
        out: Folder of the rows: parts, sidecars, ``manifest.json`` and ``_SUCCESS``.
        plan: What to generate.
        executor: Where parts run; the files do not depend on it.
        workers: Processes.
        shard: ``(i, n)``: only parts with index i modulo n.
        limit: Only the first so many scenes.
        overwrite: Start over: remove rows of other plans and all parts of this shard first.
        blocked: Scene ids to skip; they are counted and listed.
        allow_blocked: Use them and tag their rows ``contaminated``.
        dry_run: Count only, write nothing.
        max_failed: Share of scenes that may fail.
        scene_timeout_s: Longest time for one scene in seconds; 0 = no limit. A scene that fails or takes longer
            is tried once more in a process of its own, then recorded. The next run tries it again.
        progress: Called with (scenes of the finished part, its rows).

    Raises:
        ConfigError: Bad shard or workers, or ``out`` holds rows of another plan.
        SynthesisError: Too many scenes failed.
    """
    index, count = shard
    if not 0 <= index < count or workers < 1:
        raise ConfigError(
            f"shard {index}/{count} with {workers} workers: need 0 <= i < n, workers >= 1."
        )
    refs = list_scenes(scenes)[:limit]
    parts = [part for part in split_into_parts(refs) if part.index % count == index]
    summary = Summary()
    bases = {ref.scene_id: ref for ref in refs}
    job = Job(
        scenes, out, plan, bases, tuple(sorted(blocked)), allow_blocked, dry_run, scene_timeout_s
    )
    todo = []
    if not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        total = len(split_into_parts(refs))
        if overwrite:
            _start_over(out, plan, {part.stem for part in parts}, total, every_part=count == 1)
        _check_plan(out, plan, total)
    for part in parts:
        sidecar = None if dry_run else finished_sidecar(out, part)
        if sidecar is not None and sidecar["config_hash"] == plan.config_hash:
            summary.skipped_parts += 1
            _add(summary, sidecar)
            if progress is not None:
                progress(len(part.scenes), sidecar["rows"])
        else:
            todo.append(part)
    for sidecar in run_parts(executor, workers, partial(run_part, job), todo):
        _add(summary, sidecar)
        if len(summary.failed_scenes) > max_failed * len(refs):
            scene, trace = next(iter(summary.failed_scenes.items()))
            raise SynthesisError(
                f"{len(summary.failed_scenes)} of {len(refs)} scenes failed, more than the allowed "
                f"share {max_failed}. First: {scene}\n{trace}"
            )
        if progress is not None:
            progress(len(sidecar["scenes"]), sidecar["rows"])
    if not dry_run:
        merge_manifest(out, len(split_into_parts(refs)))
    return summary


def run_part(job: Job, part: Part) -> dict[str, Any]:
    """Generate one part and write it; returns its sidecar."""
    started = time.perf_counter()
    counters: Counter[tuple[str, str]] = Counter()
    failed: dict[str, str] = {}
    licenses: Counter[str] = Counter()
    skipped: list[str] = []
    rows = 0
    with nullcontext() if job.dry_run else RowWriter(job.out / f"{part.stem}.parquet") as writer:
        for ref in part.scenes:
            try:
                made, counted = _scene_rows_or_retry(job, ref)
            except SCENE_FAILURES:
                failed[ref.scene_id] = traceback.format_exc()
                continue
            if made is None:
                skipped.append(ref.scene_id)
                continue
            if writer is not None:
                writer.add(made)
            rows += len(made)
            counters.update(counted)
            licenses.update(row["license"] for row in made)
    nested: dict[str, dict[str, int]] = defaultdict(dict)
    for (task, reason), count in sorted(counters.items()):
        nested[task][reason] = count
    sidecar: dict[str, Any] = {
        "scenes": [ref.scene_id for ref in part.scenes],
        "blocked_scenes": skipped,
        "failed_scenes": failed,
        "counters": nested,
        "licenses": dict(licenses),
        "config_hash": job.plan.config_hash,
        "gen_version": GEN_VERSION,
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if not job.dry_run:
        finish_part(job.out, part, sidecar)
    return sidecar


SceneRows = tuple[list[dict[str, Any]] | None, Counters]


def _scene_rows_or_retry(job: Job, ref: SceneRef) -> SceneRows:
    """Rows of a scene; after a failure once more in a new process, where nothing of this one can disturb."""
    try:
        return scene_rows(job, ref)
    except SCENE_FAILURES as first:
        try:
            return run_separately(partial(scene_rows, job), ref)
        except SCENE_FAILURES as second:
            raise second from first


def scene_rows(job: Job, ref: SceneRef) -> SceneRows:
    """Rows of a scene and what was rejected; ``None`` for a scene that must not be used.

    Raises:
        SynthesisError: It takes longer than ``job.scene_timeout_s``, or a row does not say what its answer is.
    """
    contaminated = ref.scene_id in job.blocked
    if contaminated and not job.allow_blocked:
        return None, Counter()
    book = phrase_book(job.plan.templates)
    with time_limit(job.scene_timeout_s, ref.scene_id):
        scene = read_scene(ref)
        if scene.source != "rooms" and scene.split not in job.plan.allow_split:
            return None, Counter()
        prefix = image_prefix(scene, job.scenes)
        made, counted = generate_scene(scene, job.plan, image_prefix=prefix, book=book)
        base = base_of(scene)
        if base is not None and base in job.bases:
            made = with_pairs(job, scene, read_scene(job.bases[base]), prefix, book, made)
            rows = Counter(row["task"] for row in made)
            counted.update({(task, "rows"): rows[task] - counted[task, "rows"] for task in rows})
    for row in made:
        problems = check_text(row) if chosen(row["id"], SELF_CHECK, "self-check") else []
        if problems:
            raise SynthesisError(
                f"{ref.scene_id}: row {row['id']} of task {row['task']} is wrong: {problems[0]}. Fix the task or "
                "leave it out (--tasks)."
            )
    if contaminated:
        made = [{**row, "tags": [*row["tags"], CONTAMINATED]} for row in made]
    return made, counted


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Interrupt the block after ``seconds`` (0 = never); only the main thread of a process can.

    Raises:
        SynthesisError: The block took longer.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SynthesisError(
            f"{what} takes longer than {seconds:g} s. Raise --scene-timeout, or use fewer frames of it."
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def with_pairs(
    job: Job, twin: Scene, base: Scene, prefix: str, book: PhraseBook, made: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of a twin, those that pair with a row of its room marked, and further such rows added."""
    base_rows, _ = generate_scene(base, job.plan, book=book)
    maker = RowMaker(make_context(twin, job.plan), job.plan, book, prefix)
    pairs = {row["id"]: row for row in counterfactual_rows(base_rows, base, maker)}
    marked = [pairs.pop(row["id"], row) for row in made]
    return sorted([*marked, *pairs.values()], key=lambda row: (row["task"], row["id"]))


def _add(summary: Summary, sidecar: dict[str, Any]) -> None:
    summary.parts += 1
    summary.rows += sidecar["rows"]
    summary.failed_scenes.update(sidecar["failed_scenes"])
    summary.skipped_scenes += sidecar["blocked_scenes"]
    for task, reasons in sidecar["counters"].items():
        for reason, count in reasons.items():
            summary.counters[task, reason] += count


def _start_over(
    out: Path, plan: SynthesisPlan, own: set[str], total: int, *, every_part: bool
) -> None:
    """Remove parts of earlier runs, and nothing else; finished parts of other shards of this plan stay."""
    for path in sorted(out.glob("part-*-of-*.parquet")) + sorted(out.glob("part-*-of-*.json")):
        if _PART.fullmatch(path.stem) is None:
            continue
        sidecar = path.with_suffix(".json")
        other = _hash_of(sidecar) not in (None, plan.config_hash) or _total_of(path) != total
        if every_part or path.stem in own or other:
            path.with_suffix(".parquet").unlink(missing_ok=True)
            sidecar.unlink(missing_ok=True)


def _hash_of(sidecar: Path) -> str | None:
    """Configuration hash of a part, ``None`` while it is not finished."""
    if not sidecar.is_file():
        return None
    value: str | None = json.loads(sidecar.read_text(encoding="utf-8")).get("config_hash")
    return value


def _total_of(path: Path) -> int:
    """Number of parts of the run that wrote a part."""
    return int(path.stem.rpartition("-")[2])


def _check_plan(out: Path, plan: SynthesisPlan, total: int) -> None:
    """Refuse a folder that holds rows of another plan, or parts that this run would not replace.

    Raises:
        ConfigError: Another configuration hash, or parts of another list of scenes.
    """
    for path in sorted(out.glob("part-*-of-*")):
        if _PART.fullmatch(path.stem) and _total_of(path) != total:
            raise ConfigError(
                f"{path} belongs to another list of scenes (or --limit): this run has {total} parts, and the rows "
                "of both would be read together. Choose another folder or pass --overwrite."
            )
    for path in sorted(out.glob("part-*.json")):
        other = _hash_of(path)
        if other != plan.config_hash:
            raise ConfigError(
                f"{out} holds rows of another plan ({other}, this one is {plan.config_hash}). "
                "Choose another folder or pass --overwrite."
            )
    (out / "_SUCCESS").unlink(missing_ok=True)
    values = {"plan": plan_record(plan), "config_hash": plan.config_hash, "version": __version__}
    write_text(out / "plan.json", compact_json(values))


def plan_record(plan: SynthesisPlan) -> dict[str, Any]:
    """JSON form of a plan, from which verification rebuilds it."""
    import dataclasses

    return dataclasses.asdict(plan)


def merge_manifest(out: Path, expected_parts: int | None = None) -> dict[str, Any]:
    """Merge all sidecars of ``out`` into ``manifest.json``; ``_SUCCESS`` when no part is missing.

    Args:
        out: Folder of the rows.
        expected_parts: Number of parts of the whole run; ``None`` reads it from the file names.

    Raises:
        ConfigError: There is no part to read it from.
    """
    files = sorted(out.glob("part-*-of-*.json"))
    if expected_parts is None:
        if not files:
            raise ConfigError(
                f"{out}: no sidecar part-*-of-*.json to merge. Is this the folder of the rows?"
            )
        expected_parts = _total_of(files[0])
    counters: dict[str, Counter[str]] = defaultdict(Counter)
    licenses: Counter[str] = Counter()
    blocked: list[str] = []
    failed: list[str] = []
    rows = scenes = 0
    hashes = set()
    for path in files:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        rows += sidecar["rows"]
        scenes += len(sidecar["scenes"])
        blocked += sidecar["blocked_scenes"]
        failed += sorted(sidecar["failed_scenes"])
        licenses.update(sidecar["licenses"])
        hashes.add(sidecar["config_hash"])
        for task, reasons in sidecar["counters"].items():
            counters[task].update(reasons)
    complete = len(files) == expected_parts
    manifest = {
        "version": __version__,
        "gen_version": GEN_VERSION,
        "config_hash": sorted(hashes),
        "rows": rows,
        "scenes": scenes,
        "parts": len(files),
        "expected_parts": expected_parts,
        "complete": complete,
        "blocked_scenes": blocked,
        "failed_scenes": failed,
        "licenses": dict(sorted(licenses.items())),
        "counters": {
            task: dict(sorted(reasons.items())) for task, reasons in sorted(counters.items())
        },
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
    if complete:
        write_text(out / "_SUCCESS", "")
    return manifest
