"""One scene as a static web page: frames with projected boxes, floor plan, questions with evidence."""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialvlm.scenes.boxes import EDGES
from spatialvlm.scenes.cameras import Camera
from spatialvlm.scenes.io import load_rgb
from spatialvlm.scenes.schema import Frame, Object, Scene
from spatialvlm.scenes.visibility import NEAR_M

PALETTE = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17a2b8", "#e377c2", "#8c564b")
STATE_STYLE = {
    "visible": "",
    "ambiguous": "stroke-dasharray:6 4",
    "hidden": "opacity:.3;stroke-dasharray:2 4",
}
MAX_IMAGE_PX = 480

STYLE = Path(__file__).with_name("view.css")
SCRIPT = """
const pick = document.getElementById('task');
if (pick) pick.addEventListener('change', () => {
  for (const card of document.querySelectorAll('.qa'))
    card.hidden = pick.value !== '' && card.dataset.task !== pick.value;
});
for (const box of document.querySelectorAll('input[data-layer]'))
  box.addEventListener('change', () => document.body.classList.toggle('no-' + box.dataset.layer, !box.checked));
"""


def scene_page(scene: Scene, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """HTML page without outside references.

    Args:
        scene: With or without stored images.
        rows: Generated question rows (data engine schema); other scenes' rows are left out.
    """
    own = [row for row in rows if row["scene_id"] == scene.scene_id]
    stored = "".join(_stored_image(scene, frame) for frame in scene.frames)
    frames = "".join(_frame_figure(scene, frame) for frame in scene.frames)
    area = f" · {scene.room.area_m2:.1f} m²" if scene.room and scene.room.area_m2 else ""
    summary = (
        f"{len(scene.objects)} objects · {len(scene.frames)} frames{area} · split {scene.split} · "
        f"licence {scene.license} · {'metric' if scene.metric else 'not metric'}"
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(scene.scene_id)}</title><style>{STYLE.read_text()}</style></head><body>"
        f"<svg class='store'><defs>{stored}</defs></svg><main>"
        f"<h1>{html.escape(scene.scene_id)}</h1><p class='sub'>{html.escape(summary)}</p>"
        "<p class='sub'><label><input type='checkbox' data-layer='boxes' checked> 3D boxes</label> "
        "<label><input type='checkbox' data-layer='names' checked> names</label> · solid: visible, "
        "dashed: ambiguous, faint: hidden</p>"
        f"<div class='top'><section><h2>Floor plan and camera path</h2>{_floor_plan(scene)}</section>"
        f"<section><h2>Objects</h2>{_object_table(scene)}</section></div>"
        f"<h2>Frames</h2><div class='frames'>{frames}</div>"
        f"{_questions(scene, own)}</main><script>{SCRIPT}</script></body></html>"
    )


def color_of(index: int) -> str:
    """Outline colour of an object."""
    return PALETTE[index % len(PALETTE)]


def _stored_image(scene: Scene, frame: Frame) -> str:
    """The picture, once per page; figures and question tiles refer to it."""
    picture = ""
    if frame.rgb is not None:
        image = Image.fromarray(load_rgb(scene, frame))
        image.thumbnail((MAX_IMAGE_PX, MAX_IMAGE_PX))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f"<image href='data:image/jpeg;base64,{data}' width='{frame.width}' height='{frame.height}'/>"
    back = f"<rect width='{frame.width}' height='{frame.height}' fill='#e9ecef'/>"
    return f"<g id='frame-{html.escape(frame.frame_id)}'>{back}{picture}</g>"


def _box_path(item: Object, camera: Camera) -> str:
    """SVG path of the box edges in front of the camera."""
    corners = camera.to_cam(item.box.corners)
    pieces = []
    for a, b in corners[EDGES]:
        if a[2] < NEAR_M and b[2] < NEAR_M:
            continue
        if a[2] < NEAR_M or b[2] < NEAR_M:
            cut = a + (NEAR_M - a[2]) / (b[2] - a[2]) * (b - a)
            a, b = (cut, b) if a[2] < NEAR_M else (a, cut)
        (x0, y0), (x1, y1) = np.clip(camera.project_cam(np.stack([a, b])), -4000, 4000)
        pieces.append(f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}")
    return "".join(pieces)


