"""Carry large files in small pieces.

python -m training.vlm.pieces split FILE... --to FOLDER --mib 40
python -m training.vlm.pieces join FOLDER --to FOLDER
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__)
_CHUNK = 2**20


@app.command()
def split(
    files: Annotated[list[Path], typer.Argument(help="Files to cut up.")],
    to: Annotated[Path, typer.Option(help="The folder for the pieces.")],
    mib: Annotated[int, typer.Option(help="The largest piece.")] = 15,
) -> None:
    """Write FILE.000, FILE.001, ... and FILE.json, which says what they make."""
    to.mkdir(parents=True, exist_ok=True)
    for file in files:
        whole, names = hashlib.sha256(), []
        with file.open("rb") as stream:
            while piece := stream.read(mib * 2**20):
                whole.update(piece)
                names.append(f"{file.name}.{len(names):03}")
                (to / names[-1]).write_bytes(piece)
        index = {"file": file.name, "pieces": names, "sha256": whole.hexdigest()}
        (to / f"{file.name}.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
        typer.echo(f"{file.name}: {len(names)} pieces")


@app.command()
def join(
    folder: Annotated[Path, typer.Argument(help="Where the pieces are.")],
    to: Annotated[Path, typer.Option(help="The folder for the whole files.")],
) -> None:
    """Put every file together whose pieces are there; one whose sha256 is wrong is refused."""
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.json")):
        index = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in index["pieces"] if not (folder / name).is_file()]
        if missing:
            typer.echo(f"{index['file']}: waits for {', '.join(missing)}")
            continue
        scratch = to / f"{index['file']}.partial"
        whole = hashlib.sha256()
        with scratch.open("wb") as stream:
            for name in index["pieces"]:
                with (folder / name).open("rb") as piece:
                    while chunk := piece.read(_CHUNK):
                        whole.update(chunk)
                        stream.write(chunk)
        if whole.hexdigest() != index["sha256"]:
            scratch.unlink()
            raise SystemExit(f"{index['file']}: the pieces make another file: copy them again")
        scratch.rename(to / index["file"])
        typer.echo(f"{index['file']}: whole")


if __name__ == "__main__":
    app()
