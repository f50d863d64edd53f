"""The options of evaluate.py, and the data set that they name."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sampling.evaluation.extractors import ExtractorOrNoneConfig, NoExtractorConfig
from sampling.evaluation.extractors.inception import InceptionConfig
from sampling.evaluation.reference import SPLITS, DataSet, check_reference
from sampling.option_facts import Idle, check_idle
from sampling.sampler import SamplingConfig
from stage1_tokenizer.config.base import CommandConfig, Tree
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.saved_config import complete_data_options, parse_data_config
from stage1_tokenizer.diagnostics.views.base import with_root
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.perceptual import PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, resolve_tokenizer
from stage2_prior.prior import find_prior_file, load_prior

NOT_SAMPLED = "nothing is sampled"
NO_RECONSTRUCTIONS = "LPIPS is of reconstructions"


class EvaluateConfig(CommandConfig):
    """Measure a tokenizer, a prior, or given samples."""

    tokenizer: str | None = None
    """A stage-one run's folder, or its tokenizer.safetensors: measure its reconstructions."""
    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors: measure its samples; where nothing is named, the newest run
    under runs/stage2."""
    samples: str | None = None
    """Images in place of a prior's: a folder that `generate.py` wrote, any folder of pictures of one size, or an .npz
    file (`arr_0`, as the ADM suite has it). They are compared with the data of --prior, --tokenizer or --data."""
    n: int | None = Field(None, ge=2)
    """Images to measure; null: 10,000 samples of a prior, else all that there are."""
    data: DataConfig | None = Field(None, discriminator="kind")
    """The data set; null: that of the training. Keys without `data.kind` change that one."""
    root: str | None = None
    """Folder in which the images of the training are now; null: where they were then. With --tokenizer it may be any
    folder of images, and all of them are measured, unless --split is given."""
    split: Annotated[
        Split | None, Idle(beside="samples", reason="nothing is reconstructed, and no prior scores images")
    ] = None
    """The split whose reconstructions are measured, and that bits per token are measured on; null: validation, or with
    --tokenizer and --root all images of that folder."""
    reference: Annotated[str, Idle(beside="tokenizer", reason="reconstructions are compared with their originals")] = (
        "train"
    )
    """What samples are compared with: train, validation, a folder of pictures of one size, or an .npz file of the ADM
    suite: pictures, or mu, sigma."""
    extractor: ExtractorOrNoneConfig = InceptionConfig()
    """The network in whose features sets are compared. Only with Inception's the distances are called FID and KID."""
    perceptual: Annotated[
        PerceptualConfig,
        Idle(beside="samples", reason=NO_RECONSTRUCTIONS),
        Idle(beside="prior", reason=NO_RECONSTRUCTIONS),
    ] = PerceptualConfig(weight=1.0)
    """The network of LPIPS, as in training; weight 0 leaves it out. With extractor.kind none it is left out unless
    perceptual.weights is given, so that nothing is downloaded."""
    sampling: Annotated[
        SamplingConfig, Idle(beside="tokenizer", reason=NOT_SAMPLED), Idle(beside="samples", reason=NOT_SAMPLED)
    ] = SamplingConfig()
    """How a prior is sampled from; the defaults are those of generate.py."""
    nearest: Annotated[NonNegativeInt, Idle(beside="tokenizer", reason="reconstructions are no samples")] = 1000
    """Samples whose nearest training images are looked for; 0: none."""
    references: str = "runs/references"
    """Folder in which the reference's features are kept for the next evaluation."""
    seed: int = 0
    """Of the samples, and of all that is drawn in measuring."""
    batch_size: PositiveInt = 64
    """Images measured at once by each process; bounded by memory, without effect on the figures."""
    out: str | None = None
    """Path of the results without .json and .md; default: a name that says the protocol, in evaluation/ of the run."""

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """The tree with a whole data set where only some of the training's keys are changed."""
        tokenizer, prior, samples = (tree.get(key) for key in ("tokenizer", "prior", "samples"))

        def weights() -> Path | None:
            if isinstance(tokenizer, str) and prior is None:
                return resolve_tokenizer(tokenizer)
            return find_prior_file(prior) if samples is None or prior is not None else None

        return complete_data_options(tree, weights)

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.tokenizer is not None and self.prior is not None:
            raise ValueError("--tokenizer and --prior exclude each other; a prior's folder holds its tokenizer too")
        mode = "samples" if self.samples else "tokenizer" if self.tokenizer else "prior"
        check_idle(self, mode)
        if self.out is not None and not Path(self.out).name:
            raise ValueError(f"--out {self.out}: is a folder; name the results in it, e.g. {self.out}/results")
        check_reference(self.reference)
        if isinstance(self.extractor, NoExtractorConfig) and mode != "tokenizer":
            raise ValueError(
                f"--extractor.kind none cannot be used with --{mode}: samples are compared in an extractor's features; "
                "for bits per token alone there is stage2_prior/score.py"
            )
        if self.perceptual.weight not in (0.0, 1.0):
            raise ValueError("--perceptual.weight is 1 to measure LPIPS, or 0 to leave it out")
        return self

    @property
    def measures_folder(self) -> bool:
        """True if `root` need not be the folder of the training, and all of it is measured."""
        return self.tokenizer is not None and self.samples is None and self.split is None

    @property
    def measured_split(self) -> Split:
        """The split that reconstructions and bits per token are measured on."""
        return self.split or "validation"

    @property
    def measures_lpips(self) -> bool:
        """True if LPIPS is among the figures of a tokenizer."""
        if isinstance(self.extractor, NoExtractorConfig) and self.perceptual.weights is None:
            return False
        return bool(self.perceptual.weight)


