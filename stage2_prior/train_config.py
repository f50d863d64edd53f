"""The options of stage2_prior/train.py."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Limit
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.saved_config import complete_data_options, read_data_config
from stage1_tokenizer.engine.compiling import Wish
from stage1_tokenizer.engine.hub import is_hub_name, parse_hub_name
from stage1_tokenizer.engine.initial_weights import name_source
from stage1_tokenizer.engine.model_files import resolve_weights
from stage1_tokenizer.engine.optim import OptimConfig
from stage1_tokenizer.engine.pretrained import resolve_path
from stage1_tokenizer.engine.training_config import TrainingConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, resolve_tokenizer
from stage2_prior.gpt.model import GptConfig
from stage2_prior.prior import PRIOR_FILE, PriorConfig, read_prior_config
from stage2_prior.validation import METRICS


class TrainPriorConfig(TrainingConfig):
    """Train a prior over the codes of a tokenizer. The defaults are the quickstart's."""

    console_metrics = METRICS

    tokenizer: str
    """A stage-one run's folder, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME."""
    steps: PositiveInt = 1500
    """Optimizer steps."""
    data: DataConfig | None = Field(None, discriminator="kind")
    """The data set whose codes the prior learns; null: the tokenizer's. Keys without `data.kind` change that one."""
    views: PositiveInt = 1
    """Versions of each training image to encode: the plain one and views - 1 augmented ones, one per epoch in turn.
    More delay overfitting; they need data.flip or data.random_crop, and disk space."""
    prior: PriorConfig = GptConfig()
    optim: OptimConfig = OptimConfig(lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    validate_every: PositiveInt = 375
    """Steps between validations on the whole validation split; also at the end."""
    save_every: PositiveInt = 375
    """Steps between saved states; also at the end, and when the run is asked to stop."""
    patience: Annotated[Limit, Mark.FREE] = None
    """End the training after this many validations in a row without a better one; 0 or null: never. Set it (3) when the
    overfitting alarm begins."""
    compile: Annotated[Wish, Mark.FREE] = "auto"
    """Compile the training step. auto: that of a GPT in bfloat16, if a compiler is there and the training has at least
    500 steps; a resumed run goes on as it began. Accelerate's own switch counts more."""
    samples: NonNegativeInt = 20
    """Images to sample at each validation; 0: none."""

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """Return the tree with a whole data set, where it changes only some keys of the tokenizer's."""
        path = tree.get("tokenizer")
        return complete_data_options(tree, lambda: resolve_tokenizer(path) if isinstance(path, str) else None)

    @classmethod
    def defaults_by_files(cls, given: Tree) -> Tree:
        """Return the architecture of the prior that --init_from names."""
        path = given.get("init_from")
        if not isinstance(path, str):
            return {}
        return {"prior": read_prior_config(resolve_weights(path, PRIOR_FILE, "--init_from")).tree()}

    def resolve_saved(self, saved: Tree) -> Tree:
        """Return the saved config of a run, with the tokenizer's data set where it names none, and with the code
        fingerprint of the tokenizer where a former version saved that of all its weights."""
        tokenizer = LoadedTokenizer.load(self.tokenizer)
        if not saved.get("data"):
            saved = {**saved, "data": read_data_config(tokenizer.path).tree()}
        if tokenizer.makes_codes_of(saved.get("tokenizer")):
            saved = {**saved, "tokenizer": tokenizer.code_fingerprint}
        return saved

    @property
    def compile_wish(self) -> Wish:
        """`compile`, but never `auto` for another kind than a GPT."""
        return "never" if self.compile == "auto" and self.prior.kind != "gpt" else self.compile

    @property
    def folder(self) -> Path:
        """The run's folder: --out, or runs/stage2/ and the name of the config file, or of the tokenizer and the
        kind."""
        if is_hub_name(self.tokenizer):
            folder = Path(parse_hub_name(self.tokenizer, "--tokenizer").name)
        else:
            source = resolve_path(self.tokenizer, "--tokenizer")
            folder = source.parent if source.suffix else source
        name = Path(self.config).stem if self.config else f"{folder.name}_{self.prior.kind}"
        if self.init_from and not self.config:
            name += f"_from_{name_source(resolve_weights(self.init_from, PRIOR_FILE, '--init_from'))}"
        return Path(self.out) if self.out else Path("runs/stage2") / name
