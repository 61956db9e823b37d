"""The errors a user can meet. Each message names the thing, the cause and the next step, in one sentence."""


class DymuError(Exception):
    """Base of every error this library raises on purpose."""


class UnsupportedModel(DymuError):
    """The model, its vision tower or its language model is of no described family."""


class AlreadyApplied(DymuError):
    """`dymu.apply` was called on a model that it already changed."""


class BadThresholds(DymuError):
    """A thresholds file that cannot be read, or that belongs to another model."""


class BadBudget(DymuError):
    """A budget that the thresholds were not calibrated for."""


class BadFocus(DymuError):
    """What is to be in focus is no part of a picture, or is not known there."""


class BadImage(DymuError):
    """An image that cannot be read or used."""


class BadVideo(DymuError):
    """A video that cannot be read or used."""


class BadOutput(DymuError):
    """A file that cannot be written."""


class BadPrompt(DymuError, ValueError):
    """A prompt whose image placeholders do not fit the images."""


class BadQuestion(BadPrompt):
    """A question of a task that cannot be asked; the others can."""


class UnsupportedCache(DymuError):
    """A KV cache that cannot hold merged tokens, or was filled the other way: with DyMU, or without."""
