"""Train an image tokenizer (stage one).   accelerate launch stage1_tokenizer/train.py [--config FILE] [--key value ...]

    images -> tokenizer -> generator loss -> optimizer step (-> discriminator step) -> log -> validate -> save

Writes runs/stage1/NAME/tokenizer.safetensors. The same command again continues a stopped run.
"""

from functools import partial
from pathlib import Path

import torch
from pydantic import NonNegativeInt, PositiveInt

from stage1_tokenizer import validation
from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.order import BatchOrder, training_batches
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.diagnostics.alarms import build_alarms
from stage1_tokenizer.diagnostics.alarms.latents import CodeCounts
from stage1_tokenizer.diagnostics.report.ending import report_at_end
from stage1_tokenizer.diagnostics.report.tokenizer import tokenizer_page
from stage1_tokenizer.engine import launch, training_step
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.compiling import Compiling
from stage1_tokenizer.engine.console import format_command
from stage1_tokenizer.engine.finite import FiniteGuard, Tally
from stage1_tokenizer.engine.optim import Ema, OptimConfig
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.engine.seeds import derive_seed
from stage1_tokenizer.engine.signals import StopRequest
from stage1_tokenizer.engine.state import Part
from stage1_tokenizer.metrics import CodeUse, pixel_variance
from stage1_tokenizer.networks import NetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.objective import AdversarialConfig, PixelConfig, build_objective
from stage1_tokenizer.perceptual import PerceptualConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, build_tokenizer, save_tokenizer, start_codebook


class TrainTokenizerConfig(RunConfig):
    """Train a tokenizer. The defaults are the quickstart: a VQ-VAE on drawn shapes, minutes on two CPU cores."""

    console_metrics = validation.METRICS

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
    """Validation images in the grid of reconstructions that each validation writes; 0: no grid."""

    @property
    def folder(self) -> Path:
        """The run's folder: --out, or runs/stage1/NAME by the config file or by data set and bottleneck."""
        name = Path(self.config).stem if self.config else f"{self.data.kind}_{self.bottleneck.kind}"
        return Path(self.out) if self.out else Path("runs/stage1") / name

    def check(self, processes: int) -> None:
        """Raise ConfigError for values that do not fit together, before any data is read."""
        launch.check_batch_size(self.batch_size, self.accumulation, processes)
        self.network.check(self.data.image_size)
        self.adversarial.check(self.data.image_size)


