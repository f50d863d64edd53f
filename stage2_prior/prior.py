"""What a prior is: logits for training, generation for sampling, and how one is loaded from disk.

forward(codes (B, h, w, K), labels (B,)) -> logits (B, L, V)
generate(prior, labels (B,), noise (B, L), choose) -> codes (B, h, w, K)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_tokenizer.checkpoint import load_strict, read_weights
from stage1_tokenizer.config import Config, Tree, config_from_json
from stage1_tokenizer.errors import BadFileError, ConfigError
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape, config_tree, resolve
from stage2_prior.gpt import Gpt, GptConfig

PRIOR_FILE = "prior.safetensors"
PriorConfig = GptConfig
Choose = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, V) float32, noise (B,) uniform in [0, 1)) -> tokens (B,) int64."""


class Decoding(Protocol):
    """A generation under way."""

    def logits(self) -> Tensor:
        """(B, V) float32 for the next position."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Take the tokens (B,) that were chosen there."""
        ...


class Prior(Protocol):
    """A distribution over the code sequences of images, given a class."""

    shape: TokenShape
    classes: int
    config: PriorConfig

    @property
    def null_label(self) -> int:
        """The label that stands for "no class given"."""
        ...

    def __call__(self, codes: Tensor, labels: Tensor) -> Tensor:
        """codes (B, h, w, K), labels (B,) -> logits (B, L, V)."""
        ...

    def begin(self, labels: Tensor) -> Decoding:
        """Start to generate sequences of these labels (B,)."""
        ...


def build_prior(config: PriorConfig, shape: TokenShape, classes: int) -> Gpt:
    """A prior over codes of a shape, for images of `classes` classes (0: unconditional)."""
    return Gpt(config, shape, classes)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Tokens (B,) from probabilities (B, V), by inverting the distribution function at noise (B,) in [0, 1).

    One number per token decides, so what an image becomes depends on its own noise and not on its batch. A token of
    probability 0 is never drawn.
    """
    cumulative = probabilities.double().cumsum(dim=-1)  # (B, V)
    target = noise.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(probabilities.shape[-1] - 1)


def sample_softmax(logits: Tensor, noise: Tensor) -> Tensor:
    """The prior's own distribution, unfiltered: logits (B, V), noise (B,) -> tokens (B,)."""
    return draw(logits.softmax(dim=-1), noise)


def check_guidance(prior: Prior, guidance: float) -> None:
    """Raises ConfigError where guidance is asked of a prior that does not know images both with and without a class."""
    if guidance != 1.0 and (prior.classes == 0 or prior.config.label_dropout == 0.0):
        reason = "has no classes" if prior.classes == 0 else "was trained with label_dropout 0"
        raise ConfigError(
            f"guidance {guidance}: this prior {reason}, so it does not know images without a class; use guidance 1"
        )


@torch.inference_mode()
def generate(
    prior: Prior,
    labels: Tensor,
    noise: Tensor,
    choose: Choose = sample_softmax,
    guidance: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Codes (B, h, w, K) for labels (B,), from uniform noise (B, L).

    `guidance` s mixes logits with and without the class, uncond + s (cond - uncond) (Ho and Salimans 2022): 1 is the
    conditional prior, 0 the unconditional one. `progress` is called with the number of tokens after each position.

    Raises:
        ConfigError: guidance, but the prior has no classes or was trained without label dropout.
    """
    check_guidance(prior, guidance)
    guided = guidance != 1.0
    shape, batch = prior.shape, len(labels)
    both = torch.cat([labels, torch.full_like(labels, prior.null_label)]) if guided else labels
    decoding = prior.begin(both)
    tokens = []
    for position in range(shape.length):
        logits = decoding.logits()
        if guided:
            conditional, unconditional = logits[:batch], logits[batch:]
            logits = unconditional + guidance * (conditional - unconditional)
        chosen = choose(logits, noise[:, position])  # (B,)
        tokens.append(chosen)
        decoding.append(chosen.repeat(2) if guided else chosen)
        if progress is not None:
            progress(batch)
    return rearrange(torch.stack(tokens, dim=1), "B (h w K) -> B h w K", h=shape.h, w=shape.w)


class PriorHeader(Config):
    """What the header of a prior's file says about it."""

    prior: PriorConfig
    shape: tuple[int, int, int, int]
    """h, w, K, V."""
    classes: tuple[str, ...]
    """Names of the classes in the order of their labels, as they were at training."""
    tokenizer: str
    """The fingerprint of the tokenizer whose codes it models."""


def saved_classes(folder: Path) -> tuple[str, ...]:
    """The class map of the prior saved in a run's folder, which labels keep for good; empty where there is none yet."""
    file = folder / PRIOR_FILE
    if not file.exists():
        return ()
    _, header = read_weights(file, kind="prior")
    return config_from_json(PriorHeader, header.get("config"), str(file)).classes


@dataclass(frozen=True)
class LoadedPrior:
    """A prior and its tokenizer from a run's folder, in eval mode, without gradients."""

    model: Gpt
    tokenizer: LoadedTokenizer
    classes: tuple[str, ...]
    data: Tree
    """The data config whose tokens it was trained on."""
    path: Path
    step: int

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Load `prior.safetensors`, given as the file or its folder, and the `tokenizer.safetensors` beside it.

        Raises:
            ConfigError: one of the two does not exist.
            BadFileError: one is damaged, of another kind, or they do not belong together.
        """
        file = resolve(path, PRIOR_FILE, "--prior")
        tensors, raw = read_weights(file, kind="prior")
        header = config_from_json(PriorHeader, raw.get("config"), str(file))
        tokenizer = LoadedTokenizer.load(file.parent, device, option="--prior")
        if tokenizer.fingerprint != header.tokenizer:
            raise BadFileError(
                f"{file} was trained on the codes of the tokenizer {header.tokenizer}, but {tokenizer.path} is "
                f"{tokenizer.fingerprint}; put the former's tokenizer.safetensors beside the prior"
            )
        model = build_prior(header.prior, TokenShape(*header.shape), len(header.classes))
        load_strict(model, tensors, str(file))
        model.requires_grad_(False).eval().to(device)
        return cls(
            model, tokenizer, header.classes, config_tree(raw.get("data"), str(file)), file, int(raw.get("step", 0))
        )


def label_of(name: str, classes: tuple[str, ...]) -> int:
    """A class given by its name or its number -> its label.

    Raises:
        ConfigError: there is no such class; lists those there are.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    known = ", ".join(f"{label} {known}" for label, known in enumerate(classes)) or "none: this prior is unconditional"
    raise ConfigError(f"class {json.dumps(name)}: there is no such class; the classes are: {known}")


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
