"""Where the time of a language model's layer goes, from short prompts to long ones: operations, bytes, milliseconds.

`python -m benchmarks.roofline` takes one decoder layer of Qwen2-0.5B's shape (on a GPU of Qwen2-7B's, in bfloat16) with
random weights, prompts in which 14 % of the image tokens are left, and measures apart:

- `linear`: projections and MLP, on all N tokens and on the M merged ones; one token when decoding;
- `attention`, rotation of what is new included: of the untouched model to N tokens; of DyMU to N virtual tokens, of
  all of them and, in prefill, of one representative of each group, which sees all of them or, in long prompts, near and
  far ones; decoding, also with the cache that keeps turned keys; and of the untouched model to M tokens, as a floor.

Operations are 2 for each multiplication and addition, attention counted over the pairs that causality lets see. Bytes
are the fewest that must be read and written once: weights, inputs, outputs, cache entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from benchmarks import record
from benchmarks.prompts import SIZES, Shape, plan, prompts, rotate, tensors, turn
from dymu.measure.timing import now
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, History, Step, near_far
from dymu.unmerging.virtual import rows_behind, usual_order, virtual_keys

Run = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One decoder layer: channels, hidden channels of the MLP, and heads."""

    name: str
    channels: int
    hidden: int
    attention: Shape

    @property
    def weights(self) -> int:
        """Parameters of the projections and the MLP."""
        queries, keys = self.attention.heads * self.attention.size, self.attention.key_heads * self.attention.size
        return self.channels * (2 * queries + 2 * keys + 3 * self.hidden)


SMALL = Layer("Qwen2-0.5B", 896, 4864, Shape(14, 2, 64))
LARGE = Layer("Qwen2-7B", 3584, 18944, Shape(28, 4, 128))


@dataclass(frozen=True)
class Part:
    """Something to time, and what it must compute and move."""

    phase: str
    name: str
    operations: float
    moved: float
    run: Run


