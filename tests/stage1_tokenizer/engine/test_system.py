"""The memory that a cache may use: the machine's or the container's, shared by the processes."""

from pathlib import Path

import pytest

from stage1_tokenizer.engine import system


def test_the_least_limit_of_all_groups_counts(tmp_path: Path) -> None:
    """In both versions of control groups, every group above the process may have a limit."""
    (tmp_path / "own").write_text("4:memory:/a/b\n3:cpu:/\n0::/x/y\n")
    for name, limit in [
        ("memory.max", "max"),
        ("x/memory.max", "3000"),
        ("x/y/memory.max", "max"),
        ("memory/memory.limit_in_bytes", "9223372036854771712"),
        ("memory/a/b/memory.limit_in_bytes", "2000"),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    assert sorted(system.container_limits(tmp_path / "own", tmp_path)) == [2000, 3000, 9223372036854771712]
    assert list(system.container_limits(tmp_path / "none", tmp_path)) == []


def test_processes_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes with a quarter each would use it twice; without the system call a small size is assumed."""
    monkeypatch.setattr(system, "machine_memory", lambda: 8000)
    monkeypatch.setattr(system, "container_limits", lambda: iter([6000]))
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert system.memory_per_process() == 6000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert system.memory_per_process() == 2000
    monkeypatch.undo()
    monkeypatch.delattr("os.sysconf")
    assert system.machine_memory() == system.ASSUMED_MEMORY
