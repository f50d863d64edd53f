"""What the C library is asked to do with memory."""

import ctypes
from types import SimpleNamespace

import pytest

from stage1_tokenizer import processor


def test_nothing_happens_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    processor.keep_freed_memory()
