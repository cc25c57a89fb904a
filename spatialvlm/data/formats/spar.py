"""SPAR-7M (arXiv 2503.22976): questions about coloured points and boxes that are drawn when a row is loaded.

Rows carry the coordinates at top level (as released) or as a JSON string in ``spar_info`` (as repacked by
VG-LLM). Without the marks a question has no referent, and which image a colour belongs to depends on
``type``; the table below follows the drawing code published with the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from spatialvlm.data.formats.base import Format, Place, Row, SourceAttrs
from spatialvlm.data.formats.conversation import build_sample, parse_turns
from spatialvlm.data.formats.fields import media_fields, number_or_none
from spatialvlm.data.sample import Sample
from spatialvlm.typing import MarkSpec

# type -> colours in the order of the positions of point_img_idx[0] or bbox_img_idx[0]
_ORDER: dict[str, tuple[str, ...]] = {
    "depth_prediction_oo_mv": ("red", "blue", "green"),
    "depth_prediction_oc_mv": ("red", "blue"),
    "distance_prediction_oo_mv": ("red", "blue"),
    "distance_prediction_oo_video": ("red", "blue"),
    "distance_prediction_oc_mv": ("red",),
    "distance_infer_center_oo_mv": ("red", "green", "blue"),
    "spatial_imagination_oc_mv": ("green", "blue", "red"),
    "spatial_imagination_oc_video": ("green", "blue", "red"),
    "spatial_imagination_oo_mv": ("green", "blue", "red", "yellow"),
    "spatial_imagination_oo_video": ("green", "blue", "red", "yellow"),
    "obj_frame_locate": ("red",),
}
_PRESENT_IN_ORDER = {"obj_spatial_relation_oo_mv": ("red", "blue", "green")}
_ALL_ON_FIRST_INDEX = {"obj_spatial_relation_oc_mv"}
_ON_IMAGE_0 = {
    "position_matching", "depth_prediction_oc", "depth_prediction_oo", "distance_prediction_oc",
    "distance_prediction_oo", "distance_infer_center_oo", "obj_spatial_relation_oo",
    "spatial_imagination_oc", "spatial_imagination_oo",
}  # fmt: skip
_LISTS: dict[str, tuple[str, Callable[[int], str]]] = {
    "spatial_imagination_map_mv": ("bbox", lambda i: f"object{i}"),
    "distance_infer_center_oo_video": ("point", lambda i: f"object{i - 1}" if i else "objectA"),
}
_NOT_DRAWN = {
    "distance_infer_center_oc", "distance_infer_center_oc_mv", "view_change_infer",
    "appearance_order", "room_size", "camera_motion_infer", "nav", "obj_count",
}  # fmt: skip
_VIDEO_LABELS = {"green": "object0", "blue": "object1", "red": "object2", "yellow": "object3"}
_COLOURS = ("red", "blue", "green", "yellow")
_SUFFIXES = ("_point", "_bbox")


def is_spar(row: Row) -> int:
    """Match of the registry: sure with coordinates, compatible with typed image rows."""
    talk = isinstance(row.get("conversations"), list)
    if talk and ("spar_info" in row or any(str(k).endswith((*_SUFFIXES, "_img_idx")) for k in row)):
        return 2
    return 1 if talk and row.get("type") and (row.get("image") or row.get("images")) else 0


def read_spar(row: Row, attrs: SourceAttrs, place: Place, fmt: Format) -> list[Sample]:
    """One row -> one sample with its marks."""
    info: dict[str, Any] = dict(row)
    packed = row.get("spar_info")
    if isinstance(packed, str):
        try:
            packed = json.loads(packed)
        except (ValueError, RecursionError) as error:
            raise place.error("schema", f"has invalid JSON in spar_info: {error}.") from error
    if isinstance(packed, Mapping):
        info |= packed
    coordinates = frozenset(
        key for key in info if key.endswith((*_SUFFIXES, "_img_idx", "_list"))
    ) | {"spar_info"}
    images, videos = media_fields(row, attrs, place)
    plain = {key: value for key, value in info.items() if key not in coordinates}
    return [
        build_sample(
            plain,
            parse_turns(row, attrs, place),
            images,
            videos,
            attrs,
            place,
            fmt,
            marks=spar_marks(info, len(images), place),
        )
    ]


def spar_marks(info: Mapping[str, Any], num_images: int, place: Place) -> tuple[MarkSpec, ...]:
    """Marks of one row, in thousandths of the original image.

    Raises:
        DataError: ``spar_type`` for coordinates of an unknown type, ``schema`` for malformed ones.
    """
    given = [
        (colour, shape[1:], info[colour + shape])
        for colour in _COLOURS
        for shape in _SUFFIXES
        if info.get(colour + shape)
    ]
    kind = info.get("type")
    lists = [key for key in ("point_list", "bbox_list") if info.get(key)]
    if not given and not lists:
        return ()
    if not isinstance(kind, str):
        raise place.error("spar_type", f"has coordinates and type {kind!r:.40}.")
    if kind in _NOT_DRAWN or kind.endswith("_video_hard"):
        return ()
    if kind in _LISTS:
        return _listed_marks(kind, info, num_images, place)
    marks: list[MarkSpec] = []
    present = [colour for colour, _, _ in given]
    for colour, shape, value in given:
        if kind in _ON_IMAGE_0:
            image = 0
        elif kind in _ALL_ON_FIRST_INDEX:
            image = _image(info, shape, 0, place)
        elif kind in _ORDER or kind in _PRESENT_IN_ORDER:
            order = _ORDER.get(kind) or tuple(c for c in _PRESENT_IN_ORDER[kind] if c in present)
            if colour not in order:
                raise place.error("spar_type", f"has a {colour} {shape}, unknown in type {kind}.")
            image = _image(info, shape, order.index(colour), place)
        else:
            raise place.error("spar_type", f"has coordinates of the unknown type {kind!r:.60}.")
        label = _VIDEO_LABELS[colour] if kind.endswith("_video") and shape == "bbox" else ""
        items = value if isinstance(value, list) and isinstance(value[0], list) else [value]
        marks += [_mark(item, shape, colour, label, image, num_images, place) for item in items]
    return tuple(marks)


def _listed_marks(
    kind: str, info: Mapping[str, Any], num_images: int, place: Place
) -> tuple[MarkSpec, ...]:
    shape, label = _LISTS[kind]
    groups = info.get(f"{shape}_list")
    if not isinstance(groups, list) or not groups or not isinstance(groups[0], list):
        raise place.error("schema", f"of type {kind} has no {shape}_list[0].")
    return tuple(
        _mark(item, shape, "red", label(i), _image(info, shape, i, place), num_images, place)
        for i, item in enumerate(groups[0])
    )


def _image(info: Mapping[str, Any], shape: str, position: int, place: Place) -> int:
    """Entry ``position`` of ``<shape>_img_idx[0]``."""
    value = info.get(f"{shape}_img_idx")
    row = value[0] if isinstance(value, list) and value else value
    if isinstance(row, int) and not isinstance(row, bool):
        row = value
    if not isinstance(row, list) or position >= len(row) or type(row[position]) is not int:
        raise place.error(
            "schema", f"has {shape}_img_idx {value!r:.60} without an entry {position}."
        )
    return int(row[position])


def _mark(
    item: Any, shape: str, colour: str, label: str, image: int, num_images: int, place: Place
) -> MarkSpec:
    length = 2 if shape == "point" else 4
    numbers = item if isinstance(item, list) else []
    values = [number_or_none(v) for v in numbers]
    if len(values) != length or any(v is None for v in values) or not 0 <= image < num_images:
        raise place.error(
            "schema", f"has the {colour} {shape} {item!r:.60} on image {image} of {num_images}."
        )
    exact = tuple(v for v in values if v is not None)
    name = label or f"the {colour} {'point' if shape == 'point' else 'box'}"
    if shape == "point":
        return MarkSpec(
            image,
            "point",
            colour,
            name,
            label,
            xy=(exact[0], exact[1]),
            units="norm1000",
            style="spar",
        )
    box = (exact[0], exact[1], exact[2], exact[3])
    return MarkSpec(image, "box", colour, name, label, bbox=box, units="norm1000", style="spar")
