"""Results as pages for people, ``report.html`` and ``report.md``, and as ``result.json`` for programs."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tabulate import tabulate

from ldm.data.shards import write_atomically
from ldm.evaluation.figures import Figure


class Table(NamedTuple):
    """Rows of as many cells as columns: text, numbers, figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def page(self) -> str:
        """As HTML."""
        head = "".join(f"<th><button>{html.escape(column)}</button></th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return f'{note}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Curve(NamedTuple):
    """Lines of points (x, figure, label) by their name; intervals are drawn."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float | Figure, Figure, str]]]

    def page(self) -> str:
        """As SVG, its text as text."""
        import matplotlib
        from matplotlib.figure import Figure as Sheet

        with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": self.title}):
            sheet = Sheet(figsize=(4.8, 3.3), layout="constrained")
            axes = sheet.subplots()
            for name, points in self.lines.items():
                x = [_number(at) for at, _, _ in points]
                y = [figure.value for _, figure, _ in points]
                sides = [(max(0.0, f.value - f.low), max(0.0, f.high - f.value)) for _, f, _ in points]
                axes.errorbar(x, y, list(zip(*sides, strict=True)), marker="o", capsize=2, label=name)
                for at, (_, figure, label) in zip(x, points, strict=True):
                    axes.annotate(label, (at, figure.value), (4, 4), textcoords="offset points")
            axes.set(xlabel=self.x, ylabel=self.y)
            axes.grid(alpha=0.3)
            if len(self.lines) > 1:
                axes.legend()
            buffer = io.StringIO()
            sheet.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return f'<div class="curve">{buffer.getvalue()[buffer.getvalue().index("<svg") :]}</div>'


class Pictures(NamedTuple):
    """Small pictures that open large with what is known of each."""

    title: str
    pictures: Sequence[tuple[Image.Image, Mapping[str, Any]]]
    columns: Sequence[str] = ()  # names of what stands side by side, pictures row by row; none: as many as fit

    def page(self) -> str:
        """As HTML, the pictures in it."""
        buttons = []
        for image, about in self.pictures:
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", lossless=True)
            data = base64.b64encode(buffer.getvalue()).decode()
            said = html.escape(json.dumps({key: _text(value) for key, value in about.items()}, ensure_ascii=False))
            alt = html.escape(str(about.get("prompt", "")))
            picture = f'<img alt="{alt}" src="data:image/webp;base64,{data}">'
            buttons.append(f'<button data-about="{said}">{picture}</button>')
        heads = "".join(f"<b>{html.escape(name)}</b>" for name in self.columns)
        style = f' style="grid-template-columns: repeat({len(self.columns)}, minmax(64px, 128px))"' if heads else ""
        return f'<div class="scroll"><div class="grid"{style}>{heads}{"".join(buttons)}</div></div>'


Part = Table | Curve | Pictures


@dataclass
class Report:
    """What a command measured, in the order of its page."""

    title: str
    command: str  # that makes it again
    parts: list[Part] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # the same for programs

    def markdown(self) -> str:
        """The tables as text."""
        tables = [part for part in self.parts if isinstance(part, Table)]
        texts = [f"{t.title}\n\n{table(t.columns, t.rows)}" + f"\n{t.note}\n" * bool(t.note) for t in tables]
        return "\n".join([f"# {self.title}\n\n    {self.command}\n", *texts])

    def html(self) -> str:
        """One page that needs no network and no other file."""
        body = "\n".join(f"<h2>{html.escape(part.title)}</h2>{part.page()}" for part in self.parts)
        texts = {"title": html.escape(self.title), "command": html.escape(self.command), "body": body}
        page = (files("ldm") / "evaluation" / "report.html").read_text("utf-8")
        return re.sub(r"\{(title|command|body)\}", lambda found: texts[found[1]], page)

    def write(self, folder: Path) -> None:
        """``report.html``, ``report.md`` and ``result.json``, each whole or not at all."""
        write_json(folder / "result.json", {"command": self.command, **self.result})
        write_text(folder / "report.md", self.markdown())
        write_text(folder / "report.html", self.html())


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], style: str = "github") -> str:
    """A table as aligned Markdown, or in another of tabulate's styles (``"latex_booktabs"``); ends with a newline.

    Raises:
        ValueError: a row with another number of cells than there are columns.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    if odd := [row for row in cells if len(row) != len(columns)]:
        raise ValueError(f"row {odd[0]} has {len(odd[0])} cells, the table {len(columns)} columns; give one a column")
    return tabulate(cells, list(columns), style, disable_numparse=True) + "\n"


def write_json(path: str | Path, value: object) -> None:
    """Write JSON, whole or not at all; folders are made; figures become objects.

    Raises:
        ValueError: NaN or infinity in it, which JSON does not have.
    """
    path = Path(path)
    try:
        text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path.name}: a result is NaN or infinite; look at what was measured") from error
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _plain(value: Any) -> Any:
    """Figures as objects, which JSON would take for lists."""
    if isinstance(value, Figure):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _number(cell: Any) -> Any:
    return cell.value if isinstance(cell, Figure) else cell


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) >= 0.01 or cell == 0 else f"{cell:.4f}"
    return str(cell)


def _cell(value: Any) -> str:
    """A cell of HTML: sorted by its number if it is one, the interval of a figure below its value."""
    kind = f' data-value="{_number(value)!r}"' if isinstance(_number(value), (int, float)) else ' class="text"'
    text, space, rest = html.escape(_text(value)).partition(" (" if isinstance(value, Figure) else "\0")
    return f"<td{kind}>{text}{f'<small>({rest}</small>' if space else ''}</td>"
