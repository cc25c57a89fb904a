r"""Lift a video, a folder of frames, or a single image to a scene with 3D boxes.

    # anything another program computed: one .npz per frame (see spatialvlm/scenes/lifting/precomputed.py)
    python tools/lift.py --frames-dir clip/ --precomputed clip_features/ --name clip --out data/scenes/lifted

    # neural backends of transformers; poses from structure from motion or a tracker
    python tools/lift.py --video clip.mp4 --fps 2 --poses clip_poses.npz --depth depth-anything-metric-small \
        --detector grounding-dino-tiny --segmenter sam2-hiera-tiny --labels "chair, table, sofa" \
        --name clip --out data/scenes/lifted --features data/features

    # one image: calibration from --camera, --hfov, or Depth Pro
    python tools/lift.py --image room.jpg --hfov 60 --depth ... --detector ... --segmenter ... \
        --labels "chair, table" --name room --out data/scenes/lifted

Checkpoints are folders or hub ids. ``--endpoint`` asks an OpenAI-compatible server for the labels, and for a
phrase per object with ``--captions``. The result is read by ``tools/synthesize.py`` like any other scene
(``--allow-unfiltered`` is not needed: depth is stored). ``--features`` keeps what the models computed.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from spatialvlm.errors import ConfigError, ImporterError, SpatialVLMError, run_command
from spatialvlm.scenes.endpoint import Endpoint
from spatialvlm.scenes.lifting.endpoint_backends import EndpointCaptioner, EndpointTagger
from spatialvlm.scenes.lifting.features import FeatureStore
from spatialvlm.scenes.lifting.given import AssumedFov, FixedTags, KnownCamera, StoredPoses
from spatialvlm.scenes.lifting.lift import Lifted, lift_image, lift_video
from spatialvlm.scenes.lifting.precomputed import Precomputed
from spatialvlm.scenes.lifting.protocols import Backends, CameraEstimator
from spatialvlm.scenes.lifting.store import write_lifted
from spatialvlm.scenes.lifting.world import FloorGravity

PICTURES = (".jpg", ".jpeg", ".png")
MAX_BYTES = 2 * 2**30
"""Pixels held in memory at once, twice while they are stacked; keyframes are chosen among these frames."""
NEURAL = (
    "depth",
    "depth_pro",
    "detector",
    "segmenter",
    "poses",
    "camera",
    "hfov",
    "labels",
    "endpoint",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", type=Path)
    source.add_argument("--frames-dir", type=Path, help="pictures in the order of their names")
    source.add_argument("--image", type=Path, help="a single picture")
    parser.add_argument("--name", required=True, help="the scene becomes lifted/NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder of scenes")
    parser.add_argument("--fps", type=positive, default=2.0, help="frames per second of the video")
    parser.add_argument("--keyframes", type=int, default=32)
    parser.add_argument("--precomputed", type=Path, help="folder with one .npz per frame")
    parser.add_argument("--depth", help="Depth Anything V2 checkpoint")
    parser.add_argument("--relative-depth", action="store_true", help="its depth is not in metres")
    parser.add_argument("--depth-pro", help="Depth Pro checkpoint, also calibrates single images")
    parser.add_argument("--detector", help="Grounding DINO checkpoint")
    parser.add_argument("--segmenter", help="SAM 2 checkpoint")
    parser.add_argument("--poses", type=Path, help=".npz with world_from_cam, intrinsics, metric")
    parser.add_argument("--camera", type=lens, help="fx,fy,cx,cy of a single image, pixels")
    parser.add_argument("--hfov", type=float, help="assumed field of view of a single image")
    parser.add_argument("--labels", help="what to look for, separated by commas")
    parser.add_argument("--endpoint", help="OpenAI-compatible server that names what is there")
    parser.add_argument("--endpoint-model", default="default")
    parser.add_argument("--captions", action="store_true", help="a phrase per object (--endpoint)")
    parser.add_argument("--features", type=Path, help="keep what the models computed here")
    parser.add_argument("--workers", type=int, default=0, help="processes for the geometry")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    for problem in without_effect(arguments):
        parser.error(problem)
    return arguments


def positive(text: str) -> float:
    """A finite number above zero."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"needs a number above 0, got {text!r}")
    return value


