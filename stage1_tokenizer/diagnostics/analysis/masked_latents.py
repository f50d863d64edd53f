"""How far a latent's influence reaches: some positions are replaced, and the change of the decoded image is shown."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.diagnostics.analysis.encoded import Encoded, code_use, decode, vectors
from stage1_tokenizer.diagnostics.analysis.sheet import COLOURS, GREY, MARGIN, TOP, WIDTH, Sheet, pixels, width_of
from stage1_tokenizer.tokenizer import Tokenizer

ROWS = 4
WHITE_AT = 0.5
MEASURED = 64
"""Images over which the reach is measured."""


def masks_of(h: int, w: int, seed: int) -> dict[str, Tensor]:
    """Masks (h, w) bool of the positions to replace: a block in the middle, the right half, half of them at random."""
    block, half, scattered = (torch.zeros(h, w, dtype=torch.bool) for _ in range(3))
    side_y, side_x = -(-h // 4), -(-w // 4)
    top, left = (h - side_y) // 2, (w - side_x) // 2
    block[top : top + side_y, left : left + side_x] = True
    half[:, w // 2 :] = True
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
    scattered.view(-1)[order[: -(-h * w // 2)]] = True
    return {"a block": block, "the right half": half, "half at random": scattered}


def replacement(tokenizer: Tokenizer, encoded: Encoded) -> Tensor:
    """The latent (D,) that says nothing: that of the most frequent codes, or zeros where there are none."""
    if encoded.codes is None:
        return encoded.z_q.new_zeros(encoded.z_q.shape[1])
    common = code_use(encoded.codes, tokenizer.bottleneck.codebook_size).counts.argmax(dim=1)  # (K,)
    # A whole grid of them: a bottleneck's `vectors` may expect the grid's size.
    return vectors(tokenizer, common.expand(1, *encoded.codes.shape[1:]))[0, :, 0, 0]


def masked(z_q: Tensor, mask: Tensor, by: Tensor) -> Tensor:
    """z_q (N, D, h, w) with the vector `by` (D,) wherever mask (h, w) is true."""
    return torch.where(mask, by[:, None, None], z_q)


def change_by_distance(change: Tensor, mask: Tensor, factor: int) -> list[float]:
    """Mean of change (N, H, W) over the pixels of replaced positions (mask (h, w) bool), then over the pixels 1, 2, ...
    away from them (in the largest of the two directions), as far as there are any."""
    inside = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)  # (H, W)
    means = [float(change[:, inside].mean())]
    reached = inside
    while not reached.all():
        grown = F.max_pool2d(reached[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
        means.append(float(change[:, grown & ~reached].mean()))
        reached = grown
    return means


def draw_masked_latents(tokenizer: Tokenizer, encoded: Encoded, seed: int, footer: str) -> Sheet:
    h, w = encoded.z_q.shape[2:]
    factor = encoded.image_size[0] // h
    masks, by = masks_of(h, w, seed), replacement(tokenizer, encoded)
    chosen, measured = encoded.spread(ROWS), encoded.spread(MEASURED)
    width = width_of(encoded.image_size, (WIDTH - 2 * MARGIN - 0.45) / 7 - 0.02)
    height = width * encoded.image_size[0] / encoded.image_size[1]
    gap = (WIDTH - 2 * MARGIN - 7 * width - 3 * 0.04) / 3
    bottom = TOP + 0.4 + len(chosen) * (height + 0.06)
    what = "zeros" if encoded.codes is None else "the most frequent code"
    sheet = Sheet(
        bottom + 2.35,
        "Masked latents: how far the influence of a position reaches",
        f"Positions of the {h}x{w} latent, outlined, are replaced by {what}, and all is decoded.\nBeside "
        f"it, how much each pixel changed (mean over channels; black: not at all, brightest: {WHITE_AT:.0%} of the "
        "range and above).",
        footer,
    )
    with sheet:
        sheet.text(MARGIN, TOP + 0.25, "nothing", size=10, weight="bold")
        axes = sheet.plot(MARGIN + 0.5, bottom + 0.4, WIDTH - 2 * MARGIN - 0.7, 1.4)
        axes.set_title(f"Mean change by distance from the replaced positions ({len(measured)} images)")
        for row, image in enumerate(chosen):
            sheet.image(pixels(encoded.x_hat[image]), MARGIN, TOP + 0.35 + row * (height + 0.06), width)
        for number, (name, mask) in enumerate(masks.items()):
            left = MARGIN + width + gap + number * (2 * width + 0.04 + gap)
            sheet.text(left, TOP + 0.25, name, size=10, weight="bold", color=COLOURS[number])
            for row, image in enumerate(chosen):
                top = TOP + 0.35 + row * (height + 0.06)
                decoded = decode(tokenizer, masked(encoded.z_q[image : image + 1], mask, by))
                change = (decoded - encoded.x_hat[image]).abs().mean(dim=1)[0] / 2.0  # (H, W)
                sheet.image(pixels(decoded[0]), left, top, width)
                sheet.image(change.numpy(), left + width + 0.04, top, width, cmap="inferno", vmin=0.0, vmax=WHITE_AT)
                if name != "half at random":
                    rows, columns = torch.nonzero(mask).T
                    x0, y0 = float(columns.min()) / w * width, float(rows.min()) / h * height
                    size = (float(columns.max() + 1) / w * width - x0, float(rows.max() + 1) / h * height - y0)
                    for start in (left, left + width + 0.04):
                        sheet.box(start + x0, top + y0, *size, edgecolor="#9fe870", lw=1.0)
            all_changed = decode(tokenizer, masked(encoded.z_q[measured], mask, by)) - encoded.x_hat[measured]
            means = change_by_distance(all_changed.abs().mean(dim=1) / 2.0, mask, factor)
            axes.plot(range(len(means)), means, "o-", ms=3.5, lw=1.4, color=COLOURS[number], label=name)
        axes.axvline(factor, color=GREY, lw=1, ls="--")
        axes.text(factor, 0.97, f" one position: {factor} pixels", color=GREY, size=8, va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set(xlabel="pixels away from the nearest replaced position (0: inside)", ylim=(0, None))
        axes.set_ylabel("share of the range")
        axes.legend(loc="upper right")
    return sheet
