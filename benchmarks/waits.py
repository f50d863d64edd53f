"""Waits of the three commands for the GPU.   python -m benchmarks.waits

Trains a VQGAN and a GPT for some steps and samples from it, while torch warns of each call that makes the processor
wait for the device. Prints each line of our code that waited, and how often. Some waits are intended: the finite
guard's, once per optimizer step, the log's, and sampling's, once per row of codes.
"""

import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import sampling.generate
import stage1_tokenizer.train
import stage2_prior.train

ROOT = Path(__file__).parent.parent
OURS = ("stage1_tokenizer", "stage2_prior", "sampling")
STEPS, IMAGES = 10, 64


def count_waits(command: Any, *words: object) -> Counter[str]:
    """Run a command's main with these words, and count the waits by the innermost line of our code."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        ours = [frame for frame in frames if Path(frame.filename).relative_to(ROOT).parts[0] in OURS]
        if ours:
            found[f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}: {ours[-1].line}"] += 1

    sys.argv = [str(command.__file__), *map(str, words)]
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            command.main()
        finally:
            warnings.showwarning = before
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    return found


def main() -> None:
    """Run the three commands, and print their waits."""
    data = ["--data.kind", "shapes", "--data.train_images", 256, "--data.validation_images", 64]
    with tempfile.TemporaryDirectory() as folder:
        stage1, stage2 = Path(folder, "tokenizer"), Path(folder, "prior")
        common = ["--steps", STEPS, "--batch_size", 32, "--no-report", "--log_every", STEPS]
        commands: list[tuple[Any, list[object]]] = [
            (
                stage1_tokenizer.train,
                [*data, *common, "--out", stage1, "--network.kind", "vqgan", "--adversarial.weight", 0.5],
            ),
            (stage2_prior.train, ["--tokenizer", stage1, *common, "--out", stage2]),
            (sampling.generate, ["-n", IMAGES, "--prior", stage2, "--out", Path(folder, "samples")]),
        ]
        for command, words in commands:
            found = count_waits(command, *words)
            print(f"\n== {command.__name__}: {sum(found.values())} waits ({STEPS} steps, {IMAGES} images)")
            for line, count in found.most_common():
                print(f"{count:6}  {line}")


if __name__ == "__main__":
    main()
