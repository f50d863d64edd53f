"""Export a tokenizer as two programs of torch.export, which run without this package.

    encoder.pt2   image (B, C, H, W) float32 in [-1, 1] -> codes (B, h, w, K) int64, or a latent (B, D, h, w) float32
    decoder.pt2   codes, or a latent -> image (B, C, H, W) float32, near [-1, 1] but not clamped
    export.json   names, shapes, ranges and sizes of these arrays, and how exactly the files agree with the tokenizer

    torch.export.load("encoder.pt2").module()(image)

B is any number. H and W are any multiples of the factor, except for a network of one image size (mlp).
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer

DESCRIPTION = "export.json"
"""Name of the file that describes the exported files."""
Program = Callable[[Tensor], Tensor]
"""A program of one input and one output, as it runs from its file."""
LEAST_EQUAL_CODES = 0.99
"""Smallest share of equal codes in the check of an export; codes differ only where two are equally near."""
LARGEST_DIFFERENCE = 1e-3
"""Largest difference in the check, relative to the largest absolute value of the tokenizer's own output."""


class ImageEncoder(nn.Module):
    """The half of a tokenizer from images to codes, or to latents if the bottleneck is continuous."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder, self.bottleneck = tokenizer.encoder, tokenizer.bottleneck

    def forward(self, image: Tensor) -> Tensor:
        """image (B, C, H, W) -> codes (B, h, w, K) int64 or latent (B, D, h, w)."""
        encoded: Bottlenecked = self.bottleneck(self.encoder(image))
        return encoded.z_q if encoded.codes is None else encoded.codes


class CodeDecoder(nn.Module):
    """The half of a tokenizer from codes to images. Codes outside 0..V-1 are not checked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.bottleneck, self.decoder = tokenizer.bottleneck, tokenizer.decoder

    def forward(self, codes: Tensor) -> Tensor:
        """codes (B, h, w, K) int64 -> image (B, C, H, W)."""
        image: Tensor = self.decoder(self.bottleneck.codes_to_latents(codes))
        return image


class LatentDecoder(nn.Module):
    """The half of a tokenizer from continuous latents to images."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.decoder = tokenizer.decoder

    def forward(self, latent: Tensor) -> Tensor:
        """latent (B, D, h, w) -> image (B, C, H, W)."""
        image: Tensor = self.decoder(latent)
        return image


@dataclass(frozen=True)
class Half:
    """One half of a tokenizer: the module to export, examples of its input and output, and what its arrays are."""

    module: nn.Module
    """The half in torch's usual memory format, on the CPU."""
    inputs: tuple[Tensor, Tensor]
    """Two inputs of other batch sizes, and of other image sizes if the network allows it; the first is recorded."""
    outputs: tuple[Tensor, Tensor]
    """Results of the tokenizer itself for both inputs."""
    dynamic: Mapping[int, Any]
    """Dimensions of the input that may have any size (torch.export)."""
    arrays: Mapping[str, Any]
    """Description of `input` and `output`: name, dtype, shape and range."""


def split_tokenizer(loaded: LoadedTokenizer) -> dict[str, Half]:
    """Return the halves `encoder` and `decoder` of a tokenizer."""
    tokenizer = copy.deepcopy(loaded.tokenizer).to("cpu")
    config, depth = tokenizer.config, tokenizer.bottleneck.depth
    factor, is_fixed = config.network.factor, config.network.name_of_one_size is not None
    grid = (config.image_size[0] // factor, config.image_size[1] // factor)
    # torch.export takes a side of 1 for a constant, so the recorded input has at least 2.
    grids = [grid, grid] if is_fixed else [(max(2, grid[0]), max(2, grid[1])), (grid[0] + 1, grid[1] + 2)]
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.rand(batch, config.image_channels, h * factor, w * factor, generator=generator) * 2 - 1
        for batch, (h, w) in zip((2, 3), grids, strict=True)
    )
    with torch.no_grad():
        if depth:
            latents = tokenizer.encode_codes(first), tokenizer.encode_codes(second)
            images = tokenizer.decode_codes(latents[0]), tokenizer.decode_codes(latents[1])
        else:
            latents = tokenizer.encode(first).z_q, tokenizer.encode(second).z_q
            images = tokenizer.decode(latents[0]), tokenizer.decode(latents[1])
    tokenizer = tokenizer.to(memory_format=torch.contiguous_format)
    batch, sides = Dim("batch"), (Dim("h", min=1), Dim("w", min=1))
    pixels = {} if is_fixed else {axis: factor * side for axis, side in zip((2, 3), sides, strict=True)}
    cells = {} if is_fixed else dict(zip((1, 2) if depth else (2, 3), sides, strict=True))
    image = _describe_image(config.image_channels, factor, grid, is_fixed)
    latent = _describe_latent(tokenizer, grid, is_fixed)
    encoder, decoder = ImageEncoder(tokenizer), CodeDecoder(tokenizer) if depth else LatentDecoder(tokenizer)
    return {
        "encoder": Half(encoder, (first, second), latents, {0: batch, **pixels}, {"input": image, "output": latent}),
        "decoder": Half(decoder, latents, images, {0: batch, **cells}, {"input": latent, "output": image}),
    }


