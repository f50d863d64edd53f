"""A full training step of a VQGAN, generator and discriminator: ours against the textbook step.

The textbook step is that of taming-transformers in plain PyTorch: lambda by two `autograd.grad` calls from the losses
to the last layer (`retain_graph`), then backward through everything again; a second run of the autoencoder for the
discriminator; the lpips package; Adam. Our step goes backward through LPIPS and the discriminator once, down to the
reconstruction, and once through the decoder. Our discriminator learns from the same reconstruction, tensors are
channels_last, and AdamW is fused. The textbook step is timed in channels_last too, to show the effect of the memory
layout alone.

All steps have the same networks, weights and batch. Before anything is timed, the generator's gradients must be equal,
each parameter's to 1e-5 of its norm (both in channels_last: another layout sums in another order, which can change the
outcome of a ReLU or a max-pooling near a tie). No step clips, checks for NaN or keeps an EMA of the weights.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from benchmarks.measure import Seconds, compare
from benchmarks.memory import peak_of
from benchmarks.record import Results
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.objective import AdversarialConfig, Objective, PixelConfig, adversarial_loss, discriminator_loss
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

PIXEL = PixelConfig(l1=1.0, l2=0.0)
ADVERSARIAL = AdversarialConfig(weight=1.0)
OPTIM = OptimConfig(lr=1e-5)
SAME = {"cpu": 1e-5, "cuda": 1e-4}
"""Largest relative difference of gradients that counts as equal (without TF32); a GPU sums in no fixed order."""
WAYS = ("textbook", "textbook, channels_last", "ours")
BFLOAT16 = ("textbook, bfloat16", "textbook, channels_last, bfloat16", "ours, bfloat16")
COMPILED = ("textbook, channels_last, bfloat16, compiled", "ours, bfloat16, compiled")
"""Ways for a GPU only: the tokenizer is compiled, as `accelerate launch --dynamo_backend inductor` does."""


class Size(NamedTuple):
    """Sizes of the networks and the batch."""

    batch: int
    side: int
    channels: int
    multipliers: tuple[int, ...]
    latent_channels: int
    codes: int
    repeats: int


FULL = Size(batch=8, side=64, channels=64, multipliers=(1, 1, 2, 2, 4), latent_channels=256, codes=1024, repeats=7)
GPU = FULL._replace(batch=64, repeats=9)
SMALL = Size(batch=2, side=32, channels=8, multipliers=(1, 2), latent_channels=8, codes=16, repeats=1)


@dataclass(frozen=True)
class Step:
    """A training step with its networks, optimizers and batch."""

    tokenizer: Tokenizer
    model: nn.Module
    """The tokenizer, compiled or not."""
    discriminator: PatchDiscriminator
    perceptual: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    x: Tensor
    bfloat16: bool

    def autocast(self) -> torch.autocast:
        """Return the context of the step's precision."""
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bfloat16)

    def backward(self) -> tuple[Tensor, Tensor]:
        """Compute the generator's gradients. Returns the reconstruction and lambda."""
        raise NotImplementedError

    def update(self) -> None:
        """Make the whole step, of generator and discriminator."""
        x_hat, _ = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.backward_discriminator(x_hat)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()

    def backward_discriminator(self, x_hat: Tensor) -> None:
        """Compute the discriminator's gradients from the batch and its reconstruction."""
        with self.autocast():
            real, fake = self.discriminator(self.x, x_hat.detach())
        torch.autograd.backward(discriminator_loss(real, fake, "hinge").total)


class Textbook(Step):
    """The step of taming-transformers."""

    def backward(self) -> tuple[Tensor, Tensor]:
        """Compute the generator's gradients by several passes."""
        with self.autocast():
            x_hat, bottlenecked = self.model(self.x)
            reconstruction = F.l1_loss(x_hat.float(), self.x) + self.perceptual(self.x, x_hat).float().mean()
            adversarial = adversarial_loss(self.discriminator, x_hat, "hinge")
        last = self.tokenizer.decoder.last_weight
        of_reconstruction = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].norm()
        of_adversarial = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
        weight = (of_reconstruction / (of_adversarial + 1e-6)).clamp(0.0, 1e4).detach()
        torch.autograd.backward(reconstruction + weight * adversarial + bottlenecked.loss)
        return x_hat, weight

    def backward_discriminator(self, x_hat: Tensor) -> None:
        """Compute them from a new reconstruction, by the updated weights."""
        with self.autocast():
            x_hat, _ = self.model(self.x)
        super().backward_discriminator(x_hat)


