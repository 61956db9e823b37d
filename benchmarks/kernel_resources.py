"""What the Triton kernels take of a GPU's registers and shared memory, compiled ahead of time; no GPU is needed.

`python -m benchmarks.kernel_resources` compiles prefill and decoding for the shapes of real models, prints a table and
writes the result file; `--json` prints data instead. A kernel that does not compile, or spills registers to
memory, shows here first.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import record
from benchmarks.candidates import triton_match
from benchmarks.prompts import Shape, plan
from dymu.token_map import TokenMap
from dymu.unmerging import History
from dymu.unmerging.backends.triton import Launch, Tiles, decode, decodes, prefill

SHAPES = ["28/4/128", "32/32/128", "14/2/64", "32/32/64", "16/16/80", "32/32/96", "8/4/256"]
"""Query heads, key heads and head size: Qwen2-7B, Llama-2-7B (LLaVA-1.5), Qwen2-0.5B, and some of every head size."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NAMES = list(DTYPES)
NEW = [640, 1, 16]
"""A prompt, and one and as many tokens after it as may be decoded at once."""


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, and bytes that its spill stores and loads move together, each instruction counted once;
    of one program: bytes of shared memory, and threads."""

    registers: int
    spill_moved_bytes: int
    shared_bytes: int
    threads: int


def compiled(launch: Launch, arch: int = 90) -> Resources:
    """Compile a launch for an NVIDIA architecture as its first call would.

    Raises:
        RuntimeError: ptxas refuses the kernel.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        argument = launch.arguments.get(name)
        free = name in launch.kernel.do_not_specialize
        if name in launch.constants or (isinstance(argument, int) and argument == 1 and not free):
            signature[name] = "constexpr"
            constants[name] = launch.constants.get(name, argument)
        elif isinstance(argument, torch.Tensor):
            signature[name] = "*" + _KINDS[argument.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if argument % 16 == 0 and not free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, moved = _assembled(kernel.asm["ptx"], arch)
    return Resources(registers, moved, kernel.metadata.shared, 32 * launch.warps)


_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def _assembled(ptx: str, arch: int) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{arch}a", str(file), "-o", f"{folder}/kernel"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas cannot assemble the kernel: {done.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None
    moved = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(registers[1]), sum(map(int, moved))


def launches(
    heads: int, key_heads: int, size: int, dtype: torch.dtype, new: int, tokens: int = 640, tiles: Tiles | None = None
) -> list[Launch]:
    """What a prompt of as many `tokens`, half of them merged in pairs, or `new` tokens after it, launch.

    Args:
        tiles: of a prefill; None takes the backend's own.
    """
    pairs = torch.cat((torch.arange(tokens // 2) // 2, torch.arange(tokens // 2) + tokens // 4))
    kept = pairs[-1:] + 1
    queries, history = TokenMap(pairs[None], kept, int(kept)), History()
    step = plan(queries, history, Shape(heads, key_heads, size), torch.float32)
    if new < tokens:
        step = plan(TokenMap.identity(1, new), history, Shape(heads, key_heads, size), torch.float32)
    query = torch.zeros(1, step.queries.width, heads, size, dtype=dtype).transpose(1, 2)
    key = value = torch.zeros(1, key_heads, history.entries, size, dtype=dtype)
    if decodes(query, key, step):
        return list(decode(query, key, value, step, 0.1, None)[1:])
    return [prefill(query, key, value, step, 0.1, None, tiles)[1]]


def matching(channels: int = 64, images: int = 2) -> Launch:
    """What finding partners among 576 tokens launches."""
    length = torch.full((images,), 577)
    arguments = {
        "metric": torch.zeros(images, 577, channels),
        "start": length.cumsum(0) - length,
        "length": length,
        "similarity": torch.zeros(images, 288),
        "partner": torch.zeros(images, 288, dtype=torch.long),
        "prefix": 1,
        "most": 288,
    }
    constants = {
        "CHANNELS": channels,
        "PADDED": triton.next_power_of_2(channels),
        "ROWS": triton_match.ROWS,
        "COLUMNS": triton_match.COLUMNS,
    }
    return Launch(triton_match.match, (9, images, 1), arguments, constants)


def main(
    shape: Annotated[list[str], typer.Option(help="Query heads/key heads/head size. Give several.")] = SHAPES,
    dtype: Annotated[list[str], typer.Option(help="Give several.")] = NAMES,
    new: Annotated[list[int], typer.Option(help="Tokens, 640 for a prompt, fewer for after it. Give several.")] = NEW,
    as_json: Annotated[bool, typer.Option("--json", help="Print data; write no file.")] = False,
) -> None:
    """Compile every kernel for every shape for sm_90."""
    rows: list[dict[str, Any]] = []
    for channels in (64, 72):
        what = {"kernel": "match", "heads": "", "size": channels, "new": "", "dtype": "float32"}
        rows.append(what | asdict(compiled(matching(channels))))
    for name, sizes, count in itertools.product(dtype, shape, new):
        heads, key_heads, size = map(int, sizes.split("/"))
        for launch in launches(heads, key_heads, size, DTYPES[name], count):
            what = {"kernel": launch.kernel.__name__, "heads": f"{heads}/{key_heads}", "size": size, "new": count}
            rows.append(what | {"dtype": name} | asdict(compiled(launch)))
    if as_json:
        print(json.dumps(rows))
        return
    print(*(f"{column:>17}" for column in rows[0]))
    for row in rows:
        print(*(f"{entry!s:>17}" for entry in row.values()))
    print(record.write("kernel_resources", {"compiled_for": "sm_90", "triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
