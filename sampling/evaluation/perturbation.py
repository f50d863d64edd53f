"""Perturbed codes of images to measure, as a function of the seed and of the number of the image."""

import numpy as np
import torch
from torch import Tensor

from sampling.evaluation.sources import Indices
from stage1_tokenizer.bottlenecks.base import Bottleneck
from stage1_tokenizer.bottlenecks.nearest import find_neighbours
from stage1_tokenizer.bottlenecks.perturbation import PerturbationConfig, replace_codes
from stage1_tokenizer.engine.seeds import draw_uniforms


class CodePerturbation:
    """Replaces a share of the codes of each image. Neither the batch size nor the number of processes changes them."""

    def __init__(self, config: PerturbationConfig, bottleneck: Bottleneck, seed: int, device: torch.device) -> None:
        """Find the neighbours of all V codes once: for most codebooks there are more codes to replace than that.

        Raises:
            ConfigError: the bottleneck has no codes, or too few.
        """
        config.check(bottleneck.codebook_size)
        self._config, self._seed = config, seed
        every_code = torch.arange(bottleneck.codebook_size, device=device)
        tables = [find_neighbours(every_code, codebook, config.nearest) for codebook in bottleneck.codebooks()]
        self._neighbours = [table.__getitem__ for table in tables]  # codes (n,) -> (n, nearest)

    def __call__(self, codes: Tensor, indices: Indices) -> Tensor:
        """Replace codes (B, h, w, K) of the images with these indices (B,)."""
        uniforms = draw_uniforms(self._seed, "perturbation", np.zeros_like(indices), indices, 2 * codes[0].numel())
        choices, ranks = np.moveaxis(uniforms.reshape(len(indices), 2, *codes.shape[1:]), 1, 0)  # (B, h, w, K) each
        is_replaced = torch.from_numpy(choices < self._config.codes).to(codes.device)
        taken = torch.from_numpy((ranks * self._config.nearest).astype(np.int64)).to(codes.device)
        return replace_codes(codes, self._neighbours, is_replaced, taken)
