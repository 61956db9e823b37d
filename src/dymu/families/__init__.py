"""Where each model keeps the parts that merging and unmerging need: data, which `resolve` reads."""

from dymu.families.family import Decoder, Family, Tower
from dymu.families.known import FAMILIES

__all__ = ["FAMILIES", "Decoder", "Family", "Tower"]
