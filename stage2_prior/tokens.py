"""The tokens of a data set: the codes and labels of its images, encoded once by the frozen tokenizer, on disk.

    tokens/train-00000-of-00002.safetensors   codes (n, views, h, w, K) int32, labels (n,) int32 of images start..stop-1

Each process encodes its own share of the images and writes it as one shard, so every image is encoded exactly once on
any number of processes. A shard's header names its provenance: tokenizer, data set and settings. Shards are reused only
if their provenance is the one of the present run.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.image_tensor import device_with_room
from stage1_tokenizer.data.open_data import OpenData, open_data
from stage1_tokenizer.data.order import BatchIndices, rank_range, split_evenly
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.checkpoint import CHECKSUM_KEY, read_tensors, write_tensors
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.launch import run_on_all
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape
from stage2_prior.prior import check_classes, read_saved_classes

Provenance = dict[str, Any]
"""The origin of tokens (tokenizer, data set and settings) as JSON values."""
PROVENANCE = "provenance"
"""Header entry of a shard that holds its provenance."""
SHARD_NAME = re.compile(r"\w+-\d{5}-of-\d{5}\.safetensors")
AT_ONCE = 128
"""Images that are read and encoded together."""


class TokenSet(NamedTuple):
    """The codes and labels of one split, N images."""

    codes: Tensor
    """(N, views, h, w, K) int32; view 0 is the plain image, the other views are augmented."""
    labels: Tensor
    """(N,) int32."""
    classes: tuple[str, ...]
    """Names of the classes in the order of their labels."""

    def batch(self, batch_indices: BatchIndices) -> tuple[Tensor, Tensor]:
        """Return codes (B, h, w, K) and labels (B,) int64 of these images; epochs use the views in turn."""
        indices, epochs = torch.from_numpy(np.stack(batch_indices)).to(self.codes.device, non_blocking=True)
        return self.codes[indices, epochs % self.codes.shape[1]].long(), self.labels[indices].long()

    def to_device(self, device: torch.device) -> "TokenSet":
        """Move the tokens to a device if it has enough free memory, so that each step moves only indices."""
        target = device_with_room(device, self.codes.nbytes)
        return TokenSet(self.codes.to(target), self.labels.to(target), self.classes)


def describe_batch(batch_indices: BatchIndices, codes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return a batch by names, as the guard saves one whose loss is not finite."""
    indices, views = map(torch.from_numpy, batch_indices)
    return {"codes": codes, "labels": labels, "indices": indices, "views": views}


def open_data_of(tokenizer: LoadedTokenizer, config: DataConfig | None) -> OpenData:
    """Open the data set of a training: `config`, or the tokenizer's own data set where that is None.

    Raises:
        ConfigError: the tokenizer has no codes, or the images have another size than it was trained on.
    """
    config = config or parse_data_config(tokenizer.data, str(tokenizer.path))
    check_data_fits(tokenizer, config)
    return open_data(config)


def load_splits(
    accelerator: Accelerator, run: Run, tokenizer: LoadedTokenizer, data: OpenData, views: int, seed: int
) -> tuple[TokenSet, TokenSet]:
    """Load the tokens of the train and the validation split, encoding them where they are not on disk.

    Both have the classes of the run: those of the prior that it has saved, or else all classes with a readable image.
    """
    splits: tuple[tuple[Split, int], ...] = (("train", views), ("validation", 1))
    tokens = [
        load_or_encode(accelerator, tokenizer, data, split, number, seed, run.folder / "tokens")
        for split, number in splits
    ]
    seen = classes_with_images(*tokens)
    if unseen := [name for name in tokens[0].classes if name not in seen]:
        run.say(f"note: no readable image of {', '.join(unseen)}; the prior does not have these classes")
        tokens = [keep_classes(part, seen) for part in tokens]
    classes = read_saved_classes(run.folder) or seen
    train_set, validation_set = (relabel(part, classes) for part in tokens)
    return train_set, validation_set


