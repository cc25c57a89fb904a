"""Answers with a structure: 3D boxes as JSON (OpenSpatial 4, SSR) and cells of local maps (SSR)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from numpy.random import Generator

from spatialvlm.scenes.codecs import box_codec
from spatialvlm.synthesis.context import SceneContext, require
from spatialvlm.synthesis.grounding import (
    CAM9_CONVENTION,
    JSON_SHAPE,
    SSR_CONVENTION,
    camera_box,
    labelled,
    ssr_box,
    ssr_frame,
)
from spatialvlm.synthesis.localcogmap import (
    ANCHORS,
    build_chain,
    cell_of,
    fit,
    on_grid,
    place,
    rounding_margin,
    thresholds,
)
from spatialvlm.synthesis.referral import STRATEGIES, refer_by
from spatialvlm.synthesis.rows import QA, Args, Derived, Margin, Reason, Reject
from spatialvlm.synthesis.tasks.base import Task, require_count, shuffled, take_turns
from spatialvlm.synthesis.tasks.vsi import VideoTask
from spatialvlm.synthesis.wording import Ref
from spatialvlm.synthesis.writer import Writer

MAX_BOXES = 10
MAX_DEPTH_M = 8.0
MIN_IN_FRUSTUM = 0.5


class GroundingCam9(Task):
    """3D boxes of all instances of 1-3 labels in the camera frame, nine numbers each."""

    id = "grounding_cam9"
    family = "SM"
    capability = "MM"
    group = "meas"
    dimension = "shape"
    needs = frozenset({"metric"})
    forms = ("JSON",)
    variants = ("qwen3vl", "embodiedscan_zxy")
    """Codec of the base model."""

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """1-3 labels of clean objects of a frame."""

        def stream(frame: int) -> Iterator[Args]:
            view = ctx.view(frame)
            labels = sorted({ctx.labels[obj] for obj in view.clean})
            for _ in range(3 * len(labels)):
                count = min(int(rng.integers(1, 4)), len(labels))
                chosen = [labels[i] for i in rng.permutation(len(labels))[:count].tolist()]
                yield {
                    "variant": self.variants[int(rng.integers(2))],
                    "frames": [view.frame_id],
                    "labels": sorted(chosen),
                }

        yield from take_turns([stream(i) for i in shuffled(rng, ctx.scene.frames)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """``[{"label", "bbox_3d"}]`` from near to far."""
        view = ctx.view(args["frames"][0])
        found = []
        least = 1.0
        for label in args["labels"]:
            if label in ctx.scene.count_conflicts:
                raise Reject(Reason.COUNT_CONFLICT, label)
            for obj in ctx.by_label.get(label, ()):
                state = view.state(obj)
                if state == "ambiguous":
                    raise Reject(Reason.AMBIGUOUS, f"object {obj}")
                if state == "hidden":
                    continue
                vis = view.vis[obj]
                if vis.in_frustum_frac < MIN_IN_FRUSTUM:
                    raise Reject(Reason.TRUNCATED, f"object {obj}")
                if sum(view.depth[obj]) / 2 > MAX_DEPTH_M:
                    raise Reject(Reason.OUT_OF_RANGE, f"object {obj} is too far")
                least = min(least, vis.vis_frac)
                found.append((round(view.distance[obj], 6), obj))
        require_count(found, 1, Reason.NOT_VISIBLE)
        if len(found) > MAX_BOXES:
            raise Reject(Reason.OUT_OF_RANGE, f"{len(found)} boxes")
        boxes = [
            labelled(ctx.labels[obj], camera_box(ctx.objects[obj], view.camera, args["variant"]))
            for _, obj in sorted(found)
        ]
        return Derived(
            boxes, Margin("vis", least, 0.3), {"objects": [obj for _, obj in sorted(found)]}
        )

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """The text states field of view, image size, axes and the codec's convention."""
        frame = ctx.frame_of[args["frames"][0]]
        write.show([frame])
        camera = ctx.view(frame).camera
        slots = {
            "labels": ", ".join(args["labels"]),
            "camera": (
                f"The image has {camera.width} x {camera.height} pixels, a horizontal field of view of "
                f"{camera.hfov_deg:.1f} and a vertical one of {camera.vfov_deg:.1f} degrees."
            ),
            "convention": f"{CAM9_CONVENTION} {box_codec(args['variant']).prompt_convention()}",
            "shape": JSON_SHAPE,
        }
        return write.qa(write.turn("json", derived.answer, slots))


