"""Write a static page that shows one scene: frames with boxes, floor plan, camera path, questions.

    python tools/view_scene.py data/demo/rooms/train/train-0000000 --rows data/demo/qa/train --out scene.html

``SCENE`` is a scene folder, a ``scene.json``, or a parquet file together with ``--scene-id``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from spatialvlm.errors import SceneError, SceneSchemaError, run_command
from spatialvlm.scenes.io import iter_scenes, load_scene
from spatialvlm.scenes.schema import Scene
from spatialvlm.scenes.view import scene_page


def find_scene(path: Path, scene_id: str | None) -> Scene:
    """The scene of a file or folder; ``scene_id`` chooses one of several."""
    if path.suffix != ".parquet" and scene_id is None:
        return load_scene(path)
    for scene in iter_scenes(path):
        if scene_id is None or scene.scene_id == scene_id:
            return scene
    raise SceneSchemaError(f"{path}: holds no scene with id {scene_id!r}.")


def read_rows(path: Path, scene_id: str) -> list[dict[str, Any]]:
    """Question rows of one scene from a parquet file or a folder of them."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SceneSchemaError(f"{path}: no parquet file with question rows.")
    try:
        table = ds.dataset([str(file) for file in files], format="parquet")
        found = table.to_table(filter=ds.field("scene_id") == scene_id)
    except pa.ArrowInvalid as error:
        raise SceneSchemaError(f"{path} cannot be read as parquet: {error}") from error
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


def main() -> int:
    """Write the page; exit 2 when the scene cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scene", type=Path)
    parser.add_argument("--out", type=Path, default=Path("scene.html"))
    parser.add_argument("--rows", type=Path, help="parquet file or folder of question rows")
    parser.add_argument("--scene-id", help="which scene of a file that holds several")
    arguments = parser.parse_args()
    try:
        scene = find_scene(arguments.scene, arguments.scene_id)
        rows = read_rows(arguments.rows, scene.scene_id) if arguments.rows else []
        page = scene_page(scene, rows)
    except SceneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page, encoding="utf-8")
    print(f"{arguments.out}: {scene.scene_id}, {len(scene.frames)} frames, {len(rows)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
