"""Media paths of rows, confined to the root of their source."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from spatialvlm.errors import MediaError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


def check_name(path: str) -> None:
    """Refuse names that no file can have, or that are unsafe somewhere: NUL, URLs, drives, backslash roots.

    Raises:
        MediaError: ``refused_path``, naming the rule.
    """
    if "\0" in path:
        raise MediaError(f"media path {path!r} contains a NUL byte", reason="refused_path")
    if re.match(r"^(https?|s3|gs|hf|ftp|data|file):", path, re.IGNORECASE):
        raise MediaError(
            f"media path {path[:80]!r} is a URL, and URLs are off; download the file and give its local path",
            reason="refused_path",
        )
    if len(path) > 3000 or any(len(part.encode()) > 255 for part in path.split("/")):
        raise MediaError(
            f"media path {path[:80]!r}... is longer than file systems allow", reason="refused_path"
        )
    if path.startswith("\\") or (_SCHEME.match(path) and len(path.split(":", 1)[0]) == 1):
        raise MediaError(
            f"media path {path!r} is a Windows root or drive; give a path relative to the source root",
            reason="refused_path",
        )


def resolve(
    root: str | Path,
    base: str,
    path: str,
    *,
    allow_absolute: bool = False,
    allow_outside_root: bool = False,
) -> Path:
    """Turn a row's media path into a real path below ``root``.

    ``..`` and symbolic links are followed first and judged by where they lead, so ``../x`` that stays
    inside is fine. The file itself need not exist.

    Args:
        root: Folder no path may leave.
        base: Folder below ``root`` that ``path`` starts from.
        path: As written in the row.
        allow_absolute: Accept absolute paths (they must still lie inside ``root`` unless the next
            switch is set too).
        allow_outside_root: Accept paths that lead outside ``root``.

    Raises:
        MediaError: ``refused_path``; the message names the rule and the switch.
    """
    check_name(path)
    if path.startswith("/") and not allow_absolute:
        raise MediaError(
            f"media path {path!r} is absolute; make it relative to the source root {str(root)!r}, or set "
            "data.media.allow_absolute: true",
            reason="refused_path",
        )
    real_root = Path(root).resolve()
    try:
        real = (real_root / base / path).resolve()
    except (RuntimeError, OSError) as error:  # pathlib reports a loop of links as RuntimeError
        raise MediaError(
            f"media path {path!r} cannot be followed: {error}", reason="refused_path"
        ) from error
    if not allow_outside_root and not real.is_relative_to(real_root):
        raise MediaError(
            f"media path {path!r} leads outside the source root {str(root)!r}; move the file, correct `root`, or "
            "set data.media.allow_outside_root: true",
            reason="refused_path",
        )
    return real


def missing(path: Path) -> MediaError:
    """The error for a file that does not exist, with a hint when another Unicode form of it does."""
    hint = ""
    for form in ("NFC", "NFD"):
        other = path.with_name(unicodedata.normalize(form, path.name))
        if other.name != path.name and other.exists():
            hint = f"; the same name in Unicode form {form} exists: rename one of them"
    return MediaError(f"no such file: {path}{hint}", reason="missing")
