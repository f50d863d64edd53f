"""Export a tokenizer as two ONNX files, which onnxruntime and other programs run without this package and torch.

encoder.onnx, decoder.onnx, export.json     the arrays are those of exported_program.py

onnxruntime.InferenceSession("encoder.onnx").run(None, {"image": image})[0]
"""

import contextlib
import importlib.util
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampling.exporting.exported_program import Half, Program, export_half, write_halves
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import LoadedTokenizer

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra `onnx`; onnxruntime runs the files to check them."""
LARGEST_FILE = 2**31 - 2**20
"""Largest size in bytes of the weights in one ONNX file: protobuf allows 2 GiB in all."""


def write_onnx(loaded: LoadedTokenizer, folder: Path) -> list[Path]:
    """Write encoder.onnx, decoder.onnx and export.json into a folder, and return their paths.

    onnxruntime runs each file, and its results are compared with the tokenizer, before anything is written.

    Raises:
        ConfigError: the extra `onnx` is not installed, or the weights are too large for an ONNX file.
        StorageError: no space, or no permission.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"--format onnx needs {', '.join(missing)}, which is not installed; "
            "type: pip install 'tessera-images[onnx]'"
        )
    size = sum(weight.nbytes for weight in loaded.tokenizer.state_dict().values())
    if size > LARGEST_FILE:
        raise ConfigError(
            f"--format onnx: {loaded.path} has {size:,} bytes of weights, and an ONNX file holds at most "
            f"{LARGEST_FILE:,}; use --format exported_program"
        )
    return write_halves(loaded, folder, "onnx", "onnx", _convert)


def _convert(half: Half) -> tuple[bytes, Program]:
    """Return the bytes of the ONNX file of a half, and the program that onnxruntime runs from them."""
    import onnxruntime  # noqa: PLC0415  # an extra

    names = half.arrays["input"]["name"], half.arrays["output"]["name"]
    # The converter prints its progress, and warns of its own future changes.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            export_half(half), dynamo=True, verbose=False, input_names=names[:1], output_names=names[1:]
        )
    assert converted is not None
    model = converted.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # has the paths of this installation
    name_sizes(model.graph, half.arrays["input"]["shape"])
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (output,) = session.run(None, {names[0]: x.contiguous().numpy()})
        return torch.from_numpy(output)

    return data, run


def name_sizes(graph: Any, shape: Sequence[int | str]) -> None:
    """Rename the sizes of an ONNX graph that may vary, from numbered symbols to those of its input's shape: B, h, w."""
    symbols = [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim]
    names = {
        symbol.rpartition("*")[2]: str(name).rpartition("*")[2] for symbol, name in zip(symbols, shape, strict=True)
    }
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), size.dim_param)
