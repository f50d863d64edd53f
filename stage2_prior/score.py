"""How likely a prior finds images.   python stage2_prior/score.py [--prior runs/stage2/NAME] [--by_class]

    images -> tokenizer -> codes -> prior -> -log p(codes | class)      per image, per class, and of the whole set

An image set's code length is what an arithmetic coder would need that knows tokenizer, prior and classes: the set can
be stored in that many bits, up to the tokenizer's loss (its PSNR stands beside it). It is not a likelihood of pixels.
Writes scores.csv (a line per image) and scores.json to --out.
"""

import csv
import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from stage1_tokenizer.config.base import CommandConfig, Tree, parse_command_line
from stage1_tokenizer.data import DataConfig, build_image_batches, data_config
from stage1_tokenizer.data.image_batches import ImageBatches, Split, normalise
from stage1_tokenizer.data.order import parts_of, share
from stage1_tokenizer.data.partial_options import with_own_data
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.launch import start_accelerator
from stage1_tokenizer.metrics import CodeUse, psnr
from stage2_prior.likelihood import bits, class_log_probabilities, image_nats, nats_by_class
from stage2_prior.prior import LoadedPrior, labels_for, load_prior, prior_file
from stage2_prior.tokens import check_fits


class ScoreConfig(CommandConfig):
    """Score images: how many bits the prior needs for their codes."""

    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    data: DataConfig | None = Field(None, discriminator="kind")
    """The images; null: those of the prior's own data set. Keys without `data.kind` change that one."""
    split: Split = "validation"
    """Which split of them."""
    n: PositiveInt | None = None
    """Only the first n; null: all."""
    by_class: bool = False
    """Score each image under every class too: which one fits best, and how often that is its own."""
    batch_size: PositiveInt = 64
    """Images scored at once by each process; bounded by memory, without effect on the scores."""
    out: str | None = None
    """Folder for scores.csv and scores.json; default: scores/ and the data set's kind and split, in the prior's."""

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """The tree with a whole data set where only some of the prior's keys are changed."""
        return with_own_data(tree, lambda: prior_file(tree.get("prior")))


class Scores(NamedTuple):
    """Of N images, in their order."""

    labels: Tensor
    """(N,) int64: the labels they were scored under; that of no class where the prior does not know theirs."""
    nats: Tensor
    """(N,) float64."""
    by_class: Tensor
    """(N, classes) float64 nats under each class; (N, 0) where that was not asked for."""
    psnr: Tensor
    """(N,) float64 dB, of the tokenizer's reconstruction."""
    use: CodeUse


def main() -> None:
    config = parse_command_line(ScoreConfig)
    accelerator = start_accelerator(exact=True)
    prior = load_prior(config.prior, accelerator.device)
    data = config.data or data_config(prior.data, str(prior.path))
    check_fits(prior.tokenizer, data)
    if config.by_class and not prior.classes:
        raise ConfigError("by_class: this prior has no classes")
    pictures = build_image_batches(data, config.split, seed=0)
    channels = prior.tokenizer.tokenizer.config.image_channels
    if pictures.channels != channels:
        raise ConfigError(f"the images have {pictures.channels} channels, but the tokenizer was trained on {channels}")
    labels = labels_for(prior, pictures.classes)
    number = min(config.n or len(pictures), len(pictures))
    out = Path(config.out) if config.out else prior.path.parent / "scores" / f"{data.kind}-{config.split}"
    accelerator.print(f"scoring {number} {config.split} images of {data.kind} with {prior.path} (step {prior.step})")

    scores = score(accelerator, prior, pictures, number, labels, config)
    if not bool(torch.isfinite(scores.nats).all()):
        raise BadFileError(f"{prior.path}: gives scores that are not finite: its weights are damaged")
    if accelerator.is_main_process:
        summary = summarise(scores, prior, values=math.prod(pictures.batch(np.arange(1))[0].shape))
        described = {"prior": str(prior.path), "step": prior.step, "data": data.tree(), "split": config.split}
        write_csv(out / "scores.csv", scores, prior)
        write_file(out / "scores.json", json.dumps(described | summary, indent=1).encode())
        report(summary, prior)
        print(f"each image: {out / 'scores.csv'}")


