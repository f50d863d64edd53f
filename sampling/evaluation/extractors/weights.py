"""Weights of an extractor: fitted to the network, or refused."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stage1_tokenizer.engine.checkpoint import brief
from stage1_tokenizer.engine.errors import BadFileError


def fit(network: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Load weights, in any floating-point format, into the network as float32, and freeze it in eval mode.

    BatchNorm's counts of batches are of no use here and may be missing; else each weight must have its place and each
    place its weight. Whole numbers are tables that the network has computed itself, and must be equal. The network may
    be one built on the meta device, if it has no such tables.

    Raises:
        BadFileError: names the source and the key that is missing, unexpected, misshapen, or holds what is not finite.
    """
    own = network.state_dict()  # with the versions of its layers
    places = {name: tensor for name, tensor in own.items() if not _counts_batches(name)}
    given = {name: tensor for name, tensor in given.items() if not _counts_batches(name)}
    kind = type(network).__name__
    for name in (*places, *given):
        if name not in given:
            raise BadFileError(f"{source}: is not of {kind}: no {name}")
        if name not in places:
            raise BadFileError(f"{source}: is not of {kind}: it has no {brief(name)}")
        fits = given[name].shape == places[name].shape
        if not fits or given[name].is_floating_point() != places[name].is_floating_point():
            raise BadFileError(
                f"{source}: is not of {kind}: {name} is {given[name].dtype} {tuple(given[name].shape)}, "
                f"should be {tuple(places[name].shape)}"
            )
    try:
        weights = {
            name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in given.items()
        }
    except RuntimeError as error:  # safetensors knows formats of four bits, from which torch does not convert
        raise BadFileError(f"{source}: holds numbers of a format that cannot be read ({error})") from None
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BadFileError(f"{source}: {name} holds numbers that are not finite")
        if not tensor.is_floating_point() and not torch.equal(tensor, places[name]):
            raise BadFileError(f"{source}: is not of {kind}: {name} has other values")
    own.update(weights)
    own.update({name: torch.zeros((), dtype=torch.int64) for name in own if _counts_batches(name)})
    network.load_state_dict(own, strict=True, assign=True)
    network.requires_grad_(False).eval()


def _counts_batches(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"
