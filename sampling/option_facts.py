"""Facts about an option of a sampling command, stated at its field; a file that asks for one finds all fields with it.

stride: Annotated[int, Idle(beside="tokenizer", reason="its noise has the size of training")] = 1
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from pydantic import BaseModel

from stage1_tokenizer.config.field_facts import facts_at_fields

FactT = TypeVar("FactT", bound="Fact")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Base of the facts."""


@dataclass(frozen=True, kw_only=True)
class Idle(Fact):
    """The option does nothing beside another one, so whoever gives both has something else in mind."""

    beside: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class AlwaysShown(Fact):
    """A report names the option's value even where it is the default."""


@cache
def facts_of(cls: type[BaseModel], kind: type[FactT]) -> dict[str, list[FactT]]:
    """The facts of a kind by the names of the fields, stated in this class or in one that it extends."""
    found = {name: [fact for fact in facts if isinstance(fact, kind)] for name, facts in facts_at_fields(cls).items()}
    return {name: list(dict.fromkeys(facts)) for name, facts in found.items() if facts}


def check_idle(config: BaseModel, beside: str) -> None:
    """Raise ValueError if an option was given that does nothing beside the option `beside`."""
    for name, facts in facts_of(type(config), Idle).items():
        field = type(config).model_fields[name]
        for fact in facts:
            if fact.beside == beside and getattr(config, name) != field.default:
                raise ValueError(f"--{field.alias or name} cannot be used with --{beside}: {fact.reason}")
