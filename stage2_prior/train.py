"""Stage two: train a prior over a tokenizer's codes.   python stage2_prior/train.py --tokenizer runs/stage1/NAME

    tokens (extracted once) -> prior -> cross entropy -> step -> log -> validate -> sample -> save

Writes runs/stage2/NAME/prior.safetensors, the weights that were best on validation, with the tokenizer beside it. The
same command again continues a stopped run.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from stage1_tokenizer.config.base import Tree, parse_command_line
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.config.value_types import Limit
from stage1_tokenizer.data import DataConfig, OpenData, data_config, open_data
from stage1_tokenizer.data.image_batches import Split
from stage1_tokenizer.data.order import BatchOrder, Places
from stage1_tokenizer.data.partial_options import own_data, with_own_data
from stage1_tokenizer.diagnostics.alarms.base import Alarms
from stage1_tokenizer.diagnostics.report.ending import report_at_end
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.compiling import Compiling
from stage1_tokenizer.engine.console import format_command
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.finite import FiniteGuard, Tally
from stage1_tokenizer.engine.launch import check_batch_size, run_on_main, start_accelerator
from stage1_tokenizer.engine.optim import Ema, OptimConfig
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.engine.seeds import derive_seed, draw_uniforms
from stage1_tokenizer.engine.signals import StopRequest
from stage1_tokenizer.engine.state import Part
from stage1_tokenizer.engine.training_step import TrainedNetwork
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, resolve_tokenizer
from stage2_prior.base import Prior
from stage2_prior.best import COMPARED, Best, Overfitting
from stage2_prior.gpt.model import GptConfig
from stage2_prior.likelihood import bigram_bits, bits, token_loss
from stage2_prior.prior import PRIOR_FILE, PriorConfig, PriorHeader, build_prior, parameters_of, saved_classes
from stage2_prior.report import prior_page
from stage2_prior.tokens import TokenSet, check_fits, load_or_extract, of_classes, relabel, seen_classes
from stage2_prior.validation import FIGURES, sample, validate


class TrainPriorConfig(RunConfig):
    """Train a prior over the codes of a tokenizer. The defaults are the quickstart's."""

    console_metrics = FIGURES

    tokenizer: str
    """A stage-one run's folder, or its tokenizer.safetensors."""
    steps: PositiveInt = 1500
    """Optimizer steps."""
    data: DataConfig | None = Field(None, discriminator="kind")
    """The data set whose codes are modelled; null: that of the tokenizer. Keys without `data.kind` change that one."""
    views: PositiveInt = 1
    """Views of each training image to extract: the plain one and views - 1 augmented ones; epochs take them in turn."""
    prior: PriorConfig = GptConfig()
    optim: OptimConfig = OptimConfig(lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    validate_every: PositiveInt = 375
    """Steps between validations on the whole validation split; also at the end."""
    save_every: PositiveInt = 375
    """Steps between saved states; also at the end, and when the run is asked to stop."""
    patience: Annotated[Limit, Mark.FREE] = None
    """End the training after so many validations in a row without a better one; 0 or null: never."""
    samples: NonNegativeInt = 20
    """Images to sample at each validation; 0: none."""

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """The tree with a whole data set where only some of the tokenizer's keys are changed."""
        path = tree.get("tokenizer")
        return with_own_data(tree, lambda: resolve_tokenizer(path) if isinstance(path, str) else None)

    def resolve_saved(self, saved: Tree) -> Tree:
        """The saved config of a run, with the data set of the tokenizer where none was given."""
        return saved if saved.get("data") else {**saved, "data": own_data(resolve_tokenizer(self.tokenizer)).tree()}

    @property
    def folder(self) -> Path:
        source = Path(self.tokenizer)
        folder = source.parent if source.suffix else source
        name = Path(self.config).stem if self.config else f"{folder.name}_{self.prior.kind}"
        return Path(self.out) if self.out else Path("runs/stage2") / name


def main() -> None:
    config = parse_command_line(TrainPriorConfig)
    accelerator = start_accelerator()
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    check_batch_size(config.batch_size, config.accumulation, processes)
    tokenizer = LoadedTokenizer.load(config.tokenizer, device)
    data = config.data or data_config(tokenizer.data, str(tokenizer.path))
    check_fits(tokenizer, data)
    opened = open_data(data)
    replaced = {"tokenizer": tokenizer.fingerprint, "data": data.tree()}
    run = Run(config, accelerator, PRIOR_FILE, opened, replaced, fast_paths=["onednn"])
    run_on_main(accelerator, lambda: keep_copy(tokenizer, run.folder / TOKENIZER_FILE))
    train_set, validation_set, classes = open_tokens(config, accelerator, tokenizer, opened, run)
    shape = tokenizer.tokenizer.shape
    bigram = bigram_bits(train_set, validation_set, shape.V)
    train_set, validation_set = train_set.on(device), validation_set.on(device)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    prior = build_prior(config.prior, shape, len(classes)).to(device)
    ema = Ema(prior, config.optim.ema_decay)
    compiling = Compiling(accelerator)
    learner = TrainedNetwork(accelerator, prior, config.optim, config.steps)
    tally, best = Tally().to(device), Best(ema.module, accelerator.is_main_process)
    parts: dict[str, Part] = {"prior": prior, "ema": ema.module, "optimizer": learner.optimizer, "tally": tally}
    header = PriorHeader(prior=config.prior, shape=shape, classes=classes, tokenizer=tokenizer.fingerprint)
    described = {"config": header.model_dump_json(), "data": data.model_dump_json()}
    run.resume(
        parts | best.parts,
        watch=Alarms([Overfitting()]),
        write_weights=partial(write_prior, accelerator, run.folder / PRIOR_FILE, ema, best, described),
        optional=best.parts,
    )
    run.say(f"prior: {parameters_of(prior):,} parameters, sequences of {shape.length} tokens out of {shape.V}")

    order = BatchOrder(len(train_set.labels), config.batch_size, config.seed, rank, processes)
    guard = FiniteGuard(
        accelerator, run.folder, {"prior": prior}, partial(named_loss, prior), tally, config.skips, run.alarm
    )
    stop, has_ended = StopRequest(), best.is_exhausted(config.patience)
    if has_ended:
        run.say(f"its last {config.patience} validations brought nothing better, so it has ended (--patience)")
    for step in range(run.first_step, run.first_step if has_ended else config.steps):
        seed = derive_seed(config.seed, "model", step, rank)
        torch.manual_seed(seed)
        compiling.begin_step()
        learner.begin_step(step)
        places = order.places(step)
        codes, labels = (part.to(device, non_blocking=True) for part in train_set.batch(places))  # (B, h, w, K), (B,)
        withheld = draw_uniforms(config.seed, "label", places[1], places[0], 1)[:, 0] < config.prior.label_dropout
        labels = labels.masked_fill(torch.from_numpy(withheld).to(device, non_blocking=True), prior.null_label)

        losses = []
        micro_batches = list(zip(codes.chunk(config.accumulation), labels.chunk(config.accumulation), strict=True))
        for codes_part, labels_part in learner.micro_batches(micro_batches):
            loss = token_loss(learner.model(codes_part, labels_part), codes_part)
            accelerator.backward(loss / config.accumulation)
            losses.append(loss.detach())
        nats = torch.stack(losses).mean()
        batch = partial(batch_for_record, places, codes, labels)
        checked = guard.check(step + 1, nats, micro_batches, seed, batch, stop.asked)
        learner.learn(checked, tally)
        if checked.finite:
            ema.update(prior, step)

        run.count_step(config.batch_size)
        done, is_last = step + 1, step + 1 == config.steps
        is_saved = done % config.save_every == 0 or is_last
        if (done % config.log_every == 0 or is_saved) and checked.finite:
            values = tally.entry() | {"train/nats_per_token": float(nats), "train/bits_per_token": bits(float(nats))}
            values |= {"train/gradient_norm": float(checked.norm), "train/lr": learner.rate}
            values |= {"train/images_per_second": run.images_per_second}
            run.log(done, values, show=("train/bits_per_token",))
        if done % config.validate_every == 0 or is_last:
            figures = validate(accelerator, ema.module, validation_set, config.batch_size, tokenizer)
            figures["validation/bigram_bits_per_token"] = bigram
            run.log(done, figures)
            run.print_validation(done, figures)
            best.look(done, figures[COMPARED], ema.module)
            has_ended = best.is_exhausted(config.patience)
            if config.samples and accelerator.is_main_process:
                images = sample(ema.module, tokenizer, config.samples, config.seed, device)
                run.log_images(done, "samples", images, columns=10)
        if is_saved or has_ended or checked.stop:
            run.save(done)
        if has_ended and not is_last:
            run.say(f"step {done}: the last {config.patience} validations brought nothing better; ending (--patience)")
            break
        if checked.stop and not is_last:
            run.interrupt(done)

    run.close()
    following = format_command("sampling/generate.py", "-n", 64, "--prior", run.folder)
    run.print_summary(("weights", best.in_words(run.done)), ("next", following))
    report_at_end(accelerator, config.report, run.folder, prior_page)


def open_tokens(
    config: TrainPriorConfig, accelerator: Accelerator, tokenizer: LoadedTokenizer, opened: OpenData, run: Run
) -> tuple[TokenSet, TokenSet, tuple[str, ...]]:
    """The tokens of both splits, extracted where they are not on disk, and the classes that their labels count."""
    splits: tuple[tuple[Split, int], ...] = (("train", config.views), ("validation", 1))
    tokens = [
        load_or_extract(accelerator, tokenizer, opened, split, views, config.seed, run.folder / "tokens")
        for split, views in splits
    ]
    seen = seen_classes(*tokens)
    if unseen := [name for name in tokens[0].classes if name not in seen]:
        run.say(f"note: no readable image of {', '.join(unseen)}, so no class of the prior")
        tokens = [of_classes(part, seen) for part in tokens]
    classes = saved_classes(run.folder) or seen
    train_set, validation_set = (relabel(part, classes) for part in tokens)
    return train_set, validation_set, classes


def named_loss(prior: Prior, codes: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () of a micro-batch, without parts of its own, as the guard computes it again."""
    return token_loss(prior(codes, labels), codes), {}


def write_prior(
    accelerator: Accelerator, path: Path, ema: Ema[Prior], best: Best, described: dict[str, str], done: int
) -> None:
    """Write the weights that were best on validation; before the first one, the averaged ones of so many steps."""
    weights = best.weights if best.step and best.weights is not None else ema.module
    header = described | {"step": str(done)} | best.described()
    run_on_main(accelerator, lambda: write_weights(path, weights, "prior", header))


def keep_copy(tokenizer: LoadedTokenizer, copy: Path) -> None:
    """Put the tokenizer into the prior's own folder, which needs no other then.

    Raises:
        BadFileError: the file has changed since it was loaded, as a training that goes on changes it.
    """
    if copy.exists() and copy.samefile(tokenizer.path):
        return
    data = tokenizer.path.read_bytes()
    if not copy.exists() or copy.read_bytes() != data:
        write_file(copy, data)
    if LoadedTokenizer.load(copy).fingerprint != tokenizer.fingerprint:
        copy.unlink()
        raise BadFileError(f"{tokenizer.path}: has changed since it was loaded; is it still in training? Start again")


def batch_for_record(places: Places, codes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A batch that was not learned from, as the guard saves it."""
    indices, views = map(torch.from_numpy, places)
    return {"codes": codes, "labels": labels, "indices": indices, "views": views}


if __name__ == "__main__":
    run_command(main)
