"""Train an image tokenizer (stage one).   accelerate launch stage1_tokenizer/train.py [--config FILE] [--key value ...]

    images -> tokenizer -> generator loss -> optimizer step (-> discriminator step) -> log -> validate -> save

Writes runs/stage1/NAME/tokenizer.safetensors. The same command again continues a stopped run.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import NonNegativeInt, PositiveInt

from stage1_tokenizer import validation
from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.config.base import Tree, parse_command_line
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
from stage1_tokenizer.discriminator import (
    PatchDiscriminator,
    check_discriminator,
    read_discriminator_config,
    save_discriminator,
    start_discriminator,
)
from stage1_tokenizer.engine import launch, training_step
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.compiling import Compiling
from stage1_tokenizer.engine.console import format_command
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.finite import FiniteGuard, Tally
from stage1_tokenizer.engine.initial_weights import name_source
from stage1_tokenizer.engine.optim import Ema
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.engine.seeds import derive_seed
from stage1_tokenizer.engine.signals import StopRequest
from stage1_tokenizer.engine.state import Part
from stage1_tokenizer.engine.training_config import TrainingConfig
from stage1_tokenizer.metrics import CodeUse, pixel_variance
from stage1_tokenizer.networks import NetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.objective import AdversarialConfig, Objective, PixelConfig, build_objective
from stage1_tokenizer.perceptual import PerceptualConfig
from stage1_tokenizer.tokenizer import (
    TOKENIZER_FILE,
    LoadedTokenizer,
    Tokenizer,
    TrainedParts,
    build_tokenizer,
    check_source,
    read_tokenizer_config,
    resolve_tokenizer,
    save_tokenizer,
    start_codebook,
    start_from,
)


class TrainTokenizerConfig(TrainingConfig):
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
    train: TrainedParts = "all"
    """Parts that learn, with --init_from. `decoder`: the codes of all images stay the same, so that a prior over them
    still fits; `bottleneck_and_decoder`: the encoder stays. The discriminator always learns, if there is one."""
    validate_every: PositiveInt = 325
    """Steps between validations on the whole validation split; also at the end."""
    save_every: PositiveInt = 325
    """Steps between saved states; also at the end, and when the run is asked to stop."""
    pictures: NonNegativeInt = 16
    """Validation images in the grid of reconstructions that each validation writes; 0: no grid."""

    @classmethod
    def defaults_by_files(cls, given: Tree) -> Tree:
        """Return the architecture and the image size of the tokenizer that --init_from names."""
        path, data = given.get("init_from"), given.get("data")
        if not isinstance(path, str):
            return {}
        file = resolve_tokenizer(path, "--init_from")
        source = read_tokenizer_config(file).tree()
        kind = (data.get("kind") if isinstance(data, dict) else None) or cls.model_fields["data"].default.kind
        values = {
            "network": source["network"],
            "bottleneck": source["bottleneck"],
            "data": {"kind": kind, "image_size": source["image_size"]},
        }
        discriminator = read_discriminator_config(file.parent)
        return values | ({"adversarial": {"discriminator": discriminator.tree()}} if discriminator else {})

    @property
    def folder(self) -> Path:
        """The run's folder: --out, or runs/stage1/NAME by the config file or by data set and bottleneck."""
        name = Path(self.config).stem if self.config else f"{self.data.kind}_{self.bottleneck.kind}"
        if self.init_from and not self.config:
            name += f"_from_{name_source(resolve_tokenizer(self.init_from, '--init_from'))}"
        return Path(self.out) if self.out else Path("runs/stage1") / name

    def check(self, processes: int) -> None:
        """Raise ConfigError for values that do not fit together, before any data is read."""
        launch.check_batch_size(self.batch_size, self.accumulation, processes)
        self.network.check(self.data.image_size)
        self.adversarial.check(self.data.image_size)

    def open_source(self) -> LoadedTokenizer | None:
        """Load the tokenizer that --init_from names, and check that this training can start from it; None: it names
        none.

        Raises:
            ConfigError: there is no such file, or its architecture differs; lists the tensors or options that differ.
            BadFileError: a file is damaged or of another kind.
        """
        if not self.init_from:
            if self.train != "all":
                raise ConfigError(
                    f"train {self.train}: the other parts would keep random weights. Give the tokenizer to start from: "
                    "--init_from RUN"
                )
            return None
        source = LoadedTokenizer.load(self.init_from, option="--init_from")
        check_source(source, self.data.image_size, self.network, self.bottleneck, self.train)
        if self.adversarial.weight:
            channels = source.tokenizer.config.image_channels
            check_discriminator(source.path.parent, self.adversarial.discriminator, channels)
        return source