class SsrGrounding7(VideoTask):
    """3D box of a referred object in the frame of the first view, seven numbers."""

    id = "ssr_grounding7"
    family = "SM"
    capability = "MR"
    group = "meas"
    dimension = "shape"
    needs = frozenset({"metric", "gravity"})
    forms = ("JSON",)
    variants = ("label", "attribute", *STRATEGIES, "several")
    balance = "number"
    tags = ("benchmark_like:ssr",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Objects seen in the clip; those that share a label are named by the strategies in turns."""
        clip = self.clip(ctx)
        frames = [ctx.frame_of[frame] for frame in clip]
        seen = [obj for obj in ctx.targets if ctx.visible_once(obj, frames)]
        order = [seen[i] for i in shuffled(rng, seen)]
        for obj in order:
            if len(ctx.by_label[ctx.labels[obj]]) == 1:
                yield {"variant": "label", "frames": clip, "objects": [obj]}
                continue
            ticket = rng.random()
            first = 0 if ticket < 0.4 else 1 if ticket < 0.7 else 2
            turn = [*STRATEGIES[first:], *STRATEGIES[:first], "attribute"]
            for strategy in turn:
                if refer_by(ctx, obj, frames, strategy) is not None:
                    yield {"variant": strategy, "frames": clip, "objects": [obj]}
                    break
        for label, same in sorted(ctx.by_label.items()):
            if 1 < len(same) <= MAX_BOXES and rng.random() < 0.5:
                yield {"variant": "several", "frames": clip, "objects": list(same), "label": label}

    def derive(self, ctx: SceneContext, args: Args) -> Derived:
        """Boxes sorted by distance from the origin; one except for the variant ``several``."""
        frames = self.frames(ctx, args)
        margin = self.require_seen(ctx, args["objects"], frames)
        if args["variant"] == "several":
            if sorted(args["objects"]) != sorted(ctx.by_label[args["label"]]):
                raise Reject(Reason.DUPLICATE_LABEL, "not all instances of the label")
            if args["label"] in ctx.scene.count_conflicts:
                raise Reject(Reason.COUNT_CONFLICT, args["label"])
        else:
            ref = self._refer(ctx, args, frames)
            if ref.margin is not None:
                margin = Margin("referral", ref.margin, 1.0)
        frame = ssr_frame(ctx.view(frames[0]).camera)
        boxes = [(ctx.objects[obj], ssr_box(ctx.objects[obj], frame)) for obj in args["objects"]]
        boxes.sort(key=lambda pair: round(sum(value**2 for value in pair[1][:3]), 6))
        return Derived(
            [labelled(item.label, values) for item, values in boxes],
            margin,
            {
                "front_known": all(item.has_front for item, _ in boxes),
                "boxes": [values for _, values in boxes],
            },
        )

    def _refer(self, ctx: SceneContext, args: Args, frames: Sequence[int]) -> Ref:
        ref = refer_by(ctx, args["objects"][0], frames, args["variant"])
        if ref is None:
            raise Reject(Reason.REFERRAL, args["variant"])
        return ref

    def phrase(self, ctx: SceneContext, args: Args, derived: Derived, write: Writer) -> QA:
        """The text states origin, axes, order and units."""
        frames = self.frames(ctx, args)
        write.show(frames, "video")
        if args["variant"] == "several":
            named = f"every {args['label']}"
        else:
            named = self._refer(ctx, args, frames).phrase
        slots = {"a": named, "convention": SSR_CONVENTION, "shape": JSON_SHAPE}
        return write.qa(write.turn("json", derived.answer, slots))


MAP_RULES = (
    "You build a local map of a room as a {size} x {size} grid of cells, seen from above, with x to the "
    "right and y up. Two anchor objects have given cells; the map keeps the proportions of the room and "
    "is not mirrored. Answer with the cell of the target object as [x, y], integers from 0 to {last}."
)


class SsrLcm(VideoTask):
    """Cell of a target on the local map of two anchors; one row per triplet of the grown chain."""

    id = "ssr_lcm"
    family = "SAR"
    capability = "MR"
    group = "rel"
    dimension = "persp"
    needs = frozenset({"gravity"})
    forms = ("OE",)
    variants = ("fixed", "fit", "chain")
    tags = ("benchmark_like:ssr",)

    def propose(self, ctx: SceneContext, rng: Generator) -> Iterator[Args]:
        """Triplets in order of growth; then the same with fitted anchors, then the whole chain."""
        del rng
        clip = self.clip(ctx)
        pool = ctx.seen_unique
        require_count(pool, 3, Reason.LCM_TOO_FEW)
        points = [complex(*ctx.center_list[obj][:2]) for obj in pool]
        radius, least = thresholds(points, metric=ctx.scene.metric)
        chain = build_chain(points, radius=radius, min_anchor=least)
        if chain.fallback:
            ctx.events[Reason.LCM_SEED_FALLBACK] += 1
        ctx.events[Reason.LCM_OFF_GRID] += len(chain.dropped)
        triplets = [[pool[i] for i in (t.anchor1, t.anchor2, t.target)] for t in chain.triplets]
        for objects in triplets:
            yield {"variant": "fixed", "frames": clip, "objects": objects}
        fitted = [{"variant": "fit", "frames": clip, "objects": objects} for objects in triplets]
        whole: list[Args] = []
        if len(triplets) >= 2:
            whole = [{"variant": "chain", "frames": clip, "objects": [], "triplets": triplets[:8]}]
        yield from take_turns([iter(fitted), iter(whole)])

    def derive(self, ctx: SceneContext, args: Args) -> Derived | list[Derived]:
        """Cell ``[x, y]``; ``target_xy`` keeps the unrounded position."""
        if args["variant"] == "chain":
            return [self._triplet(ctx, args, triplet) for triplet in args["triplets"]]
        return self._triplet(ctx, args, args["objects"])

    def _triplet(self, ctx: SceneContext, args: Args, objects: list[int]) -> Derived:
        self.require_unique(ctx, objects)
        self.require_seen(ctx, objects, self.frames(ctx, args))
        a, b, t = (complex(*ctx.center_list[obj][:2]) for obj in objects)
        pool = ctx.seen_unique
        _, least = thresholds(
            [complex(*ctx.center_list[obj][:2]) for obj in pool], metric=ctx.scene.metric
        )
        require("anchor_m", abs(a - b), least, Reason.TOO_CLOSE)
        if args["variant"] == "fit":
            fitted = fit(a, b, t)
            if fitted is None:
                raise Reject(Reason.LCM_FIT_DEGENERATE)
            cells, position = [list(fitted[0]), list(fitted[1])], fitted[2]
        else:
            position = place(a, b, t)
            cells = [[int(anchor.real), int(anchor.imag)] for anchor in ANCHORS]
            if not on_grid(position):
                raise Reject(Reason.LCM_OFF_GRID)
        guard = rounding_margin(position)
        if guard < 1e-6:
            raise Reject(Reason.KNIFE_EDGE, f"cell border at {position}")
        # The margin is recorded, not filtered: any value is allowed.
        return Derived(
            list(cell_of(position)),
            Margin("cells", guard, min(guard, 1e-3)),
            {"target_xy": [position.real, position.imag], "anchor_cells": cells},
        )

    def phrase(
        self, ctx: SceneContext, args: Args, derived: Derived | list[Derived], write: Writer
    ) -> QA:
        """System text states the map; the user gives two anchors and the target."""
        write.show(self.frames(ctx, args), "video")
        write.in_sentence = False
        parts = derived if isinstance(derived, list) else [derived]
        groups = args["triplets"] if args["variant"] == "chain" else [args["objects"]]
        turns = []
        for objects, part in zip(groups, parts, strict=True):
            a, b, t = (ctx.labels[obj] for obj in objects)
            one, two = part.values["anchor_cells"]
            slots = {"a": a, "b": b, "t": t, "one": str(one), "two": str(two)}
            turns.append(write.turn("coord", part.answer, slots))
        system = MAP_RULES.format(size=10, last=9)
        return write.qa(*turns, system=system, group=f"{ctx.scene.scene_id}/lcm")