def data_set(
    config: EvaluateConfig, tokenizer: LoadedTokenizer, tree: Tree | None = None, source: Path | None = None
) -> DataSet:
    """The data of a training, or those given. Raises ConfigError unless they are such as the tokenizer takes.

    tree, source: the data config and the file that it is from; None: the tokenizer's own.
    """
    header = parse_data_config(tree or tokenizer.data, str(source or tokenizer.path))
    if config.root is not None and (config.data is not None or header.is_drawn):
        raise ConfigError(f"--root {config.root}: the images are drawn, or --data says where they are; leave it out")
    data = DataSet(config.data or with_root(header, config.root))
    if config.root is not None and config.measures_folder and isinstance(data.config, FolderConfig):
        data = DataSet(all_of(data.config), config.root)
    wanted, size = tokenizer.tokenizer.config.image_channels, tokenizer.tokenizer.config.image_size
    if data.config.image_size != size:
        given_size = "x".join(map(str, data.config.image_size))
        raise ConfigError(f"data.image_size is {given_size}, but {tokenizer.path} was trained on {size[0]}x{size[1]}")
    channels = data.image_batches(config.measured_split).channels
    if channels != wanted:
        raise ConfigError(f"the images have {channels} channels, but {tokenizer.path} was trained on {wanted}")
    return data


def all_of(config: FolderConfig) -> FolderConfig:
    """The config that validates on all images of a folder, whatever their classes."""
    every: dict[str, object] = {"layout": "flat", "validation_share": 1.0}
    lists = ("classes", "labels", "label_column", "files", "validation_files", "validation_root")
    return config.model_copy(update=every | dict.fromkeys(lists))


def trained_on(config: EvaluateConfig) -> DataSet | None:
    """The data set of given samples; None: they are compared with a folder or a file, and nothing more is asked for.

    Raises ConfigError where they are compared with a data set, and nothing says which."""
    if config.data is not None:
        return DataSet(config.data)
    if config.prior is not None:
        prior = load_prior(config.prior)
        return data_set(config, prior.tokenizer, prior.data, prior.path)
    if config.tokenizer is not None:
        return data_set(config, LoadedTokenizer.load(config.tokenizer))
    if config.reference not in SPLITS:
        return None
    raise ConfigError(
        f"--samples {config.samples}: name what to compare them with: the run that was trained on it, with --prior or "
        "--tokenizer, the data set itself, with --data.kind, or a folder or file, with --reference"
    )
