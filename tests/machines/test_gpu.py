"""The whole way on a CUDA device, in bfloat16, and every bottleneck there: skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stage1_tokenizer.bottlenecks.nearest import find_nearest
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate
from tests.helpers.artefacts import MAKERS, gpt, noise_of
from tests.helpers.commands import ROOT
from tests.helpers.quantizers import EVERY_KIND, Tree, bottleneck, latents, name_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = (
    "--data.train_images 64 --data.validation_images 16 --steps 6 --batch_size 16 "
    "--adversarial.weight 0.5 --adversarial.start 2"
)


def command(folder: Path, script: str, arguments: str) -> str:
    """What a script prints, run in `folder` by this Python; a failure shows what it printed."""
    words = [sys.executable, str(ROOT / script), *arguments.split()]
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_three_commands_run_on_a_gpu_and_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    """Device, autocast, discriminator and cache all stay on the GPU; the second call resumes at the end."""
    first = command(tmp_path, "stage1_tokenizer/train.py", SMALL)
    assert "device=cuda" in first
    assert "precision=bf16" in first
    assert "is finished already" in command(tmp_path, "stage1_tokenizer/train.py", SMALL)
    command(tmp_path, "stage2_prior/train.py", "--tokenizer runs/stage1/shapes_vq --steps 4 --batch_size 16")
    command(tmp_path, "sampling/generate.py", "-n 5")
    assert len(list((tmp_path / "runs/stage2/shapes_vq_gpt/generated/001").glob("0*.png"))) == 5
    pixelcnn = "--tokenizer runs/stage1/shapes_vq --prior.kind pixelcnn --steps 4 --batch_size 16"
    command(tmp_path, "stage2_prior/train.py", pixelcnn)
    command(tmp_path, "sampling/complete.py", "-n 2 --variants 2 --grow.right 8 --prior runs/stage2/shapes_vq_pixelcnn")
    assert "bits per token" in command(tmp_path, "stage2_prior/score.py", "-n 16 --by_class")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("depth", [1, 2])
def test_decoding_says_what_a_forward_pass_says_on_a_gpu(
    kind: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 30: caches and fused attention there too; without TF32, whose rounding is a thousand times as coarse."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    shape = TokenShape(3, 4, depth, 11)
    prior, labels, seen = MAKERS[kind](shape, 2).cuda(), torch.tensor([0, 1], device="cuda"), []

    def greedy(logits: torch.Tensor, noise: torch.Tensor, progress: float) -> torch.Tensor:
        del noise, progress
        seen.append(logits)
        return logits.argmax(dim=-1)

    codes = generate(prior, labels, noise_of(2, shape.length).cuda(), greedy)
    wanted = prior(codes, labels)
    assert torch.allclose(torch.stack(seen, dim=1), wanted, atol=1e-4 * float(wanted.std()) + 1e-5, rtol=1e-4)


def test_a_replayed_graph_says_what_a_forward_pass_says() -> None:
    """Trap 30: captured once, for several generations, after known codes, and for two at once; in bfloat16 nearly."""
    shape = TokenShape(3, 4, 1, 11)
    prior, labels = gpt(shape, 2, heads=2).cuda(), torch.tensor([0, 1], device="cuda")
    for precision, most in (("float32", 1e-4), ("bfloat16", 0.1)):
        prepared = prior.prepare(precision)  # type: ignore[arg-type]
        for seed, known in ((0, 0), (1, 5), (2, 0)):
            codes = torch.randint(11, (2, 12, 1), generator=torch.Generator().manual_seed(seed)).cuda()
            wanted = prior(codes.view(2, 3, 4, 1), labels)
            one, other, found = prepared.begin(labels), prepared.begin(labels), []
            if known:
                one.prefill(codes[:, :known])
            for place in range(known, 12):
                found.append(one.logits())
                other.logits()  # of other codes
                one.append(codes[:, place, 0])
                other.append(codes[:, 11 - place, 0])
            assert (torch.stack(found, dim=1) - wanted[:, known:]).abs().max() < most * wanted.std()


def test_int8_is_for_cpus() -> None:
    """Refused with what to take instead."""
    with pytest.raises(ConfigError, match=r"int8.*on a CPU"):
        gpt(TokenShape(3, 4, 1, 11)).cuda().prepare("int8")


@pytest.mark.parametrize("tree", EVERY_KIND, ids=name_of)
def test_every_bottleneck_learns_on_a_gpu_and_its_codes_decode_exactly(tree: Tree) -> None:
    """k-means, running means, revival and noise on the device, under autocast; in eval mode codes -> vectors is the
    forward pass bit for bit there too."""
    made = bottleneck(tree).cuda()
    made.start(latents(B=8).cuda())
    for seed in range(3):
        z = latents(B=8, seed=seed).cuda().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = made(z)
        torch.autograd.backward(out.loss + out.z_q.float().sum())
        made.finish_step()
        assert z.grad is not None
        assert z.grad.isfinite().all()
    assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in made.state_dict().values())
    made.eval()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = made(latents(B=8).cuda())
        if out.codes is not None:
            assert torch.equal(made.codes_to_latents(out.codes), out.z_q)


@pytest.mark.parametrize("size", [64, 1024, 16_384])
def test_the_nearest_codes_are_those_of_the_cpu(size: int) -> None:
    """Trap 6: float32 there too, not TF32, by the same rule for ties."""
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(5000, 32, generator=generator), torch.randn(size, 32, generator=generator)
    assert (find_nearest(x.cuda(), codes.cuda()).cpu() == find_nearest(x, codes)).float().mean() > 0.999
