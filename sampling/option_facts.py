"""Facts about an option of a sampling command, stated in the annotation of its field and read by other files.

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
    """Base class of the facts."""


@dataclass(frozen=True, kw_only=True)
class Idle(Fact):
    """The option has no effect when the option `beside` is given, so giving both is refused as a mistake."""

    beside: str
    """Name of the other option, without dashes."""
    reason: str
    """Reason, with which the error message ends."""


@dataclass(frozen=True, kw_only=True)
class AlwaysShown(Fact):
    """A report shows the option's value even if it is the default."""


@dataclass(frozen=True, kw_only=True)
class PartOf(Fact):
    """The option refines another one; whoever gives one of the two gets no default of a prior for the other."""

    whole: str
    """Name of the other option."""


@cache
def facts_of_kind(cls: type[BaseModel], kind: type[FactT]) -> dict[str, list[FactT]]:
    """Return the facts of one kind by field name, stated in this config class or in a class that it extends."""
    facts = {name: [fact for fact in stated if isinstance(fact, kind)] for name, stated in facts_at_fields(cls).items()}
    return {name: list(dict.fromkeys(of_field)) for name, of_field in facts.items() if of_field}


def check_idle(config: BaseModel, beside: str) -> None:
    """Raise ValueError if an option was given that has no effect together with the option `beside`."""
    for name, facts in facts_of_kind(type(config), Idle).items():
        field = type(config).model_fields[name]
        for fact in facts:
            if fact.beside == beside and getattr(config, name) != field.default:
                raise ValueError(f"--{field.alias or name} cannot be used with --{beside}: {fact.reason}")
