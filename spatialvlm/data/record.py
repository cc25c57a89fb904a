"""What a run was trained on, written into its folder before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spatialvlm.data.lengths import LengthTable
from spatialvlm.data.mixture import Mixture


def data_record(lengths: LengthTable, mixture: Mixture, blocked_key: str) -> dict[str, Any]:
    """Sources, rejects, hits of block lists, and the order, as JSON values."""
    sources = {}
    for number, index in enumerate(lengths.encoder.indices):
        source, info = index.source, index.info
        shortened, tokens_removed = lengths.shortened(number)
        sources[source.name] = {
            "family": source.family,
            "format": source.format.name,
            "files": len(source.files),
            "content": index.content_key,
            "revision": source.revision,
            "rows": len(index),
            "rejected": info["rejected"],
            "measured": int(np.count_nonzero(lengths.records[number]["tokens"])),
            "unusable": lengths.rejected(number),
            "shortened": shortened,
            "tokens_removed": tokens_removed,
            "drawn_from": mixture.drawn_rows[source.name],
            "distinct_media": _distinct(index.column("media_key")),
            "blocked": info["blocked"],
            "first_blocked": info["blocked_first"],
            "without_known_scene": info["no_known_id"],
            "notes": source.notes,
        }
    return {
        "block_lists": blocked_key,
        "sources": sources,
        "positions": mixture.length,
        "branches": mixture.branches,
        "warnings": mixture.warnings,
        "order": dict(mixture.parts),
    }


def write_record(path: Path, mixture: Mixture, record: dict[str, Any]) -> None:
    """Add a record to a JSON file that maps fingerprints of orders to records."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(known | {mixture.fingerprint: record}, indent=2) + "\n")
    partial.replace(path)


def _distinct(keys: Any) -> int:
    found = np.unique(np.asarray(keys))
    return len(found) - int(len(found) > 0 and found[0] == 0)
