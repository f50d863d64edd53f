"""A reader for weights files of other programs: torch checkpoints (pickles) and safetensors, from anybody.

No unpickler runs, not even the restricted one of `torch.load(weights_only=True)`, which executes no code either but
allocates whatever a file asks for (`bytearray(2**40)`, a tensor larger than its storage, a compressed record). Here the
opcodes of the pickle are listed by `pickletools`, and a small interpreter turns them into plain containers and
descriptions of tensors. It imports nothing and calls nothing that the file names. Everything else becomes a `Stub`.

    file -> checks of the zip -> opcodes -> dict, list, str, ..., TensorPlace -> read_state_dict -> tensors

Memory is bounded by the file: a pickle has at most LARGEST_PICKLE bytes, records are stored uncompressed, and tensors
that share no data have together at most the bytes of the file. Only the tensors that are asked for are read.
"""

import math
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.engine.checkpoint import ZIP_MAGIC, read_tensors, starts_as_pickle
from stage1_tokenizer.engine.errors import BadFileError, UserError, shorten
from stage1_tokenizer.engine.files import file_sha256

LARGEST_PICKLE = 8 * 2**20
"""Bytes of the pickle in a checkpoint, without its tensors; published ones have some hundred thousand."""
MOST_RECORDS = 100_000
"""Records in a checkpoint; there is one per tensor."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The number in the first pickle of a checkpoint of torch before version 1.6."""
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Number format of each storage class of torch."""


@dataclass(frozen=True, eq=False)
class Stub:
    """A name in a pickle, or an object of a class that is not known here. It holds only its name."""

    name: str


class Storage(NamedTuple):
    """A flat array of numbers in a file."""

    dtype: torch.dtype
    key: str
    numel: int


class TensorPlace(NamedTuple):
    """Description of a tensor in a file: a strided view of a storage. It is hashable: equal views are one tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def fits(self) -> bool:
        """True if the view lies inside its storage, and has no element twice by a stride of 0."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > 8 or min(numbers) < 0 or max(numbers) >= 2**48:
            return False
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return self.numel <= self.storage.numel and (self.numel == 0 or last < self.storage.numel)


class _DamagedError(Exception):
    """The file is not what it should be; the message continues `PATH: `."""


class ForeignFile:
    """A weights file of another program: its content with descriptions in place of tensors."""

    def __init__(self, path: Path, content: Any, load: Callable[[Storage], Tensor] | None) -> None:
        self.path = path
        self.content = content
        """Plain containers and scalars, TensorPlace and Stub; of a safetensors file: its tensors by name."""
        self._load = load  # None: the tensors are read already
        self.sha256 = file_sha256(path)

    def read_state_dict(
        self, keys: Sequence[str], prefixes: Sequence[str] = ("",), without: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Return the tensors of the first of the keys that the file has, e.g. "state_dict"; else those of the file.

        prefixes: read only tensors whose names begin with one of them; others are not even read from the disk.
        without: leave out tensors whose names begin with one of these.

        Raises:
            BadFileError: there are no tensors, or one is damaged or would take more memory than the file has bytes.
        """
        found = self.content
        if isinstance(found, dict):
            found = next((found[key] for key in keys if isinstance(found.get(key), dict)), found)
        named = found.items() if isinstance(found, dict) else ()
        wanted = {
            name: value
            for name, value in named
            if isinstance(name, str) and name.startswith(tuple(prefixes)) and not name.startswith(tuple(without))
        }
        tensors = {name: value for name, value in wanted.items() if isinstance(value, Tensor)}
        places = {name: value for name, value in wanted.items() if isinstance(value, TensorPlace)}
        if not (tensors or places):
            raise BadFileError(f"{self.path}: holds no weights: no mapping of names to tensors under {', '.join(keys)}")
        self._check_memory(places)
        with _one_message(self.path):
            return tensors | self._read(places)

    def _check_memory(self, places: dict[str, TensorPlace]) -> None:
        """Refuse tensors outside their storages, and tensors that need more memory than the file has bytes."""
        size = self.path.stat().st_size
        for name, place in places.items():
            if not place.fits:
                raise BadFileError(f"{self.path}: is damaged: the tensor {shorten(name)} does not lie in its storage")
        if sum(place.numel * place.storage.dtype.itemsize for place in set(places.values())) > size:
            raise BadFileError(f"{self.path}: its tensors need more memory than the {size:,} bytes of the file")

    def _read(self, places: dict[str, TensorPlace]) -> dict[str, Tensor]:
        storages: dict[Storage, Tensor] = {}
        for place in places.values():
            if place.storage not in storages:
                assert self._load is not None  # a file with a TensorPlace was given with a function that loads it
                storages[place.storage] = self._load(place.storage)
        return {
            name: storages[place.storage].as_strided(place.shape, place.stride, place.offset)
            for name, place in places.items()
        }


