"""The codes of a folder of images, for other programs: as arrays in Python, as one .npz file, or as .npy and .json.

    codes (N, h, w, K) int32    labels (N,) int32    names, classes    shape [h, w, K, V]    fingerprint

    from sampling.code_files import ImageCodes

    encoded = ImageCodes.encode("runs/stage1/NAME", "images/")  # encoded.codes, .labels, .names, .classes
    images = encoded.decode("runs/stage1/NAME")  # (N, H, W, C) uint8

Images are scaled and cropped to the tokenizer's size, as validation images are in training, and labels are those of a
data set of this folder. `npz["codes"]` of an .npz file, or the .npy file itself, needs nothing but NumPy.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from sampling.evaluation.npz import DAMAGED, read_array, write_arrays
from sampling.saved_images import decode_in_chunks
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.folder import FolderConfig, FolderImages, read_folder
from stage1_tokenizer.data.image_batches import crop, normalise, resize
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.files import open_atomic, write_file
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape

AT_ONCE = 64
"""Images that are encoded together."""
EXTENSIONS = (".npz", ".npy")


class ImageCodes(NamedTuple):
    """The codes of N images, and what they belong to."""

    codes: NDArray[np.int32]
    """(N, h, w, K) in 0..V-1."""
    labels: NDArray[np.int32]
    """(N,), positions in `classes`; 0 if the folder has no classes."""
    names: tuple[str, ...]
    """Path of each image below its folder, with forward slashes."""
    classes: tuple[str, ...]
    """Names of the classes in the order of their labels; empty without classes."""
    shape: TokenShape
    fingerprint: str
    """Fingerprint of the encoder and bottleneck that made the codes."""
    left_out: tuple[str, ...] = ()
    """Message for each file that could not be read; not saved."""

    @classmethod
    def encode(cls, tokenizer: LoadedTokenizer | str | Path, folder: str | Path) -> Self:
        """Encode all images in a folder and its sub-folders, in the order of their names.

        tokenizer: a loaded one, or the path of a stage-one run.

        Raises:
            ConfigError: the folder has no images, or the tokenizer has no codes.
            BadFileError: no image can be read.
        """
        loaded = tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer.load(tokenizer)
        shape, config = loaded.tokenizer.shape, _folder_config(loaded, Path(folder))
        splits = [part for part in dict.fromkeys(read_folder(config).values()) if isinstance(part, FolderImages)]
        codes, labels, names, errors = [], [], [], []
        order = sorted(
            (name, part, index) for part, images in enumerate(splits) for index, name in enumerate(images.names)
        )
        for start in show_progress(range(0, len(order), AT_ONCE), -(-len(order) // AT_ONCE), "batch", "encoding"):
            pixels = []
            for name, part, index in order[start : start + AT_ONCE]:
                try:
                    image, label = splits[part][index]
                except BadImageError as error:
                    errors.append(str(error))
                    continue
                pixels.append(crop(resize(image, config.image_size, config.resize_to), config.image_size))
                labels.append(label)
                names.append(name)
            if pixels:
                codes.append(_encode_batch(loaded, np.stack(pixels)))
        if not codes:
            raise BadFileError("\n  ".join(errors[:10]))
        labels_array = np.array(labels, dtype=np.int32)
        classes = splits[0].classes
        return cls(np.concatenate(codes), labels_array, (*names,), classes, shape, loaded.code_fingerprint, (*errors,))

    def decode(self, tokenizer: LoadedTokenizer | str | Path) -> NDArray[np.uint8]:
        """Decode the codes to images (N, H, W, C) uint8.

        Raises:
            BadFileError: the codes are those of another tokenizer.
        """
        loaded = tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer.load(tokenizer)
        if not loaded.makes_codes_of(self.fingerprint):
            raise BadFileError(
                f"the codes were made by the tokenizer {self.fingerprint}, but {loaded.path} has other codes "
                f"({loaded.code_fingerprint}); give the tokenizer that made them"
            )
        device = next(loaded.tokenizer.parameters()).device
        codes = torch.from_numpy(self.codes.astype(np.int64)).to(device)
        return decode_in_chunks(loaded.tokenizer.decode_codes, codes)

    def write(self, path: Path) -> list[Path]:
        """Write one .npz file, or a .npy file of the codes with a .json file beside it. Return their paths.

        Raises:
            ConfigError: another extension.
            StorageError: no space, or no permission.
        """
        facts: dict[str, Any] = {"shape": list(self.shape), "fingerprint": self.fingerprint}
        match path.suffix:
            case ".npz":
                texts = {"names": _texts(self.names), "classes": _texts(self.classes)}
                numbers: dict[str, NDArray[Any]] = {
                    "codes": self.codes,
                    "labels": self.labels,
                    "shape": np.array(self.shape, dtype=np.int64),
                }
                write_arrays(path, {**numbers, **texts, "fingerprint": np.array(self.fingerprint)})
                return [path]
            case ".npy":
                beside = path.with_suffix(".json")
                facts |= {"classes": self.classes, "names": self.names, "labels": self.labels.tolist()}
                with open_atomic(path) as file:
                    np.lib.format.write_array(file, self.codes)
                write_file(beside, json.dumps(facts, indent=1).encode())
                return [path, beside]
        raise ConfigError(f"--out {describe_path(path)}: codes are written as .npz or .npy")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            BadFileError: the file is damaged, or is not one of codes.
        """
        if path.suffix == ".npz":
            codes, labels = read_array(path, "codes", "iu", 4), read_array(path, "labels", "iu", 1)
            names, classes = (tuple(map(str, read_array(path, name, "U", 1))) for name in ("names", "classes"))
            shape, fingerprint = (
                read_array(path, "shape", "iu", 1).tolist(),
                str(read_array(path, "fingerprint", "U", 0)),
            )
        else:
            try:
                codes = np.asarray(np.load(path, mmap_mode="r"))
                facts = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
                labels, names, classes = np.array(facts["labels"]), tuple(facts["names"]), tuple(facts["classes"])
                shape, fingerprint = list(facts["shape"]), str(facts["fingerprint"])
            except (*DAMAGED, LookupError) as error:
                raise BadFileError(
                    f"{path}: it and its .json file cannot be read as codes ({shorten(error)})"
                ) from None
        whole = [*shape, *codes.shape, *labels.shape, len(names)]
        is_text = all(isinstance(text, str) for text in (*names, *classes))
        is_number = all(isinstance(n, int) for n in whole) and labels.dtype.kind in "iu"
        if len(shape) != 4 or codes.ndim != 4 or labels.ndim != 1 or not is_text or not (is_number or not len(labels)):
            raise BadFileError(f"{path}: its arrays do not have the shapes of codes; see sampling/code_files.py")
        h, w, depth, size = shape
        n = len(codes)
        if codes.dtype.kind not in "iu" or codes.shape[1:] != (h, w, depth) or not n == len(labels) == len(names):
            raise BadFileError(
                f"{path}: codes are {codes.dtype} {codes.shape} with {len(labels)} labels and {len(names)} names, but "
                f"the shape is {shape}"
            )
        if n and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise BadFileError(f"{path}: codes are {codes.min()}..{codes.max()}, but must lie in 0..{size - 1}")
        return cls(
            codes.astype(np.int32), labels.astype(np.int32), names, classes, TokenShape(h, w, depth, size), fingerprint
        )


def _texts(values: Iterable[str]) -> NDArray[np.str_]:
    return np.array([*values], dtype=np.str_)


def _folder_config(loaded: LoadedTokenizer, folder: Path) -> FolderConfig:
    """Return a data set of all images in a folder, read as the tokenizer's own data set if that is a folder too."""
    model = loaded.tokenizer.config
    own: dict[str, Any] = {"image_size": model.image_size, "channels": model.image_channels}
    if loaded.data.get("kind") == "folder":
        data = parse_data_config(loaded.data, str(loaded.path))
        kept = ("resize_to", "truncated", "largest_pixels", "background", "bits", "links")
        own |= {name: getattr(data, name) for name in kept}
    return FolderConfig(root=str(folder), validation_share=0.0, **own)


@torch.inference_mode()
def _encode_batch(loaded: LoadedTokenizer, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    """images (n, H, W, C) uint8 -> codes (n, h, w, K)."""
    device = next(loaded.tokenizer.parameters()).device
    x = normalise(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))
    codes: NDArray[np.int32] = loaded.tokenizer.encode_codes(x).int().cpu().numpy()
    return codes
