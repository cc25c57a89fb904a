"""Load pickles that hold numbers, strings and arrays, and refuse everything else before it runs."""

import io
import pickle
from pathlib import Path
from typing import Any

from spatialvlm.errors import ImporterError, UnsafePickleError

_CORE = ("numpy.core", "numpy._core")
_BUILTINS = (
    "list", "dict", "set", "frozenset", "tuple", "str", "bytes", "bytearray", "int", "float",
    "complex", "bool", "slice", "range",
)  # fmt: skip
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    [(f"{core}.multiarray", name) for core in _CORE for name in ("_reconstruct", "scalar")]
    + [(f"{core}.numeric", "_frombuffer") for core in _CORE]
    + [("numpy", "ndarray"), ("numpy", "dtype")]
    + [("builtins", name) for name in _BUILTINS]
    + [("_codecs", "encode")]
)
"""Exact (module, name) pairs. Whole modules are never allowed: numpy itself contains functions that
execute strings."""

# Protocol 2 and older call builtins by their Python 2 name.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves nothing but :data:`ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve one global.

        Raises:
            UnsafePickleError: The pair is not on the list; nothing has been built from it.
        """
        module = _RENAMED.get(module, module)
        if (module, name) not in ALLOWED:
            raise UnsafePickleError(
                f"the pickle asks for {module}.{name}, which is not on the list of allowed types. "
                "Only files with plain containers and numpy arrays are read; do not load this file "
                "by other means unless you trust its author."
            )
        return super().find_class(module, name)


def safe_load(path: str | Path) -> Any:
    """Read a pickle file.

    Raises:
        UnsafePickleError: It refers to anything else than containers and numpy arrays.
        ImporterError: It is truncated or not a pickle.
    """
    data = Path(path).read_bytes()
    try:
        return safe_loads(data)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from error
    except (
        pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, KeyError, TypeError,
    ) as error:  # fmt: skip
        raise ImporterError(
            f"{path}: not a readable pickle ({len(data)} bytes): {error}."
        ) from error


def safe_loads(data: bytes) -> Any:
    """Like :func:`safe_load` for bytes."""
    return RestrictedUnpickler(io.BytesIO(data)).load()
