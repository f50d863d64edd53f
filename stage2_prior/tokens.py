"""A data set as codes on disk, extracted once by the frozen tokenizer.

    tokens/train-00000-of-00002.safetensors   codes (n, views, h, w, K) int32, labels (n,) int32 of images start..stop-1

Each process extracts and writes the shard of its own share of the images, so every image is extracted exactly once
at any number of processes. A shard's header says what it was made from; shards are used again only if all of it is
what is wanted now.
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
from stage1_tokenizer.data import DataConfig, OpenData
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.image_batches import ImageBatches, Split, normalise
from stage1_tokenizer.data.order import Places, parts_of, share
from stage1_tokenizer.data.resident import roomy
from stage1_tokenizer.engine.checkpoint import CHECKSUM_KEY, read_tensors, write_tensors
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.launch import run_on_all
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape
from stage2_prior.prior import check_classes

Provenance = dict[str, Any]
PROVENANCE = "provenance"
"""The entry of a shard's header that says what it was made from."""
SHARD_NAME = re.compile(r"\w+-\d{5}-of-\d{5}\.safetensors")
AT_ONCE = 128
"""Images that are decoded and encoded together."""


class TokenSet(NamedTuple):
    """The codes of a split."""

    codes: Tensor
    """(N, views, h, w, K) int32; view 0 is the plain one, the others are augmented."""
    labels: Tensor
    """(N,) int32."""
    classes: tuple[str, ...]

    def batch(self, places: Places) -> tuple[Tensor, Tensor]:
        """Codes (B, h, w, K) and labels (B,), int64, at (indices, epochs); each epoch takes the next view."""
        indices, epochs = torch.from_numpy(np.stack(places)).to(self.codes.device, non_blocking=True)
        return self.codes[indices, epochs % self.codes.shape[1]].long(), self.labels[indices].long()

    def on(self, device: torch.device) -> "TokenSet":
        """The same on a device, if they leave it enough room: then only indices travel there. Else as they are."""
        where = roomy(device, self.codes.nbytes)
        return TokenSet(self.codes.to(where), self.labels.to(where), self.classes)


def load_or_extract(
    accelerator: Accelerator,
    tokenizer: LoadedTokenizer,
    opened: OpenData,
    split: Split,
    views: int,
    seed: int,
    folder: Path,
) -> TokenSet:
    """The tokens of a split: from `folder` if they are there and were made from just this, else extracted into it."""
    data = opened.config
    check_fits(tokenizer, data)
    images = opened.images(split)
    check_classes(images.classes)
    provenance = _provenance(tokenizer, data, split, views, seed) | {"identity": images.identity}
    accelerator.wait_for_everyone()
    found = _read(folder, split, provenance, accelerator.print)
    # All processes must agree before one of them starts to delete.
    if (
        int(accelerator.reduce(torch.tensor(int(found is not None), device=accelerator.device), "sum"))
        == accelerator.num_processes
    ):
        assert found is not None
        return found
    mine = share(len(images), accelerator.process_index, accelerator.num_processes)
    pictures = opened.image_batches(split, seed, bad_list=folder.parent / BAD_FILES, only=mine)
    if pictures.channels != tokenizer.tokenizer.config.image_channels:
        raise ConfigError(
            f"data.kind {data.kind} has {pictures.channels} channels, but the tokenizer {tokenizer.path} was "
            f"trained on {tokenizer.tokenizer.config.image_channels}"
        )
    accelerator.print(f"extracting the codes of {len(pictures)} {split} images")
    if accelerator.is_main_process:
        for old in shards_in(folder, split):
            old.unlink()
    accelerator.wait_for_everyone()
    run_on_all(accelerator, lambda: _extract(accelerator, tokenizer, pictures, views, provenance, folder / split))
    tokens = _read(folder, split, provenance, accelerator.print)
    if tokens is None:
        raise BadFileError(f"{folder}: the tokens that were just written cannot be read back; is the disk sound?")
    return tokens


def check_fits(tokenizer: LoadedTokenizer, data: DataConfig) -> None:
    """Raises ConfigError unless the tokenizer has codes and was trained on images of this data set's size."""
    _ = tokenizer.tokenizer.shape  # raises where the bottleneck is continuous
    wanted = tokenizer.tokenizer.config.image_size
    if data.image_size != wanted:
        raise ConfigError(
            f"data.image_size is {data.image_size[0]}x{data.image_size[1]}, but the tokenizer {tokenizer.path} was "
            f"trained on {wanted[0]}x{wanted[1]}; give --data.image_size {wanted[0]},{wanted[1]}"
        )