class Ours(Step):
    """Our step."""

    def backward(self) -> tuple[Tensor, Tensor]:
        """Compute the generator's gradients by `Objective`."""
        assert isinstance(self.perceptual, Perceptual)
        objective = Objective(self.tokenizer, PIXEL, self.perceptual, 1.0, ADVERSARIAL, self.discriminator)
        with self.autocast():
            x_hat, _, loss = objective.reconstruct(self.x, True, self.model)
        torch.autograd.backward(loss.total)
        return x_hat, loss.parts["lambda"]


def build(way: str, size: Size, device: torch.device) -> Step:
    """Build a step; all ways have the same weights and batch."""
    torch.manual_seed(0)
    network = VqganNetworkConfig(
        channels=size.channels, multipliers=size.multipliers, latent_channels=size.latent_channels
    )
    vq = VqConfig(codebook_size=size.codes, update="gradient", kmeans_init=False, revive_below=0.0)
    config = TokenizerConfig(image_size=(size.side, size.side), image_channels=3, network=network, bottleneck=vq)
    ours = way.startswith("ours")
    layout = torch.channels_last if ours or "channels_last" in way else torch.contiguous_format
    tokenizer = Tokenizer(config).to(device)
    discriminator = PatchDiscriminator(DiscriminatorConfig(), 3).to(device)
    metric = random_perceptual(size).to(device)
    perceptual = metric if ours else metric.lpips
    for module in (tokenizer, discriminator, perceptual):
        module.to(memory_format=layout)
    x = torch.rand(size.batch, 3, size.side, size.side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    optimizer, discriminator_optimizer = (
        build_optimizer(module, OPTIM)
        if ours
        else torch.optim.Adam(module.parameters(), lr=OPTIM.lr, betas=OPTIM.betas)
        for module in (tokenizer, discriminator)
    )
    x = x.to(device).contiguous(memory_format=layout)
    kind = Ours if ours else Textbook
    model: nn.Module = tokenizer
    if "compiled" in way:
        # The bottleneck is not compiled, and backward runs through a graph several times: see compiling.py.
        tokenizer.bottleneck.forward = torch.compiler.disable(tokenizer.bottleneck.forward)  # type: ignore
        torch._functorch.config.donated_buffer = False
        model = cast(nn.Module, torch.compile(tokenizer))
    return kind(tokenizer, model, discriminator, perceptual, optimizer, discriminator_optimizer, x, "bfloat16" in way)


def random_perceptual(size: Size) -> Perceptual:
    """Build LPIPS-VGG with random weights in its backbone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg.safetensors"
        save_file({f"features.{name}": tensor for name, tensor in make_layers(cfgs["D"]).state_dict().items()}, path)
        return Perceptual(PerceptualConfig(weight=1.0, weights=str(path)), (size.side, size.side))


def gradient_differences(ours: Step, theirs: Step) -> tuple[float, float]:
    """Return the largest relative difference between a parameter's two gradients, and that of lambda.

    A bias before a normalisation has a gradient of 0 except for rounding. Therefore each norm counts as at least 1/100
    of the norm of all gradients.
    """
    weights = [float(step.backward()[1]) for step in (ours, theirs)]
    gradients = [[p.grad for p in step.tokenizer.parameters() if p.grad is not None] for step in (ours, theirs)]
    least = 1e-2 * torch.nn.utils.get_total_norm(gradients[1])
    pairs = zip(*gradients, strict=True)
    apart = [float((mine - other).norm() / other.norm().clamp_min(least)) for mine, other in pairs]
    for step in (ours, theirs):
        step.optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in step.discriminator.parameters())
    return max(apart), abs(weights[0] / weights[1] - 1.0)


def parts_of(ours: Ours, theirs: Textbook) -> dict[str, Callable[[], object]]:
    """Return the parts of a step by name. Each call runs forward and backward."""
    x = ours.x

    def autoencoder() -> None:
        x_hat, bottlenecked = ours.tokenizer(x)
        torch.autograd.backward(F.l1_loss(x_hat, x) + bottlenecked.loss)
        ours.optimizer.zero_grad()

    def at_image(loss: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.backward(loss((0.9 * x).requires_grad_()))

    def discriminator() -> None:
        ours.backward_discriminator(0.9 * x)
        ours.discriminator_optimizer.zero_grad()

    def update(step: Step) -> None:
        for parameter in step.tokenizer.parameters():
            parameter.grad = parameter.detach()
        step.optimizer.step()
        step.optimizer.zero_grad()

    return {
        "autoencoder": autoencoder,
        "LPIPS": lambda: at_image(lambda x_hat: ours.perceptual(x, x_hat)),
        "LPIPS, the package": lambda: at_image(lambda x_hat: theirs.perceptual(x, x_hat).mean()),
        "discriminator, for the generator": lambda: at_image(
            partial(adversarial_loss, ours.discriminator, kind="hinge")
        ),
        "discriminator, its own": discriminator,
        "AdamW, fused": lambda: update(ours),
        "Adam": lambda: update(theirs),
    }


def one_step(way: str, size: Size, device: torch.device) -> Callable[[], object]:
    """Prepare a step for `peak_of`."""
    return build(way, size, device).update


def row(way: str, each: Seconds, took: Mapping[str, Seconds], peak_mib: float | None) -> dict[str, Any]:
    """Print the results of one way, and return them as a row."""
    times = took["textbook"].median / each.median
    print(f"{way}: {each.median * 1e3:.1f} ms, {times:.2f} times as fast as the textbook's", flush=True)
    return {"way": way, **each.row(), "times": times, "peak_mib": peak_mib}


def measure(device: torch.device, small: bool) -> Results:
    """Check the gradients, time the ways and their parts, and return the results."""
    on_gpu = device.type == "cuda"
    size = SMALL if small else GPU if on_gpu else FULL
    native = processor.takes_fast_path("bfloat16", device)
    if not native:
        print("bfloat16 is not timed: this processor emulates it")
    steps = {way: build(way, size, device) for way in (*WAYS, *(BFLOAT16 if native else ()))}
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    apart, lambda_apart = gradient_differences(steps["ours"], steps["textbook, channels_last"])
    torch.backends.cudnn.allow_tf32 = tf32
    assert max(apart, lambda_apart) < SAME[device.type], f"gradients {apart:.1e} apart, lambda {lambda_apart:.1e}"
    print(f"gradients {apart:.1e} apart, lambda {lambda_apart:.1e}", flush=True)
    took = compare({way: step.update for way, step in steps.items()}, size.repeats)
    rows = [
        row(way, each, took, None if small else peak_of(device, one_step, way, size, device))
        for way, each in took.items()
    ]
    if on_gpu:  # last, because compiling takes a minute
        took |= compare({way: build(way, size, device).update for way in COMPILED}, size.repeats, warmups=2)
        rows += [row(way, took[way], took, None) for way in COMPILED]
    ours, theirs = steps["ours"], steps["textbook"]
    assert isinstance(ours, Ours)
    assert isinstance(theirs, Textbook)
    parts = compare(parts_of(ours, theirs), size.repeats)
    return {
        "size": size._asdict(),
        "gradients_apart": apart,
        "lambda_apart": lambda_apart,
        "rows": rows,
        "parts": {name: each.row() for name, each in parts.items()},
    }


def table(results: Results) -> str:
    """Return the results as Markdown."""
    size = results["size"]
    lines = ["| step | ms | times as fast | peak, MiB |", "|---|---|---|---|"]
    for each in results["rows"]:
        memory = "" if each["peak_mib"] is None else f"{each['peak_mib']:,.0f}"
        lines.append(
            f"| {each['way']} | {each['median_s'] * 1e3:,.0f} ± {each['spread']:.0%} | {each['times']:.2f} | {memory} |"
        )
    parts = ", ".join(f"{name} {each['median_s'] * 1e3:,.1f}" for name, each in results["parts"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{size['side']}x{size['side']}, batch {size['batch']}, {size['channels']} channels times "
            f"{' '.join(map(str, size['multipliers']))}. The generator's gradients are "
            f"{results['gradients_apart']:.0e} apart, lambda {results['lambda_apart']:.0e} (relative). "
            f"Parts of ours in float32, alone, forward and back, ms: {parts}.",
        ]
    )
