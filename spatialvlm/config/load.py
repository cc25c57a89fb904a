"""YAML file plus ``key=value`` overrides to one validated config, or one error with every problem."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from spatialvlm.config.base import Section
from spatialvlm.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Section)

_SECRET_PREFIXES = ("hf_", "sk-", "ghp_", "github_pat_", "AKIA", "xoxb-", "glpat-")
_SCALAR_LIMIT = 80


def load_config(path: str | Path, overrides: Sequence[str], schema: type[ConfigT]) -> ConfigT:
    """Read, override and validate a recipe; nothing else has been imported or touched yet.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` pairs, values in YAML; ``data.sources.0.root=...`` reaches
            into lists. Later pairs win.
        schema: The recipe's config class. Cross-section rules live in its ``problems()`` method.

    Raises:
        ConfigError: Unreadable YAML, or every wrong key and value at once.
    """
    raw = read_yaml(path)
    for override in overrides:
        raw = _apply(raw, override)
    return validate(raw, schema, where=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Plain nested dict of a YAML file, without aliases, interpolation, or duplicate keys.

    Raises:
        ConfigError: The file is missing or uses one of these.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8: iconv -t UTF-8."
        raise ConfigError(msg) from error
    except OSError as error:
        msg = f"cannot read {path}: {error}. Pass the path of a YAML recipe, e.g. configs/tiny/stage1_qwen3vl.yaml."
        raise ConfigError(msg) from error
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """As :func:`read_yaml`, for text; ``where`` names it in errors."""
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
                kind = type(token).__name__.removesuffix("Token").lower()
                line = token.start_mark.line + 1
                msg = f"{where}:{line}: YAML {kind} {token.value!r} is not allowed. Write the value out."
                raise ConfigError(msg)
    except yaml.YAMLError as error:
        msg = f"{where} is not valid YAML: {error}"
        raise ConfigError(msg) from error
    for number, line in enumerate(text.splitlines(), start=1):
        # Interpolation could copy environment variables into the saved config.
        if "${" in line.split("#", 1)[0]:
            msg = f"{where}:{number}: interpolation ('${{') is not allowed: {line.strip()!r}. Write the value out."
            raise ConfigError(msg)
    try:
        loaded = OmegaConf.create(text)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        msg = f"{where} is not a valid recipe: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    container = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(container, dict):
        msg = f"{where} must hold sections (a mapping), got {type(container).__name__}."
        raise ConfigError(msg)
    return typing.cast("dict[str, Any]", container)


def dump_yaml(config: Section) -> str:
    """Resolved config as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


def validate(raw: dict[str, Any], schema: type[ConfigT], *, where: str) -> ConfigT:
    """Nested dict to config.

    Raises:
        ConfigError: Every unknown key, wrong value and contradiction, one line each.
    """
    try:
        config = schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_report(where, _problems(error, schema))) from error
    check = getattr(config, "problems", None)
    if check is not None:
        found: list[tuple[str, str]] = list(check())
        if found:
            raise ConfigError(_report(where, found))
    return config


def _apply(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_][\w]*(\.[\w-]+)*", key):
        msg = f"override {override!r} must look like section.key=value."
        raise ConfigError(msg)
    if _looks_secret(text):
        msg = f"override {key}=... looks like a token. Use the environment (WANDB_API_KEY, HF_TOKEN) instead."
        raise ConfigError(msg)
    if "${" in text:
        msg = f"override {key}={text!r}: interpolation is not allowed. Write the value out."
        raise ConfigError(msg)
    try:
        config = OmegaConf.create(raw)
        OmegaConf.update(
            config,
            key,
            OmegaConf.from_dotlist([f"value={text}"]).value,
            merge=False,
            force_add=True,
        )
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, IndexError) as error:
        msg = f"override {override!r} cannot be applied: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


def _looks_secret(text: str) -> bool:
    if text.startswith(_SECRET_PREFIXES):
        return True
    if len(text) < 32 or not re.fullmatch(r"[A-Za-z0-9+_=-]+", text):
        return False
    counts = Counter(text)
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    return entropy > 3.5 and any(c.isdigit() for c in text) and any(c.isalpha() for c in text)


def _report(where: str, problems: Iterable[tuple[str, str]]) -> str:
    rows = sorted(set(problems))
    width = max(len(key) for key, _ in rows)
    noun = "problem" if len(rows) == 1 else "problems"
    return "\n".join(
        [f"{where} has {len(rows)} {noun}:", *(f"  {key:<{width}}  {text}" for key, text in rows)]
    )


def _problems(error: ValidationError, schema: type[Section]) -> list[tuple[str, str]]:
    items = typing.cast("list[dict[str, Any]]", error.errors(include_url=False))
    wrong_inside = {item["loc"][: n + 1] for item in items for n in range(len(item["loc"]) - 1)}
    texts: dict[str, list[str]] = {}
    for item in items:
        # A list whose items are wrong also counts as too short; the items say it better.
        if item["type"] == "too_short" and item["loc"] in wrong_inside:
            continue
        texts.setdefault(_dotted(item["loc"], schema), []).append(_explain(item, schema))
    return [(key, "; or ".join(dict.fromkeys(found))) for key, found in texts.items()]


def _walk(loc: tuple[int | str, ...], schema: type[Section]) -> tuple[list[str], Any]:
    """Keys as written in YAML (pydantic adds the member of a union to a location) and the type there."""
    parts: list[str] = []
    current: Any = schema
    for part in loc:
        fields = _fields(current)
        if fields is not None:
            if part not in fields and part in {
                getattr(m, "__name__", "") for m in _members(current)
            }:
                continue
            parts.append(str(part))
            current = fields.get(str(part))
        elif isinstance(part, int) or any(typing.get_origin(m) is dict for m in _members(current)):
            parts.append(str(part))
            current = _item(current)
    return parts, current


def _dotted(loc: tuple[int | str, ...], schema: type[Section]) -> str:
    return ".".join(_walk(loc, schema)[0]) or "(file)"


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(m for arg in typing.get_args(annotation) for m in _members(arg))
    return (annotation,)


def _fields(annotation: Any) -> dict[str, Any] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            return {name: field.annotation for name, field in member.model_fields.items()}
    return None


def _item(annotation: Any) -> Any:
    for member in _members(annotation):
        args = typing.get_args(member)
        if args:
            return args[-1] if typing.get_origin(member) is dict else args[0]
    return None


def _explain(item: dict[str, Any], schema: type[Section]) -> str:
    kind, value, context = item["type"], item.get("input"), item.get("ctx", {})
    shown = repr(value)
    shown = shown if len(shown) <= _SCALAR_LIMIT else shown[:_SCALAR_LIMIT] + "..."
    if kind == "extra_forbidden":
        return "unknown key" + _did_you_mean(item["loc"], schema)
    if kind == "missing":
        return "is required and has no default"
    if kind == "literal_error":
        options = ", ".join(
            sorted(part.strip(" '") for part in re.split(r",| or ", str(context["expected"])))
        )
        return f"{shown} is not one of: {options}"
    bounds = {
        "greater_than": ("greater than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        words, name = bounds[kind]
        return f"must be {words} {context[name]}, got {shown}"
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{text[0].lower()}{text[1:]}, got {shown}" if kind != "value_error" else text


def _did_you_mean(loc: tuple[int | str, ...], schema: type[Section]) -> str:
    fields = _fields(_walk(loc[:-1], schema)[1]) or {}
    close = difflib.get_close_matches(str(loc[-1]), fields, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys: {', '.join(sorted(fields))}" if fields else ""
