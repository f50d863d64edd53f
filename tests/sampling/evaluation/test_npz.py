"""The ADM suite's files: numpy reads ours, we read theirs, and bad ones are refused with an error of ours."""

import hashlib
import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sampling.evaluation.distances import frechet_distance
from sampling.evaluation.moments import moments_of
from sampling.evaluation.npz import open_samples, read_moments, write_moments, write_samples
from stage1_tokenizer.engine.errors import BadFileError


def images(n: int = 7, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, 5, 6, channels), dtype=np.uint8)


def test_numpy_reads_our_samples(tmp_path: Path) -> None:
    """The array is as guided-diffusion's evaluator reads it; grey becomes three equal channels."""
    for x in (images(), images(channels=1), images(channels=1)[..., 0], images().transpose(0, 2, 1, 3)):
        write_samples(tmp_path / "samples.npz", x)
        with np.load(tmp_path / "samples.npz") as file:
            assert file.files == ["arr_0"]
            found = file["arr_0"]
        wanted = x if x.ndim == 4 else x[..., None]
        assert found.dtype == np.uint8
        assert np.array_equal(found, np.repeat(wanted, 3 // wanted.shape[3], axis=3))
    with pytest.raises(ValueError, match="uint8"):
        write_samples(tmp_path / "samples.npz", images().astype(np.float32))


def test_equal_samples_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_samples(tmp_path / name, images())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_samples_are_read_in_batches(tmp_path: Path, save: Any, batch_size: int) -> None:
    save(tmp_path / "samples.npz", images(), other=np.zeros(3))
    samples = open_samples(tmp_path / "samples.npz")
    assert (samples.n, samples.height, samples.width) == (7, 5, 6)
    found = list(samples.batches(batch_size))
    assert max(len(batch) for batch in found) == min(batch_size, 7)
    assert torch.equal(torch.cat(found), torch.from_numpy(images()).permute(0, 3, 1, 2))


def test_large_files_are_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read asks for more bytes than a batch has, or than the bound."""
    write_samples(tmp_path / "samples.npz", images(40))
    asked: list[int] = []
    read = zipfile.ZipExtFile.read

    def watched(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        asked.append(n or -1)
        return read(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    samples = open_samples(tmp_path / "samples.npz")
    assert sum(len(batch) for batch in samples.batches(4)) == 40
    assert max(asked) == 4 * 90
    assert min(asked) > 0, "all of it"
    monkeypatch.setattr("sampling.evaluation.npz.AT_ONCE", 200)
    assert max(len(batch) for batch in samples.batches(40)) == 2


def test_statistics_come_back_and_others_tools_read_them(tmp_path: Path) -> None:
    moments = moments_of(np.random.default_rng(0).normal(size=(50, 6)))
    write_moments(tmp_path / "reference.npz", moments)
    found = read_moments(tmp_path / "reference.npz")
    assert found.count == 50
    assert frechet_distance(found, moments) == pytest.approx(0, abs=1e-6)
    with np.load(tmp_path / "reference.npz") as file:
        assert np.array_equal(file["mu"], moments.mean)
        assert np.array_equal(file["sigma"], moments.covariance)


def test_published_statistics_are_read(tmp_path: Path) -> None:
    """Files of pytorch-fid and ADM are read: in float32, with spatial statistics and images, without a count."""
    moments = moments_of(np.random.default_rng(0).normal(size=(50, 6)))
    beside: dict[str, Any] = {"mu_s": np.zeros(3), "sigma_s": np.zeros((3, 3)), "arr_0": images()}
    mu, sigma = moments.mean.astype(np.float32), moments.covariance.astype(np.float32)
    np.savez_compressed(tmp_path / "adm.npz", mu=mu, sigma=sigma, **beside)
    found = read_moments(tmp_path / "adm.npz")
    assert found.count is None
    assert found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.covariance, moments.covariance, rtol=1e-6, atol=1e-7)
    assert open_samples(tmp_path / "adm.npz").n == 7


def archive(arrays: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as made:
        for name, data in arrays.items():
            made.writestr(name, data)
    return file.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def promising(shape: tuple[int, ...], data: bytes) -> bytes:
    """Return a uint8 header with this shape, followed by these bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


BAD = {
    "no archive": (b"arr_0", "not an .npz"),
    "nothing": (archive({}), "no array arr_0"),
    "another array": (archive({"mu.npy": npy(np.zeros(3))}), "no array arr_0.*mu.npy"),
    "no header": (archive({"arr_0.npy": b"x" * 200}), "damaged"),
    "float": (archive({"arr_0.npy": npy(np.zeros((2, 3, 3, 3)))}), "float64"),
    "grey": (archive({"arr_0.npy": npy(np.zeros((2, 3, 3, 1), dtype=np.uint8))}), r"\(2, 3, 3, 1\)"),
    "empty": (archive({"arr_0.npy": npy(np.zeros((0, 3, 3, 3), dtype=np.uint8))}), r"\(0, 3, 3, 3\)"),
    "objects": (archive({"arr_0.npy": npy(np.array([{}], dtype=object))}), "objects"),
    "terabytes": (archive({"arr_0.npy": promising((10**6, 1000, 1000, 3), b"")}), "3,000,000,000,000 bytes"),
    "negative": (archive({"arr_0.npy": promising((-1, -1, 1, 3), bytes(3))}), "arr_0"),
    "wide": (archive({"arr_0.npy": promising((1, 1, 5000, 3), bytes(15000))}), "4096 a side"),
    "lzma": (archive({"arr_0.npy": npy(images())}, zipfile.ZIP_LZMA), "compression"),
    "cut off": (archive({"arr_0.npy": npy(images())})[:300], "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_refused(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    with pytest.raises(BadFileError, match=message) as refused:
        list(open_samples(path).batches(3))
    assert str(path) in str(refused.value)


def test_a_changed_image_is_noticed(tmp_path: Path) -> None:
    """The archive has a checksum of each array, which is checked."""
    path = tmp_path / "samples.npz"
    write_samples(path, images())
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFileError, match="CRC"):
        list(open_samples(path).batches(100))


def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    lopsided, negative = np.eye(3), np.diag([1.0, 1.0, -1.0])
    lopsided[0, 1] = 0.5
    changes: list[tuple[dict[str, NDArray[Any]], str]] = [
        ({"sigma": np.eye(4)}, r"sigma is float64 \(4, 4\).*\(3, 3\)"),
        ({"mu": np.zeros((3, 1))}, "mu is float64"),
        ({"mu": np.full(3, np.nan)}, "mu has numbers that are not finite"),
        ({"mu": np.array(["a", "b", "c"])}, "mu is <U1"),
        ({"sigma": lopsided}, "not a covariance"),
        ({"sigma": negative}, "not a covariance"),
    ]
    for change, message in changes:
        changed: dict[str, Any] = {**good, **change}
        np.savez(tmp_path / "bad.npz", **changed)
        with pytest.raises(BadFileError, match=message):
            read_moments(tmp_path / "bad.npz")


class OnDemand:
    """Images that are made when they are read."""

    def __init__(self, n: int, side: int) -> None:
        self.n, self.side = n, side

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return np.full((self.side, self.side, 3), index % 256, dtype=np.uint8)


def test_samples_are_written_one_at_a_time(tmp_path: Path) -> None:
    """Writing takes the memory of a few images, also for ten times as many."""
    peaks = []
    for n in (40, 400):
        tracemalloc.start()
        write_samples(tmp_path / "samples.npz", OnDemand(n, 64), np.arange(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with np.load(tmp_path / "samples.npz") as file:
            assert file["arr_0"][:, 0, 0, 0].tolist() == [index % 256 for index in range(n)]
            assert file["labels"].tolist() == list(range(n))
    assert peaks[1] < peaks[0] + 64 * 64 * 3 < 40 * 64 * 64 * 3


def test_the_bytes_of_samples_stay_the_same(tmp_path: Path) -> None:
    """A file of samples is identified by its checksum, so every version must write equal images as equal bytes."""
    write_samples(tmp_path / "samples.npz", images(3, channels=1), np.arange(3))
    digest = hashlib.sha256((tmp_path / "samples.npz").read_bytes()).hexdigest()
    assert digest == "54915308c4a3c0b0d4073103b2870e1f0ce111cb9aa9ff660231f2d4945c0cca"


def test_images_that_differ_in_shape_leave_no_file(tmp_path: Path) -> None:
    """An error in the middle of writing leaves neither a part of a file nor a temporary one."""
    mixed = [np.zeros((4, 4, 3), dtype=np.uint8), np.zeros((4, 5, 3), dtype=np.uint8)]
    with pytest.raises(ValueError, match="one shape"):
        write_samples(tmp_path / "samples.npz", mixed)
    assert list(tmp_path.iterdir()) == []
