"""Dataset repositories of the Hugging Face Hub as source roots, fetched before training, by revision."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from spatialvlm.errors import ConfigError

_ROOT = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")


def is_hub_root(root: str | Path) -> bool:
    """Whether a source root names a Hub repository."""
    return str(root).startswith("hf:/")


def fetch(root: str, patterns: Sequence[str], cache_dir: Path) -> tuple[Path, str]:
    """Download the files of a source.

    The commit a branch or tag stood for is remembered beside the files, so that a later run without
    network finds them.

    Args:
        root: ``hf://datasets/<owner>/<name>[@<revision>]``.
        patterns: Files or glob patterns of the repository, data and media.
        cache_dir: Folder that gets ``hub/<owner>--<name>/<commit>``.

    Returns:
        The local folder, and the commit.

    Raises:
        ConfigError: The address is malformed, or the repository cannot be reached and was not fetched
            before.
    """
    match = _ROOT.fullmatch(root)
    if match is None:
        raise ConfigError(
            f"source root {root!r} is no address of the form hf://datasets/<owner>/<name>@<revision>."
        )
    name, revision = match.group(1), match.group(2) or "main"
    folder = cache_dir / "hub" / name.replace("/", "--")
    known = folder / f"{revision.replace('/', '--')}.commit"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or os.environ.get(
        "HF_DATASETS_OFFLINE"
    ):
        if known.is_file():
            commit = known.read_text().strip()
            return folder / commit, commit
        raise ConfigError(
            f"{root} was never fetched to {folder}, and offline mode is on; run once with network."
        )
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = str(HfApi().dataset_info(name, revision=revision).sha)
        snapshot_download(
            name,
            repo_type="dataset",
            revision=commit,
            allow_patterns=list(patterns),
            local_dir=folder / commit,
        )
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"{root} cannot be fetched: {error}") from error
    known.write_text(commit)
    return folder / commit, commit
