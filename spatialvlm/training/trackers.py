"""Where scalars go: JSON lines always, wandb and TensorBoard when asked for.

A tracker that fails is reported once and dropped; training goes on.
"""

# ruff: noqa: D102 - the methods are documented once, in Tracker
from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from spatialvlm.errors import ConfigError


class Tracker(Protocol):
    """Receives one dict of scalars per log step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one step."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """``metrics.jsonl``: one object per log step with ``step``, ``time``, ``attempt``.

    A resumed run replays steps under a higher ``attempt``; readers use the last.
    """

    def __init__(self, path: Path, *, attempt: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._attempt = attempt

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), "attempt": self._attempt}
        # JSON knows neither NaN nor Infinity.
        record |= {k: v if math.isfinite(v) else None for k, v in scalars.items()}  # type: ignore[misc]
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files under ``<run.dir>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            msg = 'log.tensorboard needs the package: pip install -e ".[tensorboard]".'
            raise ConfigError(msg) from error
        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, same run after a resume; console, code, git and arguments are not captured."""

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        entity: str | None,
        mode: Literal["online", "offline"],
        tags: Sequence[str],
        config: Mapping[str, Any],
        run_id: str | None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            msg = "log.wandb needs the package: pip install wandb. Or set log.wandb to null."
            raise ConfigError(msg) from error
        settings = wandb.Settings(
            console="off", disable_git=True, save_code=False, disable_code=True, x_disable_meta=True, silent=True
        )  # fmt: skip
        options = {
            "project": project,
            "entity": entity,
            "tags": list(tags),
            "dir": str(folder),
            "config": dict(config),
            "id": run_id,
            "resume": "allow",
            "settings": settings,
        }
        try:
            self.run: Any = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            sys.stderr.write(
                f"wandb cannot be reached ({error}); the run is logged offline, `wandb sync` uploads it later.\n"
            )
            self.run = wandb.init(mode="offline", **options)

    @property
    def run_id(self) -> str:
        """Saved with checkpoints, so that a resumed run continues the same curves."""
        return str(self.run.id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """All trackers of a run; rank 0 only."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._live = list(trackers)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hand the scalars to every tracker that still works."""
        for tracker in list(self._live):
            try:
                tracker.log(step, scalars)
            except Exception as error:  # noqa: BLE001 - a third-party tracker must not end a training run
                self._live.remove(tracker)
                sys.stderr.write(f"{type(tracker).__name__} failed and is dropped: {error}\n")

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._live:
            tracker.close()


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Append one object to a JSON-lines file of the run folder."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_metrics(path: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Log lines by step, the last attempt of each; unreadable tails (a kill while writing) are left out.

    Training and evaluation at one step are one record.

    Args:
        path: ``metrics.jsonl``.
        limit: Evenly spaced training lines that are read, with the last one and all evaluations; ``None`` = all. A
            report that is rebuilt at every save must not get slower with the length of the run.
    """
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    with path.open("rb") as file:
        count = sum(1 for _ in file)
        stride = 1 if limit is None else max(1, math.ceil(count / limit))
        file.seek(0)
        for number, line in enumerate(file):
            if number % stride and number + 1 != count and b'"eval/' not in line:
                continue
            try:
                record = {sys.intern(key): value for key, value in json.loads(line).items()}
            except ValueError:
                continue
            known = by_step.get(record["step"], {})
            by_step[record["step"]] = (
                {**known, **record} if known.get("attempt") == record["attempt"] else record
            )
    return [by_step[step] for step in sorted(by_step)]