def main() -> None:
    """Set up the run (data, tokenizer, objective, optimizers, state), then train, validate and save in one loop."""
    config = parse_command_line(TrainTokenizerConfig)
    accelerator = launch.start_accelerator()
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    config.check(processes)
    data = open_data(config.data)
    run = Run(config, accelerator, TOKENIZER_FILE, data)
    train_set, validation_set = (
        data.image_batches(split, config.seed, device, run.folder / BAD_FILES) for split in ("train", "validation")
    )
    launch.check_validation_size(len(validation_set), processes)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    image_size, channels = config.data.image_size, train_set.channels
    tokenizer = build_tokenizer(config.network, config.bottleneck, image_size, channels, processes).to(device)
    bottleneck, ema = tokenizer.bottleneck, Ema(tokenizer, config.optim.ema_decay)
    objective = build_objective(tokenizer, config.pixel, config.perceptual, config.adversarial, accelerator)
    compiling = Compiling(accelerator, eager=[bottleneck], keeps_graph=objective.is_adaptive)
    prepare = partial(training_step.TrainedNetwork, accelerator, config=config.optim, steps=config.steps)
    generator, discriminator = prepare(tokenizer), None
    if objective.discriminator:
        discriminator = prepare(objective.discriminator, peak=config.adversarial.lr)
    use, tally = CodeUse(bottleneck.depth, bottleneck.codebook_size, device), Tally().to(device)

    parts: dict[str, Part] = {"tokenizer": tokenizer, "ema": ema.module, "optimizer": generator.optimizer}
    if discriminator:
        parts |= {"discriminator": discriminator.module, "discriminator_optimizer": discriminator.optimizer}
    parts |= {"code_use": use, "tally": tally}
    positions = tokenizer.shape.h * tokenizer.shape.w if bottleneck.depth else 0
    codes = CodeCounts(bottleneck.codebook_size, config.batch_size * positions, len(validation_set) * positions)
    write = partial(save_tokenizer, run.folder / TOKENIZER_FILE, ema.module, config.data)
    run.resume(
        parts,
        watch=build_alarms(config.bottleneck, config.adversarial, config.optim, codes),
        write_weights=lambda step: launch.run_on_main(accelerator, lambda: write(step)),
        before_saving=lambda: use.gather(accelerator),
    )
    use.keep_on_main(accelerator)
    build_guard = partial(FiniteGuard, accelerator, run.folder, tally=tally, skips=config.skips, alarm=run.alarm)
    guard = build_guard(objective.modules, lambda *inputs: objective.reconstruct(*inputs).loss)
    if discriminator:
        discriminator_modules = {"discriminator": discriminator.module}
        discriminator_guard = build_guard(discriminator_modules, objective.discriminate, counter="critic_in_a_row")
    order = BatchOrder(len(train_set), config.batch_size, config.seed, rank, processes)
    batches = training_batches(train_set, order, run.first_step, config.steps, config.data.workers)
    variance = pixel_variance(train_set)
    stop, has_learned = StopRequest(), bool(tally.learned)

    for step, (pixels, labels) in zip(range(run.first_step, config.steps), run.fetch_batches(batches), strict=True):
        done, is_last = step + 1, step + 1 == config.steps
        compiling.begin_step()
        generator.begin_step(step)
        images = normalise(pixels.to(device, non_blocking=True))  # (B, C, H, W) float32 in [-1, 1]
        micro_batches = images.contiguous(memory_format=torch.channels_last).chunk(config.accumulation)  # (b, C, H, W)
        if not has_learned:  # the first step, or all steps so far were skipped
            with accelerator.autocast():
                start_codebook(tokenizer, micro_batches)
            if message := codes.few_vectors_message(config.bottleneck):
                run.alarm(done, "few vectors", message)

        seed = derive_seed(config.seed, "model", step, rank)
        torch.manual_seed(seed)
        describe = partial(order.describe_batch, step, pixels, labels)
        is_adversarial = objective.is_adversarial(step)
        x_hats, all_codes, generator_parts, discriminator_parts = [], [], [], []
        for x in generator.micro_batches(micro_batches):  # (b, C, H, W)
            x_hat, bottlenecked, loss = objective.reconstruct(x, is_adversarial, generator.model)
            accelerator.backward(loss.total / config.accumulation)
            x_hats.append(x_hat.detach())  # (b, C, H, W)
            if bottlenecked.codes is not None:
                all_codes.append(bottlenecked.codes)  # (b, h, w, K)
            generator_parts.append(loss.parts)  # {name: ()}
        total = training_step.mean_part("total", generator_parts)  # ()
        checked = guard.check(done, total, [(x, is_adversarial) for x in micro_batches], seed, describe, stop.asked)
        generator.learn(checked, tally)
        if checked.is_finite:
            has_learned = True
            tally.learned += 1
            bottleneck.finish_step()
            ema.update(tokenizer, step)
            for micro_batch_codes in all_codes:
                use.add(micro_batch_codes)
        else:
            bottleneck.drop_step()

        if discriminator and is_adversarial and checked.is_finite:
            discriminator.begin_step(step)
            pairs = list(zip(micro_batches, x_hats, strict=True))
            for x, x_hat in discriminator.micro_batches(pairs):  # (b, C, H, W) each
                loss = objective.discriminate(x, x_hat, discriminator.model)
                accelerator.backward(loss.total / config.accumulation)
                discriminator_parts.append(loss.parts)  # {name: ()}
            total = training_step.mean_part("total", discriminator_parts)  # ()
            discriminator.learn(discriminator_guard.check(done, total, pairs, seed, describe), tally)

        run.count_step(config.batch_size)
        is_saved = done % config.save_every == 0 or is_last
        if (done % config.log_every == 0 or is_saved) and checked.is_finite:
            scalars = training_step.mean_parts("train", generator_parts) | {"train/gradient_norm": checked.norm}
            scalars |= training_step.mean_parts("discriminator", discriminator_parts)
            values = training_step.average_over_processes(accelerator, scalars)
            values |= {"train/nmse": values["train/l2"] / variance}
            values |= {f"train/{name}": value for name, value in use.take_metrics(accelerator).items()}
            values |= tally.take_counts() | {"train/lr": generator.rate}
            values |= {"train/images_per_second": run.images_per_second}
            run.log(done, values, show=("train/total",))
        if done % config.validate_every == 0 or is_last:
            with run.save_on_error(done):
                metrics = validation.validate(
                    accelerator, ema.module, validation_set, config.batch_size, variance, objective.reconstruction_loss
                )
                run.log(done, {f"validation/{name}": value for name, value in metrics.items()})
                run.print_validation(done, metrics)
                if config.pictures:
                    grid = validation.reconstruct_pairs(ema.module, validation_set, config.pictures, device)
                    run.log_images(done, "reconstructions", grid, columns=8)
        if is_saved or checked.must_stop:
            run.save(done)
        if checked.must_stop and not is_last:
            run.interrupt(done)

    run.close()
    run.print_summary(*next_commands(run.folder, has_codes=bottleneck.depth > 0, samples=bottleneck.noise_channels > 0))
    report_at_end(accelerator, config.report, run.folder, tokenizer_page)


def next_commands(folder: Path, has_codes: bool, samples: bool) -> list[tuple[str, str]]:
    """Return (purpose, command) of the commands that can follow a training.

    has_codes: the tokenizer has codes for a prior. samples: its bottleneck can sample by itself.
    """
    scripts = [("next", "stage2_prior/train.py")] if has_codes else []
    scripts += [("next", "sampling/generate.py")] if samples else []
    scripts += [("diagnostic images", "stage1_tokenizer/analyze.py")]
    return [(purpose, format_command(script, "--tokenizer", folder)) for purpose, script in scripts]


if __name__ == "__main__":
    run_command(main)
