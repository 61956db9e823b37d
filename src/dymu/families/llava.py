"""LLaVA-1.5: one square picture, features of one or several encoder layers, an MLP, a decoder."""

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.towers import TOWERS

LLAVA = Family(model_type="llava", towers=TOWERS, decoders=DECODERS)
