"""The generator's gradients of train.py, taken at the reconstruction, against the adaptive weight of the textbooks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import alexnet

from stage1_tokenizer.objective import adaptive_weight, pull_back
from tests.helpers.processes import run_processes
from tests.helpers.training import StoppedError, train

WEIGHT = 0.7
COMMON = {
    "data.image_size": 32,
    "batch_size": 4,
    "bottleneck.update": "gradient",
    "bottleneck.kmeans_init": False,
    "bottleneck.revive_below": 0.0,
    "adversarial.weight": WEIGHT,
    "adversarial.discriminator.layers": 2,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "sonnet": {},
    "vqgan": {"network.kind": "vqgan", "network.channels": 16, "network.multipliers": "1,2"},
    "mlp": {"network.kind": "mlp", "network.hidden": "24,24", "network.factor": 8},
}


def textbook(
    modules: dict[str, nn.Module], x: Tensor, loss: str, average: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Equation 7 as it is written: a pass back from each loss to the last layer, then one from their sum to all.

    Returns the total (), lambda times its weight (), and the gradient of each of the tokenizer's parameters.
    """
    tokenizer, perceptual = modules["tokenizer"], modules.get("perceptual")
    x_hat, bottlenecked = tokenizer(x)
    reconstruction = F.l1_loss(x_hat, x) + F.mse_loss(x_hat, x)
    if perceptual is not None:
        reconstruction = reconstruction + 0.5 * perceptual.lpips(x, x_hat).mean()  # type: ignore[operator]
    (logits,) = modules["discriminator"](x_hat)
    adversarial = -logits.mean() if loss == "hinge" else -logits.sigmoid().log().mean()
    last: Tensor = tokenizer.decoder.last_weight  # type: ignore[assignment, union-attr]
    norms = [
        average(torch.autograd.grad(term, last, retain_graph=True)[0]).norm() for term in (reconstruction, adversarial)
    ]
    weight = WEIGHT * (norms[0] / (norms[1] + 1e-6)).clamp(0.0, 1e4)
    total = reconstruction + weight * adversarial + bottlenecked.loss
    return total.detach(), weight, list(torch.autograd.grad(total, list(tokenizer.parameters())))


def distances(accelerator: Accelerator, out: Path, options: dict[str, Any]) -> list[float]:
    """Return the relative distances of train.py's total, lambda and gradients from the textbook's.

    No gradient's norm counts as less than 1/100 of that of all: a bias before a norm has none but rounding."""
    caught: dict[str, Any] = {}

    class Guard:
        """Is given what train.py computes its loss with, and ends the run."""

        def __init__(self, _: Any, __: Any, modules: dict[str, nn.Module], again: Any, **___: Any) -> None:
            caught.setdefault("modules", modules)
            caught.setdefault("again", again)
            raise StoppedError

    def change(names: dict[str, Any], _: int) -> None:
        names["FiniteGuard"] = Guard

    train(accelerator, out, {**COMMON, **options}, ("log", 0), change)
    modules = caught["modules"]
    generator = torch.Generator().manual_seed(accelerator.process_index)
    x = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)

    def average(gradient: Tensor) -> Tensor:
        mean: Tensor = accelerator.reduce(gradient, "mean")
        return mean

    wanted, weight, theirs = textbook(modules, x, options["adversarial.loss"], average)
    total, parts = caught["again"](x, True)
    ours = torch.autograd.grad(total, list(modules["tokenizer"].parameters()))
    least = 1e-2 * torch.nn.utils.get_total_norm(theirs)
    apart = [(a - b).norm() / b.norm().clamp_min(least) for a, b in zip(ours, theirs, strict=True)]
    assert weight > 0
    assert torch.equal(parts["total"], total.detach())
    return [float(one) for one in [parts["total"] / wanted - 1, parts["lambda"] / weight - 1, *apart]]


@pytest.fixture(scope="session")
def lpips_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alex.safetensors"
    save_file({f"features.{n}": tensor for n, tensor in alexnet(weights=None).features.state_dict().items()}, path)
    return {"perceptual.weight": 0.5, "perceptual.net": "alex", "perceptual.weights": str(path)}


@pytest.mark.parametrize(
    ("network", "loss", "with_lpips", "processes"),
    [
        ("vqgan", "hinge", True, 1),
        ("vqgan", "vanilla", False, 1),
        ("sonnet", "vanilla", True, 1),
        ("sonnet", "hinge", False, 1),
        ("mlp", "hinge", True, 1),
        ("mlp", "vanilla", False, 1),
        ("sonnet", "hinge", True, 2),
    ],
)
def test_gradients_are_those_of_the_textbook(
    tmp_path: Path, lpips_options: dict[str, Any], network: str, loss: str, with_lpips: bool, processes: int
) -> None:
    """Trap 15: the total, lambda and every gradient to 1e-5, whatever the decoder's last layer is (a convolution, a
    transposed one, a linear layer); on two processes both weigh by the gradients of the joint batch."""
    options = {**NETWORKS[network], **(lpips_options if with_lpips else {}), "adversarial.loss": loss}
    for apart in run_processes(processes, distances, tmp_path, options):
        assert len(apart) > 10
        assert max(map(abs, apart)) < 1e-5


def image_loss(image: Tensor) -> Tensor:
    return (image * image.detach().sin()).square().sum()


def test_a_loss_is_pulled_back_to_the_reconstruction() -> None:
    """Its value and gradient, float16's loss scale cancelled; the graph of the loss itself is used up, so that nothing
    can go through it again."""
    torch.manual_seed(0)
    leaf = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    x_hat = leaf.exp()
    (wanted,) = torch.autograd.grad(image_loss(x_hat), leaf, retain_graph=True)
    for scale in (1.0, 65536.0):
        image = x_hat.detach().requires_grad_()
        loss = image_loss(image)
        ours = pull_back(loss, image, x_hat, scale)
        assert torch.equal(ours.detach(), loss.detach())
        (gradient,) = torch.autograd.grad(ours, leaf, retain_graph=True)
        assert torch.allclose(gradient, wanted, rtol=1e-12)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, image)


@pytest.mark.parametrize(
    ("last", "shape"),
    [
        (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (2, 4, 8, 8)),
        (nn.Linear(4, 3), (2, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lambda_goes_back_through_the_last_layer_alone(last: nn.Module, shape: tuple[int, ...]) -> None:
    """Not even its input's gradient is computed, let alone what is before it."""
    before = torch.ones(shape, requires_grad=True)
    seen: list[Tensor] = []
    hidden = before.exp()
    hidden.register_hook(seen.append)  # type: ignore[no-untyped-call]
    x_hat = last(hidden)
    image = x_hat.detach().requires_grad_()
    losses = [pull_back(loss, image, x_hat) for loss in (image_loss(image), image.mean())]
    assert isinstance(last.weight, Tensor)
    assert adaptive_weight(losses[0], losses[1], last.weight) > 0
    assert seen == []
    torch.autograd.backward(losses[0] + losses[1])
    assert len(seen) == 1
    assert before.grad is not None
