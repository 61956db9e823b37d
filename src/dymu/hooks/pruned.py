"""The layers of the language model, each on the tokens that a pruning lets it run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dymu.choices import Unmerge
from dymu.errors import BadPrompt, UnsupportedModel
from dymu.families.resolve import Parts
from dymu.hooks.attention import Angles, LayerSteps, Rotations
from dymu.hooks.replaced import Method
from dymu.hooks.versions import pop_cache
from dymu.pruning import Ahead, Joined, Pruning
from dymu.pruning.pruning import check_chosen
from dymu.token_map import TokenMap, at_least_float32, leaders_of, take
from dymu.unmerging import History, NewTokens
from dymu.unmerging.rows import attention_rows
from dymu.unmerging.virtual import as_pairs, as_phase, interleaved, turn_between, usual_order


@dataclass(frozen=True, eq=False)
class Prompt:
    """What goes into the first layer of one forward.

    Attributes:
        new: the tokens of the full prompt, to merged ones.
        picture: int64 [B, N], which picture (image, tile, frame) each token is of, -1: of none; None: there are none,
            so that everything runs.
        present: bool [B, N], the tokens that there are; None: all.
        positions: of the tokens, see `NewTokens.of`.
        embeds: [B, M, C], of the merged tokens.
        read: how many of the tokens are the prompt; those behind them are an answer, or tried for one.
    """

    new: NewTokens
    picture: Tensor | None
    present: Tensor | None
    positions: Tensor
    embeds: Tensor
    read: int


class Stage(NamedTuple):
    """Layers from `start` on, to the next stage: in which form they attend, and to what of the KV cache."""

    start: int
    form: Unmerge
    history: History


@dataclass(frozen=True, eq=False)
class Segment:
    """Layers that run the same tokens.

    Attributes:
        new: the tokens of the full prompt, to those that run.
        rows: int64 [B, K], which of the merged tokens these are, anything past a row's end; None: all.
        angles: their rotary angles, by kind.
        fed: bool [B, K], those of them that run the MLP; None: all.
    """

    new: NewTokens
    rows: Tensor | None
    angles: dict[str, Angles]
    steps: LayerSteps
    history: History
    fed: Tensor | None = None

    @cached_property
    def there(self) -> Tensor:
        """bool [B, K], which of `rows` there are."""
        tokens = self.new.map
        return torch.arange(tokens.width, device=tokens.kept.device) < tokens.kept[:, None]

    def gather(self, hidden: Tensor) -> Tensor:
        """Of all rows [B, M, C] those that run."""
        return hidden if self.rows is None else take(hidden, self.rows)

    def scatter(self, hidden: Tensor, ran: Tensor) -> Tensor:
        """All rows [B, M, ...], with those that ran in place of what they were."""
        if self.rows is None:
            return ran
        batch, column = self.there.nonzero(as_tuple=True)
        return hidden.index_put((batch, self.rows[batch, column]), ran[batch, column])


Plan = Callable[[NewTokens, History, bool, Unmerge], tuple[dict[str, Angles], LayerSteps]]
"""Adds new tokens to a history, and says how they rotate and attend. Takes whether it is for the last layers, and the
form of unmerging."""


class _Handed(Exception):
    """A layer has handed over its queries and keys."""


class _Recorder:
    """In place of a step: stops the layer when it hands over what it attends with."""

    def attend(
        self, module: Any, query: Tensor, key: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.module, self.query, self.key = module, query, key
        self.scaling, self.window, self.softcap = scaling, window, softcap
        raise _Handed


class PrunedLayers:
    """The layers of one forward.

    Args:
        pruning: which tokens they run; None: all.
        stages: of layers that run the same tokens and attend in the same form; the first one begins at layer 0.
        plan: see `Plan`.
        cache: the KV cache; None: there is none.
    """

    def __init__(
        self,
        parts: Parts,
        pruning: Pruning | None,
        stages: Sequence[Stage],
        plan: Plan,
        prompt: Prompt,
        cache: Any,
        rotations: Rotations,
        representatives: int,
    ) -> None:
        self._parts, self._pruning, self._stages, self._plan = parts, pruning, stages, plan
        self._prompt, self._base, self._cache = prompt, prompt.new.map, cache
        self._rotations, self._representatives = rotations, representatives
        if pruning is not None and pruning.forgets and prompt.read < prompt.new.map.tokens:
            raise BadPrompt(
                f"{type(pruning).__name__} forgets tokens when the prompt has been read, and here tokens of an answer "
                "come along with it: leave use_cache=False and assistants out, or take forget=False."
            )
        self._chooses = frozenset(() if pruning is None else pruning.starts(len(parts.decoder_layers)))
        shown = None if prompt.picture is None else prompt.picture >= 0
        self._shown = None if shown is None or not bool(shown.any()) else self._base.any(shown)
        self._segments = list[Segment]()
        self._inputs = dict[int, Tensor]()
        self._forwards = dict[int, Callable[[Tensor, Segment, Any], Any]]()
        self._recorded = dict[int, tuple[_Recorder, Segment]]()
        self._into = torch.arange(self._base.width, device=prompt.embeds.device).repeat(self._base.batch, 1)
        self._newly: Tensor | None = None
        self.fed: Tensor | None = None
        """bool [B, K], the tokens that run the MLP of the layer that runs; None: all."""
        self.ran = list[Tensor]()
        """Of each segment int64 [B], how many tokens of images and videos its layers ran; empty without pruning."""

    def begin(self) -> Segment:
        """The segment of the first layers."""
        self._add(self._prompt.new, None)
        return self._segments[0]

    def run(self, index: int, forward: Method, arguments: dict[str, Any]) -> Any:
        """Layer `index`, on what it is to run; the rest passes it."""
        hidden = arguments.pop("hidden_states")
        for known in (self._forwards, self._inputs):  # of no other layers than this one and the one before
            for passed in [at for at in known if at != index - 1]:
                del known[passed]
        self._forwards[index], self._inputs[index] = partial(self._forward, forward, arguments), hidden
        if len(self._segments) < len(self._stages) and index == self._stages[len(self._segments)].start:
            self._choose(index, hidden)
            hidden = self._inputs[index] = self._with_means(hidden)
        segment = self._segments[-1]
        self.fed = segment.fed
        made = self._forwards[index](hidden, segment, None)
        self.fed = None
        if isinstance(made, tuple):
            return (segment.scatter(hidden, made[0]), *made[1:])
        return segment.scatter(hidden, made)

    def finish(self) -> None:
        """Let the KV cache forget what later tokens shall not see."""
        if self._pruning is None or not self._pruning.forgets or self._cache is None:
            return
        for segment in self._segments:
            if segment.fed is None:
                continue
            history = segment.history
            earlier = segment.fed.new_ones(len(segment.fed), history.entries - segment.fed.shape[1])
            index = history.keep(torch.cat((earlier, segment.fed), 1))
            for layer in self._cache.layers:
                if getattr(layer, "history", None) is history:
                    layer.take(index)

    def counts(self) -> list[list[int]]:
        """For each prompt, how many tokens of images and videos each layer ran."""
        starts = [*(stage.start for stage in self._stages), len(self._parts.decoder_layers)]
        layers = [end - start for start, end in pairwise(starts)]
        return [
            [int(count) for count, times in zip(of_prompt, layers, strict=True) for _ in range(times)]
            for of_prompt in torch.stack(self.ran, 1).tolist()
        ]

    def _forward(
        self, forward: Method, arguments: dict[str, Any], hidden: Tensor, segment: Segment, recorder: Any
    ) -> Any:
        """A layer on the rows of a segment, or where a recorder stands in, as far as its attention."""
        arguments = dict(arguments)
        usual, given = self._segments[0].angles, arguments["position_embeddings"]
        kind = next((kind for kind, angles in usual.items() if angles is given), None)
        if kind is None:
            raise UnsupportedModel(
                "this language model's layers get other rotary angles than its rotary module gives, so that none "
                "can have tokens of its own; leave prune and unmerge_from out."
            )
        arguments["position_embeddings"] = segment.angles[kind]
        arguments["dymu_step"] = segment.steps if recorder is None else recorder
        if recorder is not None:
            pop_cache(arguments)
        return forward(segment.gather(hidden), **arguments)

    def _add(self, new: NewTokens, rows: Tensor | None, fed: Tensor | None = None) -> None:
        number = len(self._segments)
        stage = self._stages[number]
        last = fed is None and number + 1 == len(self._stages)  # whose MLP may then run for the asked tokens alone
        angles, steps = self._plan(new, stage.history, last, stage.form)
        self._segments.append(Segment(new, rows, angles, steps, stage.history, fed))
        if self._shown is not None and self._pruning is not None:
            shown = self._shown if rows is None else take(self._shown, rows) & self._segments[-1].there
            shown = shown if fed is None else shown & fed
            self.ran.append(shown.sum(1))

    @torch.no_grad()
    def _choose(self, index: int, hidden: Tensor) -> None:
        """Begin a segment."""
        base, before = self._base, self._segments[-1]
        self._newly = None
        if self._shown is None:
            self._add(self._prompt.new, None)
            return
        there = torch.arange(base.width, device=base.kept.device) < base.kept[:, None]
        ran = there if before.rows is None else before.scatter(torch.zeros_like(there), before.there)
        runs = self._chosen(index, hidden, self._shown, there, ran) if index in self._chooses else ran
        fed = before.fed
        if self._pruning is not None and self._pruning.attends and index in self._chooses:
            fed, runs = None if bool((runs == there).all()) else runs, there
        form = self._stages[len(self._segments)].form
        if bool((runs == there).all()) and form == self._stages[0].form:
            self._add(self._prompt.new, None, fed)
            return
        stands = torch.arange(base.width, device=runs.device).expand_as(runs)
        stands = torch.where(runs, stands, -1).gather(1, self._into)
        if self._pruning is not None and self._pruning.fill == "nearest":
            stands = self._filled(stands, self._with_means(hidden), runs)
        group = base.group.clamp(min=0)
        label = torch.where(base.group < 0, -1, stands.gather(1, group))
        tokens = TokenMap.from_leaders(leaders_of(label, base.width), self._prompt.present)
        new = NewTokens.of(tokens, self._prompt.positions, form, self._representatives)
        itself = (label == group) & (base.group >= 0)
        at = torch.where(itself, new.map.group, new.map.width)
        rows = group.new_zeros(base.batch, new.map.width + 1).scatter(1, at, group)[:, :-1]
        self._add(new, rows, fed if fed is None else take(fed, rows))

    def _chosen(self, index: int, hidden: Tensor, shown: Tensor, there: Tensor, ran: Tensor) -> Tensor:
        """bool [B, M], the merged tokens that run from layer `index` on.

        Args:
            shown, there, ran: bool [B, M], those of images and videos, those that there are, those that ran before.
        """
        assert self._pruning is not None
        runs, competes = there.clone(), there if self._pruning.comes_back else ran
        for row in range(len(runs)):
            of_image = (shown[row] & there[row]).nonzero()[:, 0]
            if not len(of_image):
                continue
            chosen = self._pruning.choose(self._ahead(index, hidden, row, of_image, competes[row, of_image]))
            if chosen is None:
                if not (self._pruning.comes_back or self._pruning.attends):
                    runs[row] = ran[row]
                continue
            check_chosen(self._pruning, chosen, competes[row, of_image])
            if isinstance(chosen, Joined):
                self._join(row, of_image, chosen.into)
                chosen = chosen.rows
            runs[row, of_image] = False
            runs[row, of_image[chosen]] = True
        self._recorded.clear()
        return runs

    def _join(self, row: int, of_image: Tensor, into: Tensor) -> None:
        """Note that of one prompt image tokens are joined, see `Joined`: what stood for them before, too."""
        joined = into >= 0
        if self._newly is None:
            self._newly = torch.full_like(self._into, -1)
        self._newly[row, of_image[joined]] = of_image[into[joined]]
        onward = torch.arange(self._into.shape[1], device=into.device)
        onward[of_image[joined]] = of_image[into[joined]]
        self._into[row] = onward[self._into[row]]

    def _with_means(self, hidden: Tensor) -> Tensor:
        """What goes into a layer [B, M, C], with the means of tokens that were joined ahead of it."""
        if self._newly is None:
            return hidden
        joined, into = self._newly >= 0, self._newly.clamp(min=0)
        count = joined.new_zeros(joined.shape, dtype=torch.float32).scatter_add(1, into, joined.float())[..., None]
        members = at_least_float32(torch.where(joined[..., None], hidden, 0))
        total = torch.zeros_like(members).scatter_add(1, into[..., None].expand_as(members), members)
        return torch.where(count > 0, total / count.clamp(min=1), hidden).to(hidden.dtype)

    def _filled(self, stands: Tensor, hidden: Tensor, runs: Tensor) -> Tensor:
        """int64 [B, M]: for image tokens that do not run, the one that does and is most like each."""
        assert self._shown is not None
        filled = stands.clone()
        for row, shown in enumerate(self._shown):
            kept, dropped = (shown & runs[row]).nonzero()[:, 0], (shown & (stands[row] < 0)).nonzero()[:, 0]
            dropped = dropped[dropped < self._base.kept[row]]
            if len(kept) and len(dropped):
                x = normalize(at_least_float32(hidden[row]), dim=-1)
                filled[row, dropped] = kept[(x[dropped] @ x[kept].mT).argmax(1)]
        return filled

    def _ahead(self, index: int, hidden: Tensor, row: int, of_image: Tensor, running: Tensor) -> Ahead:
        tokens, present = self._base, self._prompt.present
        assert self._prompt.picture is not None
        kept, there = int(tokens.kept[row]), tokens.group[row] >= 0
        there = (there if present is None else present[row] & there)[: self._prompt.read]
        last = int(tokens.group[row, there.nonzero()[-1, 0]])
        return Ahead(
            layer=index,
            layers=len(self._parts.decoder_layers),
            hidden=hidden[row, :kept],
            embeds=self._prompt.embeds[row, :kept],
            shown=of_image,
            picture=self._prompt.picture[row, tokens.first()[row, of_image]],
            running=running,
            size=tokens.size()[row, of_image],
            last=last,
            attend=lambda layer, rows: self._attention(layer, row, rows)[..., :kept],
            alike=lambda layer, rows: self._alike(layer, row, rows)[..., :kept],
            keys=lambda layer: self._keys(layer, row)[:kept],
            norm=self._norm,
        )

    def _ran_in(self, layer: int) -> Segment:
        """What ran in the layer before, or what competes to run in the next one."""
        before, history = self._segments[-1], self._stages[len(self._segments)].history
        if layer != max(self._forwards):
            return before
        competes = self._segments[0] if self._pruning is not None and self._pruning.comes_back else before
        if not history.length:
            return competes
        history = history.copy()  # the layer's cache holds others of the tokens before than that of the layer before
        form = self._stages[self._segments.index(competes)].form
        angles, steps = self._plan(competes.new, history, False, form)
        return Segment(competes.new, competes.rows, angles, steps, history)

    def _handed(self, layer: int) -> tuple[_Recorder, Segment]:
        """The queries and keys of a layer, the one before or the next one, and what they are of."""
        if layer not in self._recorded:
            if layer not in self._forwards:
                raise ValueError(
                    f"{type(self._pruning).__name__} asks for the attention of layer {layer}; only layers "
                    f"{' and '.join(map(str, self._forwards))} are known here."
                )
            recorder, segment = _Recorder(), self._ran_in(layer)
            with suppress(_Handed):
                self._forwards[layer](self._inputs[layer], segment, recorder)
            past = segment.history.entries - segment.new.map.width
            if past:
                earlier = self._cache.layers[layer].keys[..., :past, :]
                recorder.key = torch.cat((earlier, recorder.key), 2)
            self._recorded[layer] = recorder, segment
        return self._recorded[layer]

    def _attention(self, layer: int, row: int, rows: Tensor) -> Tensor:
        """[H, R, M], see `Ahead.attend`."""
        handed, segment = self._handed(layer)
        return self._weights(handed.query, handed.key, handed, segment, row, rows)

    def _weights(
        self, query: Tensor, key: Tensor, handed: _Recorder, segment: Segment, row: int, rows: Tensor
    ) -> Tensor:
        """[H, R, M], by queries and keys in place of those that the layer has handed over."""
        step = segment.steps.at(handed.module, query.shape[-1], handed.window)
        own = self._own(segment, row)
        fits = rows.dtype == torch.int64 and rows.ndim == 1
        if not fits or not bool(((rows >= 0) & (rows < len(own)) & (own[rows.clamp(0, len(own) - 1)] >= 0)).all()):
            raise ValueError(
                f"{type(self._pruning).__name__} asks for the attention of rows that there are not, or that did not "
                "run in that layer; name int64 rows of text, or of tokens that run."
            )
        weights = attention_rows(query, key, step, row, own[rows], handed.scaling, handed.window, handed.softcap)
        weights = weights[..., -segment.new.map.width :]
        there = own >= 0
        return weights.index_select(-1, own.clamp(min=0)).masked_fill(~there, 0)

    def _own(self, segment: Segment, row: int) -> Tensor:
        """int64 [M], where each merged token stands among those of a segment; -1: nowhere."""
        width = self._base.width
        if segment.rows is None:
            return torch.arange(width, device=self._base.group.device)
        there = segment.there[row]
        own = segment.rows.new_full((width,), -1)
        own[segment.rows[row, there]] = torch.arange(len(there), device=own.device)[there]
        return own

    def _alike(self, layer: int, row: int, rows: Tensor) -> Tensor:
        """[R, M], see `Ahead.alike`.

        Raises:
            BadPrompt: attention goes to tokens in the KV cache, too, whose angles are not known.
        """
        handed, segment = self._handed(layer)
        if segment.history.entries > segment.new.map.width:
            raise BadPrompt(
                f"{type(self._pruning).__name__} compares attention with that of equal keys, and of tokens in a KV "
                "cache it does not know where they stand: give the whole prompt at once, or take another method."
            )
        rotation = self._rotations.by_module[id(handed.module)]
        turn = as_phase(*self._rotations.joined(segment.angles))[:, None]
        pairs = as_pairs(turn.real.new_ones(*turn.shape[:-1], rotation.size))
        pairs[..., : rotation.pairs] *= turn[..., rotation.start : rotation.start + rotation.pairs]
        same = usual_order(interleaved(pairs, turn.real.dtype), rotation.channels)
        return self._weights(same, same, handed, segment, row, rows)[0]

    def _keys(self, layer: int, row: int) -> Tensor:
        """[M, Hkv, D], see `Ahead.keys`; turned as if the first token of a conversation stood at position 0, whatever
        padding is ahead of it."""
        handed, segment = self._handed(layer)
        keys = handed.key[row, :, -segment.new.map.width :].transpose(0, 1)
        if segment.history.entries == segment.new.map.width:
            rotation = self._rotations.by_module[id(handed.module)]
            first = as_phase(*self._rotations.joined(self._segments[0].angles))[row, 0]
            first = first[rotation.start : rotation.start + rotation.pairs]
            pairs = as_pairs(keys, rotation.channels)
            pairs[..., : rotation.pairs] *= turn_between(first, torch.ones_like(first))
            keys = usual_order(interleaved(pairs, keys.dtype), rotation.channels)
        own = self._own(segment, row)
        return keys[own.clamp(min=0)].masked_fill((own < 0)[:, None, None], 0)

    def _norm(self, hidden: Tensor) -> Tensor:
        norm = getattr(self._parts.language_model, "norm", None)
        if not isinstance(norm, nn.Module):
            raise UnsupportedModel(
                f"{type(self._parts.language_model).__name__} has no part named norm, which {self._pruning} reads."
            )
        normed: Tensor = norm(hidden[None])[0]
        return normed
