"""What the page shows, as HTML. Every text that comes from elsewhere is escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from dymu.demo.asked import Asked, Box, Promise, Subject, as_json, as_python, command
from dymu.demo.groups import BEHIND, Group, Groups
from dymu.forecast import Forecast
from dymu.measure.times import Times

_TEMPLATE = {ord("$"): "&#36;", ord("{"): "&#123;", ord("}"): "&#125;", ord("`"): "&#96;"}
"""What Gradio's own templates would read."""


def text(value: object) -> str:
    """Text as it may stand in HTML and in a quoted attribute."""
    return html.escape(str(value)).translate(_TEMPLATE)


def error(sentence: str) -> str:
    return f'<p class="dymu-error" role="alert">{text(_sentence(sentence))}</p>'


def status(sentence: str) -> str:
    """What runs at the moment."""
    return (
        f'<p class="dymu-status" role="status"><span class="dymu-spin" aria-hidden="true"></span>{text(sentence)}</p>'
    )


def hint(sentence: str) -> str:
    return f'<p class="dymu-hint">{text(sentence)}</p>'


def _sentence(words: str) -> str:
    """With a capital at the beginning, unless a file's name stands there."""
    named = re.search(r"[./\\\d]", words.split(" ")[0])
    return words if named else words[:1].upper() + words[1:]


# --- ahead of the model ---


def forecast(told: Forecast | None, focused: bool, notes: Sequence[str] = ()) -> str:
    """How many tokens the picture will keep.

    Args:
        focused: whether boxes are drawn, so that it keeps the budget's share.
    """
    if told is None:
        return hint("These thresholds hold no forecasts: how many tokens a picture keeps shows once it is asked about.")
    share = told.expected / told.most
    why = (
        f"<strong>Reserve {told.reserve:,}</strong>: enough for 95 of 100 pictures that look like it. Told from the "
        "pixels alone, before the model runs."
    )
    if focused:
        why = "With boxes a picture keeps the budget's share, whatever it shows."
    noted = "".join(f"<li>{text(_sentence(note))}.</li>" for note in notes)
    noted = f'<ul class="dymu-notes">{noted}</ul>' if noted else ""
    return (
        '<div class="dymu-forecast" aria-live="polite">'
        f'<div class="dymu-big"><strong>{told.expected:.0f}</strong> of {told.most:,} tokens expected</div>'
        f"{_meter(share, told.reserve / told.most)}"
        f"<p>{share:.0%} of this picture's tokens. {why}</p>{noted}</div>"
    )


def _meter(expected: float, reserve: float) -> str:
    return (
        '<div class="dymu-meter" aria-hidden="true">'
        f'<span class="dymu-reserve" style="width:{100 * reserve:.1f}%"></span>'
        f'<span class="dymu-expected" style="width:{100 * expected:.1f}%"></span></div>'
    )


# --- one question, asked both ways ---


def asked(subject: Subject, now: Asked, running: str = "") -> str:
    """Everything that is known of a question so far.

    Args:
        running: what is computed at the moment; empty at the end.
    """
    parts = [status(running) if running else '<p class="dymu-status dymu-done" role="status">Done.</p>']
    merged, untouched = now.merged, now.untouched
    if merged is not None:
        parts.append(counts(now.original, merged.tokens, now.budget, now.forecast))
        parts.append(
            answers(None if untouched is None else untouched.answer, merged.answer, now.original, merged.tokens)
        )
        if now.groups is not None:
            parts.append(section("What merged", drawn(now.groups, now.shown, now.picture.name, now.boxes)))
        else:
            parts.append(section("What merged", hint("This model's tokens are no grid that could be drawn.")))
        if untouched is not None and now.promise is not None:
            sides = (untouched.times, merged.times), (untouched.cache_bytes, merged.cache_bytes)
            parts.append(section("Time and memory", costs(now.promise, *sides, now.repeats)))
    if not running:
        data = as_json(subject, now)
        if now.boxes:
            parts.append(section("The same in Python", copyable(as_python(now), data, "Python")))
        else:
            call = command(subject, now.picture.name, now.question, now.budget, "--compare", "--draw", "merged.png")
            parts.append(section("The same on the command line", copyable(call, data)))
    return f'<div class="dymu-result">{"".join(parts)}</div>'


def section(title: str, inside: str) -> str:
    return f'<section class="dymu-section"><h2>{text(title)}</h2>{inside}</section>'


def counts(original: int, kept: int, budget: float | None = None, told: Forecast | None = None) -> str:
    """N → M."""
    forecast = "" if told is None else f" The forecast was {told.expected:.0f}, and {told.reserve:,} in reserve."
    at = "" if budget is None else f", at a budget of {budget:g} on average"
    return (
        f'<div class="dymu-counts"><div class="dymu-big"><strong>{original:,}</strong> image tokens '
        f'<span aria-hidden="true">→</span><span class="dymu-aside">became</span> <strong>{kept:,}</strong></div>'
        f"{_meter(kept / max(original, 1), kept / max(original, 1))}"
        f"<p>The language model reads {kept / max(original, 1):.0%} of them{at}.{forecast}</p></div>"
    )


