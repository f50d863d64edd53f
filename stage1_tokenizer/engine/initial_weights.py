"""Weights from which a new training starts (`--init_from`): a check that lists what does not fit, and their hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stage1_tokenizer.engine.checkpoint import find_misfits
from stage1_tokenizer.engine.errors import ConfigError, shorten
from stage1_tokenizer.engine.model_files import find_name

MOST_LISTED = 40
"""Largest number of tensors that a message lists."""


def check_initial(module: nn.Module, tensors: Mapping[str, Tensor], source: Path, advice: str) -> None:
    """Check that the weights of another training fit a module, which may be on the meta device.

    advice: the end of the message, which says what to do if they do not fit.

    Raises:
        ConfigError: lists the tensors that differ.
    """
    misfits = find_misfits(module, tensors)
    if misfits:
        lines = "".join(f"  {shorten(line)}\n" for line in misfits[:MOST_LISTED])
        more = f"  and {len(misfits) - MOST_LISTED} more\n" if len(misfits) > MOST_LISTED else ""
        raise ConfigError(
            f"--init_from {source}: has another architecture than this training; these tensors of the file differ:\n"
            f"{lines}{more}{advice}"
        )


def name_source(file: Path) -> str:
    """Return a short name for the source of a weights file: its repository on the Hub, or its folder."""
    name = find_name(file)
    return name.name if name else file.absolute().parent.name


def hash_weights(config: str, tensors: Mapping[str, Tensor]) -> str:
    """Return 32 hexadecimal digits that change with the config and with each weight."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
