from pydantic.fields import FieldInfo

from spatialvlm.config import EvalConfig, TrainConfig
from spatialvlm.config.base import Section

# A field that holds a whole section is documented by that section's docstring.


def _sections(schema: type[Section], seen: set[type[Section]]) -> set[type[Section]]:
    seen.add(schema)
    for field in schema.model_fields.values():
        for inner in _inner(field.annotation):
            if inner not in seen:
                _sections(inner, seen)
    return seen


def _inner(annotation) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [s for arg in getattr(annotation, "__args__", ()) for s in _inner(arg)]


def _documented(field: FieldInfo) -> bool:
    return bool(field.description) or bool(_inner(field.annotation))


def test_every_field_says_what_it_is():
    sections = _sections(TrainConfig, set()) | _sections(EvalConfig, set())
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not _documented(field)
    ]
    assert missing == []
    assert all(section.__doc__ for section in sections)


def test_none_is_explained():
    for section in _sections(TrainConfig, set()) | _sections(EvalConfig, set()):
        if section.__name__ in ("OptimConfig", "LengthConfig", "SourceMediaConfig"):
            continue  # explained once for the whole section
        for name, field in section.model_fields.items():
            if field.default is None and not _inner(field.annotation):
                assert "None" in (field.description or "") or "Required" in (
                    field.description or ""
                ), f"{section.__name__}.{name}"
