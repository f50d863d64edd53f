"""The options of evaluate.py, and the data set that they name."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sampling.evaluation.extractors import ExtractorOrNoneConfig, NoExtractorConfig
from sampling.evaluation.extractors.inception import InceptionConfig
from sampling.evaluation.reference import DataSet, check_reference
from sampling.option_facts import Idle, check_idle
from sampling.prior_defaults import defaults_of_named
from sampling.sampler import SamplingConfig
from stage1_tokenizer.bottlenecks.perturbation import PerturbationConfig
from stage1_tokenizer.config.base import CommandConfig, Tree
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.base import SPLITS, Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.saved_config import complete_data_options, parse_data_config, with_root
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.perceptual import PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, resolve_tokenizer
from stage2_prior.prior import find_prior_file, load_prior

NOT_SAMPLED = "nothing is sampled"
NO_RECONSTRUCTIONS = "LPIPS is of reconstructions"
NO_CODES = "only the codes of reconstructions are perturbed"


class EvaluateConfig(CommandConfig):
    """Measure a tokenizer, a prior, or given samples."""

    tokenizer: str | None = None
    """Folder of a stage-one run, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME: measure the
    tokenizer's reconstructions."""
    prior: str | None = None
    """Folder of a stage-two run, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME: measure the
    prior's samples. Without --tokenizer, --prior and --samples, the newest run under runs/stage2 is measured, or
    pretrained:shapes if there is none."""
    samples: str | None = None
    """Existing samples to measure: a folder that `generate.py` wrote, any folder of images of one size, or an .npz file
    of the ADM suite (`arr_0`). They are compared with the data of --prior, --tokenizer or --data."""
    n: int | None = Field(None, ge=2)
    """Number of images to measure; null: 10,000 samples of a prior, otherwise all images."""
    data: DataConfig | None = Field(None, discriminator="kind")
    """The data set; null: that of the training. Keys without `data.kind` change keys of that one."""
    root: str | None = None
    """Folder of the training's images, if they were moved; null: the folder that the training used. With --tokenizer
    and without --split it may be any folder, and all its images are measured."""
    split: Annotated[
        Split | None, Idle(beside="samples", reason="nothing is reconstructed, and no prior scores images")
    ] = None
    """Split for reconstructions and for bits per token; null: validation, or with --tokenizer and --root all images of
    that folder."""
    reference: Annotated[str, Idle(beside="tokenizer", reason="reconstructions are compared with their originals")] = (
        "train"
    )
    """Images to compare samples with: train, validation, a folder of images of one size, or an .npz file of the ADM
    suite with images or mu and sigma."""
    extractor: ExtractorOrNoneConfig = InceptionConfig()
    """The network whose features are compared. Only with Inception's features are distances called FID and KID."""
    perceptual: Annotated[
        PerceptualConfig,
        Idle(beside="samples", reason=NO_RECONSTRUCTIONS),
        Idle(beside="prior", reason=NO_RECONSTRUCTIONS),
    ] = PerceptualConfig(weight=1.0)
    """The network of LPIPS, as in training; weight 0: no LPIPS. With extractor.kind none there is no LPIPS unless
    perceptual.weights is given, so that nothing is downloaded."""
    perturbation: Annotated[
        PerturbationConfig,
        Idle(beside="samples", reason=NO_CODES),
        Idle(beside="prior", reason=NO_CODES),
    ] = PerturbationConfig()
    """Errors in the codes, as a prior makes them: measure the images that the decoder makes of perturbed codes."""
    sampling: Annotated[
        SamplingConfig, Idle(beside="tokenizer", reason=NOT_SAMPLED), Idle(beside="samples", reason=NOT_SAMPLED)
    ] = SamplingConfig()
    """Options for sampling a prior; the defaults are those of generate.py, or those that the prior states."""
    nearest: Annotated[NonNegativeInt, Idle(beside="tokenizer", reason="reconstructions are no samples")] = 1000
    """Number of samples whose nearest training images are searched for; 0: no search."""
    references: str = "runs/references"
    """Folder for the features of references, which later evaluations read again."""
    seed: int = 0
    """Seed of the samples, and of all random choices in measuring."""
    batch_size: PositiveInt = 64
    """Images that each process measures at once; more needs more memory and changes no result."""
    out: str | None = None
    """Path of the results without .json and .md; null: evaluation/NAME in the run, where NAME states the protocol."""

    @classmethod
    def defaults_by_files(cls, given: Tree) -> Tree:
        """Return the sampling defaults that the prior states."""
        if given.get("tokenizer") or given.get("samples"):
            return {}
        sampling = given.get("sampling")
        return {"sampling": defaults_of_named(given.get("prior"), sampling if isinstance(sampling, dict) else {})}

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """Return the tree with a whole data set, also if it has only keys that change the training's."""
        tokenizer, prior, samples = (tree.get(key) for key in ("tokenizer", "prior", "samples"))

        def weights() -> Path | None:
            if isinstance(tokenizer, str) and prior is None:
                return resolve_tokenizer(tokenizer)
            return find_prior_file(prior) if samples is None or prior is not None else None

        return complete_data_options(tree, weights)

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.tokenizer is not None and self.prior is not None:
            raise ValueError(
                "--tokenizer and --prior exclude each other; give --tokenizer to measure reconstructions, --prior to "
                "measure samples"
            )
        mode = "samples" if self.samples else "tokenizer" if self.tokenizer else "prior"
        check_idle(self, mode)
        if self.out is not None and not Path(self.out).name:
            raise ValueError(f"--out {self.out}: this is a folder; name the results in it, e.g. {self.out}/results")
        check_reference(self.reference)
        if isinstance(self.extractor, NoExtractorConfig) and mode != "tokenizer":
            raise ValueError(
                f"--extractor.kind none cannot be used with --{mode}: samples are compared by their features. "
                "To measure bits per token alone, use stage2_prior/score.py"
            )
        if self.perceptual.weight not in (0.0, 1.0):
            raise ValueError(
                f"--perceptual.weight {self.perceptual.weight}: give 1 to measure LPIPS, 0 to leave it out"
            )
        return self

    @property
    def measures_folder(self) -> bool:
        """True if all images of `root` are measured, whatever folder it is."""
        return self.tokenizer is not None and self.samples is None and self.split is None

    @property
    def measured_split(self) -> Split:
        """The split that reconstructions and bits per token are measured on."""
        return self.split or "validation"

    @property
    def measures_lpips(self) -> bool:
        """True if LPIPS of reconstructions is measured."""
        if isinstance(self.extractor, NoExtractorConfig) and self.perceptual.weights is None:
            return False
        return bool(self.perceptual.weight)