def read_foreign_file(path: Path) -> ForeignFile:
    """Read the structure of a checkpoint of torch (.pt, .ckpt, .bin, .pth) or of a safetensors file, without its code.

    Raises:
        BadFileError: damaged, cut off, of another kind, compressed, or larger in memory than on the disk.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP_MAGIC))
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None
    if starts_as_pickle(path):
        with _one_message(path):
            return ForeignFile(path, *(_read_zip if start == ZIP_MAGIC else _read_legacy)(path))
    tensors, _ = read_tensors(path, "FILE")
    return ForeignFile(path, tensors, None)


@contextmanager
def _one_message(path: Path) -> Iterator[None]:
    """Turn the exceptions of a parser of damaged or hostile bytes into a BadFileError that names the file."""
    try:
        yield
    except _DamagedError as error:
        raise BadFileError(f"{path}: {error}") from None
    except (UserError, MemoryError):  # a UserError is raised by a signal
        raise
    # The parsers raise what they like: BadZipFile, struct.error, IndexError, StopIteration, UnicodeDecodeError, ...
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, 200)
        raise BadFileError(f"{path}: is damaged or was cut off ({reason})") from None


def _read_zip(path: Path) -> tuple[Any, Callable[[Storage], Tensor]]:
    """Read a checkpoint of torch since version 1.6: a zip with FOLDER/data.pkl and FOLDER/data/KEY."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        _check_records(records, path.stat().st_size)
        names = {record.filename: record for record in records}
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _DamagedError("is a zip archive, but not a checkpoint of torch: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in names:
            raise _DamagedError("is a TorchScript program, not weights; save its state_dict() with torch.save")
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in names else b"little"
        if order.decode("ascii", "replace") != sys.byteorder:
            raise _DamagedError("was written on a machine with another byte order")
        if names[pickles[0]].file_size > LARGEST_PICKLE:
            raise _DamagedError(f"its data.pkl has more than {LARGEST_PICKLE:,} bytes, which no weights need")
        content = Interpreter().run(BytesIO(archive.read(pickles[0])))

    def load(storage: Storage) -> Tensor:
        name = f"{folder}data/{storage.key}"
        if name not in names:
            raise _DamagedError(f"is damaged: record {shorten(storage.key, 50)} is missing")
        with zipfile.ZipFile(path) as archive:
            return _to_numbers(archive.read(name), storage)

    return content, load


def _check_records(records: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse a zip whose records would be larger in memory than on the disk."""
    if len(records) > MOST_RECORDS:
        raise _DamagedError(f"has {len(records):,} records, at most {MOST_RECORDS:,} are read")
    for record in records:
        name = shorten(record.filename, 100)
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise _DamagedError(f"record {name} is compressed, which torch.save never does (a zip bomb is refused)")
        if record.flag_bits & 1:
            raise _DamagedError(f"record {name} is encrypted")
    if sum(record.file_size for record in records) > size or len({r.filename for r in records}) < len(records):
        raise _DamagedError("records overlap or have the same name (a zip bomb is refused)")


def _read_legacy(path: Path) -> tuple[Any, Callable[[Storage], Tensor]]:
    """Read a checkpoint of torch before version 1.6: five pickles, then the storages in the order of the fifth."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = BytesIO(file.read(LARGEST_PICKLE))
        if Interpreter().run(head) != LEGACY_MAGIC:
            raise _DamagedError("is a pickle, but not a checkpoint that torch.save has written")
        for _ in ("version", "system"):
            Interpreter().run(head)
        interpreter = Interpreter()
        content = interpreter.run(head)
        keys = Interpreter().run(head)
        places: dict[str, int] = {}
        position = head.tell()
        for key in keys if isinstance(keys, list) else ():
            storage = interpreter.storages.get(key)
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            if storage is None or storage.numel != count:
                raise _DamagedError(f"is damaged: storage {shorten(key, 50)} has another size than its tensors say")
            places[key] = position + 8
            position += 8 + count * storage.dtype.itemsize
        if position > size:
            raise _DamagedError(f"is cut off: it has {size:,} bytes, its tensors end at {position:,}")

    def load(storage: Storage) -> Tensor:
        if storage.key not in places:
            raise _DamagedError(f"is damaged: storage {shorten(storage.key, 50)} is missing")
        with path.open("rb") as file:
            file.seek(places[storage.key])
            return _to_numbers(file.read(storage.numel * storage.dtype.itemsize), storage)

    return content, load


def _to_numbers(data: bytes, storage: Storage) -> Tensor:
    """Return the bytes of a storage as numbers (numel,)."""
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise _DamagedError(f"is damaged or cut off: storage {shorten(storage.key, 50)} has {len(data):,} bytes")
    if not data:
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype == torch.bool:  # a byte of 2 is no bool
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


MARK = Stub("mark")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Opcodes that push the value after them."""
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Interpreter:
    """An interpreter of pickle opcodes that builds plain containers, TensorPlace and Stub, and calls nothing else."""

    def __init__(self) -> None:
        self.storages: dict[Any, Storage] = {}
        """Storages that were mentioned, by their keys."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: BytesIO) -> Any:
        """Return the object of the pickle at the position of `data`, which then stands behind it."""
        for opcode, argument, _ in pickletools.genops(data):
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self._stack.append(argument)
        elif name in CONSTANTS:
            self._stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self._stack.append(EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in ("POP", "POP_MARK", "DUP"):
            top = self._stack.pop() if name != "POP_MARK" else self._pop_to_mark()
            self._stack += [top, top] if name == "DUP" else []
        elif name not in ("PROTO", "FRAME", "STOP") and not self._fill(name):
            self._make_object(name, argument)

    def _fill(self, name: str) -> bool:
        """Take a step that puts values into a container. Return False if it is another step."""
        stack = self._stack
        if name == "MARK":
            stack.append(MARK)
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            values = self._pop_to_mark()
            stack.append(tuple(values) if name == "TUPLE" else values)
        elif name == "DICT":
            values = self._pop_to_mark()
            stack.append({})
            self._set_items(values)
        elif name in ("APPENDS", "ADDITEMS", "APPEND"):
            values = [stack.pop()] if name == "APPEND" else self._pop_to_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop_to_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1])
        else:
            return False
        return True

    def _make_object(self, name: str, argument: Any) -> None:
        """Take a step that an unpickler would do by an import or a call."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(Stub(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Stub(f"{shorten(module)}.{shorten(attribute)}"))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            arguments = stack.pop()
            if name == "NEWOBJ_EX":
                arguments = stack.pop()
            stack.append(_build(stack.pop(), arguments if isinstance(arguments, tuple) else ()))
        elif name == "OBJ":
            values = self._pop_to_mark()
            stack.append(_build(values[0], tuple(values[1:])))
        elif name == "INST":
            self._pop_to_mark()
            stack.append(Stub(argument.replace(" ", ".")))
        elif name == "BUILD":  # attributes of an object, e.g. the _metadata of a state_dict
            stack.pop()
        else:
            raise _DamagedError(f"its pickle has the opcode {name}, which torch.save does not write")

    def _pop_to_mark(self) -> list[Any]:
        """Remove the values above the last mark, and the mark, and return the values."""
        place = next(place for place in range(len(self._stack) - 1, -1, -1) if self._stack[place] is MARK)
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _set_items(self, values: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack; keys that are objects are left out."""
        if isinstance(self._stack[-1], dict):
            # A deeply nested tuple as a key would overflow the stack of its hash function.
            pairs = zip(values[::2], values[1::2], strict=True)
            self._stack[-1].update((key, value) for key, value in pairs if isinstance(key, (str, int, float)))

    def _storage(self, reference: Any) -> Any:
        """Return the storage of a persistent id, ("storage", class, key, device, number of elements, ...)."""
        match reference:
            case ("storage", Stub(name=name), str(key), _, int(numel), *_):
                dtype = STORAGES.get(name.removeprefix("torch."))
                if dtype is None or numel < 0:
                    return Stub(name)
                self.storages[key] = Storage(dtype, key, numel)
                return self.storages[key]
        return Stub("persistent object")


def _build(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the object that a call in a pickle stands for, if it is a tensor or a plain container; else a Stub."""
    name = function.name if isinstance(function, Stub) else "object"
    match name, arguments:
        case "collections.OrderedDict" | "collections.defaultdict" | "builtins.dict" | "__builtin__.dict", _:
            return {}
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(stride),
            *_,
        ) if all(type(number) is int for number in (*shape, *stride)):
            return TensorPlace(storage, offset, shape, stride)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (
            TensorPlace() as place,
            *_,
        ):
            return place
        case "torch.Size", (tuple(shape),):
            return shape
    return Stub(name)
