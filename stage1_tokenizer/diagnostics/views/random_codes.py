"""Images decoded from random codes or latents: they show that a decoder needs a prior to draw a plausible image."""

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.views.base import (
    Subject,
    View,
    code_use,
    decode_latents,
    encoded_images,
    look_up_vectors,
    once,
    tokenizer_device,
)  # fmt: skip
from stage1_tokenizer.diagnostics.views.sheet import GREY, MARGIN, TOP, WIDTH, Sheet, fitting

SIDE = 5
"""A block has SIDE x SIDE images."""


def uniform_codes(shape: torch.Size, codebook_size: int, generator: torch.Generator) -> Tensor:
    """Draw codes of the shape (N, h, w, K), all of 0..V-1 equally likely."""
    return torch.randint(codebook_size, shape, generator=generator)


def unigram_codes(counts: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw independent codes of the shape (N, h, w, K), of codebook k with probabilities counts[k] / sum, (K, V)."""
    n = shape[:-1].numel()
    # Inverse of the cumulative counts, because torch.multinomial allows at most 2**24 codes.
    edges = counts.double().cumsum(dim=1)
    drawn = torch.rand(len(counts), n, generator=generator, dtype=torch.float64) * edges[:, -1:]
    ids = torch.searchsorted(edges, drawn, right=True).clamp_max(counts.shape[1] - 1)  # (K, n)
    return ids.T.reshape(shape)


def shuffled(z_q: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n latent grids (n, D, h, w) twice, with vectors from random images of z_q (N, D, h, w).

    In the first result the vectors come from any position, in the second from the same position.
    """
    N, _, h, w = z_q.shape
    flat = z_q.flatten(2)  # (N, D, h * w)
    images = torch.randint(N, (2, n, h * w), generator=generator)
    positions = torch.randint(h * w, (n, h * w), generator=generator)
    anywhere = flat[images[0], :, positions]  # (n, h * w, D)
    in_place = flat[images[1], :, torch.arange(h * w).expand(n, -1)]
    anywhere, in_place = (part.transpose(1, 2).reshape(n, -1, h, w) for part in (anywhere, in_place))
    return anywhere, in_place


@once
def blocks_of(subject: Subject) -> dict[tuple[str, str], Tensor]:
    """Return blocks of up to SIDE x SIDE images (n, C, H, W), by heading and explanation."""
    encoded, n = encoded_images(subject), SIDE * SIDE
    generator = torch.Generator().manual_seed(subject.seed)
    tokenizer, bottleneck = encoded.tokenizer, encoded.tokenizer.bottleneck
    latents: dict[tuple[str, str], Tensor] = {}
    if encoded.codes is not None:
        size, shape = bottleneck.codebook_size, torch.Size((n, *encoded.codes.shape[1:]))
        uniform = uniform_codes(shape, size, generator)
        unigram = unigram_codes(code_use(encoded.codes, size).counts, shape, generator)
        latents["uniform codes", f"each of the {size} equally likely"] = look_up_vectors(tokenizer, uniform)
        latents["codes by their frequency", "as in images, but independent"] = look_up_vectors(tokenizer, unigram)
    else:
        anywhere, in_place = shuffled(encoded.z_q, n, generator)
        latents["latents of any image and position", "another one at each position"] = anywhere
        if bottleneck.noise_channels:
            noise = torch.randn(n, bottleneck.noise_channels, *encoded.z_q.shape[2:], generator=generator)
            with torch.inference_mode():
                drawn = bottleneck.sample(noise.to(tokenizer_device(tokenizer))).cpu()
            latents["noise from N(0, I)", "the bottleneck's own prior"] = drawn
        else:
            latents["latents of any image", "another image's at each position"] = in_place
    blocks = {names: decode_latents(tokenizer, z_q) for names, z_q in latents.items()}
    return blocks | {("real", "reconstructions of validation images"): encoded.x_hat[encoded.spaced_indices(n)]}


def draw_random_codes(subject: Subject) -> Sheet:
    """Draw two blocks of images from random codes, and one of reconstructions."""
    encoded, blocks = encoded_images(subject), blocks_of(subject)
    block_width = (WIDTH - 2 * MARGIN - 2 * 0.3) / 3
    width, height = fitting(encoded.image_size, block_width / SIDE - 0.02)
    gap = block_width / SIDE - width
    kind = "codes" if encoded.codes is not None else "latents"
    sheet = Sheet(
        TOP + 0.55 + SIDE * (height + gap) + 0.1,
        f"Decoded at random: {kind} alone do not make an image",
        f"The decoder turns any {kind} into some image. A prior has to learn which of them go together:\n"
        "this is what the first two blocks lack and the last one has.",
        encoded.footer,
    )
    for column, ((name, explanation), images) in enumerate(blocks.items()):
        left = MARGIN + column * (block_width + 0.3)
        sheet.text(left, TOP + 0.25, name, size=11, weight="bold")
        sheet.text(left, TOP + 0.43, explanation, size=8, color=GREY)
        for number, image in enumerate(images):
            row, col = divmod(number, SIDE)
            sheet.image(image, left + col * block_width / SIDE, TOP + 0.55 + row * (height + gap), width)
    return sheet


VIEW = View("random_codes", "Decoded at random", draw_random_codes)
