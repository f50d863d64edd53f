"""Stage one: train a tokenizer.   accelerate launch stage1_tokenizer/train.py [--config FILE] [--key value ...]

    data -> tokenizer -> generator loss (-> discriminator loss) -> step -> log -> validate -> save

Writes runs/stage1/NAME/tokenizer.safetensors. The same command again continues where it stopped.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.data import DataConfig, open_data
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.order import BatchOrder, training_batches
from stage1_tokenizer.data.pictures import normalise
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.diagnostics.alarms import build_alarms
from stage1_tokenizer.diagnostics.alarms.latents import Codes
from stage1_tokenizer.diagnostics.report.ending import report_at_end
from stage1_tokenizer.diagnostics.report.tokenizer import tokenizer_page
from stage1_tokenizer.discriminator import PatchDiscriminator
from stage1_tokenizer.engine.averages import mean, means, over_processes
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.compiling import Compiling
from stage1_tokenizer.engine.console import command
from stage1_tokenizer.engine.finite import FiniteGuard, Tally, clip
from stage1_tokenizer.engine.launch import check_batch_size, check_share, on_main, start_accelerator
from stage1_tokenizer.engine.optim import Ema, OptimConfig, build_optimizer, learning_rate, set_learning_rate
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.engine.seeds import derive_seed
from stage1_tokenizer.engine.signals import StopRequest
from stage1_tokenizer.engine.state import Part
from stage1_tokenizer.metrics import CodeUse, pixel_variance
from stage1_tokenizer.networks import NetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.objective import (
    AdversarialConfig,
    DiscriminatorLoss,
    GeneratorLoss,
    PixelConfig,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    generator_loss,
    pulled_back,
    reconstruction_loss,
)
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from stage1_tokenizer.validation import pairs, validate


class TrainTokenizerConfig(RunConfig):
    """Train a tokenizer. The defaults are the quickstart: a VQ-VAE on drawn shapes, minutes on two CPU cores."""

    steps: PositiveInt = 1300
    """Optimizer steps."""
    data: DataConfig = ShapesConfig()
    network: NetworkConfig = SonnetNetworkConfig(local=True)
    bottleneck: BottleneckConfig = VqConfig()
    pixel: PixelConfig = PixelConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    optim: OptimConfig = OptimConfig()
    validate_every: PositiveInt = 325
    """Steps between validations on the whole validation split; also at the end."""
    save_every: PositiveInt = 325
    """Steps between saved states; also at the end, and when the run is asked to stop."""
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
    config.network.check(config.data.image_size)
    config.adversarial.check(config.data.image_size)
    opened = open_data(config.data)
    run = Run(config.folder, config, config.tree(), accelerator, TOKENIZER_FILE, opened)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    bad = run.folder / BAD_FILES
    train_set = opened.pictures("train", config.seed, device, bad)
    validation_set = opened.pictures("validation", config.seed, device, bad)
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
    bottleneck = tokenizer.bottleneck
    ema = Ema(tokenizer, config.optim.ema_decay)
    perceptual = Perceptual(config.perceptual, config.data.image_size).to(device) if config.perceptual.weight else None
    optimizer = build_optimizer(tokenizer, config.optim)
    parts: dict[str, Part] = {"tokenizer": tokenizer, "ema": ema.module, "optimizer": optimizer}
    adaptive = bool(config.adversarial.weight) and config.adversarial.adaptive
    compiling = Compiling(accelerator, eager=[bottleneck], keeps_graph=adaptive)
    model, optimizer = accelerator.prepare(tokenizer, optimizer)
    if config.adversarial.weight:
        critic = PatchDiscriminator(config.adversarial.discriminator, train_set.channels).to(device)
        critic_optimizer = build_optimizer(critic, config.optim)
        parts |= {"discriminator": critic, "discriminator_optimizer": critic_optimizer}
        critic_model, critic_optimizer = accelerator.prepare(critic, critic_optimizer)

    use, tally = CodeUse(bottleneck.depth, bottleneck.codebook_size, device), Tally().to(device)
    parts |= {"code_use": use, "tally": tally}
    first = run.resume(parts)
    use.keep_on_main(accelerator)
    order = BatchOrder(len(train_set), config.batch_size, config.seed, rank, processes)
    batches = training_batches(train_set, order, first, config.steps, config.data.workers)
    variance = pixel_variance(train_set)
    positions = tokenizer.shape.h * tokenizer.shape.w if bottleneck.depth else 0
    codes = Codes(bottleneck.codebook_size, config.batch_size * positions, len(validation_set) * positions)
    alarms = build_alarms(config.bottleneck, config.adversarial, config.optim, codes)
    for entry in run.logged():  # what an uninterrupted run has seen by now
        alarms.look(int(entry["step"]), entry)
    header = {"config": tokenizer.config.model_dump_json(), "data": config.data.model_dump_json()}

    def save_weights(done: int) -> None:
        full = {**header, "step": str(done)}
        on_main(accelerator, lambda: write_weights(run.folder / TOKENIZER_FILE, ema.module, "tokenizer", full))

    def save(done: int) -> None:
        use.gather(accelerator)
        run.save(done, parts, config.keep)
        save_weights(done)

    def record(done: int, values: dict[str, float], show: tuple[str, ...] = ()) -> None:
        run.log(done, values, show)
        for name, message in alarms.look(done, values):
            run.alarm(done, name, message)

    def reconstruct(
        model: torch.nn.Module, x: Tensor, adversarial_now: bool
    ) -> tuple[Tensor, Bottlenecked, GeneratorLoss]:
        x_hat, bottlenecked = model(x)
        adaptive_now = adversarial_now and adaptive
        image = x_hat.detach().requires_grad_() if adaptive_now else x_hat
        with accelerator.autocast():  # for LPIPS: distances are taken in float32 all the same
            reconstruction, terms = reconstruction_loss(x, image, config.pixel, perceptual, config.perceptual.weight)
        if not adversarial_now:
            return x_hat, bottlenecked, generator_loss(reconstruction, terms, bottlenecked)
        adversarial = adversarial_loss(critic, image, config.adversarial.loss)
        weight = torch.full((), config.adversarial.weight, device=device)
        if adaptive_now:
            scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
            reconstruction, adversarial = (pulled_back(it, image, x_hat, scale) for it in (reconstruction, adversarial))
            average = partial(accelerator.reduce, reduction="mean")
            last = tokenizer.decoder.last_weight
            weight = weight * adaptive_weight(reconstruction, adversarial, last, average, loss_scale=scale)
        return x_hat, bottlenecked, generator_loss(reconstruction, terms, bottlenecked, adversarial, weight)

    def judge(model: torch.nn.Module, x: Tensor, x_hat: Tensor) -> DiscriminatorLoss:
        real, fake = model(x, x_hat)
        return discriminator_loss(real, fake, config.adversarial.loss)

    models: dict[str, Any] = {**parts, "perceptual": perceptual}
    taking_part = {name: models[name] for name in ("tokenizer", "discriminator", "perceptual") if models.get(name)}
    guarding = partial(FiniteGuard, accelerator, run.folder, tally=tally, skips=config.skips, alarm=run.alarm)
    guard = guarding(taking_part, lambda x, adversarial_now: reconstruct(tokenizer, x, adversarial_now)[-1])
    if config.adversarial.weight:
        critic_guard = guarding({"discriminator": critic}, partial(judge, critic), counter="critic_in_a_row")

    stop, learned = StopRequest(), bool(tally.learned)
    if first:  # the stop may have come after the state was saved and before the weights were
        save_weights(first)
    for step, (pixels, labels) in zip(range(first, config.steps), run.saving(batches, first, save), strict=True):
        set_learning_rate(optimizer, learning_rate(config.optim, config.optim.lr, step, config.steps))
        adversarial_now = bool(config.adversarial.weight) and step >= config.adversarial.start
        compiling.begin_step()
        model.train()
        images = normalise(pixels.to(device, non_blocking=True))  # (B, C, H, W)
        micro_batches = images.contiguous(memory_format=torch.channels_last).chunk(config.accumulation)
        reconstructions, codes_of, parts_of, critic_parts = [], [], [], []
        if not learned:  # the first step, or those before it were left out
            with torch.no_grad(), accelerator.autocast():
                latents = torch.cat([tokenizer.encoder(x) for x in micro_batches])
                bottleneck.start(latents.nan_to_num(posinf=0.0, neginf=0.0))  # the guard will say where they come from
            if too_few := codes.too_few(config.bottleneck):
                run.alarm(step + 1, "few vectors", too_few)

        seed, batch = derive_seed(config.seed, "model", step, rank), partial(kept, order, step, pixels, labels)
        torch.manual_seed(seed)
        for number, x in enumerate(micro_batches, start=1):
            with nullcontext() if number == config.accumulation else accelerator.no_sync(model):
                x_hat, bottlenecked, loss = reconstruct(model, x, adversarial_now)
                accelerator.backward(loss.total / config.accumulation)
            reconstructions.append(x_hat.detach())
            parts_of.append(loss.parts)
            if bottlenecked.codes is not None:
                codes_of.append(bottlenecked.codes)
        inputs: list[tuple[Any, ...]] = [(x, adversarial_now) for x in micro_batches]
        checked = guard.check(step + 1, mean("total", parts_of), inputs, seed, batch, stop.asked)
        if checked.finite:
            tally.learned += 1
            learned = True
            clip(tokenizer, config.optim.clip, checked.norm, tally)
            optimizer.step()
            bottleneck.finish_step()
            ema.update(tokenizer, step)
            for used in codes_of:
                use.add(used)
        else:
            bottleneck.drop_step()
        optimizer.zero_grad()

        if adversarial_now and checked.finite:
            set_learning_rate(
                critic_optimizer,
                learning_rate(config.optim, config.adversarial.lr or config.optim.lr, step, config.steps),
            )
            for number, (x, x_hat) in enumerate(zip(micro_batches, reconstructions, strict=True), start=1):
                with nullcontext() if number == config.accumulation else accelerator.no_sync(critic_model):
                    critic_loss = judge(critic_model, x, x_hat)
                    accelerator.backward(critic_loss.total / config.accumulation)
                critic_parts.append(critic_loss.parts)
            inputs = list(zip(micro_batches, reconstructions, strict=True))
            critic_checked = critic_guard.check(step + 1, mean("total", critic_parts), inputs, seed, batch)
            if critic_checked.finite:
                clip(critic, config.optim.clip, critic_checked.norm, tally)
                critic_optimizer.step()
            critic_optimizer.zero_grad()

        run.advance(config.batch_size)
        done, last = step + 1, step + 1 == config.steps
        saves = done % config.save_every == 0 or last
        if (done % config.log_every == 0 or saves) and checked.finite:
            scalars = means("train", parts_of) | {"train/gradient_norm": checked.norm}
            values = over_processes(accelerator, scalars | means("discriminator", critic_parts))
            values["train/nmse"] = values["train/l2"] / variance
            if bottleneck.depth:
                use.counts = accelerator.reduce(use.counts, "sum")
                values |= {f"train/{name}": figure for name, figure in use.figures().items()}
                use.counts.zero_()
            values |= tally.entry() | {
                "train/lr": optimizer.param_groups[0]["lr"],
                "train/images_per_second": run.images_per_second,
            }
            record(done, values, show=("train/total",))
        if done % config.validate_every == 0 or last:
            with run.kept(done, save):
                lpips = (perceptual, config.perceptual.weight)
                figures = validate(
                    accelerator, ema.module, validation_set, config.batch_size, variance, config.pixel, *lpips
                )
                record(done, {f"validation/{name}": figure for name, figure in figures.items()})
                run.validated(done, figures)
                if config.pictures:
                    grid = pairs(ema.module, validation_set, config.pictures, device)
                    run.pictures(done, "reconstructions", grid, columns=8)
        if saves or checked.stop:
            save(done)
        if checked.stop and not last:
            run.interrupt(done)

    run.finish()
    nexts = [("next", "stage2_prior/train.py")] * bool(bottleneck.depth)
    nexts += [("next", "sampling/generate.py")] * bool(bottleneck.noise_channels)
    nexts += [("pictures that explain it", "stage1_tokenizer/analyze.py")]
    run.summarise(*((what, command(script, "--tokenizer", run.folder)) for what, script in nexts))
    report_at_end(accelerator, config.report, run.folder, tokenizer_page)


def kept(order: BatchOrder, step: int, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is saved of a batch that was not learned from."""
    indices, epochs = map(torch.from_numpy, order.places(step))
    return {"pixels": pixels, "labels": labels, "indices": indices, "epochs": epochs}


if __name__ == "__main__":
    run_command(main)