def load_or_encode(
    accelerator: Accelerator,
    tokenizer: LoadedTokenizer,
    opened: OpenData,
    split: Split,
    views: int,
    seed: int,
    folder: Path,
) -> TokenSet:
    """Load the tokens of a split from `folder`; if they are missing or have another provenance, encode and write them.

    views: versions of each image, the plain one and views - 1 augmented ones, which depend on `seed`.

    Raises:
        ConfigError: the data set does not fit the tokenizer, or has too many classes for a prior.
        BadFileError: the tokens cannot be read back after they were written.
    """
    data = opened.config
    check_data_fits(tokenizer, data)
    images = opened.splits[split]
    check_classes(images.classes)
    provenance = _provenance(tokenizer, data, split, views, seed) | {"identity": images.identity}
    accelerator.wait_for_everyone()
    tokens = _read_tokens(folder, split, provenance, accelerator.print)
    # All processes must agree before one of them deletes shards.
    readers = accelerator.reduce(torch.tensor(int(tokens is not None), device=accelerator.device), "sum")
    if tokens is not None and int(readers) == accelerator.num_processes:
        return tokens
    mine = rank_range(len(images), accelerator.process_index, accelerator.num_processes)
    image_batches = opened.image_batches(split, seed, bad_list=folder.parent / BAD_FILES, only=mine)
    check_channels(tokenizer, image_batches, data)
    accelerator.print(f"encoding {len(image_batches)} {split} images")
    if accelerator.is_main_process:
        for old in list_shards(folder, split):
            old.unlink()
    accelerator.wait_for_everyone()
    run_on_all(
        accelerator, lambda: _encode_shard(accelerator, tokenizer, image_batches, views, provenance, folder / split)
    )
    tokens = _read_tokens(folder, split, provenance, accelerator.print)
    if tokens is None:
        raise BadFileError(f"{folder}: the tokens that were just written cannot be read back; check the disk")
    return tokens


def check_data_fits(tokenizer: LoadedTokenizer, data: DataConfig) -> None:
    """Raise ConfigError unless the tokenizer has codes and was trained on images of this data set's size."""
    _ = tokenizer.tokenizer.shape  # raises ConfigError if the bottleneck is continuous
    wanted = tokenizer.tokenizer.config.image_size
    if data.image_size != wanted:
        raise ConfigError(
            f"data.image_size is {data.image_size[0]}x{data.image_size[1]}, but the tokenizer {tokenizer.path} was "
            f"trained on {wanted[0]}x{wanted[1]}; give --data.image_size {wanted[0]},{wanted[1]}"
        )


def check_channels(tokenizer: LoadedTokenizer, images: ImageBatches, data: DataConfig) -> None:
    """Raise ConfigError unless the tokenizer was trained on images with this number of channels."""
    wanted = tokenizer.tokenizer.config.image_channels
    if images.channels != wanted:
        raise ConfigError(
            f"data.kind {data.kind} has {images.channels} channels, but the tokenizer {tokenizer.path} was trained on "
            f"{wanted}; give a data set with {wanted}"
        )


def relabel(tokens: TokenSet, classes: tuple[str, ...]) -> TokenSet:
    """Return the tokens with labels that count `classes`; classes are matched by name.

    Raises:
        ConfigError: the tokens have a class that is not among `classes`, or no classes at all.
    """
    if tokens.classes == classes:
        return tokens
    if not tokens.classes:
        raise ConfigError(f"the data has no classes, but the run was begun with {', '.join(classes)}")
    unknown = [name for name in tokens.classes if name not in classes]
    if unknown:
        raise ConfigError(
            f"the data has classes that the run does not know: {', '.join(unknown)}; it knows {', '.join(classes)}"
        )
    return keep_classes(tokens, classes)


def classes_with_images(*parts: TokenSet) -> tuple[str, ...]:
    """Return the classes with at least one image in some part; a class without images cannot be learned."""
    used = {label for tokens in parts for label in tokens.labels.tolist()}
    return tuple(name for label, name in enumerate(parts[0].classes) if label in used)


def keep_classes(tokens: TokenSet, classes: tuple[str, ...]) -> TokenSet:
    """Return the tokens of the images of `classes` only, with labels that count these classes."""
    if tokens.classes == classes:
        return tokens
    new_labels = torch.tensor([classes.index(name) if name in classes else -1 for name in tokens.classes])
    labels = new_labels[tokens.labels.long()].int()
    return TokenSet(tokens.codes[labels >= 0], labels[labels >= 0], classes)


def _provenance(tokenizer: LoadedTokenizer, data: DataConfig, split: Split, views: int, seed: int) -> Provenance:
    """Return all settings that the codes depend on."""
    return {
        "kind": "tokens",
        "tokenizer": tokenizer.fingerprint,
        "shape": list(tokenizer.tokenizer.shape),
        "split": split,
        "views": views,
        "seed": seed if views > 1 else None,
        "data": remove_marked(type(data), data.tree(), Mark.FREE, Mark.PATH),
    }