def _frame_figure(scene: Scene, frame: Frame) -> str:
    camera, width, height = frame.camera, frame.width, frame.height
    text = width / 34
    shapes = []
    for vis in sorted(frame.visible, key=lambda v: v.state != "hidden"):
        item = scene.objects[vis.obj]
        style = STATE_STYLE[vis.state]
        shapes.append(
            f"<path class='box' d='{_box_path(item, camera)}' stroke='{color_of(vis.obj)}' "
            f"fill='none' style='{style}'><title>"
            f"{html.escape(item.id)}: {vis.state}, vis {vis.vis_frac:.2f}, in frame "
            f"{vis.in_frustum_frac:.2f}, {vis.px} px</title></path>"
        )
        if vis.state != "hidden":
            x, y = vis.centroid_px or (
                (vis.bbox2d[0] + vis.bbox2d[2]) / 2,
                (vis.bbox2d[1] + vis.bbox2d[3]) / 2,
            )
            half = min(0.3 * text * len(item.label), width / 2)  # names at the border stay readable
            x, y = float(np.clip(x, half, width - half)), float(np.clip(y, text, height - text / 3))
            shapes.append(
                f"<text class='name' x='{x:.1f}' y='{y:.1f}' font-size='{text:.1f}' "
                f"stroke-width='{text / 5:.1f}' fill='{color_of(vis.obj)}'>{html.escape(item.label)}</text>"
            )
    time = f" · {frame.time_s:.1f} s" if frame.time_s is not None else ""
    counts = {state: sum(v.state == state for v in frame.visible) for state in STATE_STYLE}
    caption = (
        f"frame {html.escape(frame.frame_id)}{time} · heading {camera.heading_deg:.0f}°, pitch "
        f"{camera.pitch_deg:.0f}° · {counts['visible']} visible, {counts['ambiguous']} ambiguous"
    )
    return (
        f"<figure><svg viewBox='0 0 {width} {height}'><use href='#frame-{html.escape(frame.frame_id)}'/>"
        f"{''.join(shapes)}</svg><figcaption>{caption}</figcaption></figure>"
    )


def _floor_plan(scene: Scene) -> str:
    """Bird's-eye map: room, footprints with their fronts, and the numbered camera path. Up is +y."""
    points = [o.box.footprint for o in scene.objects] + [
        f.camera.centre[None, :2] for f in scene.frames
    ]
    polygon = scene.room.polygon_xy if scene.room else None
    if polygon:
        points.append(np.array(polygon))
    if not points:
        return "<p class='sub'>nothing to draw</p>"
    corners = np.concatenate(points)
    low, high = corners.min(axis=0) - 0.4, corners.max(axis=0) + 0.4
    span = high - low

    def at(point: Iterable[float]) -> str:
        x, y = point
        return f"{x - low[0]:.3f},{high[1] - y:.3f}"

    shapes = []
    if polygon:
        shapes.append(f"<polygon class='room' points='{' '.join(at(p) for p in polygon)}'/>")
    for item in sorted(scene.objects, key=lambda o: o.box.z_max):
        outline = " ".join(at(p) for p in item.box.footprint)
        center = item.center[:2]
        shapes.append(
            f"<polygon class='thing' points='{outline}' fill='{_fill(item)}' stroke='{color_of(item.index)}'>"
            f"<title>{html.escape(item.id)}</title></polygon>"
        )
        if item.has_front:
            tip = center + item.R[:2, 0] * item.size[0] / 2
            shapes.append(f"<polyline class='front' points='{at(center)} {at(tip)}'/>")
        shapes.append(
            f"<text class='name' x='{center[0] - low[0]:.3f}' y='{high[1] - center[1]:.3f}'>"
            f"{html.escape(item.label)}</text>"
        )
    track = [frame.camera for frame in scene.frames]
    if track:
        shapes.append(
            f"<polyline class='track' points='{' '.join(at(c.centre[:2]) for c in track)}'/>"
        )
    for index, camera in enumerate(track):
        heading = np.radians(camera.heading_deg)
        spread = np.radians(camera.hfov_deg / 2)
        wings = [
            camera.centre[:2]
            + 0.45 * np.array([np.cos(heading + s * spread), np.sin(heading + s * spread)])
            for s in (-1, 1)
        ]
        shapes.append(
            f"<polygon class='eye' points='{' '.join(at(p) for p in (camera.centre[:2], *wings))}'/>"
        )
        shapes.append(
            f"<text class='number' x='{camera.centre[0] - low[0]:.3f}' "
            f"y='{high[1] - camera.centre[1]:.3f}'>{index}</text>"
        )
    return f"<svg class='plan' viewBox='0 0 {span[0]:.3f} {span[1]:.3f}'>{''.join(shapes)}</svg>"


