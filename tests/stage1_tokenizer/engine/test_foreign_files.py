"""The reader of foreign checkpoints: equal to torch.load on honest files; hostile files run nothing, and stay small."""

import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stage1_tokenizer.engine import foreign_files
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.foreign_files import Interpreter, Stub, read_foreign_file

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def honest() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    weights: OrderedDict[str, Any] = OrderedDict((str(dtype), torch.tensor([1, 0, 1]).to(dtype)) for dtype in DTYPES)
    weights |= {"base": base, "view": base[1:3, ::2], "transposed": base.T, "scalar": torch.tensor(3.0)}
    weights |= {"parameter": nn.Parameter(torch.randn(2, 3)), "empty": torch.zeros(0, 3)}
    weights |= {"same": weights["base"]}
    return {
        "epoch": 3, "pytorch-lightning_version": "1.0.8", "state_dict": weights,
        "lr_schedulers": [{"base": (1.0, None)}],
        "hyper_parameters": {"long": 2**70, "set": {1, 2}, "yes": True, "bytes": b"\x00\xff"},
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_equal_to_torch(tmp_path: Path, zipped: bool, protocol: int) -> None:
    """Each tensor of each number format, view and parameter is bit-equal to torch's; plain values are equal."""
    path, content = tmp_path / "last.ckpt", honest()
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    file = read_foreign_file(path)
    tensors = file.read_state_dict(("state_dict",))
    expected = torch.load(path, weights_only=False)["state_dict"]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    rest = {key: value for key, value in file.content.items() if key not in ("state_dict", "hyper_parameters")}
    assert rest == {key: content[key] for key in rest}
    assert file.content["hyper_parameters"]["long"] == 2**70
    assert file.read_state_dict(("model", "state_dict"), ("ba", "vi")).keys() == {"base", "view"}


def test_safetensors_and_plain_state_dict(tmp_path: Path) -> None:
    """Weights may lie at the top of the file, and the file may be safetensors."""
    weights = {"a": torch.randn(2), "b": torch.randn(3)}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        found = read_foreign_file(tmp_path / name).read_state_dict(("state_dict",))
        assert all(torch.equal(found[key], weights[key]) for key in weights)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


class WithState(Call):
    """The call is made while the state of another object is set."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), Call(*self.call), iter([Call(*self.call)]), iter([(Call(*self.call), 1)])


def bombs(canary: Path) -> dict[str, Any]:
    run = (os.mkdir, str(canary))
    return {
        "call": Call(*run),
        "eval": Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
        "call in a state": WithState(*run),
        "call as a key": {(1, Call(*run)): 1},
        "call as a shape": Call(torch._utils._rebuild_tensor_v2, Call(*run), 0, (1,), (1,), False, OrderedDict()),
        "callbacks of Lightning": {"callbacks": {"ModelCheckpoint": Call(*run)}, "optimizer_states": [Call(*run)]},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", bombs(Path()))
def test_code_never_runs(tmp_path: Path, name: str, zipped: bool) -> None:
    """The weights beside a hostile object are read, and its code does not run; an unpickler runs it."""
    canary, path = tmp_path / "canary", tmp_path / "last.ckpt"
    weights = {"w": torch.randn(3)}
    torch.save({"bad": bombs(canary)[name], "state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_foreign_file(path).read_state_dict(("state_dict",))["w"], weights["w"])
    assert not canary.exists()
    with suppress(TypeError, AttributeError, RuntimeError, OSError):  # after the first call
        torch.load(path, weights_only=False)
    assert canary.exists(), "the bait works"


def test_opcodes_by_hand(tmp_path: Path) -> None:
    """Old opcodes that call (INST, OBJ, NEWOBJ) leave a stub; those that look up a registry are refused."""
    for code in (b"(S'x'\nios\nmkdir\n.", b"(cos\nmkdir\nS'x'\no.", b"cos\nmkdir\n(S'x'\nt\x81."):
        made = Interpreter().run(BytesIO(code))
        assert isinstance(made, Stub)
        assert made.name == "os.mkdir"
    with pytest.raises(Exception, match="EXT1"):
        Interpreter().run(BytesIO(b"\x80\x02\x82\x01."))


def rewrite(path: Path, change: Callable[[str, bytes], tuple[bytes, int] | None]) -> None:
    """Write a zip again with the records that `change` returns: their bytes and compression; None: left out."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items():
            if (changed := change(name, data)) is not None:
                new.writestr(zipfile.ZipInfo(name), changed[0], changed[1])


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
REFUSED: dict[str, tuple[Callable[[str, bytes], tuple[bytes, int] | None], str]] = {
    "zip bomb": (lambda name, data: (bytes(10**8) if "/data/" in name else data, DEFLATED), "compressed.*zip bomb"),
    "no pickle": (lambda name, data: None if "pkl" in name else (data, STORED), "no data.pkl"),
    "missing tensor": (lambda name, data: None if name.endswith("/0") else (data, STORED), "is damaged: record 0"),
    "short tensor": (lambda name, data: (data[:-1] if name.endswith("/0") else data, STORED), "storage 0 has 399"),
    "long tensor": (lambda name, data: (data * 2 if name.endswith("/0") else data, STORED), "storage 0 has 800"),
    "huge pickle": (lambda name, data: (bytes(9 * 2**20) if "pkl" in name else data, STORED), "more than 8,388,608"),
    "cut pickle": (lambda name, data: (data[:-30] if "pkl" in name else data, STORED), "is damaged"),
    "other order": (lambda name, data: (b"big" if "byteorder" in name else data, STORED), "byte order"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_zip_is_refused(tmp_path: Path, name: str) -> None:
    """Each gives one message that says what is wrong."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"w": torch.randn(100)}}, path)
    change, message = REFUSED[name]
    rewrite(path, change)
    with pytest.raises(BadFileError, match=f"a.pt: .*{message}"):
        read_foreign_file(path).read_state_dict(("state_dict",))


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    """A zip whose directory names one record many times (Fifield 2019) is larger in memory than on the disk."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {f"w{i}": torch.full((1000,), float(i)) for i in range(50)}}, path)
    with zipfile.ZipFile(path) as old:
        data, names = old.read("a/data.pkl"), old.namelist()
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("a/data.pkl", data)
        new.writestr("a/data/0", bytes(4000))
        first = new.getinfo("a/data/0")
        for name in names:
            if "/data/" in name and name != "a/data/0":
                again = zipfile.ZipInfo(name)
                again.header_offset, again.CRC = first.header_offset, first.CRC
                again.file_size = again.compress_size = 4000
                new.filelist.append(again)
                new.NameToInfo[name] = again
    with pytest.raises(BadFileError, match="zip bomb is refused"):
        read_foreign_file(path)


def test_tensors_that_outgrow_the_file_are_refused(tmp_path: Path) -> None:
    """Strides of 0, views outside their storage, and thousands of different views of one storage."""
    base = torch.zeros(1000)
    path = tmp_path / "a.pt"
    for name, weights, message in (
        ("stride 0", {"w": torch.zeros(1).expand(10**9)}, "does not lie in its storage"),
        ("views", {f"w{i}": base[i:] for i in range(200)}, "more memory than"),
    ):
        torch.save({"state_dict": weights}, path)
        with pytest.raises(BadFileError, match=message):
            read_foreign_file(path).read_state_dict(("state_dict",)), name
    torch.save({"state_dict": {"w": base}}, path)
    rewrite(path, lambda name, data: (data.replace(b"M\xe8\x03", b"M\xe9\x03", 1) if "pkl" in name else data, STORED))
    with pytest.raises(BadFileError, match=r"storage 0 has|does not lie"):
        read_foreign_file(path).read_state_dict(("state_dict",))


ALLOCATES = {
    "bytearray of 16 GiB": Call(bytearray, 2**34),
    "tensor of 16 GiB": Call(torch.zeros, 2**32),
    "storage of 16 GiB": Call(torch.UntypedStorage, 2**34),
}
RAW = {
    "memo of 2^31 entries": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes of 2^40": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "bytearray of 2^40": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "frame of 2^40": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"}.",
}


@pytest.mark.parametrize("name", [*ALLOCATES, *RAW])
def test_memory_is_bounded_by_the_file(tmp_path: Path, name: str) -> None:
    """A file of a kilobyte that asks for gigabytes: it is read or refused within 100 MB of address space."""
    path = tmp_path / "a.pt"
    torch.save({"bad": ALLOCATES.get(name), "state_dict": {"w": torch.ones(3)}}, path)
    if name in RAW:
        rewrite(path, lambda record, data: (RAW[name] if "pkl" in record else data, STORED))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, before[1]))
    message = ""
    try:
        read_foreign_file(path).read_state_dict(("state_dict",))
    except BadFileError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not message or (name in RAW and message.startswith(f"{path}: "))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_damage_gives_one_message(tmp_path: Path, zipped: bool) -> None:
    """Half a file, and a flipped byte anywhere in the first kilobytes: weights, or a BadFileError; never another."""
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"w": torch.randn(10), "v": torch.randn(3)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(BadFileError, match=r"a\.pt"):
            read_foreign_file(path).read_state_dict(("state_dict",))
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_foreign_file(path).read_state_dict(("state_dict",))
        except BadFileError as error:
            assert "a.pt" in str(error)  # noqa: PT017


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    """A million nested tuples, also as a key, whose hash would overflow the stack of the interpreter."""
    deep = b")" + b"\x85" * 1_000_000
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"w": torch.ones(3)}}, path)
    for code in (deep + b".", b"}" + deep + b"K\x01s."):
        new = b"\x80\x02" + code
        rewrite(path, lambda record, data: (new if "pkl" in record else data, STORED))  # noqa: B023
        with pytest.raises(BadFileError, match="holds no weights"):
            read_foreign_file(path).read_state_dict(("state_dict",))


def test_other_files_are_named(tmp_path: Path) -> None:
    """A bare pickle, a TorchScript program and a text say what they are; a bare pickle is not opened."""
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(Call(os.mkdir, str(canary))))
    with pytest.raises(BadFileError, match=r"not a checkpoint that torch\.save has written"):
        read_foreign_file(path)
    assert not canary.exists()
    torch.save({"state_dict": {"w": torch.ones(3)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    with pytest.raises(BadFileError, match="TorchScript"):
        read_foreign_file(path)
    path.write_bytes(b"not weights")
    with pytest.raises(BadFileError, match="not a safetensors file"):
        read_foreign_file(path)


def test_a_quantized_or_complex_tensor_is_no_weight(tmp_path: Path) -> None:
    """Number formats that no tokenizer has are stubs, so the importer reports their keys as missing."""
    path = tmp_path / "a.pt"
    weights: dict[str, Tensor] = {"w": torch.ones(3), "c": torch.ones(3, dtype=torch.complex64)}
    torch.save({"state_dict": weights}, path)
    assert read_foreign_file(path).read_state_dict(("state_dict",)).keys() == {"w"}
    assert foreign_files.STORAGES.keys() >= {"FloatStorage", "BFloat16Storage"}
