"""All inputs from outside, as targets of fuzzing.py. To add one: a few lines in `targets`."""

import contextlib
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load, save
from torch import nn
from torchvision.models import alexnet

from sampling.code_files import ImageCodes
from sampling.evaluation.extractors.base import load_weights
from sampling.evaluation.npz import open_samples, read_moments
from sampling.prior_defaults import DrawConfig, read_defaults, write_defaults
from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.fsq import FsqConfig
from stage1_tokenizer.bottlenecks.grouped_rvq import GroupedRvqConfig
from stage1_tokenizer.bottlenecks.lfq import LfqConfig
from stage1_tokenizer.config.base import CommandConfig, configure, parse_command_line, read_saved_yaml
from stage1_tokenizer.data.folder.labels import read_labels
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.record import DATA_FILE, DataRecord
from stage1_tokenizer.discriminator import (
    DISCRIMINATOR_FILE,
    DiscriminatorConfig,
    PatchDiscriminator,
    check_discriminator,
    read_discriminator_config,
    save_discriminator,
)
from stage1_tokenizer.engine.checkpoint import CHECKSUM_KEY, checksum, read_tensors, write_tensors
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.foreign_files import read_foreign_file
from stage1_tokenizer.engine.log_file import read_log
from stage1_tokenizer.engine.state import MANIFEST, _checksum, find_problem, load_state, save_state
from stage1_tokenizer.import_weights.families import FAMILIES
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig, read_backbone
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.gpt.llamagen import CHECKPOINT_KEYS, LlamaGenConfig, LlamaGenSizes
from stage2_prior.import_weights import import_llamagen
from stage2_prior.prior import PRIOR_FILE, load_prior
from stage2_prior.tokens import read_shard
from tests.helpers.artefacts import CODES, write_prior, write_tokenizer
from tests.helpers.commands import ROOT, names_of
from tests.helpers.foreign import Layout, random_state
from tests.helpers.fuzzing import Target
from tests.helpers.mutations import mutate_bytes, mutate_json, mutate_safetensors, mutate_words, mutate_yaml, words_of

IMAGES = 900
"""Megabytes that reading an image may take: 64 million pixels of four bytes, and a copy."""
COMMANDS = {"stage1_tokenizer/train.py": "TrainTokenizerConfig", "stage2_prior/train.py": "TrainPriorConfig"}
WORDS = {
    "stage1_tokenizer/train.py": (
        "--steps 5 --data.kind folder --data.root x --data.image_size 16,24 --network.kind vqgan --bottleneck.kind fsq "
        "--bottleneck.levels 8,5,5 --no-data.flip --optim.lr=1e-3 --optim.betas 0.9,0.95 --out runs/x",
        "--data.palette null --network.kind mlp --network.hidden 30,30 --bottleneck.kind rvq --adversarial.weight 0.1",
    ),
    "stage2_prior/train.py": (
        "--tokenizer x --prior.kind gpt --prior.layers 2 --prior.width 64 --data.kind shapes --data.size 0.5,0.8",
        "--tokenizer x --prior.kind pixelcnn --views 2 --optim.clip 0 --data.kind mnist",
    ),
}


