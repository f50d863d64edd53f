"""Tokens on disk that cannot be used are made anew; a tokenizer and a data set that do not fit are an error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.tokens import TokenSet, load_or_encode, relabel
from tests.helpers.artefacts import edit_weights, shapes, write_tokenizer
from tests.helpers.commands import lone_accelerator


def load(folder: Path, data: DataConfig) -> TokenSet:
    """The training tokens in folder/tokens by the tokenizer in `folder`."""
    tokenizer = LoadedTokenizer.load(folder)
    return load_or_encode(lone_accelerator(), tokenizer, OpenData(data), "train", 1, 0, folder / "tokens")


def changed(name: str, value: int) -> Callable[[Path, TokenSet], None]:
    """One number of a shard's tensor is another."""

    def change(path: Path, tokens: TokenSet) -> None:
        tensor: Tensor = getattr(tokens, name).clone()
        tensor.view(-1)[-1] = value
        edit_weights(path, **{name: tensor})

    return change


DAMAGES: dict[str, Callable[[Path, TokenSet], object]] = {
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-40]),
    "cut in the header": lambda path, _: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path, _: path.write_bytes(b""),
    "text": lambda path, _: path.write_text("tokens"),
    "code V": changed("codes", 16),
    "code -1": changed("codes", -1),
}
LABELS: dict[str, Callable[[Path, TokenSet], object]] = {
    "label 5": changed("labels", 5),
    "label -1": changed("labels", -1),
}


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(damage, id=name) for name, damage in DAMAGES.items()),
        *(pytest.param(damage, id=name) for name, damage in LABELS.items()),
    ],
)
def test_damaged_tokens_are_made_anew(
    tmp_path: Path, damage: Callable[[Path, TokenSet], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 36: an id outside its range would wrap to another code or class, or end the training with an IndexError."""
    write_tokenizer(tmp_path)
    first = load(tmp_path, shapes())
    (shard,) = (tmp_path / "tokens").iterdir()
    whole = shard.read_bytes()
    damage(shard, first)
    assert shard.read_bytes() != whole
    capsys.readouterr()
    again = load(tmp_path, shapes())
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.labels, first.labels)
    said = capsys.readouterr().out
    assert str(tmp_path / "tokens") in said
    assert "made anew" in said
    load(tmp_path, shapes())
    assert not capsys.readouterr().out, "the new ones are sound"


def test_a_continuous_tokenizer_has_no_tokens(tmp_path: Path) -> None:
    """A prior models codes, so the error says that there are none and how to get a tokenizer that has some."""
    write_tokenizer(tmp_path, bottleneck=NoBottleneckConfig())
    with pytest.raises(ConfigError, match=r"'none'.*--bottleneck.kind vq"):
        load(tmp_path, shapes())
    assert not (tmp_path / "tokens").exists()


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    """A convolutional encoder would take them, and give a grid of another size without a word."""
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"is 16x8, but .* trained on 8x12; give --data.image_size 8,12"):
        load(tmp_path, shapes(image_size=(16, 8)))
    assert not (tmp_path / "tokens").exists()


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    """A grey tokenizer and coloured images: both numbers are named, instead of a raw error of a convolution."""
    write_tokenizer(tmp_path, channels=1)
    with pytest.raises(ConfigError, match=r"shapes has 3 channels.*trained on 1"):
        load(tmp_path, shapes())


def token_set(classes: tuple[str, ...], *labels: int) -> TokenSet:
    return TokenSet(torch.zeros(len(labels), 1, 2, 3, 1, dtype=torch.int32), torch.tensor(labels).int(), classes)


def test_labels_keep_their_meaning() -> None:
    """Trap 34: a folder that was reordered, or has lost a class, gives its classes other numbers; names decide."""
    known = ("ant", "bee", "cat")
    assert relabel(token_set(known, 0, 1, 2), known).labels.tolist() == [0, 1, 2]
    assert relabel(token_set(("cat", "ant", "bee"), 0, 1, 2, 2), known).labels.tolist() == [2, 0, 1, 1]
    fewer = relabel(token_set(("bee", "cat"), 0, 1), known)
    assert fewer.labels.tolist() == [1, 2]
    assert fewer.classes == known
    assert fewer.labels.dtype == torch.int32


def test_an_unknown_class_is_refused() -> None:
    """Trap 34: a new class sorts itself between the others, and has no number that the prior would know."""
    with pytest.raises(ConfigError, match=r"does not know: aardvark, dog; it knows ant, bee"):
        relabel(token_set(("aardvark", "ant", "bee", "dog"), 0), ("ant", "bee"))


def test_data_that_has_lost_its_classes_is_refused() -> None:
    """Trap 34: a image beside the class folders makes the tree one without classes; that is no label 0."""
    with pytest.raises(ConfigError, match="classes"):
        relabel(token_set((), 0, 0), ("ant", "bee"))
