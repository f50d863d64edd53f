"""Measure a tokenizer's reconstructions or a prior's samples. The results state the protocol.

    python sampling/evaluate.py --tokenizer RUN     compare reconstructions with originals, one by one and as sets
    python sampling/evaluate.py --tokenizer RUN --root VAL     the same for all images of a folder
    python sampling/evaluate.py --tokenizer RUN --perturbation.codes 0.5     the same from codes of which half are wrong
    python sampling/evaluate.py --prior RUN -n 10000     compare samples with the data set; bits per token
    python sampling/evaluate.py --samples FILE.npz --prior RUN     measure existing samples, also of another program
    python sampling/evaluate.py --samples DIR --reference DIR     compare two folders of images

Writes RUN/evaluation/NAME.json, NAME.md and NAME-nearest.png. Results of --samples are written beside samples of ours,
and for other samples to runs/evaluation.
"""

from pathlib import Path

from sampling.evaluation.extractors import NoExtractorConfig, build_extractor
from sampling.evaluation.features import Evaluator
from sampling.evaluation.options import EvaluateConfig
from sampling.evaluation.results import console_lines, write_results
from sampling.evaluation.subjects import evaluate_samples, evaluate_tokenizer
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.launch import run_on_main, start_accelerator


def main() -> None:
    """Measure what the options name, write the results, and print them."""
    config = parse_command_line(EvaluateConfig)
    accelerator = start_accelerator(exact=True)
    chosen = config.extractor
    extractor = None if isinstance(chosen, NoExtractorConfig) else build_extractor(chosen, accelerator.device)
    references = Path(config.references)
    evaluator = Evaluator(accelerator, extractor, chosen.kind, config.batch_size, references, config.seed)
    evaluate = evaluate_tokenizer if config.tokenizer and not config.samples else evaluate_samples
    stem, evaluation = evaluate(config, evaluator)
    run_on_main(accelerator, lambda: write_results(stem, evaluation))
    accelerator.print("\n".join(console_lines(evaluation)))
    accelerator.print(f"results: {one_line(str(stem))}.md, and .json for programs")


if __name__ == "__main__":
    run_command(main)
