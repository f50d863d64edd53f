"""Measuring of one setting of a sweep, with the samples and the metrics of `evaluate.py`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from sampling.agreement import BATCH, Classifier, accuracy, accuracy_of_split, labels_in_data, train_classifier
from sampling.evaluation.features import Evaluator
from sampling.evaluation.intervals import Interval, share_interval
from sampling.evaluation.metrics import distance_warnings, sample_metrics
from sampling.evaluation.options import EvaluateConfig, build_data_set
from sampling.evaluation.reference import DataSet, Reference, load_reference
from sampling.evaluation.results import Metric, protocol_digest
from sampling.evaluation.sources import ImageSource, sample_prior
from sampling.evaluation.sweep_table import MeasuredSetting
from sampling.prior_defaults import DrawConfig
from sampling.sampler import Sampler, SamplingConfig
from sampling.sampling_loop import PriorSource
from stage1_tokenizer.engine.launch import run_on_main
from stage2_prior.prior import LoadedPrior


@dataclass(frozen=True)
class SettingMeter:
    """Everything that the settings of a sweep have in common."""

    prior: LoadedPrior
    evaluator: Evaluator
    evaluation: EvaluateConfig
    """Options of `evaluate.py`: data, reference, number of samples, and the sampling options that are not swept."""
    data: DataSet
    reference: Reference
    classifier_steps: int
    """0: no classifier."""

    @classmethod
    def prepare(
        cls, prior: LoadedPrior, evaluator: Evaluator, evaluation: EvaluateConfig, classifier_steps: int
    ) -> Self:
        """Open the data and load the reference. All that may be wrong with them ends the sweep here, before sampling.

        Raises:
            ConfigError: the data or the reference cannot be used, or the data no longer has all classes of the prior.
            BadFileError: the reference's file is damaged.
        """
        data = build_data_set(evaluation, prior.tokenizer, prior.data, prior.path)
        if classifier_steps and prior.classes:
            labels_in_data(data.image_batches("train").classes, prior.classes, np.arange(len(prior.classes)))
        reference = load_reference(evaluator, evaluation.reference, data)
        return cls(prior, evaluator, evaluation, data, reference, classifier_steps if prior.classes else 0)

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything but the setting that the metrics depend on."""
        settings = Sampler(self.prior, self.evaluation.sampling).settings()
        prior = {key: settings[key] for key in ("step", "classes", "weights")}
        return {
            "subject": f"Sweep of {self.prior.outputs.name}",
            "prior": prior | {"precision": self.evaluation.sampling.precision},
            "samples": f"{self.evaluation.n:,} samples of each setting, of the same noise",
            "classifier": f"{self.classifier_steps} steps" if self.classifier_steps else "none",
            "reference": self.reference.provenance,
            **self.evaluator.protocol(),
        }

    @property
    def folder(self) -> Path:
        """The folder for the results of this protocol."""
        compared_with = self.reference.provenance["data"].get("split", "file")
        name = f"to-{compared_with}-{self.evaluation.n}-{self.evaluator.kind}-{protocol_digest(self.protocol)}"
        return self.prior.outputs / "sweeps" / name

    @property
    def samples(self) -> Path:
        """The folder that has the folders of samples."""
        return self.prior.outputs / "evaluation"

    @property
    def warnings(self) -> list[str]:
        """Facts that limit the meaning of the metrics."""
        assert self.evaluation.n is not None
        return distance_warnings(self.evaluation.n, self.reference.moments.count, self.evaluator.extractor)

    def measure(self, draw: DrawConfig) -> MeasuredSetting:
        """Sample under a setting, unless its samples are there, and measure the samples.

        Raises:
            BadFileError: samples are missing or damaged, or the prior's logits are not finite.
        """
        evaluator, seed = self.evaluator, self.evaluator.seed
        config = SamplingConfig.from_tree(self.evaluation.sampling.tree() | draw.tree())
        prior = PriorSource(Sampler(self.prior, config), None, seed)
        assert self.evaluation.n is not None
        samples = sample_prior(evaluator.accelerator, prior, self.evaluation.n, config.batch_size)
        features = evaluator.extract(samples.source, "samples", logits=True)
        metrics = sample_metrics(features, self.reference, evaluator.extractor, seed)
        if self.classifier_steps:
            labels = prior.labels(np.arange(self.evaluation.n))
            metrics.append(run_on_main(evaluator.accelerator, lambda: self._agreement(samples.source, labels)))
        return MeasuredSetting(samples.path.name, metrics)

    def _agreement(self, samples: ImageSource, labels: NDArray[np.int64]) -> Metric:
        """Return the share of samples that the classifier finds in the requested class."""
        classifier, held_out = self._classifier
        device, total = self.evaluator.accelerator.device, len(labels)
        wanted = torch.from_numpy(labels_in_data(self.data.image_batches("train").classes, self.prior.classes, labels))
        right = 0.0
        for part in np.split(np.arange(total), range(BATCH, total, BATCH)):
            right += len(part) * accuracy(classifier, samples.read(part).to(device), wanted[part].to(device))
        low, high = share_interval(round(right), total)
        note = f"by a classifier that is right on {held_out:.1%} of held-out images"
        interval = Interval(100.0 * low, 100.0 * high)
        return Metric("agreement", "class agreement", 100.0 * right / total, interval, "%", "higher", note)

    @cached_property
    def _classifier(self) -> tuple[Classifier, float]:
        """A classifier of the data's classes, and its accuracy on held-out images."""
        device, seed = self.evaluator.accelerator.device, self.evaluator.seed
        classifier = train_classifier(self.data.image_batches("train"), self.classifier_steps, seed, device)
        return classifier, accuracy_of_split(classifier, self.data.image_batches("validation"), device)