def main() -> None:
    """Set up the run (data, tokenizer, objective, optimizers, state), then train, validate and save in one loop."""
    config = parse_command_line(TrainTokenizerConfig)
    accelerator = launch.start_accelerator()
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    config.check(processes)
    source, data = config.open_source(), open_data(config.data)
    replaced = {"init_from": source and source.fingerprint}
    run = Run(config, accelerator, TOKENIZER_FILE, data, replaced, fast_paths=config.bottleneck.fast_paths)
    train_set, validation_set = (
        data.image_batches(split, config.seed, device, run.folder / BAD_FILES) for split in ("train", "validation")
    )
    launch.check_validation_size(len(validation_set), processes)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    image_size, channels = config.data.image_size, train_set.channels
    tokenizer = build_tokenizer(config.network, config.bottleneck, image_size, channels, processes).to(device)
    objective = build_objective(tokenizer, config.pixel, config.perceptual, config.adversarial, accelerator)
    if source:
        start_models(objective, source, config.train, run.say)
    bottleneck, ema = tokenizer.bottleneck, Ema(tokenizer, config.optim.ema_decay)
    compiling = Compiling(accelerator, eager=[bottleneck], keeps_graph=objective.is_adaptive)
    prepare = partial(training_step.TrainedNetwork, accelerator, config=config.optim, steps=config.steps)
    generator, discriminator = prepare(tokenizer, in_eval_mode=tokenizer.in_eval_mode), None
    if objective.discriminator:
        discriminator = prepare(objective.discriminator, peak=config.adversarial.lr)
    use, tally = CodeUse(bottleneck.depth, bottleneck.codebook_size, device), Tally().to(device)

    parts: dict[str, Part] = {"tokenizer": tokenizer, "ema": ema.module, "optimizer": generator.optimizer}
    if discriminator:
        parts |= {"discriminator": discriminator.module, "discriminator_optimizer": discriminator.optimizer}
    parts |= {"code_use": use, "tally": tally}
    positions = tokenizer.shape.h * tokenizer.shape.w if bottleneck.depth else 0
    codes = CodeCounts(bottleneck.codebook_size, config.batch_size * positions, len(validation_set) * positions)
    run.resume(
        parts,
        watch=build_alarms(config.bottleneck, config.adversarial, config.optim, codes),
        write_weights=partial(write_models, accelerator, run.folder, ema.module, objective.discriminator, config.data),
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
    stop, has_learned = StopRequest(), bool(tally.learned or source)

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
        bottleneck.end_step(checked.is_finite)
        if checked.is_finite:
            has_learned = True
            tally.learned += 1
            ema.update(tokenizer, step)
            for micro_batch_codes in all_codes:
                use.add(micro_batch_codes)

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
        is_saved = config.is_save_step(done)
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


def start_models(
    objective: Objective, source: LoadedTokenizer, trained: TrainedParts, say: Callable[[str], None]
) -> None:
    """Start tokenizer and discriminator from a source, freeze what is not trained, and say what was done."""
    say(start_from(objective.tokenizer, source, trained))
    say(start_discriminator(objective.discriminator, source.path.parent))


def write_models(
    accelerator: Accelerator,
    folder: Path,
    tokenizer: Tokenizer,
    discriminator: PatchDiscriminator | None,
    data: DataConfig,
    step: int,
) -> None:
    """Write the weights of the tokenizer, and of the discriminator if there is one, after `step` optimizer steps."""

    def write() -> None:
        if discriminator:
            save_discriminator(folder, discriminator, step)
        save_tokenizer(folder / TOKENIZER_FILE, tokenizer, data, step)

    launch.run_on_main(accelerator, write)


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
