"""Weights named by hf:OWNER/NAME@REVISION, with the real client against a hub on this machine."""

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.hub import HubName, find_hub_name, parse_hub_name
from stage1_tokenizer.engine.model_files import output_folder
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from tests.helpers.artefacts import files_of, write_tokenizer
from tests.helpers.hub_server import FakeHub, client_of, fake_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with the tokenizer me/shapes in two commits: the first has the tag v1."""
    with fake_hub(tmp_path / "cache") as hub:
        for seed, tags in ((0, ("v1",)), (1, ())):
            write_tokenizer(tmp_path / f"run-{seed}", seed=seed)
            (tmp_path / f"run-{seed}" / "weights.pt").write_bytes(b"a pickle")
            hub.commit("me/shapes", tmp_path / f"run-{seed}", *tags)
        yield hub


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:me/cats", HubName("me", "cats")),
        ("hf:a-b/c.d_e@refs/pr/1", HubName("a-b", "c.d_e", "refs/pr/1")),
        ("hf:me/cats@v1.0", HubName("me", "cats", "v1.0")),
    ],
)
def test_names(text: str, name: HubName) -> None:
    """A name is read, and written as it was."""
    assert parse_hub_name(text, "--prior") == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text", ["hf:", "hf:cats", "hf:me/cats/x", "hf:me/../x", "hf:me/ca ts", "hf:me/cats@", "hf:-a/b"]
)
def test_names_of_another_form(text: str) -> None:
    """What is no name is refused with the form of a name."""
    with pytest.raises(ConfigError, match=r"--prior .*hf:OWNER/NAME@REVISION"):
        parse_hub_name(text, "--prior")


def test_a_revision_is_pinned_and_said(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tag, the newest commit and a commit load their own weights; what is loaded is named by its commit."""
    first, second = (LoadedTokenizer.load(tmp_path / f"run-{seed}").fingerprint for seed in (0, 1))
    tagged, newest = LoadedTokenizer.load("hf:me/shapes@v1"), LoadedTokenizer.load("hf:me/shapes")
    assert (tagged.fingerprint, newest.fingerprint) == (first, second)
    commits = [hub.revisions["me/shapes", revision] for revision in ("v1", "main")]
    assert [tagged.source, newest.source] == [f"hf:me/shapes@{commit}" for commit in commits]
    assert [str(loaded.outputs) for loaded in (tagged, newest)] == [f"runs/hub/me--shapes@{c[:12]}" for c in commits]
    said = capsys.readouterr().err
    assert f"hf:me/shapes@v1 is now hf:me/shapes@{commits[0]}" in said
    assert LoadedTokenizer.load(tagged.source).fingerprint == first
    assert capsys.readouterr().err == ""  # a commit needs no words


def test_only_safetensors_are_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    """Of a repository with a pickle in it, one file is asked for."""
    LoadedTokenizer.load("hf:me/shapes")
    assert {request.rpartition("/")[2] for request in hub.asked if "/resolve/" in request} == {TOKENIZER_FILE}
    assert not [name for name in files_of(tmp_path / "cache") if name.endswith(".pt")]


def test_a_commit_needs_no_network(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was loaded once is loaded again without a network; a branch as the cache has it, which is said."""
    source = LoadedTokenizer.load("hf:me/shapes").source
    capsys.readouterr()
    with client_of("http://127.0.0.1:9", tmp_path / "cache"):
        assert LoadedTokenizer.load(source).source == source
        assert capsys.readouterr().err == ""
        assert LoadedTokenizer.load("hf:me/shapes").source == source
        assert "the Hub cannot be reached, so the file in its cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:me/dogs", "no such repository, or it is private"),
        ("hf:me/shapes@v2", "no such revision"),
        ("hf:me/empty", f"holds no {TOKENIZER_FILE}"),
    ],
)
def test_what_the_hub_does_not_have(hub: FakeHub, tmp_path: Path, name: str, words: str) -> None:
    """One message of one line, with the option and the name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.bin").write_bytes(b"a pickle")
    hub.commit("me/empty", tmp_path / "empty")
    with pytest.raises(ConfigError) as caught:
        LoadedTokenizer.load(name)
    assert str(caught.value).startswith(f"--tokenizer {name}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One message at once; the client's own attempts are not printed."""
    with (
        client_of("http://127.0.0.1:9", tmp_path / "cache"),
        pytest.raises(ConfigError, match=r"hf:me/shapes: the Hub cannot be reached"),
    ):
        LoadedTokenizer.load("hf:me/shapes")
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_is_refused(hub: FakeHub) -> None:
    """A file of the Hub is checked as any other."""
    commit = hub.revisions["me/shapes", "main"]
    content = bytearray(hub.files["me/shapes", commit][TOKENIZER_FILE])
    content[-1] ^= 1
    hub.files["me/shapes", commit][TOKENIZER_FILE] = bytes(content)
    with pytest.raises(BadFileError, match="checksum"):
        LoadedTokenizer.load("hf:me/shapes")


def test_without_the_package(tmp_path: Path) -> None:
    """The message names the extra to install."""
    with (
        client_of("http://127.0.0.1:9", tmp_path / "cache"),
        mock.patch.dict(sys.modules, {"huggingface_hub": None}),
        pytest.raises(ConfigError, match=r"tessera-images\[hub\]"),
    ):
        LoadedTokenizer.load("hf:me/shapes")


def test_only_the_cache_is_recognised(tmp_path: Path) -> None:
    """Outputs lie beside weights of any other folder."""
    for path in (tmp_path / "run" / TOKENIZER_FILE, tmp_path / "models--a--b" / "other" / "c" / TOKENIZER_FILE):
        assert find_hub_name(path) is None
        assert output_folder(path) == path.parent
    cached = tmp_path / "models--a--b--c" / "snapshots" / "0123" / TOKENIZER_FILE
    assert find_hub_name(cached) == HubName("a", "b--c", "0123")
