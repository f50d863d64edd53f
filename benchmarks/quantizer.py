"""The vector quantizer against vector_quantize_pytorch's.   python -m benchmarks.quantizer [--out FOLDER]

Both quantize the same vectors with the same codebook; ids must be equal before anything is timed. Ours and theirs take
turns within one run (A B A B, one warm-up each), and the median counts. eval: the forward pass. train: forward,
backward and the update of the EMA codebook. Memory: how far the peak of the resident set rises above what it was before
the first call, each in a process of its own.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from benchmarks.record import write
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig

CASES = [(1024, 256), (16_384, 256), (16_384, 8)]
LARGE = (65_536, 256)
GRID = 32


def pair(codebook_size: int, dim: int) -> tuple[VectorQuantizer, VectorQuantize]:
    """Ours and theirs with the same codebook, EMA updates, the commitment loss, and nothing else."""
    torch.manual_seed(0)
    config = VqConfig(codebook_size=codebook_size, kmeans_init=False, revive_below=0.0)
    ours = VectorQuantizer(config, latent_channels=dim)
    theirs = VectorQuantize(
        dim=dim,
        codebook_size=codebook_size,
        decay=0.99,
        commitment_weight=0.25,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    theirs._codebook.embed.data.copy_(ours.codebook.weight[None])
    theirs._codebook.embed_avg.data.copy_(ours.codebook.weight[None])
    return ours, theirs


def calls(name: str, ours: VectorQuantizer, theirs: VectorQuantize, z: Tensor) -> Callable[[str], Tensor]:
    """A function of "eval" or "train" that runs one of the two on z and returns its ids."""

    def run(mode: str) -> Tensor:
        module: Any = ours if name == "ours" else theirs
        module.train(mode == "train")
        leaf = z.detach().requires_grad_(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            if name == "ours":
                out = ours(leaf)
                z_q, ids, loss = out.z_q, out.codes[..., 0], out.loss
            else:
                z_q, ids, loss = theirs(leaf)
        if mode == "train":
            torch.autograd.backward([z_q.sum() + loss.sum()])
            ours.finish_step()
        return ids

    return run


def latents(n: int, dim: int) -> Tensor:
    """As an encoder in channels_last gives them."""
    z = torch.randn(n // GRID**2, dim, GRID, GRID, generator=torch.Generator().manual_seed(1)) * dim**-0.5
    return z.contiguous(memory_format=torch.channels_last)


def extra_memory(name: str, mode: str, codebook_size: int, dim: int, n: int, pipe: Any) -> None:
    """Sends the MiB by which the first call raises the peak."""
    ours, theirs = pair(codebook_size, dim)
    z = latents(n, dim)
    calls(name, *pair(64, dim), latents(GRID**2, dim))(mode)  # so that code and thread pools are there
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    calls(name, ours, theirs, z)(mode)
    pipe.send(resident("VmHWM") - before)


def resident(name: str) -> float:
    """MiB: VmRSS is what the process has in memory now, VmHWM the most it ever had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def memory_of(*arguments: Any) -> float:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=extra_memory, args=(*arguments, theirs))
    process.start()
    result: float = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=8192, help="a multiple of 1024")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="65,536 codes too: the library takes 12 GB and minutes")
    parser.add_argument("--out", type=Path, help="folder for quantizer.json")
    options = parser.parse_args()
    rows = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.vectors} vectors")
    print("codes   dim  mode   ours ms  theirs ms  times   ours MiB  theirs MiB  ids equal")
    for codebook_size, dim in [*CASES, *([LARGE] if options.large else [])]:
        ours, theirs = pair(codebook_size, dim)
        z = latents(options.vectors, dim)
        runs = {name: calls(name, ours, theirs, z) for name in ("ours", "theirs")}
        for mode in ("eval", "train"):
            equal = torch.equal(runs["ours"](mode), runs["theirs"](mode))  # the warm-up of both
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                for name, run in runs.items():
                    began = time.perf_counter()
                    run(mode)
                    times[name].append((time.perf_counter() - began) * 1e3)
            mine, other = median(times["ours"]), median(times["theirs"])
            memory = {name: memory_of(name, mode, codebook_size, dim, options.vectors) for name in runs}
            rows.append(
                {
                    "codes": codebook_size,
                    "dim": dim,
                    "mode": mode,
                    "ids_equal": equal,
                    "ours_ms": times["ours"],
                    "theirs_ms": times["theirs"],
                    "times": other / mine,
                    "ours_MiB": memory["ours"],
                    "theirs_MiB": memory["theirs"],
                }
            )
            print(
                f"{codebook_size:6} {dim:4}  {mode:5} {mine:8.0f} {other:10.0f} {other / mine:6.1f} "
                f"{memory['ours']:10.0f} {memory['theirs']:11.0f}  {equal}",
                flush=True,
            )
    if options.out:
        write(options.out, "quantizer", vectors=options.vectors, rows=rows)


if __name__ == "__main__":
    main()
