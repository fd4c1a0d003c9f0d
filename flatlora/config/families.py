"""What the configuration must know of each family of models; `flatlora.models.family.Family` owns all the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class FamilyTraits:
    """What validates an experiment before any library of models is imported.

    Args:
        rows: kind of the data sets that it is trained on.
        unread: keys of the model section that do nothing here → why, and the remedy.
        classifies: whether it gives each of the data set's answers a score, and generates none.
        scales_loss: whether its loss is scaled on a GPU, without which small gradients underflow to 0 in FP16.
    """

    rows: Literal["text", "image", "text_to_image"]
    unread: Mapping[str, str]
    classifies: bool = False
    scales_loss: bool = False

    @property
    def quantizable(self) -> bool:
        """Whether its weights may be packed in few bits."""
        return "quantize" not in self.unread


_OWN_HEAD = {"head": "a language model has its own head; leave the key out, or choose a CLIP model"}
_NOT_OF_DIFFUSION = "nothing reads it for a diffusion model; leave the key out"

TRAITS: dict[str, FamilyTraits] = {
    "causal_lm": FamilyTraits(rows="text", unread=_OWN_HEAD),
    "seq2seq": FamilyTraits(rows="text", unread=_OWN_HEAD),
    "encoder": FamilyTraits(
        rows="text",
        unread={
            "head": "its head is trained; leave the key out, or choose a CLIP model",
            "generated_test_rows": "it generates no answers; leave the key out",
            "quantize": "its trained head would be packed too, and it is small; leave the key out",
        },
        classifies=True,
    ),
    "clip": FamilyTraits(
        rows="image",
        unread={
            "generated_test_rows": "it generates no answers; leave the key out",
            "quantize": "its text tower is read once and its image encoder is small; leave the key out",
        },
    ),
    "text_to_image": FamilyTraits(
        rows="text_to_image",
        unread=dict.fromkeys(("attn", "quantize", "head", "generated_test_rows"), _NOT_OF_DIFFUSION),
        scales_loss=True,
    ),
}
"""`model.family` → what is known of it here. A new family has an entry, and a class in flatlora/models/families/."""


OLD_FAMILIES = {"sdxl": "text_to_image"}
"""{old value of `model.family`: the current one}. Records, option files and command lines may contain the old one."""
_FIRST_NAMES = {new: old for old, new in OLD_FAMILIES.items()}


def current_family(family: Any) -> Any:
    """Returns the current name of a family; any other value unchanged."""
    return OLD_FAMILIES.get(family, family) if isinstance(family, str) else family


def family_in_identity(family: Any) -> Any:
    """Returns the name of a family in an experiment's identity; any other value unchanged.

    It is the first name that the family had: the configuration's hash, the names of run folders and the cells of tables
    depend on the identity, and must not change with a name.
    """
    family = current_family(family)
    return _FIRST_NAMES.get(family, family) if isinstance(family, str) else family


def trains_on(family: object, rows: str) -> bool:
    """Whether models of a family are trained on data sets of a kind; False for an unknown family."""
    name = str(current_family(family))
    return name in TRAITS and TRAITS[name].rows == rows