def targets(folder: Path) -> Iterator[Target]:
    """Yield all targets. Files that some of them need go into the folder."""
    configs: dict[str, type[CommandConfig]] = {name: names_of(name)[cls] for name, cls in COMMANDS.items()}
    for name, cls in configs.items():
        stage = name[:6]
        presets = [path.read_bytes() for path in sorted((ROOT / "configs" / stage).glob("*.yaml"))]
        yield Target(f"config-{stage}", presets, yaml_reader(cls), ".yaml", (mutate_yaml,))
        words = [line.replace(" ", "\0").encode() for line in WORDS[name]]
        yield Target(f"command-line-{stage}", words, words_reader(cls), mutations=(mutate_words,))
    saved = [yaml.safe_dump(configure(cls, dict(required(cls))).tree()).encode() for cls in configs.values()]
    table = b"file,label\n1.png,cat\n2.png,dog\n"
    lines = b'{"file_name": "1.png", "label": "cat"}\n{"file_name": "2", "label": 3}\n'
    yield Target("labels", [table, lines], read_table, ".csv", (mutate_json,))
    record = DataRecord(["2 images", "1 to train on, 1 to validate on"], {"train": "1", "validation": "2"}, ["cat"])
    yield Target("data-record", [json.dumps(record._asdict()).encode()], read_record, ".json", (mutate_json,))
    yield Target("run-config", saved, read_saved_yaml, ".yaml", (mutate_yaml,))

    write_tokenizer(folder / "vq")
    grouped = GroupedRvqConfig(codebook_size=8, kmeans_init=False)
    kinds: dict[str, BottleneckConfig] = {"fsq": FsqConfig(levels=(4, 4)), "lfq": LfqConfig(codebook_size=16)}
    kinds["grouped"] = grouped
    for name, bottleneck in kinds.items():
        write_tokenizer(folder / name, bottleneck=bottleneck)
    tokenizers = [(folder / name / TOKENIZER_FILE).read_bytes() for name in ("vq", *kinds)]
    header = (mutate_safetensors,)
    yield Target("tokenizer", tokenizers, LoadedTokenizer.load, ".safetensors", header)
    for name, kind, bottleneck in (("gpt", "gpt", CODES), ("pixelcnn", "pixelcnn", CODES), ("depth", "gpt", grouped)):
        beside = folder / f"prior-{name}"
        write_prior(beside, kind=kind, tokenizer={"bottleneck": bottleneck})
        write_defaults(beside / PRIOR_FILE, DrawConfig(temperature=0.9, top_k=9, temperature_end=0.5))
        prior = (beside / PRIOR_FILE).read_bytes()
        yield Target(f"prior-{name}", [prior], prior_reader(beside), ".safetensors", header)
    yield discriminator_target(folder / "discriminator")
    yield backbone_target()
    yield from foreign_targets()
    yield extractor_target()
    yield from npz_targets()
    yield from run_targets(folder)
    yield from image_targets()


def discriminator_target(folder: Path) -> Target:
    """Return the target of the discriminator beside a tokenizer, which --init_from reads."""

    def read(path: Path) -> None:
        (folder / DISCRIMINATOR_FILE).write_bytes(path.read_bytes())
        config = read_discriminator_config(folder)
        assert config is not None
        check_discriminator(folder, config, 3)

    folder.mkdir(exist_ok=True)
    save_discriminator(folder, PatchDiscriminator(DiscriminatorConfig(channels=4, layers=1), 3), 5)
    good = (folder / DISCRIMINATOR_FILE).read_bytes()
    return Target("discriminator", [good], read, ".safetensors", (mutate_safetensors,))


def yaml_reader(cls: type[CommandConfig]) -> Callable[[Path], object]:
    """Return a function that reads a config file."""
    return lambda path: configure(cls, {"config": str(path), **required(cls)})


def required(cls: type[CommandConfig]) -> dict[str, str]:
    """Return the options without a default."""
    return {"tokenizer": "x"} if cls.model_fields.get("tokenizer") else {}


def words_reader(cls: type[CommandConfig]) -> Callable[[Path], object]:
    """Return a function that reads a command line."""

    def read(path: Path) -> None:
        try:
            parse_command_line(cls, words_of(path))
        except SystemExit as end:  # after -h
            if end.code:
                raise

    return read


def prior_reader(beside: Path) -> Callable[[Path], object]:
    """Return a function that reads a file as a prior, whose tokenizer is in the folder `beside`."""

    def read(path: Path) -> None:
        (beside / PRIOR_FILE).write_bytes(path.read_bytes())
        load_prior(beside)
        read_defaults(beside / PRIOR_FILE)

    return read


def read_table(path: Path) -> object:
    """Read a table of labels of two images."""
    return read_labels(path, None, ["1.png", "a/2.png"], path.parent)


def read_record(path: Path) -> object:
    """Read the record in a run's folder. Raises BadFileError: there is none."""
    path.replace(path.with_name(DATA_FILE))
    record = DataRecord.saved_in(path.parent)
    if record is None:
        raise BadFileError("no record")
    return record


