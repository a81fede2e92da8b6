"""One self-contained page: nothing is fetched; it can be mailed, archived, read offline.

A page is a list of pieces of HTML and a style sheet. It follows the reader's light or dark setting
and prints well. Everything that is text goes through `html.escape`.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path


class Page:
    """A page being written from top to bottom.

    Args:
        title: title and first heading.
        lead: one or two sentences below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._lead = lead
        self._pieces: list[str] = []
        self._contents: list[tuple[str, str]] = []

    def section(self, title: str, text: str = "") -> None:
        """Begin a section, listed in the contents at the top."""
        anchor = f"section-{len(self._contents) + 1}"
        self._contents.append((anchor, title))
        self._pieces.append(f'<h2 id="{anchor}">{escape(title)}</h2>')
        if text:
            self.text(text)

    def subsection(self, title: str, text: str = "") -> None:
        """Begin a part of a section."""
        self._pieces.append(f"<h3>{escape(title)}</h3>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._pieces.append(f"<p>{escape(text)}</p>")

    def verdict(self, headline: str, details: Sequence[str] = ()) -> None:
        """What it all comes to, in a box."""
        more = "".join(f"<li>{escape(line)}</li>" for line in details)
        self._pieces.append(
            f'<div class="verdict"><p class="headline">{escape(headline)}</p>'
            f"{f'<ul>{more}</ul>' if more else ''}</div>"
        )

    def facts(self, facts: Sequence[tuple[str, str, str]]) -> None:
        """A row of (value, what it is, a remark) boxes."""
        boxes = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(remark)}</p></div>"
            for value, name, remark in facts
        )
        self._pieces.append(f'<dl class="facts">{boxes}</dl>')

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = ""
    ) -> None:
        """A table; the first column names the row.

        What follows a line break in a cell is set small below the rest.
        """
        titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        body = "".join(
            f'<tr><th scope="row">{_two_lines(row[0])}</th>'
            + "".join(f"<td>{_two_lines(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        below = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._pieces.append(
            f'<div class="scroll"><table>{below}<thead><tr>{titles}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def figure(self, svg: str, caption: str) -> None:
        """A figure that `moefold.inspect.plots` made, with what it shows below it."""
        self._pieces.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    def details(self, summary: str, text: str) -> None:
        """Preformatted text that opens on a click."""
        self._pieces.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def raw(self, html: str) -> None:
        """HTML as it is; whoever made it has escaped it."""
        self._pieces.append(html)

    def html(self) -> str:
        """The whole page."""
        contents = "".join(f'<a href="#{a}">{escape(title)}</a>' for a, title in self._contents)
        lead = f'<p class="lead">{escape(self._lead)}</p>' if self._lead else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self._title)}</h1>{lead}<nav>{contents}</nav></header>\n"
            f"<main>\n{chr(10).join(self._pieces)}\n</main>\n</body>\n</html>\n"
        )

    def write(self, file: Path) -> None:
        """Write the page."""
        file.write_text(self.html(), encoding="utf-8")


def _two_lines(cell: str) -> str:
    first, _, second = cell.partition("\n")
    return escape(first) + (f"<small>{escape(second)}</small>" if second else "")


_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #f3f3f0; --ink: #22252a;
  --soft: #62666d; --rule: #dcdcd7; --accent: #0a6ba8; --shade: #0a6ba8; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --card: #1f2227; --ink: #e4e5e7;
  --soft: #a0a4ab; --rule: #363a41; --accent: #6cb8ec; --shade: #4aa3dd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "Liberation Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.015em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3.25rem 0 .5rem; letter-spacing: -.01em;
  padding-top: 1.25rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .5rem 0 1rem; max-width: 44rem; }
