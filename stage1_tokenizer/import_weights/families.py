"""All families of tokenizers that can be imported. To add one: a class, and its name in `FAMILIES` and `FamilyName`."""

from typing import Literal, get_args

from torch import Tensor

from stage1_tokenizer.import_weights.family import Family
from stage1_tokenizer.import_weights.from_diffusers import DiffusersKl, DiffusersVq
from stage1_tokenizer.import_weights.from_llamagen import LlamagenVq
from stage1_tokenizer.import_weights.from_taming import Ibq, TamingVqgan

FamilyName = Literal["taming_vqgan", "llamagen_vq", "ibq", "diffusers_vq", "diffusers_kl"]
FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (TamingVqgan, LlamagenVq, Ibq, DiffusersVq, DiffusersKl)
}
assert set(FAMILIES) == set(get_args(FamilyName))

MARKS = {
    "encoder.down.0.block.0.conv1.weight": "taming_vqgan or ibq",
    "encoder.conv_blocks.0.res.0.conv1.weight": "llamagen_vq",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "diffusers_vq or diffusers_kl",
}
"""A name that every file of some families has."""


def recognise(state: dict[str, Tensor]) -> str:
    """Return the names of the families that a file with these weights may be of; empty: none."""
    return next((families for name, families in MARKS.items() if name in state), "")