def run_targets(folder: Path) -> Iterator[Target]:
    """Yield the files of a run's own folder. A checksum is renewed, because a stranger's file has a correct one."""
    state = save_state(folder / "states", 12, {"model": nn.Linear(3, 2)}, {"scaler": {"scale": 2.0}})

    def read_state(path: Path) -> None:
        (state / MANIFEST).write_bytes(path.read_bytes())
        if problem := find_problem(state):
            raise BadFileError(problem)
        load_state(state, {"model": nn.Linear(3, 2)})

    def signed_manifest(rng: random.Random, data: bytes) -> bytes:
        changed = mutate_json(rng, data)
        with contextlib.suppress(Exception):
            tree = json.loads(changed)
            tree["sha256"] = _checksum(tree)
            changed = json.dumps(tree).encode()
        return changed

    yield Target("state", [(state / MANIFEST).read_bytes()], read_state, ".json", (signed_manifest, mutate_json))

    provenance = {"shape": [2, 3, 1, 16], "views": 1}
    codes, labels = torch.randint(16, (5, 1, 2, 3, 1), dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    header = {"provenance": json.dumps(provenance, sort_keys=True), "classes": json.dumps([*"abcde"]), "start": "0"}
    shard = folder / "train-00000-of-00001.safetensors"
    write_tensors(shard, {"codes": codes, "labels": labels}, {**header, "total": "5"})
    signed = (signed_safetensors, mutate_safetensors)
    yield Target("tokens", [shard.read_bytes()], read_shard, ".safetensors", signed)

    log = b"".join(json.dumps({"step": step, "train/total": 1.5}).encode() + b"\n" for step in (20, 40))
    yield Target("log", [log], check_log, ".jsonl", (mutate_json,))


def check_log(path: Path) -> None:
    """Read a log. Raises BadFileError: entries are left out, which counts as refused."""
    if len(read_log(path)) < 2:
        raise BadFileError("lines are left out")


def signed_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Mutate a file, and renew its checksum if the file can still be read."""
    changed = mutate_safetensors(rng, data)
    with contextlib.suppress(Exception):
        length = int.from_bytes(changed[:8], "little")
        tree = json.loads(changed[8 : 8 + length])
        tree["__metadata__"].pop(CHECKSUM_KEY, None)
        tree["__metadata__"][CHECKSUM_KEY] = checksum(load(changed), tree["__metadata__"])
        text = json.dumps(tree).encode()
        changed = len(text).to_bytes(8, "little") + text + changed[8 + length :]
    return changed


def backbone_target() -> Target:
    """Return the target perceptual.weights: AlexNet in half precision, loaded into a metric that is built once."""
    layers: Any = alexnet(weights=None).features
    tensors = {f"features.{name}": tensor.half() for name, tensor in layers.state_dict().items()}
    good = save(tensors, {"from": "torchvision"})
    built: list[Perceptual] = []

    def read(path: Path) -> None:
        if not built:
            path.with_name("good.safetensors").write_bytes(good)
            weights = str(path.with_name("good.safetensors"))
            built.append(Perceptual(PerceptualConfig(weight=1.0, net="alex", weights=weights), (64, 64)))
        built[0]._load_backbone(read_backbone(str(path)), str(path))

    return Target("backbone", [good], read, ".safetensors", (mutate_safetensors,))


def foreign_targets() -> Iterator[Target]:
    """Yield checkpoints of other projects, in torch's two formats: read whole, and imported as a tokenizer."""
    state = random_state(Layout(widths=(32,), attention=(), latent=2, dim=2, size=4))
    for name, zipped in (("foreign-zip", True), ("foreign-legacy", False)):
        file = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
        yield Target(name, [file.getvalue()], read_foreign, ".ckpt", (mutate_member,) if zipped else ())
    shapes = LlamaGenSizes(layers=1, width=16, inner=8, codebook_size=4, labels=3).shapes()
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    yield Target("foreign-gpt", [save(tensors)], read_foreign_gpt, ".safetensors", (mutate_safetensors,))


def read_foreign(path: Path) -> None:
    """Read a checkpoint of taming-transformers, and build our tokenizer from it."""
    state = read_foreign_file(path).read_state_dict(("state_dict",))
    FAMILIES["taming_vqgan"](None, "").convert(state, 32, str(path))


def read_foreign_gpt(path: Path) -> None:
    """Read a checkpoint of LlamaGen, and make weights of our prior from it."""
    tensors = read_foreign_file(path).read_state_dict(CHECKPOINT_KEYS)
    import_llamagen(tensors, LlamaGenConfig(n_head=2), str(path))


def extractor_target() -> Target:
    """Return the target extractor.weights: those of a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))

    def read(path: Path) -> None:
        load_weights(network, read_tensors(path, "extractor.weights")[0], str(path))

    return Target("extractor", [save(network.state_dict())], read, ".safetensors", (mutate_safetensors,))


def npz_targets() -> Iterator[Target]:
    """Yield .npz files of samples and moments, stored and compressed."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    arrays: dict[str, dict[str, Any]] = {"samples": {"arr_0": images}}
    arrays["moments"] = {"mu": np.arange(3.0), "sigma": np.eye(3), "arr_0": images}
    readers: dict[str, Callable[[Path], object]] = {"samples": lambda path: [*open_samples(path).batches(2)]}
    readers["moments"] = read_moments
    arrays["codes"] = {"codes": np.zeros((2, 1, 2, 1), np.int32), "labels": np.zeros(2, np.int32)}
    arrays["codes"] |= {"names": np.array(["a", "b"]), "classes": np.array(["c"]), "shape": np.array([1, 2, 1, 8])}
    arrays["codes"] |= {"fingerprint": np.array("f" * 32)}
    readers["codes"] = ImageCodes.read
    for name, reader in readers.items():
        seeds = []
        for save_npz in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            save_npz(file, **arrays[name])
            seeds.append(file.getvalue())
        yield Target(f"{name}-npz", seeds, reader, ".npz", (mutate_member,))


def mutate_member(rng: random.Random, data: bytes) -> bytes:
    """Mutate one array in an archive, and write the archive again; data that is not an archive stays."""
    written = io.BytesIO()
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        chosen = rng.choice(archive.namelist())
        with zipfile.ZipFile(written, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as changed:
            for name in archive.namelist():
                content = archive.read(name)
                changed.writestr(name, mutate_bytes(rng, content) if name == chosen else content)
        return written.getvalue()
    return data


def image_targets() -> Iterator[Target]:
    """Yield a target for each image format."""
    noise = torch.randint(0, 256, (24, 32, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    colour = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = {
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "GIF": ("P", "L"),
        "TIFF": ("RGB", "RGBA", "L", "1", "CMYK", "I;16"),
        "WEBP": ("RGB", "RGBA"),
        "BMP": ("RGB", "L", "1"),
        "PPM": ("RGB", "L", "1"),
        "AVIF": ("RGB", "RGBA"),
        "JPEG2000": ("RGB", "RGBA", "L"),
        "TGA": ("RGB", "RGBA", "L", "P"),
        "PCX": ("RGB", "L", "P"),
        "ICO": ("RGBA",),
        "ICNS": ("RGBA",),
        "SGI": ("RGB", "L"),
        "DDS": ("RGBA", "RGB"),
        "QOI": ("RGB", "RGBA"),
        "XBM": ("1",),
        "DIB": ("RGB",),
    }
    for name, kinds in modes.items():
        seeds = []
        for mode in kinds:
            image = colour.convert("L").convert(mode) if mode == "I;16" else colour.convert("RGBA").convert(mode)
            options: list[dict[str, Any]] = [{}, {"exif": exif}] if name in ("PNG", "JPEG", "WEBP", "TIFF") else [{}]
            options += [{"save_all": True, "append_images": [image]}] if name in ("GIF", "TIFF", "WEBP", "PNG") else []
            options += [{"compression": kind} for kind in ("tiff_lzw", "packbits", "tiff_deflate")] * (name == "TIFF")
            options += [{"progressive": True}] if name == "JPEG" else []
            for option in options:
                file = io.BytesIO()
                image.save(file, name, **option)
                seeds.append(file.getvalue())
        yield Target(f"picture-{name.lower()}", seeds, lambda path: read_image(path, 3), f".{name.lower()}", (), IMAGES)