def _fill(item: Object) -> str:
    from spatialvlm.scenes.rooms.appearance import COLORS

    if item.color_name in COLORS:
        return "#{:02x}{:02x}{:02x}".format(*COLORS[item.color_name])
    return "#ffffff"


def _object_table(scene: Scene) -> str:
    head = "<tr><th>#</th><th>label</th><th>centre (m)</th><th>size (m)</th><th>yaw</th><th>seen in</th></tr>"
    body = []
    for item in scene.objects:
        seen = [str(i) for i, f in enumerate(scene.frames) if f.vis(item.index).state == "visible"]
        center, size = (" ".join(f"{v:.2f}" for v in values) for values in (item.center, item.size))
        body.append(
            f"<tr><td><i style='background:{color_of(item.index)}'></i>{item.index}</td>"
            f"<td>{html.escape(' '.join(filter(None, (item.color_name, item.label))))}</td><td>{center}</td>"
            f"<td>{size}</td><td>{np.degrees(item.box.yaw_rad):.0f}°</td><td>{', '.join(seen) or '–'}</td></tr>"
        )
    return f"<div class='scroll'><table>{head}{''.join(body)}</table></div>"


def _questions(scene: Scene, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    tasks = sorted({row["task"] for row in rows})
    options = "".join(f"<option>{html.escape(task)}</option>" for task in tasks)
    cards = "".join(_question_card(scene, row) for row in rows)
    return (
        f"<h2>{len(rows)} questions of {len(tasks)} tasks</h2><p><select id='task'><option value=''>all tasks"
        f"</option>{options}</select></p><div class='cards'>{cards}</div>"
    )


def _question_card(scene: Scene, row: Mapping[str, Any]) -> str:
    marks = json.loads(row["marks"] or "[]")
    by_id = {frame.frame_id: frame for frame in scene.frames}
    tiles = "".join(
        _marked_tile(by_id[name], [m for m in marks if m.get("image") == index])
        for index, name in enumerate(row["frame_ids"] or [])
        if name in by_id
    )
    turns = "".join(
        f"<p class='{message['role']}'>{html.escape(_without_markers(message['content']))}</p>"
        for message in row["messages"]
    )
    margin = row["margin"]
    evidence = json.dumps(json.loads(row["evidence"]), indent=1)
    return (
        f"<article class='qa' data-task='{html.escape(row['task'])}'><p class='head'><b>{html.escape(row['task'])}"
        f"</b> {html.escape(row['variant'] or '')} · {html.escape(row['form'])} · margin "
        f"{html.escape(margin['kind'])} {margin['value']:.3g} ≥ {margin['threshold']:.3g}</p>"
        f"<div class='tiles'>{tiles}</div>{turns}"
        f"<details><summary>evidence</summary><pre>{html.escape(evidence)}</pre></details></article>"
    )


def _without_markers(text: str) -> str:
    return text.replace("<image>", "").replace("<video>", "").strip()


def _marked_tile(frame: Frame, marks: Sequence[Mapping[str, Any]]) -> str:
    width, height = frame.width, frame.height
    shapes = []
    for mark in marks:
        sx, sy = (width / 1000, height / 1000) if mark.get("units") == "norm1000" else (1.0, 1.0)
        color = html.escape(str(mark.get("color", "red")))
        if mark.get("bbox"):
            x0, y0, x1, y1 = mark["bbox"]
            shapes.append(
                f"<rect x='{x0 * sx:.1f}' y='{y0 * sy:.1f}' width='{(x1 - x0) * sx:.1f}' "
                f"height='{(y1 - y0) * sy:.1f}' fill='none' stroke='{color}' stroke-width='{width / 120:.1f}'/>"
            )
        if mark.get("xy"):
            x, y = mark["xy"]
            shapes.append(
                f"<circle cx='{x * sx:.1f}' cy='{y * sy:.1f}' r='{width / 60:.1f}' fill='{color}'/>"
            )
    return (
        f"<svg viewBox='0 0 {width} {height}'><use href='#frame-{html.escape(frame.frame_id)}'/>"
        f"{''.join(shapes)}</svg>"
    )
