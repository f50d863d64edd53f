"""Headers of foreign weights files: they build exactly these weights and nothing more."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.dictionary import DictionaryConfig
from stage1_tokenizer.bottlenecks.fsq import FsqConfig
from stage1_tokenizer.bottlenecks.grouped_rvq import GroupedRvqConfig
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.lfq import LfqConfig
from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.bottlenecks.simvq import SimVqConfig
from stage1_tokenizer.bottlenecks.vq_library import VqLibraryConfig
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, fingerprint
from stage2_prior.prior import PRIOR_FILE, load_prior
from tests.helpers.artefacts import CODES, write_prior, write_tokenizer

Edit = Callable[[dict[str, Any]], None]


def edit(path: Path, change: Edit, entry: str = "config") -> None:
    """Change the JSON of a header's entry; the file becomes one of format 1, which has no checksum."""
    with safe_open(path, framework="pt") as file:
        header = {name: text for name, text in file.metadata().items() if name != "sha256"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    tree = json.loads(header[entry])
    change(tree)
    save_file(tensors, path, {**header, entry: json.dumps(tree), "format": "1"})


def put(dotted: str, value: Any) -> Edit:
    """Set a dotted key."""

    def change(tree: dict[str, Any]) -> None:
        *parents, leaf = dotted.split(".")
        for parent in parents:
            tree = tree[parent]
        tree[leaf] = value

    return change


@pytest.fixture
def bounded() -> Iterator[None]:
    """Limit a block to 256 MB of further address space and three seconds."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    began = time.monotonic()
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.monotonic() - began < 3


TOKENIZER_HEADERS: dict[str, tuple[Edit, str]] = {
    "wider than any machine": (put("network.channels", 10**9), "network.channels.*65536.*1000000000"),
    "wider than the file": (put("network.channels", 65_536), "does not fit the model: .*should be .65536"),
    "wider than a number": (put("network.channels", 10**400), "network.channels"),
    "many blocks": (put("network.blocks", 10**9), "network.blocks.*32"),
    "blocks": (put("network.blocks", 32), "does not fit the model: missing encoder"),
    "codes": (put("bottleneck.codebook_size", 2**24), "does not fit.*should be .16777216"),
    "image size": (put("image_size", [10**9, 8]), "image_size.*65536"),
    "odd image size": (put("image_size", [9, 8]), "not divisible"),
    "a number as text": (put("network.channels", "many"), "network.channels.*integer"),
    "another kind": (put("network", {"kind": "mlp"}), "divisible by the tokenizer's factor 7|does not fit"),
    "overflow": (
        put("network", {"kind": "vqgan", "channels": 65_536, "multipliers": [65_536, 1, 1]}),
        "cannot be built: .*overflow",
    ),
    "not finite": (put("bottleneck.beta", float("nan")), "NaN is not a number"),
    "an unknown key": (put("network.speed", 1), "network.speed.*no such key"),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", TOKENIZER_HEADERS)
def test_a_tokenizers_header_builds_no_more_than_the_file_has(name: str, tmp_path: Path) -> None:
    """A small header that asks for terabytes, or for an endless loop, is refused."""
    change, message = TOKENIZER_HEADERS[name]
    write_tokenizer(tmp_path)
    edit(tmp_path / TOKENIZER_FILE, change)
    with pytest.raises(BadFileError, match=rf"(?s){TOKENIZER_FILE}: .*{message}") as caught:
        LoadedTokenizer.load(tmp_path)
    assert len(str(caught.value)) < 1500


PRIOR_HEADERS: dict[str, tuple[Edit, str]] = {
    "layers": (put("prior.layers", 10**9), "prior.layers.*512"),
    "width": (put("prior.width", 65_536), "does not fit the model: .*65536"),
    "heads": (put("prior.heads", 7), "multiple of 4 times heads"),
    "codebook of another size": (put("shape", [2, 3, 1, 17]), r"h, w, K, V = 2, 3, 1, 17, but .* 2, 3, 1, 16"),
    "grid": (put("shape", [10**9, 10**9, 1, 16]), "h, w, K, V = 1000000000"),
    "negative": (put("shape", [2, 3, -1, 16]), "K, V = 2, 3, -1"),
    "classes": (put("classes", ["x"] * 50_000), "more than 50,000|classes.*40000"),
    "one class more": (put("classes", ["a", "b", "c"]), "start.weight is .3, 24., should be .4, 24."),
    "classes of another type": (put("classes", {"a": 1}), "classes"),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", PRIOR_HEADERS)
def test_a_priors_header_fits_its_weights_and_its_tokenizer(name: str, tmp_path: Path) -> None:
    """Grid and codebook are those of the tokenizer; else codes would be decoded that it does not have."""
    change, message = PRIOR_HEADERS[name]
    write_prior(tmp_path)
    edit(tmp_path / PRIOR_FILE, change)
    with pytest.raises(BadFileError, match=rf"(?s){PRIOR_FILE}: .*{message}") as caught:
        load_prior(tmp_path)
    assert len(str(caught.value)) < 1500


def test_a_prior_over_the_codes_of_no_codes(tmp_path: Path) -> None:
    """A continuous tokenizer has no grid of codes; a forged header is a bad file, not wrong usage."""
    write_prior(tmp_path)
    continuous = write_tokenizer(tmp_path, bottleneck=NoBottleneckConfig())
    edit(tmp_path / PRIOR_FILE, put("tokenizer", continuous.fingerprint))
    with pytest.raises(BadFileError, match=f"{PRIOR_FILE}: is a prior over codes, but the tokenizer .* has no codes"):
        load_prior(tmp_path)


@pytest.mark.parametrize("step", ["many", "-1", "1e3", "9" * 5000, "", "\u0663"])
def test_a_step_that_is_no_number_is_refused(step: str, tmp_path: Path) -> None:
    """int() fails for some of these and reads others."""
    write_tokenizer(tmp_path)
    change_entry(tmp_path / TOKENIZER_FILE, step=step)
    with pytest.raises(BadFileError, match=f"{TOKENIZER_FILE}: its header says step"):
        LoadedTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "{}" + " " * 4_000_000, "null", "[1", ""]
)
@pytest.mark.parametrize("entry", ["config", "data"])
def test_json_that_is_no_config_is_refused(entry: str, text: str, tmp_path: Path) -> None:
    """Python's reader overflows its stack, and its error about long numbers is not a JSON error."""
    write_tokenizer(tmp_path)
    change_entry(tmp_path / TOKENIZER_FILE, **{entry: text})
    with pytest.raises(BadFileError, match=f"{TOKENIZER_FILE}: its header"):
        LoadedTokenizer.load(tmp_path)


def change_entry(path: Path, **entries: str) -> None:
    """Set entries of a header to these texts."""
    with safe_open(path, framework="pt") as file:
        header = {name: text for name, text in file.metadata().items() if name != "sha256"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, {**header, **entries, "format": "1"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_numbers_of_another_format_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """A silent conversion would give the fingerprint of other weights."""
    write_tokenizer(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    with safe_open(path, framework="pt") as file:
        header = {name: text for name, text in file.metadata().items() if name != "sha256"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    tensors["encoder.0.bias"] = tensors["encoder.0.bias"].to(dtype)
    save_file(tensors, path, {**header, "format": "1"})
    with pytest.raises(BadFileError, match=rf"encoder\.0\.bias .*{str(dtype).removeprefix('torch.')}"):
        LoadedTokenizer.load(tmp_path)


KINDS: list[BottleneckConfig] = [
    CODES,
    VqLibraryConfig(codebook_size=8),
    RvqConfig(codebook_size=8, depth=2),
    GroupedRvqConfig(codebook_size=8),
    FsqConfig(levels=(4, 3)),
    LfqConfig(codebook_size=8),
    SimVqConfig(codebook_size=8),
    KlConfig(channels=3),
    DictionaryConfig(atoms=8, top=2),
    NoBottleneckConfig(),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda config: config.kind)
def test_every_kind_can_be_planned_without_memory(kind: BottleneckConfig, tmp_path: Path) -> None:
    """A module that reads a tensor while it is built cannot be built on the meta device, and its files never loaded;
    and a plan that drew random numbers would change those of the run."""
    made = write_tokenizer(tmp_path, bottleneck=kind)
    torch.manual_seed(5)
    with torch.device("meta"):
        type(made.tokenizer)(made.tokenizer.config)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))
    assert fingerprint(LoadedTokenizer.load(tmp_path).tokenizer) == made.fingerprint


def test_data_of_a_later_version_are_told_in_a_few_lines(tmp_path: Path) -> None:
    """A header of thousands of unknown keys gives a short message."""
    loaded = write_tokenizer(tmp_path)
    with pytest.raises(BadFileError, match=r"(?s)^f: .*data\.key0 \(of kind shapes\): there is no such key") as caught:
        parse_data_config({**loaded.data, **{f"key{number}": 1 for number in range(5000)}}, "f")
    assert len(str(caught.value)) < 1500
