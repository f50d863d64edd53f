"""The presets of stage one: finding them by name, and shortening their schedules for a short run."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.field_facts import Mark, config_classes, marked_keys
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.optim import OptimConfig
from stage1_tokenizer.objective import AdversarialConfig

PRESETS_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "stage1"


def find_presets(names: Iterable[str], folder: Path = PRESETS_FOLDER) -> dict[str, Path]:
    """Return the file of each preset by its name, in the given order; a name may also be the path of a YAML file.

    Raises:
        ConfigError: there is no such preset (the message has the nearest and all known ones), or two have one name.
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
            raise ConfigError(
                f"presets: two have the name {path.stem}, and their runs would share a folder. Rename one"
            )
        found[path.stem] = path
    return found


def short_schedule(preset: Tree, steps: int) -> dict[str, int]:
    """Return the keys of a preset's schedule that are too long for a run of `steps` steps, with values that fit.

    In a short run a warm-up has at most a tenth of the steps, the discriminator starts after half of them, and the
    schedule of a bottleneck ends after half of them.
    """
    optim = OptimConfig.from_tree(preset.get("optim", {}), "preset")
    adversarial = AdversarialConfig.from_tree(preset.get("adversarial", {}), "preset")
    longest = {"optim.warmup_steps": (optim.warmup_steps, steps // 10)}
    if adversarial.weight:
        longest["adversarial.start"] = (adversarial.start, steps // 2)
    bottleneck = preset.get("bottleneck", {})
    for kind in config_classes(BottleneckConfig):
        if kind.model_fields["kind"].default == bottleneck.get("kind"):
            own = kind.model_validate(bottleneck)
            longest |= {
                f"bottleneck.{key}": (getattr(own, key), steps // 2) for key in marked_keys(kind, Mark.SCHEDULE)
            }
    return {key: most for key, (own, most) in longest.items() if own > most}