def linear(layer: Layer, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The projections and the MLP of a layer, without attention."""
    heads = layer.attention
    into = nn.Linear(layer.channels, (heads.heads + 2 * heads.key_heads) * heads.size, device=device, dtype=dtype)
    out = nn.Linear(heads.heads * heads.size, layer.channels, bias=False, device=device, dtype=dtype)
    gate, up = (nn.Linear(layer.channels, layer.hidden, bias=False, device=device, dtype=dtype) for _ in range(2))
    down = nn.Linear(layer.hidden, layer.channels, bias=False, device=device, dtype=dtype)

    def run(x: Tensor) -> Tensor:
        x = x + out(into(x)[..., : heads.heads * heads.size])
        return x + down(silu(gate(x)) * up(x))

    return run


def parts(layer: Layer, images: int, side: int, kept: int, device: torch.device, dtype: torch.dtype) -> list[Part]:
    """What is timed for one prompt."""
    shape, scaling, width = layer.attention, layer.attention.size**-0.5, dtype.itemsize
    merged, history = prompts(images, side, kept, 1), History()
    merged = TokenMap(merged.group.to(device), merged.kept.to(device), merged.width)
    steps = {"prefill": plan(merged, history, shape, dtype)}
    representative = plan(merged, History(), shape, dtype, "representative")
    steps["decode"] = plan(TokenMap.identity(1, 1, device), history, shape, dtype)
    layers, backend = linear(layer, device, dtype), BACKENDS["auto"]
    pieces = []
    for phase, step in steps.items():
        decoding = phase == "decode"
        asked = {"untouched": 1 if decoding else merged.tokens, "merged": step.queries.width}
        for name, tokens in asked.items():
            x = torch.randn(1, tokens, layer.channels, device=device, dtype=dtype)
            moved = width * (layer.weights + tokens * (4 * layer.channels + 3 * layer.hidden))
            pieces.append(Part(phase, f"linear, {name}", 2.0 * tokens * layer.weights, moved, lambda x=x: layers(x)))
        query, key, value = tensors(shape, 1, step.queries.width, history.entries, dtype, device)
        key, value = key.contiguous(), value.contiguous()
        entries, new, seen = history.entries, step.queries.tokens, step.keys.shape[1]
        cos, sin = (x.to(dtype) for x in turn(torch.arange(entries, device=device)[None], shape.size))

        def cost(queries: int, pairs: float, stored: int) -> tuple[float, float]:
            operations = 4.0 * pairs * shape.heads * shape.size
            return operations, width * shape.size * 2.0 * (queries * shape.heads + stored * shape.key_heads)

        def attend(
            step: Step,
            kept: Tensor | None = None,
            inputs: tuple[Tensor, ...] = (query, key, value),
            turns: tuple[Tensor, Tensor] = (cos, sin),
            decoding: bool = decoding,
        ) -> Run:
            asked, stored, values = inputs
            last = asked.shape[2]

            def run() -> Tensor:
                q = rotate(asked, *(x[:, -last:] for x in turns))
                k = stored if decoding else rotate(stored, *turns)
                return backend(q, k, values, step, scaling, kept=kept)

            return run

        pairs = float(seen) if decoding else new * seen / 2
        untouched = cost(new, pairs, seen)
        pieces += [
            Part(phase, "attention, untouched", *untouched, _plain(shape, new, seen, device, dtype)),
            Part(phase, "attention, DyMU", *cost(step.queries.width, pairs, entries), attend(step)),
            Part(
                phase, "attention, untouched on M tokens",
                *cost(step.queries.width, pairs * step.queries.width / new * entries / seen, entries),
                _plain(shape, step.queries.width, entries, device, dtype),
            ),
        ]  # fmt: skip
        if decoding:
            turned = virtual_keys(key, rows_behind(step.keys[:, : step.turned], entries, key.shape[1]), step.turn)
            name, fast = "attention, DyMU, fast cache", attend(step, torch.cat((usual_order(turned), key), 2))
            pieces.append(Part(phase, name, *cost(new, pairs, (seen + entries) // 2), fast))
        else:
            at = representative.query_at
            asked_pairs = float((at + 1).sum())
            name, work = "attention, DyMU, representative", cost(step.queries.width, asked_pairs, entries)
            pieces.append(Part(phase, name, *work, _from(2 * merged.tokens, attend(representative))))
            if merged.tokens >= near_far.LONG and device.type == "cpu":  # on a GPU no backend that is chosen has them
                pieces.append(Part(phase, f"{name}, near and far", *work, attend(representative)))
    return pieces


def _plain(shape: Shape, asked: int, seen: int, device: torch.device, dtype: torch.dtype) -> Run:
    """The untouched model's attention of `asked` tokens to `seen`; its cached keys are rotated already."""
    query, key, value = tensors(shape, 1, asked, seen, dtype, device)
    key, value = key.contiguous(), value.contiguous()
    cos, sin = (x.to(dtype) for x in turn(torch.arange(seen, device=device)[None], shape.size))
    decoding = asked < seen

    def attend() -> Tensor:
        q = rotate(query, cos[:, -asked:], sin[:, -asked:])
        k = key if decoding else rotate(key, cos, sin)
        return scaled_dot_product_attention(
            q, k, value, is_causal=not decoding, scale=shape.size**-0.5, enable_gqa=shape.heads != shape.key_heads
        ).transpose(1, 2)

    return attend


def _from(tokens: int, run: Run) -> Run:
    """The same, where only prompts of so many tokens and more have near and far keys."""

    def limited() -> Any:
        before, near_far.LONG = near_far.LONG, tokens
        try:
            return run()
        finally:
            near_far.LONG = before

    return limited


def main(
    repeats: int = 15,
    limit_s: Annotated[float, typer.Option(help="Rounds of one prompt stop after so long, but not before two.")] = 60,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "roofline",
) -> None:
    """Time every part of every prompt in turn, and write the result file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer, dtype = (LARGE, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)
    rows = []
    with torch.inference_mode():
        for images, side, kept in track([size for size in SIZES if size[2] != SIZES[1][2]], description="prompts"):
            torch.manual_seed(0)
            timed = parts(layer, images, side, kept, device, dtype)
            times: list[list[float]] = [[] for _ in timed]
            began = now()
            for turn in range(repeats + 1):
                for part, spent in zip(timed, times, strict=True):
                    start = now()
                    part.run()
                    spent.append(now() - start)
                if turn == 0 and now() - began < limit_s / 4:
                    times = [[] for _ in timed]  # that was to warm up
                if now() - began > limit_s and len(times[0]) > 1:
                    break
            tokens, left = images * side**2, kept
            for part, spent in zip(timed, times, strict=True):
                seconds = median(spent)
                rows.append(
                    {
                        "image_tokens": tokens, "kept": left, "phase": part.phase, "part": part.name,
                        "operations": part.operations, "bytes": part.moved, "ms": 1e3 * seconds, "runs": len(spent),
                        "gflops": part.operations / seconds / 1e9, "gbytes_s": part.moved / seconds / 1e9,
                    }
                )  # fmt: skip
    about = {"layer": layer.name, "dtype": str(dtype).removeprefix("torch."), "text_tokens": 64, "rows": rows}
    print(record.write(name, about))


if __name__ == "__main__":
    typer.run(main)
