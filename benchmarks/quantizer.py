"""Our vector quantizer against vector_quantize_pytorch's.

Both quantize the same 8,192 vectors with the same codebook; their codes must be equal before anything is timed. eval:
the forward pass. train: forward, backward and the update of the EMA codebook. The floor is one matrix product of all
vectors and all codebook vectors, the arithmetic of an exact search, at the best rate that the machine had before any of
the cases. Memory: the rise of the peak in the first call, each in a separate process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from benchmarks.measure import Floors, compare, measure_floors
from benchmarks.memory import peak_of
from benchmarks.record import Results
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig

CASES = ((1024, 256), (16_384, 256), (16_384, 8))
"""Codebook size, channels."""
VECTORS = 8192
GRID = 32
REPEATS = 5


def pair(codebook_size: int, dim: int, device: torch.device) -> tuple[VectorQuantizer, VectorQuantize]:
    """Build both quantizers with the same codebook, EMA updates, the commitment loss, and nothing else."""
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
    return ours.to(device), theirs.to(device)


def way(name: str, mode: str, ours: VectorQuantizer, theirs: VectorQuantize, z: Tensor) -> Callable[[], Tensor]:
    """Return a call of one of the two on z, in the mode "eval" or "train". It returns the codes (B, h, w)."""

    def run() -> Tensor:
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


def latents(n: int, dim: int, device: torch.device) -> Tensor:
    """Draw latents (n / GRID^2, dim, GRID, GRID) in channels_last, as an encoder returns them."""
    z = torch.randn(n // GRID**2, dim, GRID, GRID, generator=torch.Generator().manual_seed(1)) * dim**-0.5
    return z.contiguous(memory_format=torch.channels_last).to(device)


def prepare(
    name: str, mode: str, codebook_size: int, dim: int, vectors: int, device: torch.device
) -> Callable[[], Any]:
    """Prepare a call for `peak_of`, after a tiny call that loads code and starts thread pools."""
    call = way(name, mode, *pair(codebook_size, dim, device), latents(vectors, dim, device))
    way(name, mode, *pair(64, dim, device), latents(GRID**2, dim, device))()
    return call


def measure(device: torch.device, small: bool) -> Results:
    """Check that both quantizers give equal codes, time them, and return the results."""
    rows: list[Results] = []
    measured: list[Floors] = []
    vectors = GRID**2 if small else VECTORS
    for codebook_size, dim in ((64, 8),) if small else CASES:
        measured.append(measure_floors(device, small))
        both = pair(codebook_size, dim, device)
        z = latents(vectors, dim, device)
        for mode in ("eval", "train"):
            ways = {name: way(name, mode, *both, z) for name in ("ours", "theirs")}
            equal = torch.equal(ways["theirs"](), ways["ours"]())
            assert equal, f"{codebook_size} codes of {dim}, {mode}: ids differ, so times would say nothing"
            took = compare(ways, REPEATS, warmups=0)
            peaks = {}
            if not small:
                for name in ways:
                    peaks[name] = peak_of(device, prepare, name, mode, codebook_size, dim, vectors, device)
            rows.append(
                {
                    "codes": codebook_size,
                    "dim": dim,
                    "mode": mode,
                    "equal": equal,
                    "ours": {**took["ours"].row(), "MiB": peaks.get("ours")},
                    "theirs": {**took["theirs"].row(), "MiB": peaks.get("theirs")},
                    "times": took["theirs"].median / took["ours"].median,
                    "floors": measured[-1].row(),
                }
            )
            print(f"{codebook_size} codes of {dim}, {mode}: {rows[-1]['times']:.1f} times as fast", flush=True)
    best = max(measured, key=lambda floors: floors.float32)
    for row in rows:
        # Each vector with each codebook vector once.
        operations, numbers = 2.0 * vectors * row["codes"] * row["dim"], (vectors + row["codes"]) * row["dim"]
        row["floor_s"] = best.seconds(operations, 4.0 * numbers)
        row["over_floor"] = row["ours"]["median_s"] / row["floor_s"]
    return {"equal": all(row["equal"] for row in rows), "vectors": vectors, "rows": rows}


def table(results: Results) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{results['vectors']:,} vectors; vqp is vector_quantize_pytorch. The codes are equal.",
        "",
        "| codes | channels | mode | ours, ms | vqp, ms | times as fast | over the floor | ours, MiB | vqp, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours, theirs = row["ours"], row["theirs"]
        cells = [
            f"{row['codes']:,}",
            f"{row['dim']}",
            row["mode"],
            f"{ours['median_s'] * 1e3:,.1f} ± {ours['spread']:.0%}",
            f"{theirs['median_s'] * 1e3:,.1f} ± {theirs['spread']:.0%}",
            f"{row['times']:.1f}",
            f"{row['over_floor']:.1f}",
            *("-" if each["MiB"] is None else f"{each['MiB']:,.0f}" for each in (ours, theirs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
