"""How vLLM's layers attend to merged tokens: what stands in place of `self_attn.attn` in each."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.platforms import current_platform

from dymu import unmerging
from dymu.choices import Unmerge
from dymu.errors import DymuError, UnsupportedModel
from dymu.serving.vllm import paged


class Groups:
    """The groups of the images that requests show, each under a number that M-RoPE's whole numbers can carry.

    They live as long as the request, which keeps what it shows.
    """

    def __init__(self) -> None:
        self._by_number: weakref.WeakValueDictionary[int, _Numbered] = weakref.WeakValueDictionary()
        self._next = 1

    def number(self, shown: Any, group: Tensor, tokens: int) -> Tensor:
        """int64 [tokens], a number for each token of what is shown.

        Args:
            shown: vLLM's item, which goes with the request.
            group: int64 [L], which token stands for each.
        """
        held = shown.__dict__.get("_dymu_groups")
        if held is None or held.of is not self:
            members = group == torch.arange(tokens)[:, None]
            held = shown.__dict__["_dymu_groups"] = _Numbered(self, self._next, members)
            self._by_number[held.first] = held
            self._next += tokens
        numbers: Tensor = held.first + torch.arange(tokens)
        return numbers

    def members(self, numbers: Tensor, longest: int) -> Tensor:
        """bool [T, longest], the members of tokens with such numbers."""
        firsts = sorted(self._by_number.keys())
        at = torch.bucketize(numbers, torch.tensor(firsts), right=True) - 1
        members = torch.zeros(len(numbers), longest, dtype=torch.bool)
        for index in at.unique().tolist():
            here, held = at == index, self._by_number[firsts[index]]
            members[here, : held.members.shape[1]] = held.members[numbers[here] - held.first]
        return members


class _Numbered:
    def __init__(self, of: Groups, first: int, members: Tensor) -> None:
        self.of, self.first, self.members = of, first, members


class Step:
    """What the attention of all layers shares in one step of the engine.

    Args:
        frequencies: float64 [P], rotary angle per position.
        longest: tokens of an image, at most.
        each_query: see `paged.Slots.step`.

    Attributes:
        rows: int64 [3, T] for the tokens of the step: text has its position three times; a token of an image its
            position, less than zero its number, and the position of its image's first token.
    """

    def __init__(self, frequencies: Tensor, longest: int, each_query: bool) -> None:
        self.groups, self.rows = Groups(), torch.zeros(3, 0, dtype=torch.int64)
        self._frequencies, self._longest, self._each_query = frequencies, longest, each_query
        self._slots: paged.Slots | None = None
        self._of: Any = None
        self._plan: list[tuple[slice, Tensor, unmerging.Step]] = []

    def plan(self, metadata: Any, cache: Tensor, backend: str) -> list[tuple[slice, Tensor, unmerging.Step]]:
        """For each request of the running step: which of its tokens are its own, the slots of all that it has, and how
        the new ones attend.

        Args:
            metadata: vLLM's, of the step; its new tokens are in the cache, or will be.
            cache: of any layer, [blocks, heads of keys, slots of a block, 2 D].
            backend: `sdpa` gets the entries of the request, `triton` all pages.
        """
        if self._of is metadata:
            return self._plan
        slots, block = metadata.slot_mapping[: metadata.num_actual_tokens].long(), cache.shape[2]
        device = slots.device
        if self._slots is None:
            self._slots = paged.Slots(cache.shape[0] * block, self._longest, device)
            self._frequencies = self._frequencies.to(device)
        position, number, begin = self.rows[:, : len(slots)]
        merged = number < 0
        members = torch.zeros(len(slots), self._longest, dtype=torch.bool, device=device)
        members[:, 0] = True
        if bool(merged.any()):
            members[merged] = self.groups.members(-number[merged].cpu(), self._longest).to(device)
        self._slots.write(slots, position, torch.where(merged, begin, position), members)
        pages = paged.Pages.of(cache) if backend == "triton" else None
        begins, plan = metadata.query_start_loc.tolist(), []
        for request, length in enumerate(metadata.seq_lens.tolist()):
            new = slice(begins[request], begins[request + 1])
            if new.start < new.stop:
                blocks = metadata.block_table[request, : -(-length // block)].long()
                own = (blocks[:, None] * block + torch.arange(block, device=device)).flatten()[:length]
                step = self._slots.step(
                    own,
                    new.stop - new.start,
                    self._frequencies,
                    each_query=self._each_query,
                    backend=backend,
                    rows=None if pages is None else pages.rows(own, block),
                )
                plan.append((new, own, step))
        self._of, self._plan = metadata, plan
        return plan


class Sizes(nn.Module):
    """log(size) of each token of the running step, where compiled layers find it."""

    log: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.register_buffer("log", torch.zeros(tokens, dtype=torch.float32), persistent=False)

    def set(self, number: Tensor) -> None:
        """int64 [T]: less than zero a size, else of text."""
        self.log[: len(number)] = torch.where(number < 0, -number, 1).log()


class SizedAttention(nn.Module):
    """log(size) of each key is added to its logits, by any kernel: as two more channels of queries and keys.

    The first holds it as near as the type can, the second the rest.
    """

    def __init__(self, sizes: Sizes, inner: Attention, head: int, scale: float) -> None:
        super().__init__()
        self.sizes = [sizes]  # the language model's layers share one, which is nobody's child
        self.inner, self.head, self.scale = inner, head, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, wide = len(q), self.inner.head_size
        log = self.sizes[0].log[:tokens] / self.scale
        high = log.to(k.dtype)
        low = (log - high.float()).to(k.dtype)
        one = torch.ones_like(high)
        q = self._widened(q, torch.stack((one, one), -1), wide)
        k = self._widened(k, torch.stack((high, low), -1), wide)
        v = self._widened(v, None, wide)
        found: Tensor = self.inner(q, k, v)
        return found.view(tokens, -1, wide)[..., : self.head].flatten(1)

    def _widened(self, x: Tensor, more: Tensor | None, wide: int) -> Tensor:
        heads = x.view(len(x), -1, self.head)
        padded = nn.functional.pad(heads, (0, wide - self.head))
        if more is not None:
            padded[..., self.head : self.head + 2] = more[:, None]
        return padded.flatten(1)


def frequencies_of(rotary: Any) -> Tensor:
    """float64 [P], by how much more every position is turned.

    Raises:
        UnsupportedModel: it is not the same from position to position, or pairs neighbouring channels.
    """
    exact = rotary._compute_cos_sin_cache().float()
    cos, sin = exact.double().chunk(2, -1)
    angle = torch.atan2(sin, cos)
    at = torch.arange(len(angle), dtype=torch.float64, device=angle.device)
    off = torch.remainder(angle - at[:, None] * angle[1] + torch.pi, 2 * torch.pi) - torch.pi
    stored = rotary.cos_sin_cache
    same = exact.shape == stored.shape and torch.equal(exact.to(stored.dtype), stored)
    if not (same and rotary.is_neox_style) or off.abs().max() > 1e-3 * max(1, len(at) / 1e4):
        raise UnsupportedModel(
            "this language model's positions turn in a way that dymu does not know in vLLM: take unmerge='original'."
        )
    return angle[1]


def make_room(model: nn.Module, positions: int) -> None:
    """Let the language model rotate by so many positions: those of unmerged prompts, of which merged ones keep some.

    Raises:
        UnsupportedModel: it cannot.
    """
    rotaries = [module for module in model.modules() if isinstance(module, RotaryEmbeddingBase)]
    for rotary in rotaries:
        stored = getattr(rotary, "cos_sin_cache", None)
        if stored is None:
            rotaries = []
            break
        if len(stored) >= positions:
            continue
        rotary.max_position_embeddings = positions
        longer = rotary._compute_cos_sin_cache().to(stored)
        if len(longer) < positions or not torch.equal(longer[: len(stored)], stored):
            rotaries = []
            break
        rotary.cos_sin_cache = longer
    if not rotaries:
        raise UnsupportedModel(
            f"this language model turns positions in a way that dymu does not know in vLLM, or cannot turn "
            f"{positions:,}: take a smaller --max-model-len, or fewer images in --limit-mm-per-prompt."
        )


def layers_of(model: Any) -> list[Any]:
    """Those that this process holds; with pipelines, others hold the rest.

    Raises:
        UnsupportedModel: there are none with an attention that is known.
    """
    layers = [layer for layer in model.layers if hasattr(layer, "self_attn")]
    if not layers:
        raise UnsupportedModel("this language model's attention is not known in vLLM: take unmerge='original'.")
    return layers


def _unmerged_backend() -> Any:
    """The attention backend for this platform."""
    if current_platform.is_cpu():
        from dymu.serving.vllm import on_cpu

        return on_cpu.UnmergedBackend
    from dymu.serving.vllm import on_gpu

    return on_gpu.UnmergedBackend


def _refuse_unknown(attention: Any, unmerge: Unmerge) -> None:
    """Raises: UnsupportedModel, where a layer attends in a way that a form other than `original` does not know."""
    impl = attention.impl
    unknown = {
        "capped logits": getattr(impl, "logits_soft_cap", None),
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
    }
    if unmerge != "compact":
        plain = attention.kv_cache_dtype in ("auto", "float16", "bfloat16")
        unknown |= {"a sliding window": attention.sliding_window, f"a cache of {attention.kv_cache_dtype}": not plain}
    found = [name for name, there in unknown.items() if there]
    if found:
        raise UnsupportedModel(
            f"this language model has {' and '.join(found)}, which dymu does not know in vLLM with "
            f"unmerge={unmerge!r}: take unmerge='original'."
        )


def check_engine(config: VllmConfig, unmerge: Unmerge, longest: int) -> None:
    """Raises: DymuError, where the engine would cut images, or has pages that others fill."""
    from dymu.serving.vllm.scheduler import WholeImages

    scheduling = config.scheduler_config
    least = longest + scheduling.max_num_seqs
    wrong = [
        word
        for word, there in {
            "a scheduler other than dymu's": scheduling.get_scheduler_cls() is not WholeImages,
            "chunks that cut images": not scheduling.disable_chunked_mm_input,
            "a KV transfer": config.kv_transfer_config is not None,
            f"max_num_batched_tokens below {least}": scheduling.max_num_batched_tokens < least,
            f"a long_prefill_token_threshold below {longest}": 0 < scheduling.long_prefill_token_threshold < longest,
        }.items()
        if there
    ]
    if wrong:
        raise DymuError(
            f"unmerge={unmerge!r} would not be exact with {' and '.join(wrong)}: start vLLM as `dymu vllm` does, or "
            "with dymu.serving.vllm.options."
        )


def install(model: nn.Module, config: VllmConfig, unmerge: Unmerge, longest: int) -> Step | Sizes:
    """Let the layers of a language model of vLLM attend to merged tokens; what its forward has to tell them.

    Raises:
        UnsupportedModel: it has something that the form does not know.
        DymuError: see `check_engine`.
    """
    layers = [layer.self_attn for layer in layers_of(model)]
    known = config.compilation_config.static_forward_context
    if unmerge == "compact":
        sizes = Sizes(config.scheduler_config.max_num_batched_tokens)
    else:
        check_engine(config, unmerge, longest)
        step = Step(frequencies_of(layers[0].rotary_emb), longest, unmerge == "exact")
        backend = _unmerged_backend()
    for layer in layers:
        stock = layer.attn
        _refuse_unknown(stock, unmerge)
        known.pop(stock.layer_name)
        options = {
            "num_kv_heads": layer.num_kv_heads,
            "cache_config": config.cache_config,
            "quant_config": config.quant_config,
            "prefix": stock.layer_name,
        }
        if unmerge == "compact":
            wide = _next_head_size(stock.attn_backend, layer.head_dim + 2)
            options["per_layer_sliding_window"] = stock.sliding_window
            inner = Attention(layer.num_heads, wide, layer.scaling, **options)
            layer.attn = SizedAttention(sizes, inner, layer.head_dim, layer.scaling)
        else:
            layer.attn = Attention(
                layer.num_heads, layer.head_dim, layer.scaling, **options, attn_backend=backend, step=step
            )
    return sizes if unmerge == "compact" else step


def _next_head_size(backend: Any, least: int) -> int:
    """The smallest head size from `least` on that a backend takes, in steps of 8.

    Raises:
        UnsupportedModel: it takes none.
    """
    for size in range(-(-least // 8) * 8, 513, 8):
        if backend.supports_head_size(size):
            return size
    raise UnsupportedModel(f"{backend.get_name()} takes no heads of {least} channels or more: take unmerge='original'.")
