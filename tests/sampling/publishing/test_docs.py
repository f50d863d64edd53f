"""The section of docs/weights.md about publishing: its commands run, and print what the page shows."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from tests.helpers.artefacts import write_prior
from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.documents import blocks_of, commands_of
from tests.helpers.hub_server import FakeHub, fake_hub

SECTION = (ROOT / "docs/weights.md").read_text(encoding="utf-8").split("\n## Publish a run\n")[1].split("\n## ")[0]
SMALL = (
    "--data.image_size 16 --data.train_images 20 --data.validation_images 6 --network.channels 8 "
    "--network.multipliers 1,1 --bottleneck.codebook_size 8 --batch_size 8 --steps 1 --adversarial.weight 0 "
    "--perceptual.weight 0 --no-report"
)
"""Options that make the training of the page tiny."""


class Api:
    """The part of huggingface_hub.HfApi that a push uses; it adds a commit to the hub on this machine."""

    def __init__(self, hub: FakeHub) -> None:
        self.hub = hub

    def whoami(self) -> None:
        """Answer as for a user who is logged in."""

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        """Check that an existing repository is no error."""
        assert exist_ok

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        """Add a commit."""
        return SimpleNamespace(oid=self.hub.commit(repo_id, folder_path))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish to a folder and to the Hub, load from both, export to diffusers; what is printed is on the page."""
    monkeypatch.chdir(tmp_path)
    write_prior(Path("runs/stage2/shapes_vq_gpt"))
    printed = ""
    commands = commands_of("\n".join(block.text for block in blocks_of(SECTION) if not block.language))
    assert len(commands) == 6
    with fake_hub(tmp_path / "cache") as hub, monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "HfApi", lambda **_: Api(hub))
        for script, arguments in commands:
            tiny = SMALL.split() if script.endswith("train.py") else []
            ended = run(names_of(script)["main"], *arguments, *tiny)
            assert ended.code == 0, (script, ended.err)
            printed += ended.out
        for block in blocks_of(SECTION):
            if block.language == "text":
                assert all(line in printed for line in block.text.splitlines()), printed
            if block.language == "python" and "Sampler" in block.text:
                names: dict[str, object] = {}
                exec(block.text, names)
                assert getattr(names["images"], "shape", None) == (4, 8, 12, 3)
    diffusers = pytest.importorskip("diffusers", reason="the extra bench is not installed")
    assert diffusers.VQModel.from_pretrained("portable").config.norm_num_groups == 8
