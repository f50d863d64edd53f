"""Facts about keys, stated at their fields: who needs the keys with a fact asks for its mark, and lists no names."""

from enum import Enum, auto
from typing import Any

from pydantic import BaseModel

from stage1_tokenizer.config.messages import models_of


class Mark(Enum):
    """A fact about a key that other files ask for, stated at its field: `workers: Annotated[int, Mark.FREE] = 0`."""

    FREE = auto()
    """Says where, how often or how fast, and not what: a resumed run may change it, and no result depends on it."""
    PATH = auto()
    """A path of the data. What lies there is compared by its identity, so it may lie elsewhere on a resume."""
    VIEW = auto()
    """Changes no image in its plain view, or only those whose identity changes too: an evaluation need not state it."""
    SCHEDULE = auto()
    """Optimizer steps until something has its full effect, which a short run shortens."""


def facts_at_fields(cls: type[BaseModel]) -> dict[str, list[Any]]:
    """Return what the annotation of each field states, in this class or in one that it extends."""
    bases = [base for base in cls.__mro__ if issubclass(base, BaseModel)]
    return {
        name: [fact for base in bases if name in base.model_fields for fact in base.model_fields[name].metadata]
        for name in cls.model_fields
    }


def marked(cls: type[BaseModel], mark: Mark) -> set[str]:
    """Return the keys of a config class that have a mark, stated in this class or in one that it extends."""
    return {cls.model_fields[name].alias or name for name, facts in facts_at_fields(cls).items() if mark in facts}


def without_marked(cls: type[BaseModel], tree: dict[str, Any], *marks: Mark) -> dict[str, Any]:
    """Return the tree of a config of this class without the keys that have one of the marks."""
    left_out = set[str]().union(*(marked(cls, mark) for mark in marks))
    fields = {field.alias or name: field for name, field in cls.model_fields.items()}
    kept = {key: value for key, value in tree.items() if key not in left_out}
    for key, value in kept.items():
        classes = list(models_of(fields[key].annotation)) if key in fields and isinstance(value, dict) else []
        kinds = [each for each in classes if "kind" in each.model_fields]
        of_kind = [each for each in kinds if each.model_fields["kind"].default == value.get("kind")]
        for below in of_kind if kinds else classes[:1]:
            kept[key] = without_marked(below, value, *marks)
    return kept
