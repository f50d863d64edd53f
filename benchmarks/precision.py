"""Changes in a trained prior by other precisions than float32.   python -m benchmarks.precision --prior RUN [-n 256]

On the first n images of the prior's validation split, code by code: bits per token, how often the likeliest code is the
same as in float32, and the distance of the logits, relative to their standard deviation. For n samples from the same
noise (top_p 0.9): the share of codes and of images that differ. One different code changes all codes after it, so a
difference does not mean that the images are worse.
"""

import argparse
from functools import partial

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sampling.choose import ChooseConfig, choose
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage2_prior.base import PreparedPrior
from stage2_prior.fast_linear import Precision
from stage2_prior.generation import generate
from stage2_prior.likelihood import nats_to_bits, token_nats
from stage2_prior.prior import LoadedPrior, load_prior, match_labels

COMPARED: tuple[Precision, ...] = ("float32", "bfloat16", "int8")


@torch.inference_mode()
def logits_of(prepared: PreparedPrior, codes: Tensor, labels: Tensor) -> Tensor:
    """Return the logits (B, L, V) of given codes (B, h, w, K), position by position."""
    generation, found = prepared.begin(labels), []
    for code in rearrange(codes, "B h w K -> (h w K) B"):
        found.append(generation.logits())
        generation.append(code)
    return torch.stack(found, dim=1)


@torch.inference_mode()
def validation_codes(prior: LoadedPrior, n: int) -> tuple[Tensor, Tensor]:
    """Return codes (n, h, w, K) and labels (n,) of the first n validation images."""
    images = open_data(parse_data_config(prior.data, str(prior.path))).image_batches("validation", seed=0)
    pixels, own = images.batch(np.arange(min(n, len(images))))
    return prior.tokenizer.tokenizer.encode_codes(normalise(pixels)), torch.from_numpy(
        match_labels(prior, images.classes)
    )[own]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", required=True, help="folder of a stage-two run")
    parser.add_argument("-n", type=int, default=256, help="number of images and of samples (default: 256)")
    options = parser.parse_args()
    prior = load_prior(options.prior)
    codes, labels = validation_codes(prior, options.n)
    noise = torch.rand(
        len(codes), prior.model.shape.length, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    pick = partial(choose, config=ChooseConfig(top_p=0.9))
    logits, samples = {}, {}
    print("precision  bits per token  likeliest the same  logits apart  other codes  other images")
    for precision in COMPARED:
        prepared = prior.model.prepare(precision)
        logits[precision] = logits_of(prepared, codes, labels)
        samples[precision] = generate(prior.model, labels, noise, pick, prepared=prepared)
        found, wanted = logits[precision], logits["float32"]
        differs = samples[precision] != samples["float32"]
        print(
            f"{precision:9} {nats_to_bits(float(token_nats(found, codes).mean())):15.4f} "
            f"{float((found.argmax(-1) == wanted.argmax(-1)).float().mean()):19.1%} "
            f"{float((found - wanted).std() / wanted.std()):13.2e} {float(differs.float().mean()):12.1%} "
            f"{float(differs.flatten(1).any(dim=1).float().mean()):15.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
