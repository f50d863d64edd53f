"""Hundreds of ways to end a command, one after the other: `make soak`, or `python -m tests.helpers.soak --minutes 10`.

    life      one process, or two, of a trainer or of the sampler, which is ended at a random moment
    campaign  lives of the same command, with damage done to its folder between them, until one reaches the end

At the end of a campaign everything must be, byte for byte, what a command that nothing happened to has written. Beside
the campaigns, in another process, every format that is read from outside is fuzzed. All follows from --seed but time.
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

STEPS, SAVE_EVERY, PICTURES = 60, 3, 60
SLOWEST = 300.0
"""Seconds after which a life that has not ended hangs."""
ENDS = {"kill": 7, "SIGTERM": 2, "disk full": 1}
"""How a life ends, and how often relative to the others."""
NAMES = {"kill": "kills", "SIGTERM": "stops by SIGTERM", "disk full": "full disks"}
GLOO = ("Connection closed by peer", "Connection reset", "Socket", "gloo")
"""What a process says whose neighbour was killed."""


class Job(NamedTuple):
    """A command that is to be ended again and again."""

    name: str
    run: Callable[..., tuple[int, str]]
    """(accelerator, folder, the folder of what it needs) -> exit code, stderr."""
    result: Callable[[Path], dict[str, bytes]]
    """What the end is compared by."""


class SoakError(AssertionError):
    """Something that must never happen."""


def tokenizer(accelerator: Accelerator, out: Path, given: Path) -> tuple[int, str]:
    options = {"steps": STEPS, "save_every": SAVE_EVERY, "keep": 2, "validate_every": 30}
    return trained(accelerator, out, {**options, "bottleneck.revive_below": 2.0})


def prior(accelerator: Accelerator, out: Path, given: Path) -> tuple[int, str]:
    options = {"steps": STEPS, "save_every": SAVE_EVERY, "keep": 2, "validate_every": 30}
    return prior_trained(accelerator, out, given / "stage1", options)


def pictures(accelerator: Accelerator, out: Path, given: Path) -> tuple[int, str]:
    words = ("-n", PICTURES, "--prior", given / "stage2", "--out", out, "--batch_size", 4)
    sys.argv = ["sampling/generate.py", *map(str, words)]
    return ended(names_of("sampling/generate.py")["main"])


def of_training(out: Path) -> dict[str, bytes]:
    """The newest state, the weights, and the log without what depends on the clock."""
    newest = list_states(out / "state")[0]
    found = {path.name: path.read_bytes() for path in [*newest.iterdir(), *out.glob("*.safetensors")]}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.endswith("per_second")} for line in lines]
    return {name: data for name, data in found.items() if not name.startswith("nonfinite")} | {
        "log": json.dumps(kept).encode()
    }


def of_sampling(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


JOBS = (
    Job("tokenizer", tokenizer, of_training),
    Job("prior", prior, of_training),
    Job("pictures", pictures, of_sampling),
)


def life(accelerator: Accelerator, job: Job, out: Path, given: Path, end: str, delay: float, rank: int) -> Any:
    """Run a job in this process, and end it after `delay` seconds if this is the rank that it shall happen to."""

    def alarm(*_: Any) -> None:
        if end == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    if end and accelerator.process_index == rank:
        # Left to itself, the system ends a process at this signal at once, whatever it does, as SIGKILL does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL if end == "kill" else alarm)
        signal.setitimer(signal.ITIMER_REAL, delay)
    return job.run(accelerator, out, given)


def damage(out: Path, chance: random.Random) -> str | None:
    """Harm a folder between two lives, as no crash may but a bad disk or a careless hand; what was done."""
    whole = [state for state in list_states(out / "state") if find_problem(state) is None]
    kinds = ["half a line in the log", "leftovers", "an empty state", "a picture", "tokens"]
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
        places = {"a state": [*whole[0].iterdir()] if whole else [], "a picture": [*out.glob("0*.png")]}
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
    """The last step in the log, or 0."""
    log = out / "metrics.jsonl"
    for line in reversed(log.read_text(errors="replace").splitlines() if log.exists() else []):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def campaign(job: Job, n: int, folder: Path, given: Path, chance: random.Random, counts: Counter[str]) -> None:
    """Lives of a job on n processes until its end, which must be that of `given`. Raises SoakError."""
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
            # Of two processes, one may hear first of the other's end; a launcher would have ended it too. And before
            # a command has begun, SIGTERM ends it as it ends any process.
            left = n > 1 and any(word in str(error) for word in GLOO)
            silent = end != "disk full" and "died without a word" in str(error)
            if not (left or silent):
                raise SoakError(f"{job.name} was to end by {end}: {error}") from None
            counts[NAMES[end]] += 1
        else:
            codes = {code for code, _ in answers}
            wanted = InterruptionError.exit_code if end == "SIGTERM" else StorageError.exit_code
            # A sampler's process that has made its share ends with 0, whatever becomes of the other one.
            allowed = [{0}, {wanted}, {0, wanted}] if job.result is of_sampling else [{0}, {wanted}]
            if codes not in allowed or (end == "kill" and codes != {0}):
                raise SoakError(f"{job.name} was ended by {end}, and said {answers}")
            counts[NAMES[end]] += wanted in codes
            if codes == {0} and job.result is of_training:
                break
        # A sampler's folder says whether all is made: the main process puts the grid together after all shares, and
        # may be stopped before it has, or just after.
        if job.result is of_sampling and is_finished(out):
            break
        kept = list_states(out / "state")
        began = bool(kept) or bool([*out.glob("0*.png")])
        if job.result is of_training and kept:
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
    """What the jobs need, and how each ends when nothing happens to it."""
    write_tokenizer(given / "stage1")
    write_prior(given / "stage2")
    for job in JOBS:
        for n in (1, 2):
            for code, err in run_processes(n, life, job, given / f"{job.name}-{n}", given, "", 0.0, 0, timeout=SLOWEST):
                if code:
                    raise SoakError(err)


def fuzz_all(folder: Path, inputs: int, seed: int, results: Any) -> None:
    """Fuzz each format with so many inputs, shared among its targets; to be run in a process of its own.

    Pictures are seven formats; a command line is no file, and gets a tenth.
    """
    from tests.helpers.fuzz_targets import targets  # noqa: PLC0415 (it imports all that there is)
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
    """All of it. Returns the number of failures, after printing the counts."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of campaigns")
    parser.add_argument("--fuzz", type=int, default=10_000, help="inputs for each format; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=None, help="kept; default: a temporary one, removed if all is well"
    )
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="tessera-soak-"))
    failures = soak(given.minutes, given.seed, given.fuzz, folder)
    if not failures and given.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
