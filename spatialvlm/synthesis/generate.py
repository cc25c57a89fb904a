"""All questions of one scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from numpy.random import Generator, Philox

from spatialvlm.scenes.schema import Scene
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.plan import SynthesisPlan
from spatialvlm.synthesis.rows import (
    Args,
    Reason,
    Reject,
    canonical_json,
    finish_row,
    hashed,
    row_id,
)
from spatialvlm.synthesis.tasks import TASKS, Task
from spatialvlm.synthesis.wording import PhraseBook, phrase_book
from spatialvlm.synthesis.writer import Writer

TRIES_PER_ROW = 20

Media = tuple[list[str], list[str], list[float] | None]
"""Image paths, frame ids, and times in seconds."""
Counters = Counter[tuple[str, str]]
"""(task, reason or ``rows``) -> number."""


def task_rng(seed: int, scene_id: str, task: str) -> Generator:
    """Generator of a task's proposals in one scene; depends on nothing else."""
    return Generator(Philox(key=hashed(seed, scene_id, task, 0, size=16)))


def make_context(scene: Scene, plan: SynthesisPlan) -> SceneContext:
    """Geometry of a scene under the switches of the plan."""
    if plan.geometry == "points":
        from spatialvlm.synthesis.points import boxes_of_visible_points

        scene = boxes_of_visible_points(scene)
    return SceneContext(scene, visibility_filter=plan.visibility_filter)


def generate_scene(
    scene: Scene, plan: SynthesisPlan, *, image_prefix: str = "", book: PhraseBook | None = None
) -> tuple[list[dict[str, Any]], Counters]:
    """Generate the rows of one scene, sorted by (task, id).

    Args:
        scene: A validated scene.
        plan: What to generate.
        image_prefix: Folder of the scene below the scenes folder.
        book: Templates; the built-in ones by default.

    Returns:
        Rows of :data:`~spatialvlm.synthesis.rows.SCHEMA` and what was rejected for which reason.
    """
    ctx = make_context(scene, plan)
    maker = RowMaker(ctx, plan, book or phrase_book(), image_prefix)
    counters: Counters = Counter()
    rows: list[dict[str, Any]] = []
    for name in sorted(plan.tasks):
        made = list(task_rows(maker, TASKS[name], counters))
        counters[name, "rows"] += len(made)
        rows += sorted(made, key=lambda row: str(row["id"]))
    return rows, counters


def task_rows(maker: RowMaker, task: Task, counters: Counters) -> Iterable[dict[str, Any]]:
    """Rows of one task in one scene until the count is reached or the candidates run out."""
    ctx, plan = maker.ctx, maker.plan
    missing = task.unmet_need(ctx)
    if missing is None and ctx.unfiltered and not plan.allow_unfiltered:
        missing = Reason.NEEDS_VISIBILITY
    if missing is not None:
        counters[task.id, missing] += 1
        return
    wanted = plan.count(task.id)
    rng = task_rng(plan.seed, ctx.scene.scene_id, task.id)
    stream = iter(task.propose(ctx, rng))
    variants = plan.tasks[task.id].variants
    seen: set[str] = set()
    made = tried = 0
    for _ in range(TRIES_PER_ROW * wanted):
        if made == wanted:
            break
        try:
            args = next(stream, None)
            if args is None:
                break
            if variants is not None and args["variant"] not in variants:
                continue
            tried += 1
            row = maker.row(task, args)
            if row["id"] in seen:
                raise Reject(Reason.DUPLICATE)
        except Reject as reject:
            tried += 1
            counters[task.id, reject.reason] += 1
            continue
        seen.add(row["id"])
        made += 1
        yield row
    if wanted and not tried:
        seen_any = any(ctx.view(frame).clean for frame in range(ctx.num_frames))
        counters[task.id, Reason.NO_CANDIDATE if seen_any else Reason.NO_CLEAN_OBJECT] += 1
    for reason, count in ctx.events.items():
        counters[task.id, reason] += count
    ctx.events.clear()


class RowMaker:
    """Builds rows of one scene; generation and verification share it."""

    def __init__(
        self, ctx: SceneContext, plan: SynthesisPlan, book: PhraseBook, image_prefix: str = ""
    ) -> None:
        self.ctx = ctx
        self.plan = plan
        self.book = book
        self.prefix = f"{image_prefix}/" if image_prefix not in ("", ".") else ""
        scene = ctx.scene
        self.scene_columns = {
            "scene_id": scene.scene_id,
            "room_id": scene.room_id,
            "source": scene.source,
            "split": scene.split,
            "license": scene.license,
            "config_hash": plan.config_hash,
        }
        # A twin is worded like its room, so that pairs differ in their pictures and answers only.
        twin = scene.extra.get("twin")
        self.seed_id = str(twin["of"]) if twin else scene.scene_id
        self._task_columns: dict[str, dict[str, Any]] = {}
        self._media: dict[tuple[int, ...], Media] = {}

    def row(self, task: Task, args: Args) -> dict[str, Any]:
        """Derive, phrase and assemble one row.

        Raises:
            Reject: The question is not asked.
        """
        derived = task.derive(self.ctx, args)
        forms = task.forms_for(args)
        chosen = self.plan.tasks[task.id].forms
        if chosen is not None:
            forms = tuple(form for form in forms if form in chosen)
        if not forms:
            raise Reject(Reason.QUOTA, "no allowed form")
        key = canonical_json(args)
        write = Writer(
            self.ctx,
            task.id,
            key,
            forms,
            seed=self.plan.seed,
            identity=self.seed_id,
            wording=self.plan.wording,
            book=self.book,
        )
        qa = task.phrase(self.ctx, args, derived, write)
        if task.id not in self._task_columns:
            self._task_columns[task.id] = {
                "task": task.id,
                "family": task.family,
                "capability": task.capability,
                "tags": [*task.all_tags(), *(["unfiltered"] if self.ctx.unfiltered else [])],
            }
        columns = self._task_columns[task.id]
        if qa.tags:
            columns = {**columns, "tags": [*columns["tags"], *qa.tags]}
        images, frame_ids, times = self._media_of(qa.frames)
        overlap = None
        if len(images) == 2 and qa.media == "images":
            overlap = self.ctx.pair(qa.frames[0], qa.frames[1]).iou
        return finish_row(
            self.scene_columns,
            columns,
            args,
            derived,
            qa,
            args_json=key,
            identity=row_id(self.ctx.scene.scene_id, task.id, key, qa.turns[0].form),
            images=images,
            frame_ids=frame_ids,
            frame_times=times,
            overlap=overlap,
        )

    def _media_of(self, indices: tuple[int, ...]) -> Media:
        """Image paths, ids and times of frames; rows about the same frames share the lists."""
        found = self._media.get(indices)
        if found is None:
            frames = [self.ctx.scene.frames[index] for index in indices]
            times = [float(frame.time_s) for frame in frames if frame.time_s is not None]
            found = self._media[indices] = (
                [f"{self.prefix}{frame.rgb}" for frame in frames],
                [frame.frame_id for frame in frames],
                times if len(times) == len(frames) else None,
            )
        return found
