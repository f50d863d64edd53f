"""The words of a command line before they are parsed: each option once, and any text as it was typed.

The parser would join an option's values where it is given twice, split paths at commas, and refuse quotation marks and
brackets. So of an option the last value alone is handed to it, and for text a number that stands for it. Forms that
other programs take are taken too: `--image-size`, `--flip true`, `--levels 8 8 8`.
"""

from argparse import Action, ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stage1_tokenizer.config.messages import shortened

STANDS_FOR = "text-number-{}"
TEXTS = "{str,tuple[str,...]}"
"""How the parser calls the type of an option that collects texts: given twice, it has both."""
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words after a switch that set it."""


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
    """The words of a command line: of an option that is given several times the last value, in its last place, unless
    it collects them."""
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
        option = option if option in actions else option[:2] + option[2:].replace("-", "_")
        action = actions.get(option)
        if action is None or action.dest == "help":
            plain = positional and not word.startswith("-")
            rest.append(stand_in(word) if plain else word)
            continue
        values = [value] if equals else _following(action, words, actions, positional)
        if action.nargs == 0 and values and values[0].lower() in SWITCHES:
            option, values = _switched(action, option, SWITCHES[values[0].lower()]), []
        if action.metavar == TEXTS and action.dest in given:
            given[action.dest] += values
            continue
        if action.dest in given:
            old, new = (" ".join(map(_shown, each)) for each in ([*given.pop(action.dest)], [option, *values]))
            dropped.append(f"{shortened(old)} does not count, since {shortened(new)} follows")
        given[action.dest] = [option, *values]
    options = []
    for option, *values in given.values():
        metavar = actions[option].metavar
        if metavar in ("str", TEXTS):
            passed = [value if value == "null" else stand_in(value) for value in values]
        else:
            passed = [",".join(values)] if values else []
        # With "=", for a value may begin with a dash.
        options += [f"{option}={value}" for value in passed] or [option]
    return Words([*options, *rest], texts, dropped)


def _following(action: Action, words: list[str], actions: Mapping[str, Action], positional: bool) -> list[str]:
    """Take the values of an option from the words that follow it: of a switch `true` or `false`, if that is there; of
    an option that takes several values all up to the next option, unless a command takes words without options."""
    if action.nargs == 0:
        return [words.pop(0)] if words and words[0].lower() in SWITCHES else []
    values = list[str]()
    while words and words[0].partition("=")[0] not in actions:
        values.append(words.pop(0))
        if positional or "tuple[" not in str(action.metavar) or (words and words[0].startswith("-")):
            break
    return values


def _switched(action: Action, option: str, on: bool) -> str:
    """The form of a switch, `--key` or `--no-key`, that sets what a word after one of the forms asks for."""
    off = option.startswith("--no-")
    return next((each for each in action.option_strings if each.startswith("--no-") == (off == on)), option)


def _shown(word: str) -> str:
    return word if word.isprintable() else repr(word)
