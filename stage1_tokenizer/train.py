"""Stage one: train a tokenizer.   accelerate launch stage1_tokenizer/train.py [--config FILE] [--key value ...]

    data -> tokenizer -> generator loss (-> discriminator loss) -> step -> log -> validate -> save

Writes runs/stage1/NAME/tokenizer.safetensors. The same command again continues where it stopped.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.data import DataConfig, open_data
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.order import BatchOrder, training_batches
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.diagnostics.alarms import build_alarms
from stage1_tokenizer.diagnostics.alarms.latents import CodeCounts
from stage1_tokenizer.diagnostics.report.ending import report_at_end
from stage1_tokenizer.diagnostics.report.tokenizer import tokenizer_page
from stage1_tokenizer.discriminator import PatchDiscriminator
from stage1_tokenizer.engine.averages import mean, means, over_processes
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.compiling import Compiling
from stage1_tokenizer.engine.console import command
from stage1_tokenizer.engine.finite import FiniteGuard, Tally
from stage1_tokenizer.engine.launch import check_batch_size, check_share, on_main, start_accelerator
from stage1_tokenizer.engine.learner import Learner
from stage1_tokenizer.engine.optim import Ema, OptimConfig
from stage1_tokenizer.engine.run import OpenedRun
from stage1_tokenizer.engine.seeds import derive_seed
from stage1_tokenizer.engine.signals import StopRequest
from stage1_tokenizer.engine.state import Part
from stage1_tokenizer.metrics import CodeUse, pixel_variance
from stage1_tokenizer.networks import NetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.objective import AdversarialConfig, Objective, PixelConfig
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerConfig
from stage1_tokenizer.validation import FIGURES, pairs, validate


class TrainTokenizerConfig(RunConfig):
    """Train a tokenizer. The defaults are the quickstart: a VQ-VAE on drawn shapes, minutes on two CPU cores."""

    figures = FIGURES

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
    check(config, processes)
    opened = open_data(config.data)
    folder = OpenedRun(config, accelerator, TOKENIZER_FILE, opened)
    train_set, validation_set = (
        opened.image_batches(split, config.seed, device, folder.path / BAD_FILES) for split in ("train", "validation")
    )
    check_share(len(validation_set), processes)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    tokenizer = build_tokenizer(config, train_set, processes).to(device)
    bottleneck, ema = tokenizer.bottleneck, Ema(tokenizer, config.optim.ema_decay)
    objective = build_objective(config, tokenizer, accelerator)
    compiling = Compiling(accelerator, eager=[bottleneck], keeps_graph=objective.is_adaptive)
    generator = Learner(accelerator, tokenizer, config.optim, config.steps)
    critic = None
    if objective.critic:
        critic = Learner(accelerator, objective.critic, config.optim, config.steps, peak=config.adversarial.lr)
    use, tally = CodeUse(bottleneck.depth, bottleneck.codebook_size, device), Tally().to(device)

    parts: dict[str, Part] = {"tokenizer": tokenizer, "ema": ema.module, "optimizer": generator.optimizer}
    if critic:
        parts |= {"discriminator": critic.module, "discriminator_optimizer": critic.optimizer}
    parts |= {"code_use": use, "tally": tally}
    header = {"config": tokenizer.config.model_dump_json(), "data": config.data.model_dump_json()}
    positions = tokenizer.shape.h * tokenizer.shape.w if bottleneck.depth else 0
    codes = CodeCounts(bottleneck.codebook_size, config.batch_size * positions, len(validation_set) * positions)
    run = folder.resume(
        parts,
        watch=build_alarms(config.bottleneck, config.adversarial, config.optim, codes),
        write_weights=partial(write_tokenizer, accelerator, folder.path / TOKENIZER_FILE, ema, header),
        before_saving=lambda: use.gather(accelerator),
    )
    use.keep_on_main(accelerator)

    order = BatchOrder(len(train_set), config.batch_size, config.seed, rank, processes)
    batches = training_batches(train_set, order, run.first, config.steps, config.data.workers)
    variance = pixel_variance(train_set)
    guarding = partial(FiniteGuard, accelerator, run.folder, tally=tally, skips=config.skips, alarm=run.alarm)
    guard = guarding(objective.modules, lambda x, is_adversarial: objective.generator(x, is_adversarial).loss)
    if critic:
        critic_guard = guarding({"discriminator": critic.module}, objective.discriminator, counter="critic_in_a_row")
    stop, has_learned = StopRequest(), bool(tally.learned)

    for step, (pixels, labels) in zip(range(run.first, config.steps), run.protected_batches(batches), strict=True):
        compiling.begin_step()
        generator.begin_step(step)
        images = normalise(pixels.to(device, non_blocking=True))  # (B, C, H, W)
        micro_batches = images.contiguous(memory_format=torch.channels_last).chunk(config.accumulation)
        if not has_learned:  # the first step, or those before it were left out
            start_codebook(tokenizer, micro_batches, accelerator)
            if message := codes.few_vectors_message(config.bottleneck):
                run.alarm(step + 1, "few vectors", message)

        seed = derive_seed(config.seed, "model", step, rank)
        batch = partial(batch_for_record, order, step, pixels, labels)
        torch.manual_seed(seed)
        is_adversarial = objective.is_adversarial(step)
        x_hats, codes_of, parts_of, critic_parts = [], [], [], []
        for x in generator.micro_batches(micro_batches):
            x_hat, bottlenecked, loss = objective.generator(x, is_adversarial, generator.model)
            accelerator.backward(loss.total / config.accumulation)
            x_hats.append(x_hat.detach())
            if bottlenecked.codes is not None:
                codes_of.append(bottlenecked.codes)
            parts_of.append(loss.parts)
        inputs: list[tuple[Any, ...]] = [(x, is_adversarial) for x in micro_batches]
        checked = guard.check(step + 1, mean("total", parts_of), inputs, seed, batch, stop.asked)
        generator.learn(checked, tally)
        if checked.finite:
            has_learned = True
            tally.learned += 1
            bottleneck.finish_step()
            ema.update(tokenizer, step)
            for used in codes_of:
                use.add(used)
        else:
            bottleneck.drop_step()

        if critic and is_adversarial and checked.finite:
            critic.begin_step(step)
            inputs = list(zip(micro_batches, x_hats, strict=True))
            for x, x_hat in critic.micro_batches(inputs):
                loss = objective.discriminator(x, x_hat, critic.model)
                accelerator.backward(loss.total / config.accumulation)
                critic_parts.append(loss.parts)
            critic.learn(critic_guard.check(step + 1, mean("total", critic_parts), inputs, seed, batch), tally)

        run.advance(config.batch_size)
        done, is_last = step + 1, step + 1 == config.steps
        is_saved = done % config.save_every == 0 or is_last
        if (done % config.log_every == 0 or is_saved) and checked.finite:
            scalars = means("train", parts_of) | {"train/gradient_norm": checked.norm}
            values = over_processes(accelerator, scalars | means("discriminator", critic_parts))
            values |= {"train/nmse": values["train/l2"] / variance}
            values |= {f"train/{name}": figure for name, figure in use.taken(accelerator).items()}
            values |= tally.entry() | {"train/lr": generator.rate, "train/images_per_second": run.images_per_second}
            run.log(done, values, show=("train/total",))
        if done % config.validate_every == 0 or is_last:
            with run.protected(done):
                figures = validate(
                    accelerator, ema.module, validation_set, config.batch_size, variance, objective.distance
                )
                run.log(done, {f"validation/{name}": figure for name, figure in figures.items()})
                run.validated(done, figures)
                if config.pictures:
                    grid = pairs(ema.module, validation_set, config.pictures, device)
                    run.log_images(done, "reconstructions", grid, columns=8)
        if is_saved or checked.stop:
            run.save(done)
        if checked.stop and not is_last:
            run.interrupt(done)

    run.finish()
    nexts = [("next", "stage2_prior/train.py")] * bool(bottleneck.depth)
    nexts += [("next", "sampling/generate.py")] * bool(bottleneck.noise_channels)
    nexts += [("pictures that explain it", "stage1_tokenizer/analyze.py")]
    run.summarise(*((what, command(script, "--tokenizer", run.folder)) for what, script in nexts))
    report_at_end(accelerator, config.report, run.folder, tokenizer_page)


def check(config: TrainTokenizerConfig, processes: int) -> None:
    """Raise ConfigError for what cannot be trained together; before anything is read."""
    check_batch_size(config.batch_size, config.accumulation, processes)
    config.network.check(config.data.image_size)
    config.adversarial.check(config.data.image_size)


def build_tokenizer(config: TrainTokenizerConfig, images: ImageBatches, processes: int) -> Tokenizer:
    """The tokenizer for these images, untrained, in channels_last."""
    described = TokenizerConfig(
        image_size=config.data.image_size,
        image_channels=images.channels,
        network=config.network,
        bottleneck=config.bottleneck,
    )
    return Tokenizer(described, processes).to(memory_format=torch.channels_last)


def build_objective(config: TrainTokenizerConfig, tokenizer: Tokenizer, accelerator: Accelerator) -> Objective:
    """The losses, with LPIPS and the discriminator where the config gives them a weight."""
    perceptual = critic = None
    if config.perceptual.weight:
        perceptual = Perceptual(config.perceptual, config.data.image_size).to(accelerator.device)
    if config.adversarial.weight:
        critic = PatchDiscriminator(config.adversarial.discriminator, tokenizer.config.image_channels)
        critic.to(accelerator.device)
    scaler = accelerator.scaler
    return Objective(
        tokenizer,
        config.pixel,
        perceptual,
        config.perceptual.weight,
        config.adversarial,
        critic,
        average=partial(accelerator.reduce, reduction="mean"),
        loss_scale=scaler.get_scale if scaler else lambda: 1.0,
        autocast=accelerator.autocast,
    )


def write_tokenizer(
    accelerator: Accelerator, path: Path, ema: Ema[Tokenizer], header: dict[str, str], done: int
) -> None:
    """Write the averaged weights of so many steps."""
    described = {**header, "step": str(done)}
    on_main(accelerator, lambda: write_weights(path, ema.module, "tokenizer", described))


@torch.no_grad()
def start_codebook(tokenizer: Tokenizer, micro_batches: tuple[Tensor, ...], accelerator: Accelerator) -> None:
    """Place the codebook's vectors by the latents of the first batch; each micro-batch (b, C, H, W)."""
    with accelerator.autocast():
        latents = torch.cat([tokenizer.encoder(x) for x in micro_batches])  # (B, D, h, w)
        # The guard will say where a value comes from that is not finite.
        tokenizer.bottleneck.start(latents.nan_to_num(posinf=0.0, neginf=0.0))


def batch_for_record(order: BatchOrder, step: int, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A batch that was not learned from, as the guard saves it."""
    indices, epochs = map(torch.from_numpy, order.places(step))
    return {"pixels": pixels, "labels": labels, "indices": indices, "epochs": epochs}


if __name__ == "__main__":
    run_command(main)