@torch.inference_mode()
def _encode_shard(
    accelerator: Accelerator,
    tokenizer: LoadedTokenizer,
    images: ImageBatches,
    views: int,
    provenance: Provenance,
    stem: Path,
) -> None:
    """Encode this process's share of the images, and write it as a shard."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = np.asarray(rank_range(len(images), rank, processes), dtype=np.int64)
    h, w, depth, _ = tokenizer.tokenizer.shape
    codes, labels = [torch.empty(0, views, h, w, depth, dtype=torch.int32)], [torch.empty(0, dtype=torch.int32)]
    progress = progress_bar(len(mine) * views, "image", "encoding")
    for indices in split_evenly(mine, AT_ONCE):
        per_view = []
        for view in range(views):
            pixels, batch_labels = images.batch(indices, None if view == 0 else np.full_like(indices, view))
            per_view.append(tokenizer.tokenizer.encode_codes(normalise(pixels.to(accelerator.device))).int().cpu())
            progress.update(len(indices))
        codes.append(torch.stack(per_view, dim=1))  # (b, views, h, w, K)
        labels.append(batch_labels.int())
    progress.close()
    header = {
        PROVENANCE: json.dumps(provenance, sort_keys=True),
        "classes": json.dumps(images.classes),
        "start": str(rank_range(len(images), rank, processes).start),
        "total": str(len(images)),
    }
    path = stem.with_name(f"{stem.name}-{rank:05d}-of-{processes:05d}.safetensors")
    write_tensors(path, {"codes": torch.cat(codes).contiguous(), "labels": torch.cat(labels)}, header)


class Shard(NamedTuple):
    """The header of one file of tokens."""

    start: int
    """Index of its first image in the split."""
    n: int
    """Images in this file."""
    total: int
    """Images in the split."""
    classes: tuple[str, ...]
    provenance: Provenance

    @property
    def shape(self) -> TokenShape:
        """The shape of the codes, by the provenance."""
        return TokenShape(*map(int, self.provenance["shape"]))

    def continues(self, former: Sequence["Shard"]) -> bool:
        """Return True if this shard begins where the former ones end, and the rest of their headers is equal."""
        return self.start == sum(shard.n for shard in former) and all(shard[2:] == self[2:] for shard in former)


def list_shards(folder: Path, split: str = "*") -> list[Path]:
    """List the token files in a folder, sorted; `split` "*": of all splits."""
    return sorted(path for path in folder.glob(f"{split}-*.safetensors") if SHARD_NAME.fullmatch(path.name))


def _read_tokens(folder: Path, split: Split, provenance: Provenance, say: Callable[[str], object]) -> TokenSet | None:
    """Read the tokens of a split; None: they are missing, incomplete, damaged or of another provenance (`say` why)."""
    shards: list[Shard] = []
    parts: list[TokenSet] = []
    for path in list_shards(folder, split):
        try:
            shard, part = read_shard(path)
        except BadFileError as error:
            say(f"{error}; the tokens are made anew")
            return None
        if shard.provenance != json.loads(json.dumps(provenance)):
            say(f"{path}: was made from another tokenizer, data set or setting; the tokens are made anew")
            return None
        if not shard.continues(shards):
            say(f"{path}: does not continue the shard before it; the tokens are made anew")
            return None
        shards.append(shard)
        parts.append(part)
    if not shards or sum(shard.n for shard in shards) != shards[0].total:
        return None
    codes, labels, classes = zip(*parts, strict=True)
    return TokenSet(torch.cat(codes), torch.cat(labels), classes[0])


def read_shard(path: Path) -> tuple[Shard, TokenSet]:
    """Read a file of tokens: its header and its tokens.

    Raises:
        BadFileError: the file is damaged, or its codes or labels lie outside the range that its header gives.
    """
    tensors, header = read_tensors(path)
    if CHECKSUM_KEY not in header:
        raise BadFileError(f"{path}: has no checksum; an earlier version wrote it, or it is damaged")
    try:
        tokens = TokenSet(tensors["codes"], tensors["labels"], tuple(parse_json(header["classes"])))
        made_from: Provenance = parse_json(header[PROVENANCE])
        h, w, depth, size = map(int, made_from["shape"])
        n, views = len(tokens.labels), int(made_from["views"])
        shard = Shard(int(header["start"]), n, int(header["total"]), tokens.classes, made_from)
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        raise BadFileError(f"{path}: its header cannot be read ({shorten(error)})") from None
    for name, values, shape, limit in (
        ("codes", tokens.codes, (n, views, h, w, depth), size),
        ("labels", tokens.labels, (n,), max(1, len(tokens.classes))),
    ):
        if values.dtype != torch.int32 or values.shape != shape:
            raise BadFileError(f"{path}: its {name} are {values.dtype} {tuple(values.shape)}, not int32 {shape}")
        if (
            n and not 0 <= int(values.min()) <= int(values.max()) < limit
        ):  # a negative index would silently count from the end
            present = f"{int(values.min())}..{int(values.max())}"
            raise BadFileError(f"{path}: its {name} are {present}, but must lie in 0..{limit - 1}")
    return shard, tokens
