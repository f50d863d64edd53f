"""Hundreds of interrupted commands: `make soak`, or `python -m tests.helpers.soak --minutes 10`.

    life      one or two processes of a trainer or of the sampler, ended at a random moment
    campaign  lives of the same command, with damage to its folder between them, until one reaches the end

At the end of a campaign all files must be equal, byte for byte, to those of an uninterrupted command. In another
process, every format that is read from outside is fuzzed. Everything except times depends on --seed alone.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from sampling.output import is_finished
from stage1_tokenizer.engine.errors import InterruptionError, StorageError
from stage1_tokenizer.engine.state import find_problem, list_states, step_of_state
from tests.helpers.artefacts import write_prior, write_tokenizer
from tests.helpers.commands import names_of
from tests.helpers.faults import ended, prior_trained, trained
from tests.helpers.processes import RankFailedError, run_processes

STEPS, SAVE_EVERY, IMAGES = 60, 3, 60
SLOWEST = 300.0
"""Seconds after which a life counts as hanging."""
ENDS = {"kill": 7, "SIGTERM": 2, "disk full": 1}
"""Ends of a life, with their relative frequencies."""
NAMES = {"kill": "kills", "SIGTERM": "stops by SIGTERM", "disk full": "full disks"}
GLOO = ("Connection closed by peer", "Connection reset", "Socket", "gloo")
"""Words in the error of a process whose neighbour was killed."""


class Job(NamedTuple):
    """A command to interrupt again and again."""

    name: str
    run: Callable[..., tuple[int, str]]
    """(accelerator, output folder, input folder) -> exit code, stderr."""
    result: Callable[[Path], dict[str, bytes]]
    """Files that are compared at the end, by name."""


class SoakError(AssertionError):
    """A failure that the soak found."""


def tokenizer(accelerator: Accelerator, out: Path, given: Path) -> tuple[int, str]:
    """Train a tokenizer."""
    options = {"steps": STEPS, "save_every": SAVE_EVERY, "keep": 2, "validate_every": 30}
    return trained(accelerator, out, {**options, "bottleneck.revive_below": 2.0})


def prior(accelerator: Accelerator, out: Path, given: Path) -> tuple[int, str]:
    """Train a prior."""
    options = {"steps": STEPS, "save_every": SAVE_EVERY, "keep": 2, "validate_every": 30}
    return prior_trained(accelerator, out, given / "stage1", options)


def samples(accelerator: Accelerator, out: Path, given: Path) -> tuple[int, str]:
    """Sample from a prior."""
    words = ("-n", IMAGES, "--prior", given / "stage2", "--out", out, "--batch_size", 4)
    sys.argv = ["sampling/generate.py", *map(str, words)]
    return ended(names_of("sampling/generate.py")["main"])


def training_files(out: Path) -> dict[str, bytes]:
    """Return the newest state, the weights, and the log without the entries that depend on time."""
    newest = list_states(out / "state")[0]
    found = {path.name: path.read_bytes() for path in [*newest.iterdir(), *out.glob("*.safetensors")]}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.endswith("per_second")} for line in lines]
    return {name: data for name, data in found.items() if not name.startswith("nonfinite")} | {
        "log": json.dumps(kept).encode()
    }


def sampling_files(out: Path) -> dict[str, bytes]:
    """Return the images."""
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


JOBS = (
    Job("tokenizer", tokenizer, training_files),
    Job("prior", prior, training_files),
    Job("samples", samples, sampling_files),
)


def life(accelerator: Accelerator, job: Job, out: Path, given: Path, end: str, delay: float, rank: int) -> Any:
    """Run a job in this process, and if this is `rank`, end it after `delay` seconds."""

    def alarm(*_: Any) -> None:
        if end == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    if end and accelerator.process_index == rank:
        # By default this signal ends a process at once, as SIGKILL does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL if end == "kill" else alarm)
        signal.setitimer(signal.ITIMER_REAL, delay)
    return job.run(accelerator, out, given)


def damage(out: Path, chance: random.Random) -> str | None:
    """Damage a folder between two lives, as a bad disk or a user might. Returns the kind; None: nothing to do."""
    whole = [state for state in list_states(out / "state") if find_problem(state) is None]
    kinds = ["half a line in the log", "leftovers", "an empty state", "an image", "tokens"]
    kind = chance.choice([*kinds, *["a state"] * 5] if len(whole) > 1 else kinds)
    if kind == "half a line in the log" and (out / "metrics.jsonl").exists():
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99')
    elif kind == "leftovers" and (out / "state").exists():
        (out / "state/.tmp-step-00000999-1").mkdir(exist_ok=True)
        (out / ".tmp-tokenizer.safetensors-1").write_bytes(b"half")
    elif kind == "an empty state" and whole:
        (out / f"state/step-{chance.randint(100, 999):08d}").mkdir(exist_ok=True)
    else:
        places = {"a state": [*whole[0].iterdir()] if whole else [], "an image": [*out.glob("0*.png")]}
        places["tokens"] = [*(out / "tokens").glob("*.safetensors")]
        if not places.get(kind):
            return None
        path = chance.choice(sorted(places[kind]))
        data = bytearray(path.read_bytes())
        if data and chance.random() < 0.5:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(data))
        elif data and chance.random() < 0.7:
            path.write_bytes(bytes(data[: chance.randrange(len(data))]))
        else:
            path.unlink()
    return kind


def reached(out: Path) -> int:
    """Return the last step in the log, or 0."""
    log = out / "metrics.jsonl"
    for line in reversed(log.read_text(errors="replace").splitlines() if log.exists() else []):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def campaign(job: Job, n: int, folder: Path, given: Path, chance: random.Random, counts: Counter[str]) -> None:
    """Run lives of a job on n processes until its end. Raises SoakError: a failure, or an end other than in `given`."""
    out = folder / f"{job.name}-{n}"
    shutil.rmtree(out, ignore_errors=True)
    lives, began = 0, False
    while True:
        lives += 1
        end = chance.choices(list(ENDS), list(ENDS.values()))[0]
        delay = chance.uniform(0.02, 1.5)
        if lives > 200:
            raise SoakError(f"{job.name}: no progress in 200 lives")
        counts["resumes"] += began
        try:
            answers = run_processes(n, life, job, out, given, end, delay, chance.randrange(n), timeout=SLOWEST)
        except RankFailedError as error:
            # One of two processes may fail because the other one ended; a launcher would have ended it too. Before a
            # command has begun, SIGTERM ends it like any process.
            left = n > 1 and any(word in str(error) for word in GLOO)
            silent = end != "disk full" and "died without a word" in str(error)
            if not (left or silent):
                raise SoakError(f"{job.name} was to end by {end}: {error}") from None
            counts[NAMES[end]] += 1
        else:
            codes = {code for code, _ in answers}
            wanted = InterruptionError.exit_code if end == "SIGTERM" else StorageError.exit_code
            # A process of the sampler that has finished its share ends with 0, whatever happens to the other one.
            allowed = [{0}, {wanted}, {0, wanted}] if job.result is sampling_files else [{0}, {wanted}]
            if codes not in allowed or (end == "kill" and codes != {0}):
                raise SoakError(f"{job.name} was ended by {end}, and said {answers}")
            counts[NAMES[end]] += wanted in codes
            if codes == {0} and job.result is training_files:
                break
        # A sampler's folder states if it is finished: the main process makes the grid after all shares, and may be
        # stopped before or just after that.
        if job.result is sampling_files and is_finished(out):
            break
        kept = list_states(out / "state")
        began = bool(kept) or bool([*out.glob("0*.png")])
        if job.result is training_files and kept:
            lost = max(0, reached(out) - step_of_state(kept[0]))
            counts["lost steps"] += lost
            counts["most steps lost at once"] = max(counts["most steps lost at once"], lost)
            if lost > SAVE_EVERY or len(kept) > 4:
                raise SoakError(f"{job.name}: {lost} steps lost, {len(kept)} states kept")
        if chance.random() < 0.3 and out.exists():
            counts["bad inputs"] += damage(out, chance) is not None
    whole = job.result(given / f"{job.name}-{n}")
    ours = job.result(out)
    if ours != whole:
        wrong = [name for name in whole | ours if whole.get(name) != ours.get(name)]
        raise SoakError(f"{job.name} on {n}: differs from an uninterrupted run in {', '.join(wrong)}")
    counts[f"whole ends of {job.name} on {n}, equal to an uninterrupted one"] += 1


def prepare(given: Path) -> None:
    """Write the inputs of the jobs, and run each job once without an interruption."""
    write_tokenizer(given / "stage1")
    write_prior(given / "stage2")
    for job in JOBS:
        for n in (1, 2):
            for code, err in run_processes(n, life, job, given / f"{job.name}-{n}", given, "", 0.0, 0, timeout=SLOWEST):
                if code:
                    raise SoakError(err)


def fuzz_all(folder: Path, inputs: int, seed: int, results: Any) -> None:
    """Fuzz each format with this many inputs, divided among its targets; for a separate process.

    Each image format gets all of them; a command line is not a file, and gets a tenth.
    """
    from tests.helpers.fuzz_targets import targets  # noqa: PLC0415 (it imports almost everything)
    from tests.helpers.fuzzing import fuzz  # noqa: PLC0415

    known = list(targets(folder))
    formats = Counter(target.name.split("-")[0] for target in known)
    for target in known:
        began, name = time.monotonic(), target.name.split("-")[0]
        parts = {"picture": 1, "command": 10}.get(name, formats[name])
        try:
            counts = fuzz(target, -(-inputs // parts), seed, folder)
            results.put((target.name, counts.accepted, counts.refused, time.monotonic() - began, ""))
        except AssertionError as error:
            results.put((target.name, 0, 0, time.monotonic() - began, str(error)))
    results.put(None)


def soak(minutes: float, seed: int, inputs: int, folder: Path) -> int:
    """Run campaigns and fuzzing, and print the counts. Returns the number of failures."""
    given, chance, counts, failures = folder / "given", random.Random(seed), Counter[str](), 0
    results: Any = multiprocessing.get_context("spawn").Queue()
    (folder / "fuzz").mkdir(parents=True)
    fuzzer = multiprocessing.get_context("spawn").Process(
        target=fuzz_all, args=(folder / "fuzz", inputs, seed, results)
    )
    if inputs:
        fuzzer.start()
    prepare(given)
    until = time.monotonic() + 60.0 * minutes
    while time.monotonic() < until:
        job, n = chance.choice(JOBS), chance.choice((1, 2))
        try:
            campaign(job, n, folder, given, chance, counts)
        except SoakError as error:
            failures += 1
            shutil.copytree(folder / f"{job.name}-{n}", folder / f"failure-{failures}", dirs_exist_ok=True)
            print(f"FAILURE {failures}: {error}\n  its folder: {folder / f'failure-{failures}'}", flush=True)
        print(f"{sum(counts[name] for name in ('kills', 'stops by SIGTERM', 'full disks'))} ends so far", flush=True)
    while inputs and (result := results.get()) is not None:
        name, accepted, refused, seconds, failure = result
        failures += bool(failure)
        print(
            failure or f"fuzz {name}: {accepted + refused:,} inputs, {accepted:,} accepted, {seconds:.0f} s", flush=True
        )
    for name, count in counts.items():
        print(f"{name}: {count}")
    print(f"failures: {failures}")
    return failures


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of campaigns")
    parser.add_argument("--fuzz", type=int, default=10_000, help="inputs per format; 0: no fuzzing")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="folder to keep; default: a temporary one, removed if there are no failures",
    )
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="tessera-soak-"))
    failures = soak(given.minutes, given.seed, given.fuzz, folder)
    if not failures and given.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