def lens(text: str) -> KnownCamera:
    """``fx,fy,cx,cy`` in pixels."""
    try:
        fx, fy, cx, cy = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs fx,fy,cx,cy in pixels, got {text!r}") from None
    if not (min(fx, fy) > 0 and all(map(math.isfinite, (fx, fy, cx, cy)))):
        raise argparse.ArgumentTypeError(f"needs finite numbers, fx and fy above 0, got {text!r}")
    return KnownCamera(fx, fy, cx, cy)


def without_effect(arguments: argparse.Namespace) -> list[str]:
    """Options that the others make useless."""
    given = {name for name, value in vars(arguments).items() if value not in (None, False)}
    rules = [
        ("captions", "endpoint" not in given, "needs --endpoint, which writes the phrases"),
        ("depth", "depth_pro" in given, "has no effect beside --depth-pro"),
        ("relative_depth", "depth" not in given, "says what --depth is; name its checkpoint"),
        ("camera", "image" not in given, "is for --image; the lens of a video comes with --poses"),
        ("hfov", "image" not in given, "is for --image; the lens of a video comes with --poses"),
        ("hfov", "camera" in given, "has no effect beside --camera"),
        ("poses", "image" in given, "is for videos; a single image has no path"),
    ]
    rules += [
        (name, "precomputed" in given, "has no effect beside --precomputed") for name in NEURAL
    ]
    return [
        f"--{name.replace('_', '-')} {why}"
        for name, applies, why in rules
        if name in given and applies
    ]


