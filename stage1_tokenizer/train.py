"""Stage one: train a tokenizer.   accelerate launch stage1_tokenizer/train.py [--config FILE] [--key value ...]

    data -> tokenizer -> generator loss (-> discriminator loss) -> step -> log -> validate -> save

Writes runs/stage1/NAME/tokenizer.safetensors. The same command again continues where it stopped.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.checkpoint import Part, write_weights
from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.data import DataConfig, build_pictures
from stage1_tokenizer.data.order import BatchOrder, training_batches, validation_batches
from stage1_tokenizer.data.pictures import Pictures, normalise
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.discriminator import PatchDiscriminator
from stage1_tokenizer.errors import run_command
from stage1_tokenizer.losses import (
    AdversarialConfig,
    PixelConfig,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from stage1_tokenizer.metrics import CodeUse, psnr
from stage1_tokenizer.networks import NetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.optim import Ema, OptimConfig, build_optimizer, learning_rate, set_learning_rate
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.run import Run, check_batch_size, check_share, start_accelerator
from stage1_tokenizer.seeds import derive_seed
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig


class TrainTokenizerConfig(CommandConfig):
    """Train a tokenizer. The defaults are the quickstart: a VQ-VAE on drawn shapes, minutes on two CPU cores."""

    out: str | None = None
    """The run's folder; default: runs/stage1/ and the name of the config file, or DATA_BOTTLENECK."""
    seed: int = 0
    """Everything random in the run follows from it."""
    steps: PositiveInt = 1300
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step. Gradients are those of the whole batch; an EMA codebook and k-means, which
    learn in the forward pass, see each micro-batch as a batch of its own."""
    data: DataConfig = ShapesConfig()
    network: NetworkConfig = SonnetNetworkConfig(local=True)
    bottleneck: BottleneckConfig = VqConfig()
    pixel: PixelConfig = PixelConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    optim: OptimConfig = OptimConfig()
    log_every: PositiveInt = 20
    """Steps between log entries."""
    validate_every: PositiveInt = 325
    """Steps between validations on the whole validation split; also at the end."""
    save_every: PositiveInt = 325
    """Steps between saved states; also at the end."""
    keep: int = Field(2, ge=2)
    """Saved states to keep; at least 2, since the newest may be in the making when the power fails."""
    pictures: NonNegativeInt = 16
    """Images in the grids of reconstructions; 0: no grids."""

    @property
    def folder(self) -> Path:
        name = Path(self.config).stem if self.config else f"{self.data.kind}_{self.bottleneck.kind}"
        return Path(self.out) if self.out else Path("runs/stage1") / name


def main() -> None:
    config = parse_command_line(TrainTokenizerConfig)
    accelerator = start_accelerator()
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    check_batch_size(config.batch_size, config.accumulation, processes)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    train_set = build_pictures(config.data, "train", config.seed)
    validation_set = build_pictures(config.data, "validation", config.seed)
    check_share(len(validation_set), processes)
    tokenizer = Tokenizer(
        TokenizerConfig(
            image_size=config.data.image_size,
            image_channels=train_set.channels,
            network=config.network,
            bottleneck=config.bottleneck,
        ),
        processes,
    ).to(device)
    tokenizer.to(memory_format=torch.channels_last)
    ema = Ema(tokenizer, config.optim.ema_decay)
    perceptual = Perceptual(config.perceptual, config.data.image_size).to(device) if config.perceptual.weight else None
    optimizer = build_optimizer(tokenizer, config.optim)
    parts: dict[str, Part] = {"tokenizer": tokenizer, "ema": ema.module, "optimizer": optimizer}
    model, optimizer = accelerator.prepare(tokenizer, optimizer)
    if config.adversarial.weight:
        critic = PatchDiscriminator(config.adversarial.discriminator, train_set.channels).to(device)
        critic_optimizer = build_optimizer(critic, config.optim)
        parts |= {"discriminator": critic, "discriminator_optimizer": critic_optimizer}
        critic_model, critic_optimizer = accelerator.prepare(critic, critic_optimizer)

    run = Run(config.folder, config.tree(), config.steps, accelerator, TOKENIZER_FILE)
    first = run.resume(parts)
    order = BatchOrder(len(train_set), config.batch_size, config.seed, rank, processes)
    batches = training_batches(train_set, order, first, config.steps, config.data.workers)
    header = {"config": tokenizer.config.model_dump_json(), "data": config.data.model_dump_json()}

    def save_weights(done: int) -> None:
        if accelerator.is_main_process:
            write_weights(run.folder / TOKENIZER_FILE, ema.module, "tokenizer", {**header, "step": str(done)})

    if first:  # the stop may have come after the state was saved and before the weights were
        save_weights(first)
    for step, (pixels, _) in zip(range(first, config.steps), batches, strict=True):
        torch.manual_seed(derive_seed(config.seed, "model", step, rank))
        set_learning_rate(optimizer, learning_rate(config.optim, config.optim.lr, step, config.steps))
        adversarial_now = bool(config.adversarial.weight) and step >= config.adversarial.start
        model.train()
        images = normalise(pixels.to(device, non_blocking=True)).contiguous(
            memory_format=torch.channels_last
        )  # (B, C, H, W)
        micro_batches = images.chunk(config.accumulation)
        reconstructions = []

        for number, x in enumerate(micro_batches, start=1):
            with nullcontext() if number == config.accumulation else accelerator.no_sync(model):
                x_hat, bottlenecked = model(x)
                reconstruction, terms = reconstruction_loss(
                    x, x_hat, config.pixel, perceptual, config.perceptual.weight
                )
                adversarial, weight = None, torch.zeros((), device=device)
                if adversarial_now:
                    adversarial = adversarial_loss(critic, x_hat, config.adversarial.loss)
                    weight = config.adversarial.weight * (
                        adaptive_weight(
                            reconstruction,
                            adversarial,
                            tokenizer.decoder.last_weight,
                            average=lambda gradient: accelerator.reduce(gradient, "mean"),
                            loss_scale=accelerator.scaler.get_scale() if accelerator.scaler else 1.0,
                        )
                        if config.adversarial.adaptive
                        else torch.ones((), device=device)
                    )
                loss = generator_loss(reconstruction, terms, bottlenecked, adversarial, weight)
                accelerator.backward(loss.total / config.accumulation)
            reconstructions.append(x_hat.detach())
        gradient_norm = clip(accelerator, tokenizer, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(tokenizer, step)
        scalars = {f"train/{name}": value for name, value in loss.parts.items()} | {
            "train/gradient_norm": gradient_norm
        }

        if adversarial_now:
            set_learning_rate(
                critic_optimizer,
                learning_rate(config.optim, config.adversarial.lr or config.optim.lr, step, config.steps),
            )
            for number, (x, x_hat) in enumerate(zip(micro_batches, reconstructions, strict=True), start=1):
                with nullcontext() if number == config.accumulation else accelerator.no_sync(critic_model):
                    real, fake = critic_model(x, x_hat)
                    critic_loss = discriminator_loss(real, fake, config.adversarial.loss)
                    accelerator.backward(critic_loss.total / config.accumulation)
            clip(accelerator, critic, config.optim.clip)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            scalars |= {f"discriminator/{name}": value for name, value in critic_loss.parts.items()}

        run.advance(config.batch_size)
        done, last = step + 1, step + 1 == config.steps
        saves = done % config.save_every == 0 or last
        if done % config.log_every == 0 or saves:  # a state is saved only after a look at its losses
            values = {name: float(value) for name, value in scalars.items()}
            run.check_finite(done, values)
            values |= {"train/lr": optimizer.param_groups[0]["lr"], "train/images_per_second": run.images_per_second}
            run.log(done, values, show=("train/total", "train/images_per_second"))
        if done % config.validate_every == 0 or last:
            figures = validate(accelerator, ema.module, validation_set, config, perceptual)
            run.log(done, figures)
            run.say(f"step {done}: " + " ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            if config.pictures:
                grid = pairs(ema.module, validation_set, config.pictures, device)
                run.pictures(done, "reconstructions", grid, columns=8)
        if saves:
            run.save(done, parts, config.keep)
            save_weights(done)

    run.finish()
    accelerator.print(f"tokenizer: {run.folder / TOKENIZER_FILE}")
    if tokenizer.bottleneck.depth:
        accelerator.print(f"next: python stage2_prior/train.py --tokenizer {run.folder}")


def clip(accelerator: Accelerator, module: torch.nn.Module, largest: float) -> Tensor:
    """Clip the gradient's norm (0: do not); returns the norm () before clipping."""
    norm: Tensor = accelerator.clip_grad_norm_(module.parameters(), largest or float("inf"))
    return norm