def _describe_image(channels: int, factor: int, grid: tuple[int, int], is_fixed: bool) -> dict[str, Any]:
    sides = [grid[0] * factor, grid[1] * factor] if is_fixed else [f"{factor}*h", f"{factor}*w"]
    return {"name": "image", "dtype": "float32", "shape": ["B", channels, *sides], "range": [-1, 1], "clamped": False}


def _describe_latent(tokenizer: Tokenizer, grid: tuple[int, int], is_fixed: bool) -> dict[str, Any]:
    sides = list(grid) if is_fixed else ["h", "w"]
    bottleneck = tokenizer.bottleneck
    if bottleneck.depth:
        shape, values = ["B", *sides, bottleneck.depth], [0, bottleneck.codebook_size - 1]
        return {"name": "codes", "dtype": "int64", "shape": shape, "range": values}
    return {"name": "latent", "dtype": "float32", "shape": ["B", tokenizer.config.network.latent_channels, *sides]}


def export_half(half: Half) -> ExportedProgram:
    """Record the operators of one half as a program of torch.export, without those that its output does not need."""
    name = half.arrays["input"]["name"]
    with torch.no_grad():
        recorded = torch.export.export(half.module, half.inputs[:1], dynamic_shapes={name: dict(half.dynamic)})
    # Without a table of decompositions, this only removes what is unused: losses, entropies, numbers for the log.
    program = _drop_unused_tensors(recorded.run_decompositions({}))
    for graph in (part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule)):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # has the paths of this installation
    return program


def _drop_unused_tensors(program: ExportedProgram) -> ExportedProgram:
    """Return the program without the tensors that it does not use (a codebook's running means), and without the
    recorded input."""
    signature, graph = program.graph_signature, program.graph
    nodes = {node.name: node for node in graph.nodes}
    kept = [spec for spec in signature.input_specs if spec.target is None or nodes[spec.arg.name].users]
    for spec in signature.input_specs:
        if spec not in kept:
            graph.erase_node(nodes[spec.arg.name])
    targets = {spec.target for spec in kept}
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(kept, signature.output_specs),
        state_dict={name: tensor for name, tensor in program.state_dict.items() if name in targets},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants={name: tensor for name, tensor in program.constants.items() if name in targets},
    )


def write_exported_program(loaded: LoadedTokenizer, folder: Path) -> list[Path]:
    """Write encoder.pt2, decoder.pt2 and export.json into a folder, and return their paths.

    Each program is loaded again from its bytes and compared with the tokenizer before anything is written.

    Raises:
        StorageError: no space, or no permission.
    """

    def convert(half: Half) -> tuple[bytes, Program]:
        buffer = BytesIO()
        torch.export.save(export_half(half), buffer)
        data = buffer.getvalue()
        with warnings.catch_warnings():  # torch 2.9 warns of its own buffers
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            program: Program = torch.export.load(BytesIO(data)).module()
        return data, program

    return write_halves(loaded, folder, "exported_program", "pt2", convert)


def write_halves(
    loaded: LoadedTokenizer,
    folder: Path,
    format_name: str,
    extension: str,
    convert: Callable[[Half], tuple[bytes, Program]],
) -> list[Path]:
    """Convert both halves of a tokenizer, check them, and write them with their description.

    convert: returns the bytes of a half's file, and the program that runs from these bytes.

    Raises:
        StorageError: no space, or no permission.
    """
    files: dict[str, bytes] = {}
    description: dict[str, Any] = {
        "format": format_name,
        "tokenizer": loaded.fingerprint,
        "factor": loaded.tokenizer.config.network.factor,
        "image_size": list(loaded.tokenizer.config.image_size),
        "any_image_size": loaded.tokenizer.config.network.name_of_one_size is None,
    }
    for name, half in split_tokenizer(loaded).items():
        data, program = convert(half)
        file = f"{name}.{extension}"
        files[file] = data
        description[name] = {"file": file, **half.arrays, "agreement": check_half(half, program)}
    for file, data in files.items():
        write_file(folder / file, data)
    write_file(folder / DESCRIPTION, json.dumps(description, indent=1).encode())
    return [folder / name for name in (*files, DESCRIPTION)]


@torch.no_grad()
def check_half(half: Half, program: Program) -> dict[str, float]:
    """Compare a program with its half of the tokenizer on both inputs.

    Returns:
        `equal_codes`, the smaller share of equal codes (0..1), or `difference`, the largest absolute difference.

    Raises:
        RuntimeError: they differ by more than rounding: an error of this package or of the format's converter.
    """
    shares, differences = [], []
    for x, expected in zip(half.inputs, half.outputs, strict=True):
        got = program(x)
        if got.shape != expected.shape:
            raise RuntimeError(f"the exported program returns {tuple(got.shape)}, not {tuple(expected.shape)}")
        if expected.dtype == torch.int64:
            shares.append(float((got == expected).double().mean()))
            if shares[-1] < LEAST_EQUAL_CODES:
                raise RuntimeError(f"only {shares[-1]:.1%} of the exported program's codes are those of the tokenizer")
        else:
            differences.append(float((got - expected).abs().max()))
            if differences[-1] > LARGEST_DIFFERENCE * max(1.0, float(expected.abs().max())):
                raise RuntimeError(f"the exported program differs from the tokenizer by {differences[-1]:.2g}")
    return {"equal_codes": min(shares)} if shares else {"difference": max(differences)}
