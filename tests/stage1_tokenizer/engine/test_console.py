"""Console output of commands: bars on terminals only, a line per validation, and a summary whose commands run."""

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

from sampling.report_comparison import COMPARED_METRICS
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.engine import console
from stage1_tokenizer.validation import METRICS
from tests.helpers.artefacts import write_prior, write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.prior_training import flags
from tests.helpers.prior_training import train as train_prior
from tests.helpers.training import TINY, log

BAR = re.compile(r"\d+% \|.*\| \d+/\d+ \w+s, +[\d.]+ \w+/s, \d\d:\d\d left")
SMALL = {key: value for key, value in TINY.items() if not isinstance(value, bool)} | {"adversarial.weight": 0}


def on_terminal(code: str, columns: int = 100) -> str:
    """Return the output of Python code on a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    found: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                return
            if not part:
                return
            found.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)
    process.wait(timeout=60)
    reader.join(timeout=60)
    os.close(ours)
    assert process.returncode == 0, b"".join(found).decode()
    return b"".join(found).decode()


COUNTING = """
import sys, time
sys.path.insert(0, {root!r})
from stage1_tokenizer.engine.console import say, show_progress
for place in show_progress(range(30), 30, "image", "reading"):
    time.sleep(0.02)
    if place == 15:
        say("half of it")