.lead { font-size: 1.1rem; color: var(--soft); margin: .6rem 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-bottom: 2rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.verdict { border-left: 4px solid var(--accent); background: var(--card); padding: 1.1rem 1.4rem;
  border-radius: 0 10px 10px 0; margin: 1.5rem 0; }
.verdict .headline { font-size: 1.2rem; line-height: 1.45; font-weight: 600; margin: 0; }
.verdict ul { margin: .7rem 0 0; padding-left: 1.1rem; color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .9rem;
  margin: 1.5rem 0; }
.facts > div { background: var(--card); border-radius: 10px; padding: .9rem 1.1rem; }
.facts dt { font-size: .82rem; color: var(--soft); }
.facts dd { margin: .1rem 0; font-size: 1.5rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.facts p { margin: 0; font-size: .82rem; line-height: 1.45; color: var(--soft); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .93rem; }
caption, figcaption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .87rem;
  line-height: 1.5; padding-top: .6rem; max-width: 44rem; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-size: .82rem; font-weight: 500; color: var(--soft); vertical-align: bottom; }
td > small, th > small { display: block; color: var(--soft); font-weight: 400; line-height: 1.3; }
tbody th { font-weight: 500; }
figure { margin: 1.25rem 0 1.75rem; } svg.figure { display: block; width: 100%; max-width: 46rem; }
svg.figure * { stroke-linejoin: round; } svg.figure text { font-family: inherit; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border-radius: 10px; padding: 1rem; overflow-x: auto;
  font-size: .84rem; line-height: 1.5; }
.tabs > input { position: absolute; opacity: 0; pointer-events: none; }
.tabs > label { display: inline-block; padding: .35rem .9rem; margin: .75rem .4rem .25rem 0;
  border: 1px solid var(--rule); border-radius: 99px; cursor: pointer; font-size: .9rem; }
.tabs > input:checked + label { background: var(--accent); border-color: var(--accent);
  color: var(--paper); font-weight: 600; }
.tabs > input:focus-visible + label { outline: 2px solid var(--ink); outline-offset: 2px; }
.tabs > .panel { display: none; }
.experts { display: grid; gap: .35rem; margin: 1rem 0; }
.expert { display: grid; grid-template-columns: 6rem 11rem 3rem 1fr; gap: .9rem;
  align-items: start; padding: .3rem 0; }
.expert > .name { font-weight: 600; border-left: 5px solid var(--hue); padding-left: .6rem; }
.bar { position: relative; height: 1.5rem; background: var(--card); border-radius: 5px;
  overflow: hidden; }
.bar > i { position: absolute; inset: 0 auto 0 0; border-radius: 5px;
  background: color-mix(in oklab, var(--hue) 70%, var(--card)); }
.bar > .fair { position: absolute; inset: 0 auto 0 auto; border-left: 2px dashed var(--ink);
  opacity: .55; }
.expert > .share { text-align: right; font-size: .88rem; font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .87rem; line-height: 1.5; }
.words { font: .84rem/1.9 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.words span { background: color-mix(in oklab, var(--hue) 20%, transparent); border-radius: 4px;
  padding: .08rem .35rem; margin-right: .3rem; white-space: nowrap; }
.words small { color: var(--soft); font-family: inherit; }
.passage { background: var(--card); border-radius: 10px; padding: .9rem 1.1rem; margin: .8rem 0; }
.passage p { font: .9rem/2.1 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  margin: 0; max-width: none; overflow-wrap: anywhere; }
.t { background: color-mix(in oklab, var(--hue) 24%, transparent);
  border-bottom: 2px solid var(--hue); border-radius: 3px 3px 0 0; padding: .1rem .08rem; }
.t sub { font-size: .62rem; color: var(--soft); padding-left: .06rem; line-height: 0; }
.t.none { background: none; border-bottom: 2px dotted var(--soft); }
.matrix { border-collapse: separate; border-spacing: 2px; width: auto; }
.matrix th, .matrix td { border: 0; padding: .3rem .5rem; text-align: center; font-size: .8rem;
  min-width: 2.9rem; border-radius: 4px; }
.matrix td { background: color-mix(in oklab, var(--shade) calc(var(--heat) * 62%), var(--card)); }
.matrix td.self { background: none; color: var(--soft); }
@media (max-width: 44rem) { .expert { grid-template-columns: 6rem 1fr 3rem; }
  .expert > .words { grid-column: 1 / -1; } }
@media print { .tabs > .panel { display: block !important; } .tabs > label { display: none; } }
"""
