"""What a request asks for, checked before any model sees it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from PIL import Image

from dymu.choices import UNTOUCHED, Counting
from dymu.counts import Count
from dymu.errors import BadBudget, BadImage, BadPrompt
from dymu.media import images
from dymu.thresholds import Thresholds

MOST_IMAGES, MOST_TEXT = 16, 1_000_000
"""Images, and characters, in a request."""
COLDEST = 0.01
"""The lowest temperature above 0: at lower ones the numbers leave the range of floats."""
HARMLESS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "stream_options", "safety_identifier")),
    "parallel_tool_calls": None,
    "prompt_cache_key": None,
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields beside those of `Asked` that change no answer, with these values, or null; None: with any."""


def count_of(asked: Any, thresholds: Thresholds, counting: Counting) -> Count | None:
    """How many image tokens a request keeps; None: nothing merges.

    Args:
        asked: tokens per image, a fraction of all up to 1.0, or "untouched".
        counting: what the number says.

    Raises:
        BadBudget: it is none of these, or outside the calibrated range.
    """
    if asked == UNTOUCHED:
        return None
    if isinstance(asked, bool) or not isinstance(asked, int | float):
        raise BadBudget(
            f"a budget is a number of image tokens (96), a fraction of them (0.15) or {UNTOUCHED!r}, not {asked!r}."
        )
    if abs(asked) > 2**53:
        raise BadBudget("a budget is a number of image tokens, and no image has so many.")
    count = Count.of(counting, asked)
    count.rule(thresholds)
    return count


_Words = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Id = Annotated[str, msgspec.Meta(pattern="^(0|[1-9][0-9]{0,8})$")]


class _Address(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto"] | None = None


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str | None = None
    image_url: _Address | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    """Fields that must be null are those of an answer that is sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None
    tool_calls: None = None
    function_call: None = None
    refusal: None = None
    reasoning_content: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content if part.text is not None)
        return self.content or ""


class Asked(msgspec.Struct):
    """The fields of an OpenAI chat request that are read here.

    Attributes:
        budget: see `count_of`; of several images one for each, None the server's; None: the server's for all.
    """

    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    model: str | None = None
    budget: int | float | str | list[int | float | str | None] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(gt=-1, le=2)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    stop: _Words | Annotated[list[_Words], msgspec.Meta(min_length=1, max_length=4)] | None = None
    stream: bool | None = None
    logit_bias: dict[_Id, Annotated[float, msgspec.Meta(ge=-100, le=100)]] | None = None

    @classmethod
    def of(cls, body: dict[str, Any]) -> Asked:
        """Raises: BadPrompt, where a field is not known, asks for something that cannot be had, or has another type, or
        a message holds something else than text and images."""
        try:
            asked = msgspec.convert(body, cls)
        except msgspec.ValidationError as error:
            raise BadPrompt(f"the request is not as the OpenAI API has it, or as it is known here: {error}.") from error
        if asked.temperature is not None and 0 < asked.temperature < COLDEST:
            raise BadPrompt(
                f"a temperature of {asked.temperature:g} is below {COLDEST}: take 0 for the likeliest answer."
            )
        if sum(map(len, asked.texts)) > MOST_TEXT:
            raise BadPrompt(f"the messages have more than {MOST_TEXT:,} characters: send less text.")
        for name in body.keys() - {*cls.__struct_fields__}:
            if name not in HARMLESS:
                raise BadPrompt(f"this server does not know the field {name!r}: leave it out.")
            if (values := HARMLESS[name]) is not None and body[name] is not None and body[name] not in values:
                raise BadPrompt(f"this server cannot do what the field {name!r} asks for: leave it out.")
        for part in asked.parts:
            if part.type not in ("text", "image_url"):
                raise BadPrompt(f"a message has a part of the type {part.type!r}; send text and image_url.")
            if (part.text is None) == (part.type == "text") or (part.image_url is None) == (part.type == "image_url"):
                raise BadPrompt(
                    f"a part of the type {part.type!r} has the field {part.type!r}, and no other: send that."
                )
        return asked

    @property
    def parts(self) -> list[_Part]:
        return [part for message in self.messages if isinstance(message.content, list) for part in message.content]

    @property
    def texts(self) -> list[str]:
        """What each message says."""
        return [message.text for message in self.messages]

    def images(self) -> Sequence[Image.Image]:
        """The images of all messages, in their order.

        Raises:
            BadImage: one is no image, or is not in the request itself; or they are too many, or too large together.
        """
        addresses = [part.image_url for part in self.parts if part.image_url is not None]
        if len(addresses) > MOST_IMAGES:
            raise BadImage(f"the request has {len(addresses)} images, more than the {MOST_IMAGES} allowed: send fewer.")
        loaded, pixels = list[Image.Image](), 0
        for number, address in enumerate(addresses, 1):
            loaded.append(image_of(address.url, f"image {number}"))
            pixels += loaded[-1].width * loaded[-1].height
            if pixels > images.MAX_PIXELS:
                raise BadImage(images.too_many_pixels("the images of the request have together"))
        return loaded


def image_of(url: str, name: str) -> Image.Image:
    """The image of a `data:` URL. Other addresses are not followed, since a client would have the server open its own
    files, or those of its network.

    Raises:
        BadImage: it is no image, or another address.
    """
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise BadImage(
            f"{name} is no data URL in base64 (data:image/png;base64,…), and other addresses are not followed: send "
            "the image itself."
        )
    try:
        encoded = base64.b64decode(data, validate=True)
    except ValueError as error:  # binascii.Error, and characters that are no ASCII
        raise BadImage(f"{name} is no base64 ({error}): encode the file's bytes.") from error
    return images.load(encoded, name).image