"""


def test_on_a_terminal_a_bar_has_a_rate_and_the_time_left() -> None:
    shown = on_terminal(COUNTING.format(root=str(ROOT)))
    drawn = [part for part in re.split(r"[\r\n]", shown) if BAR.search(part)]
    assert len(drawn) > 2
    assert drawn[-1].startswith("reading 100% |")
    assert all(len(part) <= 100 for part in drawn)
    assert "\rhalf of it\r\n" in shown.replace(" ", "").replace("halfofit", "half of it")  # a line of its own


def test_on_a_narrow_terminal_a_bar_stays_on_its_line() -> None:
    shown = on_terminal(COUNTING.format(root=str(ROOT)), columns=40)
    assert max(len(part) for part in re.split(r"[\r\n]", shown)) <= 40


def test_elsewhere_there_is_no_bar() -> None:
    code = COUNTING.format(root=str(ROOT))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("half of it\n", "")


def test_other_processes_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of several processes draws on the terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert console.progress_bar(3, "step").disable
    monkeypatch.setenv("RANK", "0")
    first = console.progress_bar(3, "step")
    assert not first.disable
    first.close()


def trained(tmp_path: Path, **options: Any) -> Ended:
    words = [
        word for key, value in {**SMALL, **options}.items() for word in (f"--{key.replace('__', '.')}", str(value))
    ]
    return run(names_of("stage1_tokenizer/train.py")["main"], "--out", tmp_path / "run", *words)


def test_a_training_that_is_not_on_a_terminal_says_plain_lines(tmp_path: Path) -> None:
    """There is one line at the start, one per validation, and the summary, without control characters."""
    ended = trained(tmp_path, validate_every=2)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "\r" not in ended.out
    assert "\x1b" not in ended.out
    lines = ended.out.splitlines()
    assert f"training {tmp_path / 'run'}: 4 steps of 8 images" in lines
    validations = [line for line in lines if line.startswith("step ")]
    entries = [entry for entry in log(tmp_path / "run") if "validation/psnr" in entry]
    assert len(validations) == len(entries) == 2
    for line, entry in zip(validations, entries, strict=True):
        assert line.startswith(f"step {entry['step']:.0f}/4  PSNR {entry['validation/psnr']:.2f} dB, codes in use ")
        assert re.search(r"  \(validation, [\d.]+ s\)$", line)
        assert len(line) < 100


def test_the_summarys_figures_are_the_logs_and_its_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ended = trained(tmp_path, validate_every=2)
    summary = ended.out[ended.out.index("\nrun: 4 steps in ") :]
    last = [entry for entry in log(tmp_path / "run") if "validation/psnr" in entry][-1]
    assert f"{last['validation/psnr']:.2f} dB" in summary
    assert f"{last['validation/code_usage']:.0%}" in summary
    assert re.search(r"^  alarms +none$", summary, flags=re.M)
    commands = dict(re.findall(r"^([a-z ]+): (\S*python\S* .*)$", summary, flags=re.M))
    assert commands.keys() == {"next", "diagnostic images"}
    expected = {
        "next": ("stage2_prior/train.py", "TrainPriorConfig"),
        "diagnostic images": ("stage1_tokenizer/analyze.py", "AnalyzeConfig"),
    }
    for what, line in commands.items():
        _, script, *arguments = shlex.split(line)
        assert script == expected[what][0]
        config = parse_command_line(names_of(script)[expected[what][1]], arguments)
        assert Path(getattr(config, "tokenizer")).is_dir()  # noqa: B009 (of either class)


def test_a_priors_summary_leads_to_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    ended = train_prior(tmp_path / "a run", tmp_path / "tokenizer", stop_after=6)
    ended = run(names_of("stage2_prior/train.py")["main"], *flags(tmp_path / "a run", tmp_path / "tokenizer"))
    assert ended.code == 0, ended.err
    assert f"continuing {tmp_path / 'a run'} from step 6" in ended.out
    assert re.search(r"^a run: 10 steps, the last 4 of them in [\d.]+ s$", ended.out, flags=re.M)
    entries = [entry for entry in log(tmp_path / "a run") if "validation/bits_per_token" in entry]
    assert f"bits per token  {entries[-1]['validation/bits_per_token']:.3f}" in ended.out
    line = re.findall(r"^next: (.*)$", ended.out, flags=re.M)[0]
    _, script, *arguments = shlex.split(line)  # a space in the run's name
    config = parse_command_line(names_of(script)["GenerateConfig"], arguments)
    assert config.model_dump()["prior"] == str(tmp_path / "a run")


def test_a_finished_training_that_is_started_again_says_so(tmp_path: Path) -> None:
    """The summary has no duration, since nothing was trained."""
    assert trained(tmp_path).code == 0
    again = trained(tmp_path)
    assert again.code == 0
    assert f"{tmp_path / 'run'} is finished already: 4 steps" in again.out
    assert "\nrun: 4 steps\n" in again.out


def test_the_time_left_is_by_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation between two steps does not make the time jump: with ten steps of one
    second and one of eleven seconds, a step takes two seconds."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = console.progress_bar(110, "step")
    now = shown.start_t
    monkeypatch.setattr(shown, "_time", lambda: now)
    for step in range(1, 11):
        now += 11.0 if step == 5 else 1.0
        shown.update()
    assert "03:20 left" in str(shown)
    shown.close()


def test_the_summary_says_the_best_and_what_went_wrong(tmp_path: Path) -> None:
    """The run has better metrics half-way, an alarm, and skipped steps."""
    entries: list[dict[str, Any]] = [
        {"step": 10, "train/skipped": 2.0},
        {"step": 10, "validation/psnr": 21.0, "validation/total": 0.5},
        {"step": 20, "train/skipped": 1.0},
        {"step": 20, "validation/psnr": 20.0, "validation/total": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    alarm = {"step": 20, "alarm": "collapse", "message": "m"}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    said = console.format_summary(tmp_path, METRICS, 0, 20, 200.0, "tokenizer.safetensors", [("next", "python x.py")])
    assert "20 steps in 3 min 20 s" in said
    assert "PSNR     20.00 dB (best 21.00 dB at step 10)" in said
    assert "loss     0.4\n" in said
    assert "alarms   1: collapse at step 20; alarms.jsonl says what to change" in said
    assert "skipped  3 steps that were not finite" in said
    assert said.endswith("\nnext: python x.py")


def test_the_console_and_the_report_call_the_same_better() -> None:
    """Each has its own table of the metrics."""
    signs = {"higher": 1, "lower": -1, None: 0}
    trainings = {"stage1_tokenizer/train.py": "TrainTokenizerConfig", "stage2_prior/train.py": "TrainPriorConfig"}
    figures = [figure for script, config in trainings.items() for figure in names_of(script)[config].console_metrics]
    both = [(figure, COMPARED_METRICS.get(f"validation/{figure.name}")) for figure in figures]
    assert sum(meaning is not None for _, meaning in both) > 3
    assert [figure.name for figure, meaning in both if meaning and signs[meaning.better] != figure.direction] == []


def test_a_command_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command has the right interpreter and the script's path from the current folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert console.format_command("sampling/generate.py", "-n", 4) == "python sampling/generate.py -n 4"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(console.format_command("sampling/generate.py"))[0] == console.relative_path(Path(sys.executable))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(console.format_command("sampling/generate.py", "--prior", "it's a run"))
    assert words[1:] == [str(ROOT / "sampling/generate.py"), "--prior", "it's a run"]
    assert Path(words[1]).is_file()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (12.4, "12 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min")],
)
def test_durations_read_as_people_say_them(seconds: float, said: str) -> None:
    assert console.format_duration(seconds) == said


def test_sampling_that_is_not_on_a_terminal_draws_nothing(tmp_path: Path) -> None:
    write_prior(tmp_path)
    ended = run(names_of("sampling/generate.py")["main"], "-n", 2, "--prior", tmp_path)
    assert ended.err == ""
    assert "\r" not in ended.out
    assert ended.out.splitlines()[-1].startswith("2 images in ")
