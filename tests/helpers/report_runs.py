"""Run folders for the tests of the report, written without a training; and a parser of the page."""

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from stage1_tokenizer.config.base import write_yaml
from stage1_tokenizer.diagnostics.report.markup import VOID
from tests.helpers.artefacts import shapes, write_prior, write_tokenizer

LOG = [
    {"step": 10, "train/total": 0.9, "train/l1": 0.5, "train/nmse": 1.1, "train/lr": 1e-3},
    {"step": 20, "train/total": 0.4, "train/l1": 0.3, "train/nmse": 0.6, "train/lr": 1e-3, "train/skipped": 2.0},
    {"step": 20, "validation/psnr": 21.5, "validation/nmse": 0.0723, "validation/code_usage": 0.9375,
     "validation/code_perplexity": 11.25, "validation/bits_per_image": 24.0},
    {"step": 30, "train/total": 0.5, "train/l1": 0.35, "train/nmse": 0.65, "train/images_per_second": 123.4},
    {"step": 30, "validation/psnr": 20.25, "validation/nmse": 0.0911, "validation/code_usage": 0.875,
     "validation/code_perplexity": 10.5, "validation/bits_per_image": 24.0},
]  # fmt: skip
PRIOR_LOG = [
    {"step": 5, "train/bits_per_token": 3.9, "train/lr": 1e-3, "train/gradient_norm": 0.5},
    {"step": 10, "validation/bits_per_token": 2.5, "validation/unigram_bits_per_token": 3.75,
     "validation/bigram_bits_per_token": 3.125, "validation/code_bits_per_dim": 0.052},
]  # fmt: skip
ALARM = {"step": 20, "alarm": "dead codes", "message": "half of them are not used: lower bottleneck.codebook_size"}


def config(**changed: Any) -> dict[str, Any]:
    """Return the content of config.yaml of a tokenizer's run."""
    data = shapes().tree()
    return {
        "config": None, "seed": 0, "steps": 30, "batch_size": 8, "data": data,
        "network": {"kind": "sonnet", "factor": 4}, "bottleneck": {"kind": "vq", "codebook_size": 16},
        "optim": {"lr": 0.001}, "pictures": 4, **changed,
    }  # fmt: skip


def write_log(folder: Path, entries: list[dict[str, Any]], name: str = "metrics.jsonl") -> None:
    """Write a log, one line of JSON per entry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def tokenizer_run(folder: Path, entries: list[dict[str, Any]] = LOG, **options: Any) -> Path:
    """Write a finished run of a tokenizer; `options` are those of `write_tokenizer`."""
    loaded = write_tokenizer(folder, **options)
    write_yaml(folder / "config.yaml", config(data=loaded.data))
    write_log(folder, entries)
    write_log(folder, [ALARM], "alarms.jsonl")
    (folder / "samples").mkdir()
    save_image(torch.rand(3, 20, 40), folder / "samples/reconstructions-00000020.png")
    return folder


def prior_run(folder: Path, **options: Any) -> Path:
    """Write a finished run of a prior, with generated samples."""
    write_prior(folder, **options)
    tree = {"config": None, "tokenizer": "0" * 32, "steps": 10, "batch_size": 8, "data": None,
            "prior": {"kind": "gpt", "layers": 2, "width": 24}, "optim": {"lr": 0.001}, "samples": 4}  # fmt: skip
    write_yaml(folder / "config.yaml", tree)
    write_log(folder, PRIOR_LOG)
    for step in (5, 10):
        (folder / "samples").mkdir(exist_ok=True)
        save_image(torch.rand(3, 20, 40), folder / f"samples/samples-{step:08d}.png")
    outputs(folder, "generated", {"n": 2, "class": "cat", "temperature": 0.75, "finished": True})
    return folder


def outputs(run: Path, kind: str, settings: Mapping[str, Any], number: str = "001") -> Path:
    """Write a numbered folder of images in a run's folder."""
    folder = run / kind / number
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    for name in ("000000", "000001", "grid"):
        save_image(torch.rand(3, 8, 12), folder / f"{name}.png")
    return folder


class Page(HTMLParser):
    """A parsed page. Raises AssertionError: an element is not closed, or closed but not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.terms: dict[str, list[str]] = {}
        """Texts of <dd> after each <dt>."""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and tag not in ("path", "rect"):
            self.open.append(tag)
        if tag == "dt":
            self._term = ""
        elif tag == "dd":
            self.terms.setdefault(self._term, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.words.append(data)
        if "dt" in self.open:
            self._term += data
        elif "dd" in self.open:
            self.terms[self._term][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
