"""Where each model keeps the parts that merging and unmerging need: data, no behaviour."""

from dymu.families.family import Decoder, Family, Tower
from dymu.families.known import FAMILIES
from dymu.families.resolve import Modality, Parts, resolve

__all__ = ["FAMILIES", "Decoder", "Family", "Modality", "Parts", "Tower", "resolve"]