def answers(untouched: str | None, merged: str, original: int, kept: int) -> str:
    """Both answers, the words in which they differ marked."""
    if untouched is None:
        before, after, told = "…", text(merged), "The untouched model is still answering."
    else:
        before, after, differing = marked_words(untouched, merged)
        told = {0: "Both answers are the same.", 1: "One word differs, marked in both."}.get(
            differing, f"{differing} words differ, marked in both."
        )
    cards = [
        f'<div class="dymu-card"><h3>{title}</h3><p class="dymu-answer">{answer or "<em>(nothing)</em>"}</p></div>'
        for title, answer in ((f"Untouched, {original:,} tokens", before), (f"Merged, {kept:,} tokens", after))
    ]
    title = '<h2 class="dymu-aside">Answers</h2>'
    return f'{title}<div class="dymu-answers">{"".join(cards)}</div><p class="dymu-told">{told}</p>'


def marked_words(before: str, after: str) -> tuple[str, str, int]:
    """Two texts as HTML, words of the first alone in <del> and of the second alone in <ins>; and how many these are."""
    first, second = (words.split() for words in (before, after))
    left, right, differing = list[str](), list[str](), 0
    for what, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        ours, theirs = text(" ".join(first[a:b])), text(" ".join(second[c:d]))
        if what != "equal":
            differing += max(b - a, d - c)
            ours, theirs = (
                f"<{tag}>{words}</{tag}>" if words else "" for tag, words in (("del", ours), ("ins", theirs))
            )
        left.append(ours)
        right.append(theirs)
    return " ".join(filter(None, left)), " ".join(filter(None, right)), differing


def copyable(call: str, data: dict[str, Any], kind: str = "Command") -> str:
    """A command, or another call, and the JSON that it gives, each with a button that copies it."""
    return _copied(kind, call) + _copied("JSON", json.dumps(data, indent=1, ensure_ascii=False))


def _copied(title: str, words: str) -> str:
    return (
        f'<div class="dymu-copied"><div class="dymu-row"><h3>{title}</h3>'
        f'<button type="button" class="dymu-copy" aria-label="Copy: {title}">Copy</button></div>'
        f'<pre tabindex="0" role="region" aria-label="{title}"><code>{text(words)}</code></pre></div>'
    )


# --- groups on the picture ---


def drawn(groups: Groups, shown: str, name: str, boxes: Sequence[Box] = ()) -> str:
    """The picture with its groups: each says its size and layer where a pointer is on it, or the focus."""
    width, height = groups.size
    shapes = "".join(_shape(number, group, groups) for number, group in enumerate(groups.groups))
    framed = "".join(
        f'<rect class="dymu-box" x="{left * width:.1f}" y="{top * height:.1f}" width="{(right - left) * width:.1f}" '
        f'height="{(bottom - top) * height:.1f}"/>'
        for left, top, right, bottom in boxes
    )
    several = [group for group in groups.groups if group.size > 1]
    single = len(groups.groups) - len(several)
    label = f"{len(groups.groups)} groups on {name}. Arrow keys go from group to group, the largest first."
    lines = "".join(f"<li>{text(_sentence(about(group)))}.</li>" for group in several[:8])
    figure = (
        f'<figure class="dymu-figure"><svg class="dymu-groups" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="{text(label)}"><image href="{shown}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{shapes}{framed}'
        f'<path class="dymu-mark dymu-mark-under"/><path class="dymu-mark"/></svg>'
        '<p class="dymu-tip" aria-hidden="true"></p>'
        "<figcaption>Point at a group, or tab to the picture and use the arrow keys.</figcaption></figure>"
    )
    return (
        f'<div class="dymu-split">{figure}<div class="dymu-words"><p>{len(several)} groups of several patches, filled '
        f"with their mean colour, and {single} patches that stand for themselves. The largest groups:</p>"
        f"<ol>{lines}</ol></div></div>"
    )


def about(group: Group) -> str:
    """A group in words."""
    if group.size == 1:
        return "a patch that stands for itself"
    patches = f"{group.size} patches are one token"
    if group.layer is None or group.layer == 0:
        return patches
    if group.layer == BEHIND:
        return f"{patches}, the last joined behind the encoder"
    return f"{patches}, the last joined in encoder layer {group.layer}"