def read_frames(arguments: argparse.Namespace) -> tuple[np.ndarray, list[float]]:
    """Frames ``[S, H, W, 3]`` and their times in seconds."""
    if arguments.video is not None:
        return decode_video(arguments.video, arguments.fps)
    if arguments.image is not None:
        paths = [arguments.image]
    else:
        paths = sorted(p for p in arguments.frames_dir.glob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise ImporterError(f"{arguments.frames_dir}: no jpg or png file.")
    images: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise ImporterError(f"{path}: not a readable picture: {error}.") from error
        check_memory(images, f"{arguments.frames_dir}", "Keep fewer or smaller pictures.")
    if len({image.shape for image in images}) > 1:
        raise ImporterError(f"{arguments.frames_dir}: the pictures differ in size.")
    return np.stack(images), [index / arguments.fps for index in range(len(images))]


def decode_video(path: Path, fps: float) -> tuple[np.ndarray, list[float]]:
    """Frames of a video at about ``fps``, and their times in seconds after the first frame.

    Raises:
        ImporterError: Not a video.
        ConfigError: More frames than fit into memory.
    """
    import av

    images: list[np.ndarray] = []
    times: list[float] = []
    start: float | None = None
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                seconds = float(frame.time or 0.0)
                start = seconds if start is None else start
                time = seconds - start
                if not times or time >= len(times) / fps - 1e-6:
                    images.append(frame.to_ndarray(format="rgb24"))
                    times.append(time)
                    check_memory(
                        images, f"{path} at --fps {fps:g}", "Lower --fps or cut the video."
                    )
    except av.FFmpegError as error:
        raise ImporterError(f"{path}: cannot be decoded: {error}.") from error
    if not images:
        raise ImporterError(f"{path}: holds no picture.")
    return np.stack(images), times


def check_memory(images: Sequence[np.ndarray], where: str, advice: str) -> None:
    """Refuse frames that do not fit into memory.

    Raises:
        ConfigError: More than :data:`MAX_BYTES`.
    """
    if images and len(images) * images[0].nbytes > MAX_BYTES:
        raise ConfigError(
            f"{where}: {len(images)} frames of {images[0].shape[1]}x{images[0].shape[0]} pixels exceed the limit of "
            f"{MAX_BYTES / 2**20:g} MiB. {advice}"
        )


def make_backends(
    arguments: argparse.Namespace, images: np.ndarray, store: FeatureStore
) -> tuple[Backends, CameraEstimator | None]:
    """Backends of the command line, and the calibration of a single image.

    Raises:
        ConfigError: Something that is needed was not named.
    """
    if arguments.precomputed is not None:
        files = Precomputed(arguments.precomputed, images)
        return files.backends(), files
    missing = [
        option
        for option, value in (
            ("--depth or --depth-pro", arguments.depth or arguments.depth_pro),
            ("--detector", arguments.detector),
            ("--segmenter", arguments.segmenter),
            ("--labels or --endpoint", arguments.labels or arguments.endpoint),
            ("--poses", arguments.poses or arguments.image),
        )
        if not value
    ]
    if missing:
        raise ConfigError(f"lifting needs {', '.join(missing)}, or --precomputed.")
    from spatialvlm.scenes.lifting.hf_backends import (
        DepthAnythingDepth,
        DepthPro,
        GroundingDinoDetector,
        Sam2Segmenter,
    )

    device = arguments.device
    camera: CameraEstimator | None = None
    depth: DepthPro | DepthAnythingDepth
    if arguments.depth_pro:
        depth = camera = DepthPro(arguments.depth_pro, device, store)
    else:
        depth = DepthAnythingDepth(
            arguments.depth, metric=not arguments.relative_depth, device=device
        )
    if arguments.camera:
        camera = arguments.camera
    elif arguments.hfov is not None:
        camera = AssumedFov(arguments.hfov)
    endpoint = arguments.endpoint and Endpoint(arguments.endpoint, arguments.endpoint_model)
    labels = [label.strip() for label in (arguments.labels or "").split(",") if label.strip()]
    tagger = FixedTags(labels) if labels else EndpointTagger(endpoint)
    poses = StoredPoses(arguments.poses, images) if arguments.poses else None
    return Backends(
        depth,
        poses,  # type: ignore[arg-type]  # single images have none
        tagger,
        GroundingDinoDetector(arguments.detector, device),
        Sam2Segmenter(arguments.segmenter, device, store),
        FloorGravity(),
        captioner=EndpointCaptioner(endpoint) if endpoint and arguments.captions else None,
    ), camera


def lift(arguments: argparse.Namespace) -> Lifted:
    """Read, lift."""
    images, times = read_frames(arguments)
    store = FeatureStore(arguments.features)
    backends, camera = make_backends(arguments, images, store)
    scene_id = f"lifted/{arguments.name}"
    if arguments.image is None:
        return lift_video(
            images,
            backends,
            scene_id=scene_id,
            times_s=times,
            num_keyframes=arguments.keyframes,
            store=store,
            workers=arguments.workers,
        )
    if camera is None:
        raise ConfigError("a single image needs --camera, --hfov or --depth-pro.")
    return lift_image(images[0], backends, camera, scene_id=scene_id, store=store)


def main(argv: list[str] | None = None) -> int:
    """Lift and write; exit 2 when something is missing."""
    arguments = parse_arguments(argv)
    try:
        scene = write_lifted(lift(arguments), arguments.out)
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    unit = "metres" if scene.metric else "an unknown unit"
    gravity = "level" if scene.gravity_aligned else "not level"
    print(f"{scene.scene_id}: {len(scene.frames)} frames in {unit}, {gravity}")
    for item in scene.objects:
        size = " x ".join(f"{v:.2f}" for v in item.size)
        print(f"  {item.label:20s} {size}  seen in {item.extra['num_frames']} frames")
    for reason, number in scene.extra["counters"].items():
        print(f"  {reason:20s} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
