"""The presets of stage one: which there are, and how their schedules are shortened for a short budget."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.marks import Mark, marked
from stage1_tokenizer.config.messages import models_of
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.optim import OptimConfig
from stage1_tokenizer.objective import AdversarialConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "stage1"


def find_presets(names: Iterable[str], folder: Path = FOLDER) -> dict[str, Path]:
    """The file of each preset, in the order of the names; a name may also be the path of a YAML file.

    Raises:
        ConfigError: there is no such preset (the nearest and all known ones are named), or two have the same name.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
        if path is None or not path.is_file():
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"presets: there is no {name}; {hint}{folder} has {', '.join(known)}")
        if path.stem in found:
            raise ConfigError(f"presets: two are named {path.stem}, and their runs would share a folder")
        found[path.stem] = path
    return found


def short_schedule(preset: Tree, steps: int) -> dict[str, int]:
    """Those keys of a preset's schedule that are too long for a run of `steps` steps, with values that fit.

    A warm-up takes no more than a tenth of the steps, the discriminator starts after half of them, and a bottleneck's
    schedule is over after half of them: what comes later in the preset would not come at all.
    """
    optim = OptimConfig.from_tree(preset.get("optim", {}), "preset")
    adversarial = AdversarialConfig.from_tree(preset.get("adversarial", {}), "preset")
    longest = {"optim.warmup_steps": (optim.warmup_steps, steps // 10)}
    if adversarial.weight:
        longest["adversarial.start"] = (adversarial.start, steps // 2)
    bottleneck = preset.get("bottleneck", {})
    for kind in models_of(BottleneckConfig):
        if kind.model_fields["kind"].default == bottleneck.get("kind"):
            own = kind.model_validate(bottleneck)
            longest |= {f"bottleneck.{key}": (getattr(own, key), steps // 2) for key in marked(kind, Mark.SCHEDULE)}
    return {key: most for key, (own, most) in longest.items() if own > most}
