"""Commands of docs/weights.md, run one after the other on tiny data; a command that the page shows works."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers.artefacts import write_image_folder
from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.documents import blocks_of

PAGE = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
TINY_RUN = "--optim.warmup_steps 1 --steps 3 --batch_size 4 --save_every 2 --no-report --log_every 1"
TINY_SHAPES = "--data.train_images 12 --data.validation_images 6"
TINY_NETWORK = "--network.channels 8 --network.residual_channels 4 --bottleneck.codebook_size 8"
TINY_GAN = "--adversarial.discriminator.channels 4 --adversarial.discriminator.layers 1"
TINY_PRIOR = "--prior.layers 1 --prior.width 16 --prior.heads 2"


def execute(line: str) -> str:
    """Run a line of the page with options that make it small, and return what it prints."""
    words = shlex.split(line)
    if words[0] == "cp":
        shutil.copy(words[1], words[2])
        return ""
    script, arguments = words[1], words[2:]
    tiny = "" if script.startswith("sampling") else TINY_RUN
    if script == "stage1_tokenizer/train.py":
        tiny += "" if "--data.root" in arguments else f" {TINY_SHAPES} --pictures 0"
        tiny += "" if "--init_from" in arguments else f" {TINY_NETWORK}"
        tiny += f" {TINY_GAN}" if "--adversarial.start" in arguments else ""
    elif script == "stage2_prior/train.py":
        tiny += " --samples 0" if "--init_from" in arguments else f" --samples 0 {TINY_PRIOR}"
    if "--steps" in arguments:  # the page's own number, a hundredth of it
        place = arguments.index("--steps")
        tiny = tiny.replace("--steps 3", f"--steps {int(arguments[place + 1]) // 100}")
        del arguments[place : place + 2]
    if "--adversarial.start" in arguments:
        arguments[arguments.index("--adversarial.start") + 1] = "1"
    ended = run(names_of(script)["main"], *arguments, *tiny.split())
    assert ended.code == 0, f"{line}\n{ended.err}"
    return ended.out


def test_the_page_runs_from_its_first_command_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands of the section, in their order, after one training of each stage; each prints what the page says."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_image_folder(tmp_path / "photos" / split, ("cat", "dog"), per_class=6, size=(40, 40))
    execute("python stage1_tokenizer/train.py --out runs/stage1/shapes_vq")
    execute("python stage2_prior/train.py --tokenizer runs/stage1/shapes_vq --out runs/stage2/shapes_vq_gpt")
    section = PAGE.split("## Go on from your own")[1]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    text = "".join(block.text for block in blocks_of(section) if not block.language).replace("\\\n", " ")
    printed = [execute(line) for line in text.splitlines()]
    assert len(printed) == 9
    photos, sharper, _, _, gan, gan_longer, prior, wsd, wsd_longer = printed
    assert "12 to train on, 12 to validate on" in photos
    assert "--train all" in photos
    assert "--train decoder" in sharper
    assert "so the discriminator starts from random weights" in gan
    assert "the discriminator starts from runs/stage1/gan/discriminator.safetensors" in gan_longer
    assert "starting from runs/stage2/shapes_vq_gpt" in prior
    assert "10 steps of" in wsd
    assert "from step 8: 20 steps" in wsd_longer


def test_a_validation_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--data.validation_root` in a fine-tuning: all of that folder is validated on, all of the other trained on."""
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "photos", ("cat", "dog"), per_class=6, size=(40, 40))
    write_image_folder(tmp_path / "held_out", ("cat", "dog"), per_class=3, size=(40, 40))
    execute("python stage1_tokenizer/train.py --out runs/stage1/shapes_vq")
    out = execute(
        "python stage1_tokenizer/train.py --init_from runs/stage1/shapes_vq --data.kind folder --data.root photos "
        "--data.validation_root held_out --out runs/stage1/photos"
    )
    assert "12 to train on, 6 to validate on" in out
