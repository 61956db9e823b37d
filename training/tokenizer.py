"""A small tokenizer: every word of the closed world is one token, anything else falls to bytes."""

import re
import string
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from training.questions import LEADS, PHRASINGS, PLACED_AT
from training.vocabulary import BACKGROUND, COLOURS, PLACES, names, plural

PAD, END, IMAGE, USER, ASSISTANT = "<pad>", "</s>", "<image>", "<user>", "<assistant>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] != 'user' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Images first, then the text, wherever the message puts them."""


def words() -> list[str]:
    """Every word the recipe can ask or answer with, sorted."""
    texts = [text for options in PHRASINGS.values() for text in options]
    texts += [text for options in PLACED_AT.values() for text in options]
    texts += [*LEADS, *names(), *map(plural, names()), *COLOURS, *PLACES, BACKGROUND]
    texts += ["yes no and object it middle center color", " ".join(map(str, range(10)))]
    joined = re.sub(r"\{\w+\}|[?:,.']", " ", " ".join(texts))
    return sorted({*joined.split(), "an"})


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over whole words, then characters, then bytes: nothing is ever unknown."""
    special = [PAD, END, "<unk>", IMAGE, USER, ASSISTANT]
    pieces = [(token, 0.0) for token in special]
    pieces += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    pieces += [("▁" + word, -1.0) for word in words()]
    pieces += [("▁", -9.0), ("s", -3.0), ("es", -3.0)]
    pieces += [(c, -10.0) for c in string.ascii_lowercase + string.digits if c != "s"]
    pieces += [(c, -2.0) for c in "?!.,:;'-()\""]
    core = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "reply_token": ASSISTANT},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
