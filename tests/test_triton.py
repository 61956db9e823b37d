"""The triton backend: in Triton's interpreter against the formula, and compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dymu
import tiny
from dymu.choices import UNMERGE
from dymu.reducers import ThresholdMerge
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, History
from dymu.unmerging.step import Step
from test_unmerging import as_float32, grow, prompts, steps

backend = pytest.importorskip("dymu.unmerging.backends.triton", reason="it needs Triton", exc_type=ImportError)
gpu = pytest.importorskip("benchmarks.gpu_attention")
bench_prompts = pytest.importorskip("benchmarks.prompts")
kernel_work = pytest.importorskip("benchmarks.kernel_work")
tables = backend.tables
SMALL = backend.Tiles(rows=16, width=32, sizes=2, warps=4, stages=1)


def grown_prompt(
    size: int, tokens: int, *, padded: bool = True, pieces: int = 1, unmerge: str = "exact"
) -> tuple[Step, int]:
    """Two rows whose tokens merge with one of the 20 before them at random, in one piece or several, and how many
    entries a cache would hold."""
    history, step = History(), None
    for _ in range(pieces):
        leaders = torch.arange(tokens).repeat(2, 1)
        for n in range(1, tokens):
            for row in leaders[torch.rand(2) < 0.7]:
                row[n] = row[torch.randint(max(0, n - 20), n, ())]
        present = torch.ones(2, tokens, dtype=torch.bool)
        present[0, : tokens // 3 if padded else 0] = False
        queries = TokenMap.from_leaders(leaders, present if padded else None)
        step, _, _ = grow(history, queries, unmerge, size=size, backend="triton")
    assert step is not None
    return step, history.entries


def error(
    step: Step, entries: int, heads: int, shared: int, size: int, dtype: torch.dtype, window: int | None = None
) -> float:
    """Of the triton backend in a type, relative to sdpa in float64."""
    query = torch.randn(2, heads * shared, step.queries.width, size).to(dtype)
    key, value = torch.randn(2, 2, heads, entries, size).to(dtype)
    expected = BACKENDS["sdpa"](query.double(), key.double(), value.double(), step, 0.3, window)
    output = BACKENDS["triton"](query, key, value, as_float32(step), 0.3, window)
    assert output.dtype == dtype
    return float((output.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [8, 16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [50, 5], ids=["prefill", "decode"])
def test_every_head_size_and_type(size, tokens):
    step, entries = grown_prompt(size, tokens)
    assert error(step, entries, 1, 3, size, torch.float32) < 1e-6
    assert error(step, entries, 1, 3, size, torch.float16) < 2e-3


def test_few_queries_of_many_heads_are_prefilled(monkeypatch):
    monkeypatch.setattr(backend, "decode", None)
    step, entries = grown_prompt(8, 9)
    assert error(step, entries, 1, 16, 8, torch.float32) < 1e-6


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("unmerge", ["exact", "compact"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "ragged"])
def test_prompts_of_many_tiles_that_grow(padded, unmerge, window, monkeypatch):
    monkeypatch.setattr(tables, "SPAN", 64)
    step, entries = grown_prompt(8, 100, padded=padded, pieces=3, unmerge=unmerge)
    assert error(step, entries, 2, 1, 8, torch.float32, window) < 1e-6


@pytest.mark.parametrize("unmerge", [unmerge for unmerge in UNMERGE if unmerge != "restore"])
@settings(max_examples=15)
@given(data=st.data())
def test_prefill_equals_the_reference(unmerge, data):
    """Also of few queries, which are prefilled in the middle of a prompt or decoded, by which is quicker."""
    step, query, key, value, window = data.draw(steps(unmerge, both_ways=False))
    expected = BACKENDS["reference"](query, key, value, step, 0.3, window)
    out, launch = backend.prefill(query.float(), key.float(), value.float(), as_float32(step), 0.3, window, SMALL)
    launch.run()
    assert (out.double() - expected).norm() / expected.norm().clamp(min=1e-3) < 1e-5


@given(data=st.data())
def test_key_tiles_hold_every_token_once_in_chunks_of_one_entry(data):
    tokens = data.draw(st.integers(1, 60))
    keys = data.draw(prompts(tokens, 2)).group
    tiles = tables.key_tiles(keys, 16, (4, 2, 1))
    for row, places, slots in zip(keys, tiles.index, tiles.slot, strict=True):
        there = places < tables.NONE
        assert sorted(places[there].tolist()) == (row >= 0).nonzero()[:, 0].tolist()
        assert torch.equal(row[places[there].long()], slots[there].long())
        for size, table, used in zip((4, 2, 1), slots, there, strict=True):
            chunks, whole = table.view(-1, size, 16 // size), used.view(-1, size, 16 // size)
            assert torch.equal(chunks, chunks[:, :1].expand_as(chunks))
            assert torch.equal(whole, whole[:, :1].expand_as(whole))


@given(data=st.data())
def test_visits_miss_no_key_and_mask_where_they_must(data):
    tokens, seen = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 30))
    group = data.draw(prompts(tokens, 2)).group
    keys = torch.cat((torch.arange(seen).expand(2, -1), torch.where(group < 0, -1, group + seen)), 1)
    window = data.draw(st.sampled_from([None, 1, 7]))
    columns, rows = (
        tables.key_tiles(keys, 16, (4, 2, 1)),
        tables.query_tiles(group, torch.arange(seen, tokens + seen)[None], 8),
    )
    indices = torch.arange(tokens + seen).expand(2, -1)
    visits = columns.visits(rows, indices, window)
    for b in range(2):
        for tile, place in enumerate(rows.index[b].view(-1, 8)):
            query = place[place >= 0]
            for table, (start, whole, end) in zip(columns.index[b], visits[b, tile].tolist(), strict=True):
                sees = (table <= query[:, None, None]) & (table < tables.NONE)
                if window is not None:
                    sees &= query[:, None, None] - table < window
                assert not sees[:, :start].any()
                assert not sees[:, max(end, start) :].any()
                assert sees[:, start:whole].all()


def test_a_model_answers_the_same():
    model = tiny.llava("clip", "mistral")
    ids = torch.stack([tiny.prompt(model, 3, "image", length, seed=length) for length in (9, 9)])
    inputs = {"input_ids": ids, "pixel_values": tiny.pictures(2)}
    options = {"do_sample": False, "max_new_tokens": 3, "suppress_tokens": [tiny.IMAGE_TOKEN]}
    outputs = []
    for name in ("triton", "sdpa"):
        with dymu.apply(model, merge=ThresholdMerge((0.9,) * tiny.LAYERS), backend=name):
            outputs.append((model(**inputs).logits, model.generate(**inputs, **options)))
    (logits, text), (expected_logits, expected_text) = outputs
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    assert torch.equal(text, expected_text)


def test_what_it_cannot_compute_is_refused(monkeypatch):
    step, entries = grown_prompt(8, 20)
    query, key, value = (torch.randn(2, 1, entries, 8) for _ in range(3))
    with pytest.raises(ValueError, match=r"not in float64; choose backend='sdpa'"):
        BACKENDS["triton"](query.double(), key.double(), value.double(), step, 0.3)
    with pytest.raises(ValueError, match="up to 256 channels"):
        BACKENDS["triton"](*(x.repeat(1, 1, 1, 512 // x.shape[-1]) for x in (query, key, value)), step, 0.3)
    with torch.enable_grad(), pytest.raises(ValueError, match="no backward pass"):
        BACKENDS["triton"](query.requires_grad_(), key, value, step, 0.3)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="this model is on the CPU"):
        BACKENDS["triton"](query.detach(), key, value, step, 0.3)


@pytest.mark.parametrize(("window", "unmerge", "new"), [(None, "exact", 1), (30, "exact", 3), (None, "compact", 1)])
def test_the_gpu_benchmark_checks_by_a_formula_of_its_own(window, unmerge, new):
    case = gpu.Case(bench_prompts.Shape(4, 2, 16), "float32", window=window, unmerge=unmerge, side=8, kept=20, new=new)
    assert max(gpu.errors(case, "cpu")) < 1e-6


def test_the_gpu_benchmark_merges_to_as_many_groups_as_asked():
    groups = bench_prompts.blobs(images=2, side=10, kept=40, seed=1)
    assert sorted(set(groups)) == list(range(40))
    assert max(groups.count(group) for group in range(40)) > 5


def test_chunks_save_products_and_alone_cost_none():
    assert kernel_work.work(images=4, side=27, kept=408, sizes=1) == kernel_work.Work(
        1, 1, 1, pytest.approx(0.08, abs=0.02)
    )
    assert kernel_work.work(images=4, side=27, kept=408).both < 0.75


def test_triton_is_optional_and_its_kernels_are_loaded_when_first_used():
    show = "import dymu.unmerging; print(*dymu.unmerging.BACKENDS, 'dymu.unmerging.backends.triton' in sys.modules)"
    forget = "[sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] == 'dymu']"
    # One process, since torch is slow to import.
    code = f"import sys; {show}; {forget}; sys.modules['triton'] = None; {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["reference sdpa auto triton False", "reference sdpa auto False"]


def assembler() -> str | None:
    import triton

    try:
        return triton.knobs.nvidia.ptxas.path
    except RuntimeError:
        return None


@pytest.mark.skipif(assembler() is None, reason="ptxas, NVIDIA's assembler, comes with Triton for Linux")
@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [("bfloat16", ["28/4/128", "32/32/64"]), ("float32", ["32/1/128"])],
    ids=["bfloat16", "float32"],
)
def test_kernels_compile_for_an_h100(dtype, shapes):
    """Grouped and single heads, of 128 and 64, in bfloat16, 32 heads that share one in float32, and matching;
    of a prompt, and of one and 16 tokens after it, which are decoded where they fit and else prefilled: with next to no
    registers spilled, in the 227 KiB of shared memory that a program may have."""
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", "--dtype", dtype]
    options = [part for shape in shapes for part in ("--shape", shape)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    heads = [shape.rsplit("/", 1)[0] for shape in shapes]
    attention = {(kernel, each) for kernel in ("prefill", "decode", "combine") for each in heads}
    assert {(row["kernel"], row["heads"]) for row in rows} == attention | {("match", "")}
    for row in rows:
        assert row["spill_moved_bytes"] <= 64, row
        assert row["shared_bytes"] <= 227 * 1024, row