def _shape(number: int, group: Group, groups: Groups) -> str:
    rows, columns = groups.grid
    left, top, right, bottom = groups.box
    width, height = groups.size
    x = [(left + (right - left) * column / columns) * width for column in range(columns + 1)]
    y = [(top + (bottom - top) * row / rows) * height for row in range(rows + 1)]
    cells = {(int(row), int(column)) for row, column in group.cells}
    fill = "".join(
        f"M{x[start]:.1f} {y[row]:.1f}H{x[end]:.1f}V{y[row + 1]:.1f}H{x[start]:.1f}Z"
        for row, start, end in _runs(cells)
    )
    edges = []
    for row, column in sorted(cells):
        if (row - 1, column) not in cells:
            edges.append(f"M{x[column]:.1f} {y[row]:.1f}H{x[column + 1]:.1f}")
        if (row + 1, column) not in cells:
            edges.append(f"M{x[column]:.1f} {y[row + 1]:.1f}H{x[column + 1]:.1f}")
        if (row, column - 1) not in cells:
            edges.append(f"M{x[column]:.1f} {y[row]:.1f}V{y[row + 1]:.1f}")
        if (row, column + 1) not in cells:
            edges.append(f"M{x[column + 1]:.1f} {y[row]:.1f}V{y[row + 1]:.1f}")
    line = "".join(edges)
    paint = "rgb({},{},{})".format(*group.colour) if group.size > 1 else "transparent"
    focus = "0" if number == 0 else "-1"
    return (
        f'<g class="dymu-group" role="img" tabindex="{focus}" aria-label="{text(about(group))}">'
        f'<path class="dymu-fill" fill="{paint}" d="{fill}"/><path class="dymu-under" d="{line}"/>'
        f'<path class="dymu-edge" d="{line}"/></g>'
    )


def _runs(cells: set[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Row, first column and the column behind the last, of cells side by side."""
    for row, column in sorted(cells):
        if (row, column - 1) not in cells:
            end = column + 1
            while (row, end) in cells:
                end += 1
            yield row, column, end


# --- time and memory ---


def costs(
    promised: Promise,
    times: tuple[Times | None, Times | None],
    stored: tuple[int | None, int | None],
    repeats: int,
) -> str:
    """Bars of what both ways cost, and of what the counts of tokens promise."""
    full, less = times
    rows = []
    if full is not None and less is not None:
        for title, part, before, after in (
            ("Vision encoder", promised.encoder, full.encoder_ms, less.encoder_ms),
            ("Prefill", promised.prefill, full.prefill_ms, less.prefill_ms),
            ("Each token after", promised.each_token, full.decode_ms_per_token, less.decode_ms_per_token),
        ):
            bars = (("untouched", before), ("promised by the counts", before * part), ("measured", after))
            rows.append(_bars(title, [(name, value, f"{value:.1f} ms") for name, value in bars], before))
    else:
        rows.append(hint("Times come last: each way is run a few times in turn."))
    all_bytes, fewer_bytes = stored
    if all_bytes is not None and fewer_bytes is not None:
        sizes = (("untouched", all_bytes), ("merged", fewer_bytes))
        rows.append(_bars("KV cache", [(name, size, _size(size)) for name, size in sizes], all_bytes))
    note = (
        "Promised: the untouched time, times the part of the tokens that are left in the encoder's layers and in the "
        "prompt, and of the bytes read for one more token. On a small model most of the time is spent on other things "
        "than tokens, so that promises are not met."
    )
    runs = f" Measured: medians of {repeats} runs each, taken in turn." if repeats > 1 else ""
    runs = " Measured: one run each, which says little on a busy machine." if repeats == 1 else runs
    return f'<div class="dymu-costs">{"".join(rows)}</div><p class="dymu-fine">{note}{runs}</p>'


def _bars(title: str, bars: Sequence[tuple[str, float, str]], full: float) -> str:
    longest = max(*(value for _, value, _ in bars), 1e-9)
    kinds = {"untouched": "dymu-of-all", "promised by the counts": "dymu-promised"}
    lines = "".join(
        f'<tr><th scope="row">{name}</th><td class="dymu-track"><span aria-hidden="true" '
        f'class="dymu-bar {kinds.get(name, "dymu-measured")}" style="width:{100 * value / longest:.1f}%"></span></td>'
        f'<td class="dymu-number">{said}</td><td class="dymu-number">× {value / full if full else 0:.2f}</td></tr>'
        for name, value, said in bars
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in ("way", "bar", "cost", "part"))
    head = f'<tr class="dymu-aside">{names}</tr>'
    return (
        f'<table class="dymu-bars"><caption>{text(title)}</caption><thead>{head}</thead><tbody>{lines}</tbody></table>'
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def table(caption: str, header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + _cell(line[0], 'th scope="row"', "th") + "".join(map(_cell, line[1:])) + "</tr>" for line in lines
    )
    return (
        f'<div class="dymu-scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f'<table class="dymu-table"><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: object, begin: str = "td", end: str = "td") -> str:
    number = ' class="dymu-number"' if re.match(r"[-+–\d]", str(value)) else ""
    return f"<{begin}{number}>{text(value)}</{end}>"
