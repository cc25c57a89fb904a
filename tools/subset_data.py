r"""Nested subsets of a training file with the same share of every category, for scaling studies.

    python tools/subset_data.py --file data/spatial.jsonl --category task --fractions 0.2 0.4 0.6 0.8 --out data/subsets

``data.fraction`` in a recipe does the same on the fly, per source and without looking at categories. This tool keeps the
categories' shares exactly and writes ``<name>.<percent>.jsonl`` and ``manifest.json`` (rows per category and a hash of
the ids per subset). Every smaller subset lies in every larger one, and the choice does not depend on the order of rows.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from spatialvlm.errors import ConfigError, DataError, run_command
from spatialvlm.evaluation.scaling import nested_subset


def read_categories(path: Path, key: str) -> dict[str, str]:
    """Id (or line number) of every row -> its category, in file order.

    Raises:
        DataError: A line is no object, lacks the key, or repeats an id.
    """
    found: dict[str, str] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, category = str(row.get("id", number)), str(row[key])
            except (ValueError, AttributeError, KeyError) as error:
                raise DataError(f"{path}:{number} has no {key!r} to choose by ({error})") from None
            if name in found:
                raise DataError(f"{path}:{number}: id {name!r} occurs twice")
            found[name] = category
    if not found:
        raise DataError(f"{path} is empty")
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, required=True, help="JSON lines")
    parser.add_argument("--category", required=True, help="key whose shares are kept")
    parser.add_argument("--fractions", type=float, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--floor", type=int, default=1, help="least rows per category")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if (
        args.fractions != sorted(set(args.fractions))
        or not 0 < args.fractions[0] <= args.fractions[-1] <= 1
    ):
        raise ConfigError(f"--fractions {args.fractions} must increase and lie in (0, 1]")
    categories = read_categories(args.file, args.category)
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(categories)
    manifest = {}
    for fraction in args.fractions:
        chosen = nested_subset(categories, fraction, seed=args.seed, floor=args.floor)
        kept = set(chosen)
        target = args.out / f"{args.file.stem}.{100 * fraction:03.10g}.jsonl"
        with args.file.open(encoding="utf-8") as source, target.open("w", encoding="utf-8") as file:
            rows = (line for line in source if line.strip())
            file.writelines(line for name, line in zip(names, rows, strict=True) if name in kept)
        manifest[target.name] = {
            "fraction": fraction,
            "seed": args.seed,
            "rows": len(chosen),
            "categories": dict(sorted(Counter(categories[name] for name in chosen).items())),
            "ids_sha256": hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest(),
        }
        print(f"{target}: {len(chosen)} of {len(names)} rows")
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (args.out / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