def relabel(tokens: TokenSet, classes: tuple[str, ...]) -> TokenSet:
    """The same tokens with the labels of another class map, matched by name.

    Raises:
        ConfigError: an image has a class that the map does not know.
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
    mapping = torch.tensor([classes.index(name) for name in tokens.classes], dtype=torch.int32)
    return TokenSet(tokens.codes, mapping[tokens.labels.long()], classes)


def seen_classes(*parts: TokenSet) -> tuple[str, ...]:
    """The classes that an image of any part is of. One whose images are all unreadable would be sampled though never
    seen."""
    used = {label for tokens in parts for label in tokens.labels.tolist()}
    return tuple(name for label, name in enumerate(parts[0].classes) if label in used)


def of_classes(tokens: TokenSet, classes: tuple[str, ...]) -> TokenSet:
    """The images of some of the classes, which are all that there are then."""
    if tokens.classes == classes:
        return tokens
    places = torch.tensor([classes.index(name) if name in classes else -1 for name in tokens.classes])
    labels = places[tokens.labels.long()].int()
    return TokenSet(tokens.codes[labels >= 0], labels[labels >= 0], classes)


def _provenance(tokenizer: LoadedTokenizer, data: DataConfig, split: Split, views: int, seed: int) -> Provenance:
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
def _extract(
    accelerator: Accelerator,
    tokenizer: LoadedTokenizer,
    pictures: ImageBatches,
    views: int,
    provenance: Provenance,
    stem: Path,
) -> None:
    """Write this process's shard."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = np.asarray(share(len(pictures), rank, processes), dtype=np.int64)
    h, w, depth, _ = tokenizer.tokenizer.shape
    codes, labels = [torch.empty(0, views, h, w, depth, dtype=torch.int32)], [torch.empty(0, dtype=torch.int32)]
    shown = progress_bar(len(mine) * views, "image", "extracting codes")
    for indices in parts_of(mine, AT_ONCE):
        per_view = []
        for view in range(views):
            pixels, batch_labels = pictures.batch(indices, None if view == 0 else np.full_like(indices, view))
            per_view.append(tokenizer.tokenizer.encode_codes(normalise(pixels.to(accelerator.device))).int().cpu())
            shown.update(len(indices))
        codes.append(torch.stack(per_view, dim=1))  # (b, views, h, w, K)
        labels.append(batch_labels.int())
    shown.close()
    header = {
        PROVENANCE: json.dumps(provenance, sort_keys=True),
        "classes": json.dumps(pictures.classes),
        "start": str(share(len(pictures), rank, processes).start),
        "total": str(len(pictures)),
    }
    path = stem.with_name(f"{stem.name}-{rank:05d}-of-{processes:05d}.safetensors")
    write_tensors(path, {"codes": torch.cat(codes).contiguous(), "labels": torch.cat(labels)}, header)


class Shard(NamedTuple):
    """What a file of tokens says of its content."""

    start: int
    """Number of its first image among those of the split."""
    n: int
    total: int
    """Images of the split."""
    classes: tuple[str, ...]
    provenance: Provenance

    @property
    def shape(self) -> TokenShape:
        return TokenShape(*map(int, self.provenance["shape"]))

    def continues(self, former: Sequence["Shard"]) -> bool:
        """True if these are the shards before it: their images end where its begin, and all else is the same."""
        return self.start == sum(shard.n for shard in former) and all(shard[2:] == self[2:] for shard in former)


def shards_in(folder: Path, split: str = "*") -> list[Path]:
    """The files of tokens in a folder, those of a split in their order."""
    return sorted(path for path in folder.glob(f"{split}-*.safetensors") if SHARD_NAME.fullmatch(path.name))


def _read(folder: Path, split: Split, provenance: Provenance, say: Callable[[str], object]) -> TokenSet | None:
    """The tokens in a folder, or None where there are none, or not all, or damaged ones, or of another provenance."""
    shards: list[Shard] = []
    parts: list[TokenSet] = []
    for path in shards_in(folder, split):
        try:
            shard, part = read_shard(path)
        except BadFileError as error:
            say(f"{error}; it is made anew")
            return None
        if shard.provenance != json.loads(json.dumps(provenance)):
            say(f"{path}: was made from another tokenizer, data set or setting; it is made anew")
            return None
        if not shard.continues(shards):
            say(f"{path}: does not continue the shard before it; all are made anew")
            return None
        shards.append(shard)
        parts.append(part)
    if not shards or sum(shard.n for shard in shards) != shards[0].total:
        return None
    codes, labels, classes = zip(*parts, strict=True)
    return TokenSet(torch.cat(codes), torch.cat(labels), classes[0])


def read_shard(path: Path) -> tuple[Shard, TokenSet]:
    """A file of tokens: what its header says, and the tokens.

    Raises:
        BadFileError: it is damaged, or holds what its header does not allow.
    """
    tensors, header = read_tensors(path)
    if CHECKSUM_KEY not in header:
        raise BadFileError(f"{path}: has no checksum, as an earlier version wrote it or as damage leaves it")
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
        if n and not 0 <= int(values.min()) <= int(values.max()) < limit:  # indexing would wrap a negative one silently
            found = f"{int(values.min())}..{int(values.max())}"
            raise BadFileError(f"{path}: its {name} are {found}, but must lie in 0..{limit - 1}")
    return shard, tokens
