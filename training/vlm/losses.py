"""What is minimised: answers behind an image, what lies at each place of it, and talk without images.

All questions about an image share one sequence. Attention to what is ahead of them is plain causal attention without a
mask; only the short rest needs one, which keeps every question blind to the others. Each question has the positions it
has when it is asked alone, so that its loss is what it would be alone (a test says so).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from training.vlm.base import MEAN, STD
from training.vlm.data import TRAINED_KINDS, Batch, Chat

ATTENTION = "packed-questions"
SHARPNESS = 20.0
"""Places are told apart by cosines to the word embeddings, times this: then their lengths stay the answers' affair.

Cosines as seen from the middle of all embeddings: from the origin, these all lie in much the same direction.
"""

BACKGROUND_WEIGHT, COLOUR_WEIGHT = 0.1, 0.4
TALK_WEIGHT = 0.25
"""Of text without images, where answers about images have 1."""


@dataclass(frozen=True)
class Scores:
    """Sums over a step, on its device, by number in ``TRAINED_KINDS``; one more at the end for named places."""

    loss: torch.Tensor
    right: torch.Tensor
    count: torch.Tensor


class Objective:
    """The losses of one model.

    Args:
        model: its language model is set to the packed attention.
        image_tokens: how many of them stand ahead of the questions.
    """

    def __init__(self, model: LlavaForConditionalGeneration, chat: Chat, background: int, colours: list[int]) -> None:
        device = model.device
        self.model = model.model
        self.background = background
        self.prefix = torch.tensor(chat.prefix, device=device)
        image = self.prefix == model.config.image_token_id
        self.image_begin, self.image_tokens = int(image.int().argmax()), int(image.sum())
        self.middle = model.get_input_embeddings().weight.detach().float().mean(0)
        self.colours = torch.tensor(colours, device=device)
        self.mean = 255 * torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=device).view(1, 3, 1, 1)
        self.model.language_model.set_attn_implementation(register(len(chat.prefix)))

    def __call__(self, batch: Batch, dense_weight: float) -> tuple[torch.Tensor, Scores]:
        """The loss to minimise, and what it is made of."""
        visual = self.visual(batch.pixels)
        logits = self.answer_logits(visual, batch)
        each = F.cross_entropy(logits, batch.targets, reduction="none")
        answers = (each * batch.weights).sum() / batch.weights.sum()
        dense, place_scores = self.dense(visual, batch)
        loss = answers + dense_weight * dense
        kinds, losses, right = batch.kinds, each, logits.argmax(1) == batch.targets
        if len(batch.talk_ids):
            talk_logits = self.talk_logits(batch)
            talk = F.cross_entropy(talk_logits, batch.talk_targets, reduction="none")
            loss = loss + TALK_WEIGHT * talk.mean()
            kinds = torch.cat([kinds, torch.full_like(batch.talk_targets, TRAINED_KINDS.index("talk"))])
            losses = torch.cat([losses, talk])
            right = torch.cat([right, talk_logits.argmax(1) == batch.talk_targets])
        with torch.no_grad():
            zeros = torch.zeros(len(TRAINED_KINDS), device=losses.device)
            sums = [zeros.index_add(0, kinds, value.float()) for value in (losses, right, torch.ones_like(losses))]
            return loss, Scores(*(torch.cat([a, b[None]]) for a, b in zip(sums, place_scores, strict=True)))

    def visual(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens as the language model gets them, [B, N, C], from bytes [B, side, side, 3]."""
        values = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return torch.stack(list(self.model.get_image_features(pixel_values=values).pooler_output))

    def answer_logits(self, visual: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, vocabulary], in float32: what each learned token was expected to be."""
        rows = len(batch.ids)
        embed = self.model.language_model.embed_tokens
        prefix = embed(self.prefix).expand(rows, -1, -1)
        before = prefix[:, : self.image_begin]
        after = prefix[:, self.image_begin + self.image_tokens :]
        inputs = torch.cat([before, visual.to(prefix.dtype), after, embed(batch.ids)], dim=1)
        ahead = len(self.prefix)
        positions = torch.cat([torch.arange(ahead, device=inputs.device).expand(rows, -1), ahead + batch.places], dim=1)
        hidden = self._hidden(inputs, positions, questions_mask(batch.turns, ahead))[:, ahead:]
        return self._logits(hidden, batch.where)

    def talk_logits(self, batch: Batch) -> torch.Tensor:
        """[T', vocabulary] for the text without images. Padding is on the right, where nothing attends to it."""
        inputs = self.model.language_model.embed_tokens(batch.talk_ids)
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand(len(inputs), -1)
        return self._logits(self._hidden(inputs, positions, None), batch.talk_where)

    def _hidden(self, inputs: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = self.model.language_model(
            inputs_embeds=inputs, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden

    def _logits(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        table = self.model.language_model.embed_tokens.weight
        return F.linear(hidden.flatten(0, 1)[where], table).float()

    def dense(self, visual: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """How badly image tokens name what lies at their places, and its colour; loss, hits and number of things."""
        towards = F.normalize(visual.flatten(0, 1).float() - self.middle, dim=1) * SHARPNESS
        names = batch.names.flatten()
        logits = towards @ self._directions(batch.candidates).T
        each = F.cross_entropy(logits.float(), names, reduction="none", ignore_index=-100)
        things = (names >= 0) & (batch.candidates[names.clamp(min=0)] != self.background)
        weights = torch.where(things, 1.0, BACKGROUND_WEIGHT) * (names >= 0)
        loss = (each * weights).sum() / weights.sum().clamp(min=1)
        shades = batch.colours.flatten()
        shade = F.cross_entropy(
            (towards @ self._directions(self.colours).T).float(), shades, reduction="none", ignore_index=-100
        )
        loss = loss + COLOUR_WEIGHT * shade.sum() / (shades >= 0).sum().clamp(min=1)
        with torch.no_grad():
            hits = (logits.argmax(1) == names) & things
            return loss, [(each * things).sum(), hits.sum().float(), things.sum().float()]

    def _directions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the embeddings of these tokens lie from the middle of all, as unit vectors."""
        table = self.model.language_model.embed_tokens.weight
        return F.normalize(table[tokens].float() - self.middle, dim=1)


def questions_mask(turns: torch.Tensor, ahead: int) -> torch.Tensor:
    """Who sees whom, bool [B, 1, S, ahead + S]: a question sees all that is ahead of it and its own earlier tokens."""
    rows, room = turns.shape
    earlier = torch.ones(room, room, dtype=torch.bool, device=turns.device).tril()
    seen = (turns[:, :, None] == turns[:, None, :]) & earlier
    return torch.cat([seen.new_ones(rows, room, ahead), seen], dim=2)[:, None]


def register(ahead: int) -> str:
    """Make the packed attention known to transformers, for so many tokens ahead of the questions."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        if attention_mask is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        else:
            front = F.scaled_dot_product_attention(
                query[:, :, :ahead], key[:, :, :ahead], value[:, :, :ahead], is_causal=True, scale=scaling
            )
            back = F.scaled_dot_product_attention(
                query[:, :, ahead:], key, value, attn_mask=attention_mask, scale=scaling
            )
            out = torch.cat([front, back], dim=2)
        return out.transpose(1, 2), None

    name = f"{ATTENTION}-{ahead}"
    AttentionInterface.register(name, attend)
    return name
