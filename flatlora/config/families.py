"""What the configuration must know of each family of models; `flatlora.models.family.Family` owns all the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FamilyTraits:
    """What validates an experiment before any library of models is imported.

    Args:
        rows: kind of the data sets that it is trained on.
        unread: keys of the model section that do nothing here → why, and the remedy.
        scales_loss: whether its loss is scaled on a GPU, without which small gradients underflow to 0 in FP16.
    """

    rows: Literal["text", "image", "captioned"]
    unread: Mapping[str, str]
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
    "clip": FamilyTraits(
        rows="image",
        unread={
            "generated_test_rows": "it generates no answers; leave the key out",
            "quantize": "its text tower is read once and its image encoder is small; leave the key out",
        },
    ),
    "sdxl": FamilyTraits(
        rows="captioned",
        unread=dict.fromkeys(("attn", "quantize", "head", "generated_test_rows"), _NOT_OF_DIFFUSION),
        scales_loss=True,
    ),
}
"""`model.family` → what is known of it here. A new family has an entry, and a class in flatlora/models/families/."""


def trains_on(family: object, rows: str) -> bool:
    """Whether models of a family are trained on data sets of a kind; False for an unknown family."""
    return str(family) in TRAITS and TRAITS[str(family)].rows == rows
