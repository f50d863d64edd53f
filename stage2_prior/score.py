"""Score images: how many bits a prior needs for their codes.   python stage2_prior/score.py [--prior RUN] [--by_class]

    images -> tokenizer -> codes -> prior -> -log p(codes | class)      per image, per class, and of the whole set

The bits of a set are its code length: an arithmetic coder that has tokenizer, prior and classes stores the set in this
many bits, with the tokenizer's loss (PSNR is printed with it). It is not a likelihood of pixels. Writes scores.csv (one
line per image) and scores.json to --out.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, Tree, parse_command_line
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import complete_data_options, parse_data_config
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.launch import start_accelerator
from stage2_prior.prior import find_prior_file, load_prior, match_labels
from stage2_prior.scoring import csv_table, score_images, summarise
from stage2_prior.tokens import check_channels, check_data_fits


class ScoreConfig(CommandConfig):
    """Score images: how many bits the prior needs for their codes."""

    prior: str | None = None
    """A stage-two run's folder, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME; null: the newest
    run under runs/stage2, or pretrained:shapes if there is none."""
    data: DataConfig | None = Field(None, discriminator="kind")
    """The data set to score; null: the prior's own. Keys without `data.kind` change that one."""
    split: Split = "validation"
    """The split to score: train or validation."""
    n: PositiveInt | None = None
    """Score only the first n images; null: all."""
    by_class: bool = False
    """Score each image under every class too: which class fits best, and how often that is the image's own."""
    batch_size: PositiveInt = 64
    """Images scored at once by each process. No effect on the scores; lower it when memory runs out."""
    out: str | None = None
    """Folder for scores.csv and scores.json; null: scores/KIND-SPLIT in the prior's folder."""

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """Return the tree with a whole data set, where it changes only some keys of the prior's."""
        return complete_data_options(tree, lambda: find_prior_file(tree.get("prior")))


def main() -> None:
    """Score the images, write both files, and print a summary."""
    config = parse_command_line(ScoreConfig)
    accelerator = start_accelerator(exact=True)
    prior = load_prior(config.prior, accelerator.device)
    data = config.data or parse_data_config(prior.data, str(prior.path))
    check_data_fits(prior.tokenizer, data)
    if config.by_class and not prior.classes:
        raise ConfigError("by_class: this prior has no classes; leave this option out")
    images = open_data(data).image_batches(config.split, seed=0)
    check_channels(prior.tokenizer, images, data)
    labels = match_labels(prior, images.classes)
    n = min(config.n or len(images), len(images))
    out = Path(config.out) if config.out else prior.outputs / "scores" / f"{data.kind}-{config.split}"
    accelerator.print(f"scoring {n} {config.split} images of {data.kind} with {prior.source} (step {prior.step})")

    scores = score_images(accelerator, prior, images, labels, n, config.batch_size, config.by_class)
    if accelerator.is_main_process:
        summary = summarise(scores, prior, values=math.prod(images.batch(np.arange(1))[0].shape))
        described = {"prior": prior.source, "step": prior.step, "data": data.tree(), "split": config.split}
        write_file(out / "scores.csv", csv_table(scores, prior).encode())
        write_file(out / "scores.json", json.dumps(described | summary, indent=1).encode())
        print_summary(summary, prior.model.shape.length, prior.model.shape.V)
        print(f"each image: {out / 'scores.csv'}")


def print_summary(summary: dict[str, Any], length: int, codebook_size: int) -> None:
    """Print the metrics of a set of images of `length` tokens each, out of `codebook_size` codes."""
    per_token, nats, unigram = (summary[f"{name}_per_token"] for name in ("bits", "nats", "unigram_bits"))
    uniform = math.log2(codebook_size)
    print(
        f"  bits per token  {per_token:.3f} ({nats:.3f} nats); without context {unigram:.3f}, equally likely codes "
        f"{uniform:.3f}"
    )
    deviation = summary["bits_per_image_deviation"]
    print(f"  bits per image  {summary['bits_per_image']:.1f}, standard deviation {deviation:.1f}, {length} tokens")
    stored, plain = summary["code_length_bytes"], summary["images"] * uniform * length / 8
    share = f": {stored / plain:.1%} of the codes as plain numbers" if plain else ""  # plain is 0 for a single code
    print(
        f"  the whole set   {stored:,.0f} bytes for {summary['images']} images{share}; reconstructed at "
        f"{summary['psnr']:.2f} dB"
    )
    width = max(map(len, summary["classes"]), default=0)
    for name, own in summary["classes"].items():
        found = f"; the best class of {own['found']:.1%} of them" if "found" in own else ""
        print(f"  {name:<{width}}  {own['bits_per_token']:.3f} bits per token, {own['images']} images{found}")
    if summary.get("class_found") is not None:
        print(f"  the class with the fewest bits is the image's own in {summary['class_found']:.1%}")


if __name__ == "__main__":
    run_command(main)
