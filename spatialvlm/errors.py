"""Every exception a user can meet. Each message says what, where, which value, and how to fix it.

``assert`` is for our own invariants; these classes are for users. The finer classes exist so that a
caller can tell apart situations it would handle differently.
"""

import sys
from collections.abc import Callable


class SpatialVLMError(Exception):
    """Base of every error this package raises on purpose."""


USER_ERRORS = (SpatialVLMError, OSError)
"""What a command answers with one line instead of a traceback: our errors, and files that cannot be read or
written (the text of an OSError names the path)."""


def run_command(main: Callable[[], int | None]) -> int:
    """Exit code of a tool; what a user can repair is one line and exit code 2, not a traceback.

    Args:
        main: The tool; ``None`` = success.
    """
    try:
        return main() or 0
    except USER_ERRORS as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


class ConfigError(SpatialVLMError):
    """A YAML file, an override, or a combination of settings is wrong."""


class LaunchError(SpatialVLMError):
    """The processes of a run do not fit together, or the run directory is in use."""


class DataError(SpatialVLMError):
    """A dataset file, row, or label is wrong.

    Args:
        message: What, where, which value, how to fix it.
        reason: One word, one of the reasons listed in docs/data.md, counted per source.
    """

    def __init__(self, message: str, *, reason: str = "schema") -> None:
        super().__init__(message)
        self.reason = reason


class MediaError(DataError):
    """An image or video is missing, broken, too large, or outside its root."""


class MarkError(DataError):
    """Marks cannot be drawn: no hook, an unknown colour list, or a mark outside its image."""


class BudgetError(DataError):
    """More rows were rejected or quarantined than the configuration allows."""


class WorkerError(DataError):
    """A loader worker died or hung; the message names the sample in flight."""


class StateError(DataError):
    """A loader state belongs to another order, or to a newer version."""


class IsolationError(SpatialVLMError):
    """The attention implementation lets samples of one pack see each other."""


class GeometryError(SpatialVLMError):
    """The geometry branch was given something it cannot use."""


class AlignmentError(GeometryError):
    """Geometry features, visual tokens, and placeholders do not match."""


class CacheError(GeometryError):
    """The feature cache returned features that differ from recomputed ones."""


class CheckpointError(SpatialVLMError):
    """Weights or a training checkpoint cannot be read, written, or trusted."""


class FingerprintError(CheckpointError):
    """The geometry encoder differs from the one the checkpoint was trained with."""


class NonFiniteError(SpatialVLMError):
    """Gradients or weights are not finite."""


class HangError(SpatialVLMError):
    """No progress on some rank within the time limit."""


class OutOfMemoryError(SpatialVLMError):
    """The device ran out of memory; the message holds the step, the samples, and the estimate."""


class SceneError(SpatialVLMError):
    """A scene file is invalid, of another schema version, or cannot be imported."""


class BoxError(SceneError):
    """A box has a wrong size, rotation, or number of values."""


class CameraError(SceneError):
    """A camera has an invalid pose or intrinsic matrix."""


class UnsafePickleError(SceneError):
    """A pickle names a class outside the allow-list; nothing was executed."""


class RoomGenerationError(SceneError):
    """A procedural room could not be built within the allowed number of tries."""


class SceneSchemaError(SceneError):
    """A scene record or one of its images breaks the schema, or is of another version."""


class ImporterError(SceneError):
    """A dataset file cannot be imported: truncated, a column is missing, or another format."""


class BackendUnavailableError(SceneError):
    """An optional package or its weights are missing; the message names the extra to install."""


class ContaminationError(SceneError):
    """A scene or room belongs to an evaluation set."""


class SynthesisError(SpatialVLMError):
    """A task, template, or executor of the data engine failed."""


class EvaluationError(SpatialVLMError):
    """Predictions and benchmark do not fit together."""
