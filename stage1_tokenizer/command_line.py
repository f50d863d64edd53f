"""The words of a command line before they are parsed: each option once, and any text as it was typed.

The parser would join an option's values where it is given twice, split paths at commas, and refuse quotation marks and
brackets. So of an option the last value alone is handed to it, and for text a number that stands for it.
"""

from argparse import Action, ArgumentParser
from collections.abc import Sequence
from typing import Any, NamedTuple

from stage1_tokenizer.config_errors import shortened

STANDS_FOR = "text-number-{}"


class Words(NamedTuple):
    """A command line, ready to be parsed."""

    argv: list[str]
    texts: dict[str, str]
    """What each placeholder among the words stands for."""
    dropped: list[str]
    """Lines that say which values do not count, since their options were given again."""

    def restore(self, value: Any) -> Any:
        """A parsed value, or a tree of them, with the texts in place of what stands for them."""
        if isinstance(value, dict):
            return {key: self.restore(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.restore(part) for part in value]
        return self.texts.get(value, value) if isinstance(value, str) else value


def words_of(parser: ArgumentParser, argv: Sequence[str]) -> Words:
    """The words of a command line: of an option that is given several times the last value, in its last place."""
    actions = parser._option_string_actions  # argparse has no public way to ask which options there are
    positional = bool(parser._get_positional_actions())
    texts: dict[str, str] = {}
    given: dict[str, list[str]] = {}  # by what an option sets, in the order of the last mention
    dropped, rest, words = list[str](), list[str](), list(argv)

    def stand_in(text: str) -> str:
        name = STANDS_FOR.format(len(texts))
        texts[name] = text
        return name

    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        action = actions.get(option)
        if action is None or action.dest == "help":
            plain = positional and not word.startswith("-")
            rest.append(stand_in(word) if plain else word)
            continue
        values = [value] if equals else [words.pop(0)] if action.nargs != 0 and words else []
        if action.dest in given:
            old, new = (" ".join(map(_shown, each)) for each in ([*given.pop(action.dest)], [option, *values]))
            dropped.append(f"{shortened(old)} does not count, since {shortened(new)} follows")
        given[action.dest] = [option, *values]
    options = []
    for option, *values in given.values():
        as_text = _takes_text(actions[option]) and values and values[0] != "null"
        # With "=", for a value may begin with a dash.
        options += [f"{option}={stand_in(values[0]) if as_text else values[0]}"] if values else [option]
    return Words([*options, *rest], texts, dropped)


def _takes_text(action: Action) -> bool:
    return action.metavar == "str"


def _shown(word: str) -> str:
    return word if word.isprintable() else repr(word)
