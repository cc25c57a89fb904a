"""ScanNet++ (Yeshwanth et al., ICCV 2023): iPhone or DSLR frames, oriented boxes of ``segments_anno.json``.

Expected: ``data/<scene>/scans/segments_anno.json`` with either
``iphone/{pose_intrinsic_imu.json, depth.bin}`` and the pictures in ``iphone/rgb/*.jpg`` or still inside
``iphone/rgb.mp4`` (earlier ``rgb.mkv``), or ``dslr/nerfstudio/transforms_undistorted.json`` and
``dslr/undistorted_images``. ``scans/mesh_aligned_0.05.ply`` gives the floor area. Box axes are the **rows** of ``normalizedAxes``, and the vertical one is
usually the second, so axes are relabelled before anything is called a height. ``depth.bin`` holds 192x256
frames, each either zlib-compressed as a whole (float32) or framed as lz4 blocks (uint16 millimetres).
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from spatialvlm.errors import BackendUnavailableError, ImporterError
from spatialvlm.scenes.areas import scanned_room
from spatialvlm.scenes.importers.common import (
    FrameList,
    ImportOptions,
    ImportReport,
    ObjectList,
    axes_from_rows,
    choose_frames,
    measure_visibility,
    official_split,
    stored_size,
)
from spatialvlm.scenes.importers.mesh_depth import add_mesh_depth
from spatialvlm.scenes.schema import Frame, Scene

LICENSE = "ScanNet++-TOU"
MESH = "scans/mesh_aligned_0.05.ply"
DEPTH_SHAPE = (192, 256)
READ_BYTES = 2**20
FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL camera axes to OpenCV: the second and third column change sign."""


def list_scenes(root: Path) -> list[str]:
    """Scene folders relative to ``root``."""
    return [
        str(path.parent.parent.relative_to(root))
        for path in sorted(root.glob("**/scans/segments_anno.json"))
    ]


def iter_scenes(root: Path, options: ImportOptions, report: ImportReport) -> Iterator[Scene]:
    """All scenes below ``root``."""
    for name in list_scenes(root):
        yield read_scene(root, name, options, report)


def read_scene(root: Path, name: str, options: ImportOptions, report: ImportReport) -> Scene:
    """One scene by the name that :func:`list_scenes` gave.

    Raises:
        ImporterError: A file is missing or of another format.
    """
    folder = root / name
    scene_id = f"scannetpp/{folder.name}"
    objects = ObjectList(report)
    groups = _json(folder / "scans" / "segments_anno.json").get("segGroups", [])
    for group in groups:
        box = group["obb"]
        rotation = axes_from_rows(box["normalizedAxes"], report)
        objects.add(
            (box["centroid"], box["axesLengths"], rotation),
            group["label"],
            native_id=str(group["objectId"]),
            label_source="scannetpp",
            refit_tilted=True,
        )
    if (folder / "iphone" / "pose_intrinsic_imu.json").is_file():
        frames = _iphone(folder, scene_id, options, report)
    else:
        frames = _dslr(folder, scene_id, options, report)
    scene = Scene(
        scene_id=scene_id,
        room_id=scene_id,
        source="scannetpp",
        objects=objects.finish(),
        frames=frames,
        split=official_split(root, scene_id),
        license=LICENSE,
        room=scanned_room(folder / MESH),
        mesh=MESH if (folder / MESH).is_file() else None,
        root=folder,
    )
    scene = add_mesh_depth(scene, options, report)
    return measure_visibility(scene, report, occupancy=options.occupancy)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ImporterError(f"{path}: missing.") from error
    except json.JSONDecodeError as error:
        raise ImporterError(f"{path}: not JSON at offset {error.pos}: {error.msg}.") from error
    return loaded


def _iphone(
    folder: Path, scene_id: str, options: ImportOptions, report: ImportReport
) -> list[Frame]:
    entries = _json(folder / "iphone" / "pose_intrinsic_imu.json")
    names = sorted(entries)
    frames = FrameList(report)
    chosen = choose_frames(len(names), options.num_frames)
    media = ((options.media or folder.parent / "extracted") / scene_id).resolve()
    pictures = _pictures(folder / "iphone", names, chosen, media)
    depth_file = folder / "iphone" / "depth.bin"
    depths = read_depth_bin(depth_file, set(chosen)) if depth_file.is_file() else {}
    for index in chosen:
        name = names[index]
        size = stored_size(pictures[index], report)
        if size is None:
            continue
        depth_path = None
        if index in depths:
            (media / "depth").mkdir(parents=True, exist_ok=True)
            depth_path = str(media / "depth" / f"{name}.png")
            Image.fromarray(depths[index]).save(depth_path)
        frames.add(
            name,
            intrinsics=entries[name]["intrinsic"],
            world_from_cam=entries[name].get("aligned_pose", entries[name]["pose"]),
            width=size[0],
            height=size[1],
            rgb=os.path.relpath(pictures[index], folder),
            depth=depth_path,
            time_s=entries[name].get("timestamp"),
        )
    return frames.finish(scene_id)


