r"""Import scenes of a public dataset into the one schema that the data engine reads.

    python tools/import_scenes.py --source embodiedscan --root data/embodiedscan --out data/scenes/embodiedscan
    python tools/import_scenes.py --source scannet --root data/scannet --out data/scenes/scannet \
        --frames 32 --workers 8
    python tools/import_scenes.py --source vla3d --root data/VLA-3D --rgb-root data/scenes/scannet \
        --out data/scenes/vla3d

Sources: embodiedscan, scannet, scannetpp, arkitscenes, hypersim, vsi_meta (VSI-Bench and VLM-3R), vla3d,
openspatial (parquet in OpenSpatial's columns). Each scene goes to ``<out>/<source>/<id>/scene.json``; pictures stay where they are unless they must be
extracted or turned (then they go to ``<out>/media``). Skips are counted by reason, failing scenes are listed
in ``<out>/import.json`` and bounded by ``--max-failed``. Scenes of evaluation sets are left out unless
``--allow-contaminated``.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.scenes.blacklist import Blacklist, load_list, shipped_lists
from spatialvlm.scenes.importers import (
    arkitscenes,
    embodiedscan,
    hypersim,
    openspatial,
    scannet,
    scannetpp,
    vla3d,
    vsi_meta,
)
from spatialvlm.scenes.importers.common import ImportOptions, ImportReport, rebase
from spatialvlm.scenes.io import save_scene

IMPORTERS: dict[str, ModuleType] = {
    "embodiedscan": embodiedscan,
    "scannet": scannet,
    "scannetpp": scannetpp,
    "arkitscenes": arkitscenes,
    "hypersim": hypersim,
    "vsi_meta": vsi_meta,
    "vla3d": vla3d,
    "openspatial": openspatial,
}
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, IndexError)
"""What annotations of an unexpected shape end in; such a scene is listed as failed, the others go on."""
Job = tuple[str, str, Path, Path, ImportOptions, Blacklist | None]


def import_one(job: Job) -> tuple[str, ImportReport]:
    """Import and write one scene; the error of a failing scene is part of the report."""
    source, name, root, out, options, blacklist = job
    report = ImportReport()
    try:
        scene = IMPORTERS[source].read_scene(root, name, options, report)
        if blacklist is not None and (
            blacklist.check(scene.scene_id) or blacklist.check(scene.room_id)
        ):
            report.count("blacklisted")
            return name, report
        folder = out / scene.scene_id
        save_scene(rebase(scene, folder), folder)
        report.count("scenes")
        report.count("objects", len(scene.objects))
        report.count("frames", len(scene.frames))
    except (SpatialVLMError, OSError, *MALFORMED) as error:
        report.failed[name] = f"{type(error).__name__}: {error}"
    return name, report


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=sorted(IMPORTERS), required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--rgb-root", type=Path, help="imported scenes that lend their frames (vla3d)"
    )
    parser.add_argument("--frames", default="32", help="evenly spaced frames per scene, or 'all'")
    parser.add_argument("--upright", action="store_true", help="turn sideways images")
    parser.add_argument(
        "--mesh-depth",
        action="store_true",
        help="depth from the mesh of the scan for frames without (scannet, scannetpp, arkitscenes)",
    )
    parser.add_argument("--occupancy", choices=("robust", "openspatial", "none"), default="robust")
    parser.add_argument(
        "--blacklist", type=Path, action="append", default=[], help="further block list"
    )
    parser.add_argument(
        "--allow-contaminated", action="store_true", help="keep scenes of evaluation sets"
    )
    parser.add_argument(
        "--max-failed", type=float, default=0.01, help="largest share of failing scenes"
    )
    parser.add_argument("--limit", type=int, help="only the first so many scenes")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.frames != "all" and (not arguments.frames.isdigit() or int(arguments.frames) < 1):
        parser.error(f"--frames must be 'all' or a positive number, got {arguments.frames!r}")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.rgb_root is not None and arguments.source != "vla3d":
        parser.error("--rgb-root is for --source vla3d; the other sources have their own images")
    for name in ("root", "rgb_root"):
        folder = getattr(arguments, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name.replace('_', '-')} {folder} is not a folder")
    return arguments


def results(jobs: list[Job], workers: int) -> Iterator[tuple[str, ImportReport]]:
    """Reports in any order."""
    if workers == 1:
        yield from map(import_one, jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(import_one, jobs)


def main() -> int:
    """Import everything; exit 1 when too many scenes failed, 2 when there is nothing to import."""
    arguments = parse_arguments()
    out = arguments.out.resolve()
    options = ImportOptions(
        num_frames=None if arguments.frames == "all" else int(arguments.frames),
        upright=arguments.upright,
        occupancy=arguments.occupancy,
        media=out / "media",
        mesh_depth=arguments.mesh_depth,
        rgb_root=arguments.rgb_root and arguments.rgb_root.resolve(),
    )
    try:
        lists = [*shipped_lists(), *(load_list(path) for path in arguments.blacklist)]
        importer = IMPORTERS[arguments.source]
        known_rooms = getattr(importer, "room_aliases", None)
        aliases = known_rooms(arguments.root) if known_rooms else None
        names = importer.list_scenes(arguments.root)[: arguments.limit]
    except (SpatialVLMError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if not names:
        print(f"{arguments.root}: no {arguments.source} scene below this folder", file=sys.stderr)
        return 2
    blacklist = None if arguments.allow_contaminated else Blacklist(lists, aliases)
    jobs = [
        (arguments.source, name, arguments.root.resolve(), out, options, blacklist)
        for name in names
    ]
    total = ImportReport()
    for name, report in tqdm(
        results(jobs, arguments.workers), total=len(jobs), unit="scene", desc="import"
    ):
        total.merge(report)
        for error in report.failed.values():
            tqdm.write(f"{name}: {error}", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "counters": dict(sorted(total.counters.items())),
        "failed": dict(sorted(total.failed.items())),
    }
    (out / "import.json").write_text(json.dumps(summary, indent=1) + "\n")
    for reason, number in summary["counters"].items():
        print(f"{reason:24s} {number}")
    print(f"{'failed':24s} {len(total.failed)}")
    return 1 if len(total.failed) > arguments.max_failed * len(names) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
