"""Caption images, batch by batch, going on where an earlier run was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from dymu.captioning.file import FORMAT, CaptionFile, Header, Row
from dymu.captioning.sources import Source
from dymu.errors import BadImage
from dymu.files import escaped, expanded
from dymu.handle import Handle, name_of
from dymu.measure.progress import Bar
from dymu.measure.provenance import fingerprint, short_hash, thresholds_hash, versions
from dymu.media.images import load
from dymu.prompting import check_question, generate, inputs_for, items_by_prompt
from dymu.thresholds import Thresholds


class Captioner:
    """A model that captions batches of images.

    Args:
        model, processor: of transformers; DyMU is applied to the model if there is a handle.
        handle: see `dymu.apply`; None: the model is untouched.
    """

    def __init__(self, model: Any, processor: Any, handle: Handle | None, prompt: str, max_new_tokens: int) -> None:
        check_question(processor, prompt)
        self._model, self._processor, self._handle = model, processor, handle
        self._prompt, self._max_new_tokens = prompt, max_new_tokens

    def header(
        self,
        source: str,
        thresholds: Thresholds | None,
        unmerge: str,
        cache: str = "merged",
        focus: str | None = None,
        guard: str | None = None,
    ) -> Header:
        """What the captions depend on.

        Args:
            source: see `Header`.
            unmerge, cache, focus, guard: as they were given to `dymu.apply`.
        """
        return Header(
            dymu_captions=FORMAT,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            source=escaped(source),
            model=name_of(self._model),
            weights=fingerprint(self._model),
            dtype=str(self._model.dtype).removeprefix("torch."),
            processor=short_hash([self._processor.chat_template, self._processor.image_processor.to_dict()]),
            thresholds="" if thresholds is None else thresholds_hash(thresholds),
            budget=None if self._handle is None else self._handle.budget,
            unmerge=unmerge,
            prompt=self._prompt,
            max_new_tokens=self._max_new_tokens,
            versions=versions("torch", "transformers"),
            cache=cache,
            at_most=None if self._handle is None else self._handle.at_most,
            exactly=None if self._handle is None else self._handle.exactly,
            focus=focus,
            guard=guard,
        )

    def __call__(self, batch: Sequence[Source]) -> list[Row]:
        """A row for each image, in order; one that cannot be read has an error."""
        rows: dict[str, Row] = {}
        images = {}
        for source in batch:
            try:
                images[source.name] = load(source.path, source.name).image
            except BadImage as error:
                rows[source.name] = Row(source.name, error=str(error))
        if images:
            inputs = inputs_for(self._model, self._processor, [([image], self._prompt) for image in images.values()])
            texts, _ = generate(self._model, self._processor, inputs, self._max_new_tokens)
            counts = self._counts(inputs, len(images))
            for name, text, (original, kept) in zip(images, texts, counts, strict=True):
                rows[name] = Row(name, text, original, kept)
        return [rows[source.name] for source in batch]

    def _counts(self, inputs: dict[str, Any], images: int) -> list[tuple[int | None, int | None]]:
        if self._handle is None:
            return [(None, None)] * images
        of_images = items_by_prompt(self._model, inputs, self._handle.last.items)
        return [(sum(len(item.leaders) for item in items), sum(item.kept for item in items)) for items in of_images]


def caption(
    captioned: Callable[[Iterable[Sequence[Source]]], Iterator[Sequence[Row]]],
    header: Header,
    sources: Sequence[Source],
    output: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Row]:
    """Caption the images that the file has no caption of yet, and append them.

    Args:
        captioned: batches to their rows, such as `functools.partial(map, captioner)`, in any order.
        header: see `Captioner.header`.
        output: the file of captions; a part of this very run is continued.

    Returns:
        The rows of all images, those of earlier runs too.

    Raises:
        BadResults, BadOutput: see `CaptionFile`.
    """
    with CaptionFile(expanded(output), header) as file, Bar(progress) as bar:
        there = {name for name, row in file.rows.items() if row.error is None}
        left = [source for source in sources if source.name not in there]
        todo = bar.add_task("captions", total=len(sources), completed=len(sources) - len(left))
        batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
        for rows in captioned(batches):
            for row in rows:
                file.add(row)
            bar.advance(todo, len(rows))
        return {source.name: file.rows[source.name] for source in sources}