@torch.inference_mode()
def validate(
    accelerator: Accelerator,
    tokenizer: Tokenizer,
    split: Pictures,
    config: TrainTokenizerConfig,
    perceptual: Perceptual | None,
) -> dict[str, float]:
    """Figures over the whole split, each image once over all processes."""
    device = accelerator.device
    sums: dict[str, Tensor] = {}
    use = CodeUse(tokenizer.bottleneck.codebook_size, device)
    size = max(1, config.batch_size // accelerator.num_processes)
    for pixels, _ in validation_batches(split, size, accelerator.process_index, accelerator.num_processes):
        x = normalise(pixels.to(device))
        with accelerator.autocast():
            x_hat, bottlenecked = tokenizer(x)
        reconstruction, terms = reconstruction_loss(
            x, x_hat.float(), config.pixel, perceptual, config.perceptual.weight
        )
        means = generator_loss(reconstruction, terms, bottlenecked).parts | {"psnr": psnr(x, x_hat).mean()}
        for name, mean in means.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + mean * len(x)
        if bottlenecked.codes is not None:
            use.add(bottlenecked.codes)
    figures = {
        f"validation/{name}": float(accelerator.reduce(total, "sum")) / len(split) for name, total in sums.items()
    }
    if tokenizer.bottleneck.depth:
        use.counts = accelerator.reduce(use.counts, "sum")
        figures |= {
            "validation/code_usage": use.usage,
            "validation/code_perplexity": use.perplexity,
            "validation/code_entropy_bits": use.entropy_bits,
        }
    return figures


@torch.inference_mode()
def pairs(tokenizer: Tokenizer, split: Pictures, n: int, device: torch.device) -> Tensor:
    """n images from all over a split, each followed by its reconstruction: (2n, C, H, W) in [-1, 1]."""
    pixels, _ = split.batch(np.linspace(0, len(split) - 1, min(n, len(split)), dtype=np.int64))
    x = normalise(pixels.to(device))
    return torch.stack([x, tokenizer(x)[0].float()], dim=1).flatten(0, 1)


if __name__ == "__main__":
    run_command(main)
