"""The end of a command: one message and an exit code for a user's error, a traceback for our bugs."""

from collections.abc import Callable

import pytest

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, DivergedError, StorageError


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (BadFileError, 3), (DivergedError, 4), (StorageError, 5)]
)
def test_a_users_error_is_one_message(error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts tell the causes apart by the exit code, and people read what to do."""
    with pytest.raises(SystemExit) as ended:
        run_command(raising(error("what to do")))
    assert ended.value.code == code
    assert capsys.readouterr() == ("", f"{error.__name__}: what to do\n")


def test_a_misspelt_flag_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage has the exit code of shells and argparse, and stdout stays empty for pipes."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: print(parse_command_line(CommandConfig, ["--confg", "x"])))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "--confg" in err
    assert "did you mean --config?" in err
    assert "Traceback" not in err


def test_an_interrupt_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends with the shell's exit code for it, and the message says that nothing is lost."""
    with pytest.raises(SystemExit) as ended:
        run_command(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert "continues from what is on disk" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, AssertionError])
def test_our_own_error_keeps_its_traceback(error: type[Exception]) -> None:
    """Without a traceback nobody could fix the bug."""
    with pytest.raises(error, match=r"^bug$"):
        run_command(raising(error("bug")))


def full(errno: int) -> Callable[[], None]:
    def main() -> None:
        raise OSError(errno, "what the system says")

    return main


def test_fault_12_a_full_disk_is_told_wherever_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 12: a write that no code expects to fail, or the console's output into a file, ends with code 5."""
    with pytest.raises(SystemExit) as ended:
        run_command(full(28))
    assert ended.value.code == 5
    assert "no space left" in capsys.readouterr().err
    with pytest.raises(OSError, match="what the system says"):
        run_command(full(5))


def test_fault_12_the_console_is_on_the_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: a message that cannot be written does not change the exit code."""

    def refuse(_: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr.write", refuse)
    with pytest.raises(SystemExit) as ended:
        run_command(full(28))
    assert ended.value.code == 5