def _pictures(
    folder: Path, names: Sequence[str], chosen: Sequence[int], media: Path
) -> dict[int, Path]:
    """Paths of the chosen pictures; taken out of the video when nobody has extracted them yet."""
    video = next((folder / v for v in ("rgb.mp4", "rgb.mkv") if (folder / v).is_file()), None)
    if (folder / "rgb").is_dir() or video is None:
        return {index: folder / "rgb" / f"{names[index]}.jpg" for index in chosen}
    paths = {index: media / "rgb" / f"{names[index]}.jpg" for index in chosen}
    (media / "rgb").mkdir(parents=True, exist_ok=True)
    import av

    try:
        with av.open(str(video)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in paths:
                    frame.to_image().save(paths[index], quality=95)
                if index >= max(paths):
                    break
    except av.FFmpegError as error:
        raise ImporterError(f"{video}: cannot be decoded: {error}.") from error
    return paths


def read_depth_bin(
    path: Path, wanted: set[int], shape: tuple[int, int] = DEPTH_SHAPE
) -> dict[int, npt.NDArray[np.uint16]]:
    """Chosen frames of an iPhone ``depth.bin`` as uint16 millimetres; the file is never held in memory.

    Raises:
        ImporterError: Neither of the two layouts fits.
        BackendUnavailableError: The file needs the ``lz4`` package.
    """
    with path.open("rb") as file:
        whole = _read_stream(file, wanted, shape)
        if whole is not None:
            return whole
        file.seek(0)
        found: dict[int, npt.NDArray[np.uint16]] = {}
        index = 0
        while len(head := file.read(4)) == 4:
            (size,) = struct.unpack("<I", head)
            offset = file.tell()
            block = file.read(size)
            if len(block) != size:
                raise ImporterError(f"{path}: frame {index} ends early at offset {file.tell()}.")
            if index in wanted:
                found[index] = _decode_block(block, shape, f"{path}: frame {index} at {offset}")
            index += 1
    return found


def _read_stream(
    file: BinaryIO, wanted: set[int], shape: tuple[int, int]
) -> dict[int, npt.NDArray[np.uint16]] | None:
    """Frames of a file that is one deflate stream of float32 metres; ``None`` when it is not."""
    frame_bytes = 4 * shape[0] * shape[1]
    inflate, rest, index = zlib.decompressobj(wbits=-zlib.MAX_WBITS), b"", 0
    found: dict[int, npt.NDArray[np.uint16]] = {}
    try:
        while data := file.read(READ_BYTES):
            rest += inflate.decompress(data)
            while len(rest) >= frame_bytes:
                if index in wanted:
                    metres = np.frombuffer(rest[:frame_bytes], dtype="<f4").reshape(shape)
                    found[index] = np.round(metres * 1000).astype(np.uint16)
                rest, index = rest[frame_bytes:], index + 1
    except zlib.error:
        return None
    return found if index and not rest and inflate.eof else None


def _decode_block(block: bytes, shape: tuple[int, int], where: str) -> npt.NDArray[np.uint16]:
    """One frame: lz4 of uint16 millimetres, or zlib of float32 metres."""
    height, width = shape
    try:
        raw = zlib.decompress(block, wbits=-zlib.MAX_WBITS)
        return np.round(np.frombuffer(raw, "<f4").reshape(height, width) * 1000).astype(np.uint16)
    except (zlib.error, ValueError):
        pass
    try:
        import lz4.block
    except ImportError as error:
        raise BackendUnavailableError(
            f"{where}: lz4-compressed depth needs lz4: pip install -e '.[scenes]'"
        ) from error
    try:
        raw = lz4.block.decompress(block, uncompressed_size=2 * height * width)
        return np.frombuffer(raw, "<u2").reshape(height, width)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise ImporterError(
            f"{where}: neither zlib float32 nor lz4 uint16 depth: {error}."
        ) from error


def _dslr(folder: Path, scene_id: str, options: ImportOptions, report: ImportReport) -> list[Frame]:
    """Undistorted DSLR images with nerfstudio transforms (OpenGL axes)."""
    path = folder / "dslr" / "nerfstudio" / "transforms_undistorted.json"
    content = _json(path)
    listed = sorted(
        content["frames"] + content.get("test_frames", []), key=lambda f: str(f["file_path"])
    )
    k = [[content["fl_x"], 0, content["cx"]], [0, content["fl_y"], content["cy"]], [0, 0, 1]]
    frames = FrameList(report)
    for index in choose_frames(len(listed), options.num_frames):
        item = listed[index]
        if item.get("is_bad"):
            report.count("bad_frame")
            continue
        name = Path(item["file_path"]).name
        frames.add(
            Path(name).stem,
            intrinsics=k,
            world_from_cam=np.array(item["transform_matrix"], dtype=np.float64) @ FLIP_YZ,
            width=int(content["w"]),
            height=int(content["h"]),
            rgb=f"dslr/undistorted_images/{name}",
        )
    return frames.finish(scene_id)
