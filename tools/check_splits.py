"""Show that rendered splits share no room, no layout grammar and no furniture size.

    python tools/check_splits.py data/rooms/train data/rooms/val data/rooms/test

Exit code 1 when something is shared, each line says what; 2 when there are not two splits to compare.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

from spatialvlm.errors import SpatialVLMError, run_command
from spatialvlm.scenes.io import iter_scenes
from spatialvlm.scenes.rooms.splits import split_report


def main(argv: list[str] | None = None) -> int:
    """Read all rooms, print a line per split and one per thing in common."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    try:
        facts, shared = split_report(chain.from_iterable(map(iter_scenes, arguments.folders)))
    except SpatialVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if len(facts) < 2:
        print(
            f"SceneError: found rooms of {len(facts)} splits ({', '.join(facts) or 'none'}); comparing needs two. "
            "Name folders written by tools/render_rooms.py.",
            file=sys.stderr,
        )
        return 2
    for split, own in sorted(facts.items()):
        print(
            f"{split}: {own.scenes} scenes, {len(own.rooms)} rooms, {', '.join(sorted(own.grammars))}"
        )
    for problem in shared:
        print(problem)
    print("disjoint" if not shared else f"{len(shared)} things in common")
    return 1 if shared else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
