"""Preparation of a command line for the parser of pydantic-settings.

The parser joins the values of an option that is given twice, splits paths at commas, and refuses quotation marks and
brackets. So it gets only the last value of each option, and a placeholder for each text. Forms that other programs
accept are accepted too: `--image-size`, `--flip true`, `--levels 8 8 8`.
"""

from argparse import Action, ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stage1_tokenizer.config.error_messages import LONGEST_VALUE
from stage1_tokenizer.engine.errors import shorten

PLACEHOLDER = "text-number-{}"
TEXTS = "{str,tuple[str,...]}"
"""The parser's name for the type of an option that collects texts: given twice, it has both."""
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words that may follow a switch, with the value that they set."""


class PreparedWords(NamedTuple):
    """A command line, ready to be parsed."""

    argv: list[str]
    texts: dict[str, str]
    """The text of each placeholder."""
    dropped: list[str]
    """Lines that name the values that are ignored, since their options were given again."""

    def restore(self, value: Any) -> Any:
        """Return a parsed value, or a tree of values, with the texts in place of their placeholders."""
        if isinstance(value, dict):
            return {key: self.restore(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.restore(part) for part in value]
        return self.texts.get(value, value) if isinstance(value, str) else value


def prepare_words(parser: ArgumentParser, argv: Sequence[str]) -> PreparedWords:
    """Return the words of a command line, each option once, with its last value unless it collects values."""
    actions = parser._option_string_actions  # argparse has no public way to ask which options there are
    positional = bool(parser._get_positional_actions())
    texts: dict[str, str] = {}
    given: dict[str, list[str]] = {}  # by the name of the value that an option sets
    dropped, rest, words = list[str](), list[str](), list(argv)

    def replace(text: str) -> str:
        name = PLACEHOLDER.format(len(texts))
        texts[name] = text
        return name

    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        option = option if option in actions else option[:2] + option[2:].replace("-", "_")
        action = actions.get(option)
        if action is None or action.dest == "help":
            is_text = positional and not word.startswith("-")
            rest.append(replace(word) if is_text else word)
            continue
        values = [value] if equals else _take_values(action, words, actions, positional)
        if action.nargs == 0 and values and values[0].lower() in SWITCHES:
            option, values = _switch_form(action, option, SWITCHES[values[0].lower()]), []
        if action.metavar == TEXTS and action.dest in given:
            given[action.dest] += values
            continue
        if action.dest in given:
            old, new = (" ".join(map(_printable, part)) for part in ([*given.pop(action.dest)], [option, *values]))
            dropped.append(f"{shorten(old, LONGEST_VALUE)} does not count, since {shorten(new, LONGEST_VALUE)} follows")
        given[action.dest] = [option, *values]
    options = []
    for option, *values in given.values():
        metavar = actions[option].metavar
        if metavar in ("str", TEXTS):
            passed = [value if value == "null" else replace(value) for value in values]
        else:
            passed = [",".join(values)] if values else []
        # With "=", since a value may begin with a dash.
        options += [f"{option}={value}" for value in passed] or [option]
    return PreparedWords([*options, *rest], texts, dropped)


def _take_values(action: Action, words: list[str], actions: Mapping[str, Action], positional: bool) -> list[str]:
    """Remove the values of an option from the words that follow it, and return them.

    A switch may have a word such as `true`. An option with several values has all words up to the next option, unless
    the command has words without an option.
    """
    if action.nargs == 0:
        return [words.pop(0)] if words and words[0].lower() in SWITCHES else []
    values = list[str]()
    while words and words[0].partition("=")[0] not in actions:
        values.append(words.pop(0))
        if positional or "tuple[" not in str(action.metavar) or (words and words[0].startswith("-")):
            break
    return values


def _switch_form(action: Action, option: str, on: bool) -> str:
    """Return the form of a switch, `--key` or `--no-key`, that means the given form followed by true or false."""
    is_off = option.startswith("--no-")
    return next((form for form in action.option_strings if form.startswith("--no-") == (is_off == on)), option)


def _printable(word: str) -> str:
    return word if word.isprintable() else repr(word)
