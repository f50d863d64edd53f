"""publish.py --format onnx and exported_program: a folder with the files, a model card and a use that runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.artefacts import write_prior, write_tokenizer
from tests.helpers.commands import names_of, run

SCRIPT = "sampling/publish.py"


@pytest.mark.parametrize(
    ("format_", "end", "library"), [("onnx", "onnx", "onnx"), ("exported_program", "pt2", "pytorch")]
)
def test_the_card_runs(format_: str, end: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the model card, executed in the folder, give the codes and the images of the tokenizer."""
    loaded, out = write_tokenizer(tmp_path / "run"), tmp_path / "out"
    arguments = (tmp_path / "run", "--to", out, "--licence", "mit", "--format", format_)
    ended = run(names_of(SCRIPT)["main"], *arguments)
    assert ended.code == 0, ended.err
    assert {path.name for path in out.iterdir()} == {"README.md", f"encoder.{end}", f"decoder.{end}", "export.json"}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"library_name: {library}\n" in card
    assert json.loads((out / "export.json").read_text(encoding="utf-8"))["tokenizer"] == loaded.fingerprint
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    images = torch.rand(3, 3, 8, 12) * 2 - 1
    monkeypatch.chdir(out)
    names = {"images": images.numpy() if format_ == "onnx" else images}
    exec(code, names)
    codes = loaded.tokenizer.encode_codes(images)
    assert torch.equal(torch.as_tensor(names["codes"]), codes)
    expected = loaded.tokenizer.decode_codes(codes)
    torch.testing.assert_close(
        torch.as_tensor(names["images"]), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_a_prior_is_refused(tmp_path: Path) -> None:
    write_prior(tmp_path / "run")
    for format_ in ("onnx", "exported_program"):
        arguments = (tmp_path / "run", "--to", tmp_path / "out", "--licence", "mit", "--format", format_)
        ended = run(names_of(SCRIPT)["main"], *arguments)
        assert ended.code == 2
        assert f"--format {format_}: {tmp_path / 'run'} is the run of a prior" in ended.err
        assert not (tmp_path / "out").exists()


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path / "run")
    monkeypatch.setattr("sampling.exporting.onnx_file.PACKAGES", ("onnx", "no_such_package"))
    arguments = (tmp_path / "run", "--to", tmp_path / "out", "--licence", "mit", "--format", "onnx")
    ended = run(names_of(SCRIPT)["main"], *arguments)
    assert ended.code == 2
    assert "--format onnx needs no_such_package, which is not installed" in ended.err
    assert not (tmp_path / "out").exists()
