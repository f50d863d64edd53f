"""Facts about config keys. Each is stated at its field, so no other file has a list of keys."""

from collections.abc import Iterator
from enum import Enum, auto
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


class Mark(Enum):
    """A fact about a key, stated at its field: `workers: Annotated[int, Mark.FREE] = 0`."""

    FREE = auto()
    """The key changes no result (paths of outputs, workers, log intervals), so a resumed run may change it."""
    PATH = auto()
    """The key is a path of the data. The data are compared by content, so they may be moved before a resume."""
    NOT_EVALUATED = auto()
    """An evaluation ignores the key. It changes augmented images only, or images whose identity changes too."""
    SCHEDULE = auto()
    """The key is a number of optimizer steps, which a short run shortens."""


def facts_at_fields(cls: type[BaseModel]) -> dict[str, list[Any]]:
    """Return the facts in the annotation of each field, stated in this class or in a base class."""
    bases = [base for base in cls.__mro__ if issubclass(base, BaseModel)]
    return {
        name: [fact for base in bases if name in base.model_fields for fact in base.model_fields[name].metadata]
        for name in cls.model_fields
    }


def marked_keys(cls: type[BaseModel], mark: Mark) -> set[str]:
    """Return the keys of a config class that have a mark."""
    return {cls.model_fields[name].alias or name for name, facts in facts_at_fields(cls).items() if mark in facts}


def remove_marked(cls: type[BaseModel], tree: dict[str, Any], *marks: Mark) -> dict[str, Any]:
    """Return the tree of a config of this class without the keys that have one of the marks, at all levels."""
    removed = set[str]().union(*(marked_keys(cls, mark) for mark in marks))
    fields = {field.alias or name: field for name, field in cls.model_fields.items()}
    kept = {key: value for key, value in tree.items() if key not in removed}
    for key, value in kept.items():
        classes = list(config_classes(fields[key].annotation)) if key in fields and isinstance(value, dict) else []
        kinds = [choice for choice in classes if "kind" in choice.model_fields]
        of_kind = [choice for choice in kinds if choice.model_fields["kind"].default == value.get("kind")]
        for below in of_kind if kinds else classes[:1]:
            kept[key] = remove_marked(below, value, *marks)
    return kept


def config_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the config classes in the annotation of a field."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from config_classes(argument)
