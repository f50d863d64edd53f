"""Train a prior over a tokenizer's codes (stage two).   python stage2_prior/train.py --tokenizer runs/stage1/NAME

    codes (encoded once) -> prior -> cross entropy -> optimizer step -> log -> validate -> sample -> save

Writes runs/stage2/NAME/prior.safetensors, the weights of the best validation, and a copy of the tokenizer beside it.
The same command again continues a stopped run. The options are in train_config.py.
"""

from functools import partial

import torch

from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.data.order import BatchOrder
from stage1_tokenizer.diagnostics.report.ending import report_at_end
from stage1_tokenizer.engine import launch
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.compiling import Compiling
from stage1_tokenizer.engine.console import format_command
from stage1_tokenizer.engine.finite import FiniteGuard, Tally
from stage1_tokenizer.engine.optim import Ema
from stage1_tokenizer.engine.run import Run
from stage1_tokenizer.engine.seeds import derive_seed
from stage1_tokenizer.engine.signals import StopRequest
from stage1_tokenizer.engine.state import Part
from stage1_tokenizer.engine.training_step import TrainedNetwork
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.best_weights import BestWeights, build_prior_alarms
from stage2_prior.guidance import withhold_labels
from stage2_prior.likelihood import bigram_bits, nats_to_bits, token_loss
from stage2_prior.prior import (
    PRIOR_FILE,
    PriorHeader,
    build_prior,
    copy_tokenizer,
    count_parameters,
    open_source,
    start_from,
)
from stage2_prior.report import prior_page
from stage2_prior.tokens import describe_batch, load_splits, open_data_of
from stage2_prior.train_config import TrainPriorConfig
from stage2_prior.validation import sample_images, validate


def main() -> None:
    """Set up the run, then train, validate, sample and save."""
    config = parse_command_line(TrainPriorConfig)
    accelerator = launch.start_accelerator()
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    launch.check_batch_size(config.batch_size, config.accumulation, processes)
    tokenizer = LoadedTokenizer.load(config.tokenizer, device)
    source = open_source(config.init_from, config.prior, tokenizer)
    data = open_data_of(tokenizer, config.data)
    fingerprints = {"tokenizer": tokenizer.code_fingerprint, "init_from": source and source.fingerprint}
    replaced = fingerprints | {"data": data.config.tree()}
    run = Run(config, accelerator, PRIOR_FILE, data, replaced)
    launch.run_on_main(accelerator, lambda: copy_tokenizer(tokenizer, run.folder))
    train_set, validation_set = load_splits(accelerator, run, tokenizer, data, config.views, config.seed)
    shape, classes = tokenizer.tokenizer.shape, train_set.classes
    bigram = bigram_bits(train_set, validation_set, shape.V)
    train_set, validation_set = train_set.to_device(device), validation_set.to_device(device)

    torch.manual_seed(derive_seed(config.seed, "initialise"))  # the same weights in every process
    prior = build_prior(config.prior, shape, len(classes)).to(device)
    if source:
        run.say(start_from(prior, classes, source, tokenizer))
    ema = Ema(prior, config.optim.ema_decay)
    compiling = Compiling(accelerator, wish=config.compile_wish, steps=config.steps, was_on=run.was_compiled)
    learner = TrainedNetwork(accelerator, prior, config.optim, config.steps)
    tally, best = Tally().to(device), BestWeights(ema.module, accelerator.is_main_process)
    parts: dict[str, Part] = {"prior": prior, "ema": ema.module, "optimizer": learner.optimizer, "tally": tally}
    header = PriorHeader(prior=config.prior, shape=shape, classes=classes, tokenizer=tokenizer.code_fingerprint)
    entries = header.entries(data.config, tokenizer) | (source.origin if source else {})
    write = partial(best.write, run.folder / PRIOR_FILE, entries)
    run.resume(
        parts | best.parts,
        watch=build_prior_alarms(),
        write_weights=lambda step: launch.run_on_main(accelerator, lambda: write(step)),
        optional=best.parts,
    )
    run.say(f"prior: {count_parameters(prior):,} parameters, sequences of {shape.length} tokens out of {shape.V}")

    order = BatchOrder(len(train_set.labels), config.batch_size, config.seed, rank, processes)
    guard = FiniteGuard(
        accelerator,
        run.folder,
        {"prior": prior},
        lambda codes, labels: (token_loss(prior(codes, labels), codes), {}),
        tally,
        config.skips,
        run.alarm,
    )
    stop, has_ended = StopRequest(), best.is_exhausted(config.patience)
    if has_ended:
        run.say(f"the run has ended (--patience): its last {config.patience} validations were not better")
    for step in range(run.first_step, run.first_step if has_ended else config.steps):
        seed = derive_seed(config.seed, "model", step, rank)
        torch.manual_seed(seed)
        compiling.begin_step()
        learner.begin_step(step)
        batch_indices = order.indices(step)
        batch = train_set.batch(batch_indices)
        codes, labels = (part.to(device, non_blocking=True) for part in batch)  # (B, h, w, K), (B,)
        labels = withhold_labels(labels, batch_indices, prior, config.seed)  # (B,)

        losses = []
        micro_batches = list(zip(codes.chunk(config.accumulation), labels.chunk(config.accumulation), strict=True))
        for micro_codes, micro_labels in learner.micro_batches(micro_batches):
            logits = learner.model(micro_codes, micro_labels)  # (b, L, V)
            loss = token_loss(logits, micro_codes)  # ()
            accelerator.backward(loss / config.accumulation)
            losses.append(loss.detach())
        nats = torch.stack(losses).mean()  # () per token
        describe = partial(describe_batch, batch_indices, codes, labels)
        checked = guard.check(step + 1, nats, micro_batches, seed, describe, stop.asked)
        learner.learn(checked, tally)
        if checked.is_finite:
            ema.update(prior, step)

        run.count_step(config.batch_size)
        done, is_last = step + 1, step + 1 == config.steps
        is_saved = config.is_save_step(done)
        if (done % config.log_every == 0 or is_saved) and checked.is_finite:
            values = tally.take_counts() | {"train/nats_per_token": float(nats)}
            values |= {"train/bits_per_token": nats_to_bits(float(nats)), "train/gradient_norm": float(checked.norm)}
            values |= {"train/lr": learner.rate, "train/images_per_second": run.images_per_second}
            run.log(done, values, show=("train/bits_per_token",))
        if done % config.validate_every == 0 or is_last:
            metrics = validate(accelerator, ema.module, validation_set, config.batch_size, tokenizer)
            metrics["validation/bigram_bits_per_token"] = bigram
            run.log(done, metrics)
            run.print_validation(done, metrics)
            best.update(done, metrics)
            has_ended = best.is_exhausted(config.patience)
            if config.samples and accelerator.is_main_process:
                images = sample_images(ema.module, tokenizer, config.samples, config.seed, device)  # (n, C, H, W)
                run.log_images(done, "samples", images, columns=10)
        if is_saved or has_ended or checked.must_stop:
            run.save(done)
        if has_ended and not is_last:
            run.say(f"step {done}: the last {config.patience} validations were not better; training ends (--patience)")
            break
        if checked.must_stop and not is_last:
            run.interrupt(done)

    run.close()
    next_command = format_command("sampling/generate.py", "-n", 64, "--prior", run.folder)
    run.print_summary(("weights", best.summary(run.done)), ("next", next_command))
    report_at_end(accelerator, config.report, run.folder, prior_page)


if __name__ == "__main__":
    run_command(main)
