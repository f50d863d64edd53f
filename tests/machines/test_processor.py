"""What the C library is asked to do with memory."""

import ctypes
from types import SimpleNamespace

import pytest

from stage1_tokenizer.engine import processor


def test_nothing_happens_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    processor.keep_freed_memory()


def test_glibc_takes_what_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses in silence (a threshold above 32 MiB, say), so its answers are looked at: 1 is yes. How many faults
    that saves depends on where tensors come to lie in the heap, and is for benchmarks."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("another C library")
    answers: list[int] = []
    asked = SimpleNamespace(mallopt=lambda option, value: answers.append(libc.mallopt(option, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: asked)
    processor.keep_freed_memory()
    assert answers == [1, 1, 1]