def build_data_set(
    config: EvaluateConfig, tokenizer: LoadedTokenizer, tree: Tree | None = None, source: Path | None = None
) -> DataSet:
    """Return the data set of a training, or the one that the options name.

    tree, source: the data config and the file that contains it; None: those of the tokenizer.

    Raises:
        ConfigError: the images' size or channels are not the tokenizer's, or --root cannot be used.
    """
    header = parse_data_config(tree or tokenizer.data, str(source or tokenizer.path))
    if config.root is not None and (config.data is not None or header.is_drawn):
        raise ConfigError(f"--root {config.root}: the images are drawn, or --data states their folder; leave it out")
    data = DataSet(config.data or with_root(header, config.root))
    if config.root is not None and config.measures_folder and isinstance(data.config, FolderConfig):
        data = DataSet(with_all_images(data.config), config.root)
    wanted, size = tokenizer.tokenizer.config.image_channels, tokenizer.tokenizer.config.image_size
    if data.config.image_size != size:
        given_size = "x".join(map(str, data.config.image_size))
        raise ConfigError(f"data.image_size is {given_size}, but {tokenizer.path} was trained on {size[0]}x{size[1]}")
    channels = data.image_batches(config.measured_split).channels
    if channels != wanted:
        raise ConfigError(f"the images have {channels} channels, but {tokenizer.path} was trained on {wanted}")
    return data


def with_all_images(config: FolderConfig) -> FolderConfig:
    """Return the config with all images of the folder in the validation split, whatever their classes are."""
    whole: dict[str, object] = {"layout": "flat", "validation_share": 1.0}
    lists = ("classes", "labels", "label_column", "files", "validation_files", "validation_root")
    return config.model_copy(update=whole | dict.fromkeys(lists))


def data_of_samples(config: EvaluateConfig) -> DataSet | None:
    """Return the data set that given samples are compared with; None: a folder or a file is the reference.

    Raises:
        ConfigError: a split is the reference, and no option names the data set.
    """
    if config.data is not None:
        return DataSet(config.data)
    if config.prior is not None:
        prior = load_prior(config.prior)
        return build_data_set(config, prior.tokenizer, prior.data, prior.path)
    if config.tokenizer is not None:
        return build_data_set(config, LoadedTokenizer.load(config.tokenizer))
    if config.reference not in SPLITS:
        return None
    raise ConfigError(
        f"--samples {config.samples}: the data to compare with is not known; name a run that was trained on it with "
        "--prior or --tokenizer, the data set with --data.kind, or a folder or file with --reference"
    )