@torch.inference_mode()
def score(
    accelerator: Accelerator,
    prior: LoadedPrior,
    pictures: ImageBatches,
    number: int,
    labels: NDArray[np.int64],
    config: ScoreConfig,
) -> Scores:
    """Score the first `number` pictures, each once over all processes."""
    device, model, tokenizer = accelerator.device, prior.model, prior.tokenizer.tokenizer
    classes = len(prior.classes) if config.by_class else 0
    table = torch.zeros(number, 3 + classes, dtype=torch.float64, device=device)  # label, nats, psnr, nats by class
    use = CodeUse(model.shape.K, model.shape.V, device)
    mine = np.asarray(share(number, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    shown = progress_bar(len(mine), "image", "scoring")
    for indices in parts_of(mine, config.batch_size):
        pixels, own = pictures.batch(indices)
        x = normalise(pixels.to(device))
        codes = tokenizer.encode_codes(x)  # (b, h, w, K)
        given = torch.from_numpy(labels)[own].to(device)
        columns = [given.double(), image_nats(model, codes, given), psnr(x, tokenizer.decode_codes(codes)).double()]
        rows = torch.stack(columns, dim=1)
        if classes:
            rows = torch.cat([rows, nats_by_class(model, codes)], dim=1)
        table[torch.from_numpy(indices).to(device)] = rows
        use.add(codes)
        shown.update(len(indices))
    shown.close()
    table = accelerator.reduce(table, "sum").cpu()
    use.counts = accelerator.reduce(use.counts, "sum").cpu()
    return Scores(table[:, 0].long(), table[:, 1], table[:, 3:], table[:, 2], use)


def summarise(scores: Scores, prior: LoadedPrior, values: int) -> dict[str, Any]:
    """The set's figures; `values` is the number of colour values of an image."""
    length, nats = prior.model.shape.length, scores.nats
    mean = float(nats.mean())
    summary: dict[str, Any] = {
        "images": len(nats),
        "nats_per_token": mean / length,
        "bits_per_token": bits(mean) / length,
        "unigram_bits_per_token": scores.use.entropy_bits,
        "nats_per_image": mean,
        "bits_per_image": bits(mean),
        "bits_per_image_deviation": bits(float(nats.std())) if len(nats) > 1 else 0.0,
        "code_length_bytes": bits(float(nats.sum())) / 8,
        "code_bits_per_dim": bits(mean) / values,
        "psnr": float(scores.psnr.mean()),
        "classes": {
            name: {"images": int(own.sum()), "bits_per_token": bits(float(nats[own].mean())) / length}
            for label, name in enumerate([*prior.classes, "(no class)"])
            if bool((own := scores.labels == label).any())
        },
    }
    if scores.by_class.shape[1]:
        right = scores.by_class.argmin(dim=1) == scores.labels
        known = scores.labels < len(prior.classes)
        summary["class_found"] = float(right[known].double().mean()) if bool(known.any()) else None
        for label, name in enumerate(prior.classes):
            if name in summary["classes"]:
                summary["classes"][name]["found"] = float(right[scores.labels == label].double().mean())
    return summary


def write_csv(path: Path, scores: Scores, prior: LoadedPrior) -> None:
    """A line per image: its number, class, nats and bits; with by_class also the log probability of each class."""
    names = [*prior.classes, ""]
    posterior = class_log_probabilities(scores.by_class) if scores.by_class.shape[1] else scores.by_class
    of_classes = [f"ln p({name})" for name in prior.classes[: posterior.shape[1]]]
    text = StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["image", "class", "nats", "bits", "psnr", *of_classes])
    for index, (label, nats) in enumerate(zip(scores.labels.tolist(), scores.nats.tolist(), strict=True)):
        figures = (nats, bits(nats), float(scores.psnr[index]), *posterior[index].tolist())
        rows.writerow([index, names[label], *(f"{figure:.4f}" for figure in figures)])
    write_file(path, text.getvalue().encode())


def report(summary: dict[str, Any], prior: LoadedPrior, say: Callable[[str], object] = print) -> None:
    """The figures as text."""
    shape, figures = prior.model.shape, summary
    each, nats, alone = (figures[f"{name}_per_token"] for name in ("bits", "nats", "unigram_bits"))
    equal = math.log2(shape.V)
    say(f"  bits per token  {each:.3f} ({nats:.3f} nats); by the codes' frequencies {alone:.3f}, all alike {equal:.3f}")
    deviation = figures["bits_per_image_deviation"]
    say(f"  bits per image  {figures['bits_per_image']:.1f}, standard deviation {deviation:.1f}, {shape.length} tokens")
    stored, plain = figures["code_length_bytes"], figures["images"] * equal * shape.length / 8
    share = (
        f": {stored / plain:.1%} of the codes as plain numbers" if plain else ""
    )  # a codebook of one code takes none
    say(
        f"  the whole set   {stored:,.0f} bytes for {figures['images']} images{share}; decoded again at "
        f"{figures['psnr']:.2f} dB"
    )
    width = max(map(len, figures["classes"]), default=0)
    for name, own in figures["classes"].items():
        found = f"; it explains {own['found']:.1%} of them best" if "found" in own else ""
        say(f"  {name:<{width}}  {own['bits_per_token']:.3f} bits per token, {own['images']} images{found}")
    if figures.get("class_found") is not None:
        say(f"  the class that explains an image best is its own in {figures['class_found']:.1%}")


if __name__ == "__main__":
    run_command(main)
