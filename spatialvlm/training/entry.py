"""Command line of the training recipes, and how their errors become exit codes. Imports no torch.

Exit codes: 0 finished, preempted or dry run; 1 any other failure; 2 configuration; 3 data; 4 non-finite
gradients; 5 hang. A stopped run exits 0 because its state is saved; ``run.json`` says ``preempted``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spatialvlm.config import TrainConfig, load_config
from spatialvlm.errors import USER_ERRORS, ConfigError, DataError, NonFiniteError
from spatialvlm.training.rank_log import log_traceback, stop_rank_log
from spatialvlm.training.signals import stop_listening


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the user typed."""

    config: Path
    overrides: tuple[str, ...]
    dry_run: bool
    trust_remote_code: bool = False


def parse_arguments(doc: str | None, argv: Sequence[str] | None = None) -> Arguments:
    """A YAML file, ``key=value`` pairs and two flags; no flag is a prefix of a launcher's flag."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be trained and what it needs, then exit",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of model.init_from; needs model.revision, the 40-digit commit you have read",
    )
    found = parser.parse_intermixed_args(argv)  # overrides may follow --dry-run
    return Arguments(found.config, tuple(found.overrides), found.dry_run, found.trust_remote_code)


def load_recipe(arguments: Arguments, stage: int) -> TrainConfig:
    """Validated configuration of one stage.

    Raises:
        ConfigError: Everything that is wrong with the file, or a recipe of the other stage.
    """
    config = load_config(arguments.config, arguments.overrides, TrainConfig)
    if config.stage != stage:
        raise ConfigError(
            f"{arguments.config} is a recipe of stage {config.stage}; run it with recipes/stage{config.stage}.py."
        )
    return config


def exit_code(error: Exception) -> int:
    """Exit code of an error a user can meet."""
    if isinstance(error, ConfigError):
        return 2
    if isinstance(error, DataError):
        return 3
    return 4 if isinstance(error, NonFiniteError) else 1


def run_recipe(
    train: Callable[[TrainConfig, Arguments], None],
    dry_run: Callable[[TrainConfig], None],
    *,
    stage: int,
    doc: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, validate, then train or describe; returns the exit code.

    Args:
        train: The body of the recipe.
        dry_run: Prints the plan of the recipe.
        stage: Stage the recipe is for.
        doc: Help text.
        argv: Arguments, ``None`` = the process's.
    """
    arguments = parse_arguments(doc, argv)
    config = None
    try:
        config = load_recipe(arguments, stage)
        if arguments.dry_run:
            dry_run(config)
        else:
            train(config, arguments)
    except USER_ERRORS as error:
        where = (
            f" in run.dir={config.run.dir} or data.index_dir={config.data.index_dir}"
            if (config is not None and isinstance(error, OSError) and error.filename is None)
            else ""
        )  # a write to an open file does not say to which
        sys.stderr.write(f"\n{type(error).__name__}: {error}{where}\n")
        if config is not None and not arguments.dry_run:
            _record_failure(Path(config.run.dir), error)
        return exit_code(error)
    except BaseException:
        log_traceback()
        raise
    finally:
        stop_listening()
        stop_rank_log()
    return 0


def _record_failure(run_dir: Path, error: Exception) -> None:
    """A run that had started says why it ended; a refused start leaves another run's record alone."""
    path = run_dir / "run.json"
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # not written by this launch, whose files are never half written
    if not isinstance(record, dict) or record.get("owner") != owner():
        return
    if record.get("state") == "running":
        from spatialvlm.training.state import write_json

        record |= {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
        with suppress(OSError):  # a full disk may be why; the old record stays whole
            write_json(path, record)
            (run_dir / "lock").unlink(missing_ok=True)


def owner() -> str:
    """Identity of this launch, equal on all of its ranks on one host."""
    import os
    import socket

    launcher = os.environ.get("TORCHELASTIC_RUN_ID") or ""
    return f"{socket.gethostname()}:{launcher}:{os.getppid()}"
