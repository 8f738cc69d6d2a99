"""The frame of a page: one HTML file without links or scripts, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from html import escape
from types import MappingProxyType

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1d22;--soft:#666b76;--line:#e3e3dd;
--accent:#3d5af1;--raw:#b9c2f7;--right:#12805c;--wrong:#c8372d;--band:#f1f1ec;--warm:#d9480f;--cool:#1c7ed6}
@media (prefers-color-scheme:dark){:root{--page:#121317;--card:#1a1c22;--ink:#eceef2;--soft:#9aa0ad;
--line:#2b2e37;--accent:#8b9dff;--raw:#414a7c;--right:#4cc38a;--wrong:#ff7b6e;--band:#20232a;--warm:#ff922b;
--cool:#4dabf7}}
:root{--r0:#3e4bf2;--r1:#ed630e;--r2:#23a56a;--r3:#b102ab;--r4:#6b1c1a;--r5:#685835;--r6:#2f4058;--r7:#c677bc}
@media (prefers-color-scheme:dark){:root{--r0:#7b7ecc;--r1:#fe9022;--r2:#4bc48e;--r3:#ee279b;--r4:#a88046;
--r5:#aad7fc;--r6:#f1f1e7;--r7:#c999ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 6px}
h2{font-size:20px;letter-spacing:-.01em;margin:44px 0 4px}
h3{font-size:15px;margin:0 0 10px}
p{margin:0 0 14px;max-width:75ch}.soft{color:var(--soft);font-size:14px;font-weight:400}
.eyebrow{color:var(--accent);font-weight:600;font-size:13px;letter-spacing:.06em;text-transform:uppercase;
margin:0 0 8px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:26px 0 0}
.fact{padding:14px}.fact b{display:block;font-size:24px;white-space:nowrap;line-height:1.2;
letter-spacing:-.02em}
.fact span{color:var(--soft);font-size:13px;display:block}.fact.head b{color:var(--accent)}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.scores{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
figure{margin:0}.chart{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px}
.chart figcaption{font-weight:600;font-size:14px;margin:0 4px 2px}.chart svg{display:block;width:100%}
.rule{stroke:var(--line)}.axis{stroke:var(--soft)}.tick,.label,.phase{fill:var(--soft);font-size:12px}
.phase{font-size:11.5px;font-weight:600}.band{fill:none}.band.b0{fill:var(--band)}.mark{fill:var(--warm)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round;stroke:var(--tone)}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--tone);margin:0 6px 3px 0}
.s0{--tone:var(--accent)}.mean{--tone:var(--ink)}.line.raw{--tone:var(--raw);stroke-width:1}
.n0{--tone:var(--cool)}.n1{--tone:color-mix(in oklch,var(--cool),var(--warm) 14%)}
.n2{--tone:color-mix(in oklch,var(--cool),var(--warm) 29%)}
.n3{--tone:color-mix(in oklch,var(--cool),var(--warm) 43%)}
.n4{--tone:color-mix(in oklch,var(--cool),var(--warm) 57%)}
.n5{--tone:color-mix(in oklch,var(--cool),var(--warm) 71%)}
.n6{--tone:color-mix(in oklch,var(--cool),var(--warm) 86%)}.n7{--tone:var(--warm)}
.r0{--tone:var(--r0)}.r1{--tone:var(--r1)}.r2{--tone:var(--r2)}.r3{--tone:var(--r3)}.r4{--tone:var(--r4)}
.r5{--tone:var(--r5)}.r6{--tone:var(--r6)}.r7{--tone:var(--r7)}
.dot{fill:var(--card);stroke:var(--tone);stroke-width:1.6}.end{fill:var(--tone);font-size:12px;font-weight:700;
stroke:var(--card);stroke-width:3px;paint-order:stroke}
.chip{display:inline-block;min-width:22px;padding:0 6px;border-radius:6px;background:var(--tone);
color:var(--card);font-size:13px;line-height:20px;font-weight:700;text-align:center;margin-right:8px}
.runs{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));margin:22px 0 0}
.runs b{font-size:16px;overflow-wrap:anywhere}.runs p{margin:6px 0 0;overflow-wrap:anywhere}
.note{border-left:3px solid var(--warm);padding-left:12px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--soft);margin:4px 4px 0}
.gallery{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(124px,1fr));margin:10px 0 22px}
.shot{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.shot img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--band)}
.shot figcaption{padding:8px 10px 10px;font-size:12.5px;line-height:1.35}
.shot.wrong{border-color:var(--wrong)}
.verdict{display:block;font-weight:650;margin-bottom:2px;color:var(--right)}
.wrong .verdict{color:var(--wrong)}
img.pixels{image-rendering:pixelated}
.strip{display:flex;gap:14px;overflow-x:auto;padding-bottom:8px}.strip figure{flex:0 0 auto;width:236px}
.strip img{width:100%;display:block;border-radius:8px;border:1px solid var(--line)}
.strip figcaption{font-size:13px;color:var(--soft);margin-top:4px}
.wide{overflow-x:auto}.wide td:first-child{position:sticky;left:0;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:500;font-size:12.5px;white-space:nowrap}
th,td{white-space:nowrap;padding:6px 12px 6px 0;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}tr.group th{color:var(--ink);font-weight:650;font-size:13px;padding-top:16px}
th:last-child,td:last-child{padding-right:0}
td.number,th.number{text-align:right;white-space:nowrap}tr.main td{font-weight:650}tr.main .fill{opacity:1}
svg.bar{width:96px;height:16px;display:block}.track{fill:var(--line)}.fill{fill:var(--accent);opacity:.72}
.interval path{stroke:var(--ink);stroke-width:1.2}
details{margin-top:12px}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:12px 0 0}
footer{margin-top:48px;color:var(--soft);font-size:13px}
@media (max-width:520px){main{padding:24px 14px 48px}h1{font-size:27px}.fact b{font-size:22px}
.facts{grid-template-columns:1fr 1fr}.gallery{grid-template-columns:1fr 1fr}svg.bar{width:48px}
th,td{padding-right:9px}table{font-size:13px}
.card{padding:14px}}
@media print{.strip{flex-wrap:wrap}body{background:#fff}}
"""


def page(title: str, sections: list[str]) -> str:
    """A whole HTML document of the sections that are not empty."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def footer(source: str) -> str:
    """When the page was written, and from what."""
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return f"<footer>Written by Shoestring, {written}, from {escape(source)}.</footer>"


def table(
    heads: list[str],
    rows: list[list[str]],
    numbers: set[int],
    main: int | None = None,
    groups: Mapping[int, str] = MappingProxyType({}),
) -> str:
    """A table of HTML cells; columns in `numbers` are set flush right, row `main` stands out.

    `groups` holds headings by the number of the row that they stand above.
    """
    kind = [' class="number"' if k in numbers else "" for k in range(len(heads))]
    head = "".join(f"<th{kind[k]}>{each}</th>" for k, each in enumerate(heads))
    lines = []
    for number, row in enumerate(rows):
        if number in groups:
            lines.append(f'<tr class="group"><th colspan="{len(heads)}">{groups[number]}</th></tr>')
        cells = "".join(f"<td{kind[k]}>{each}</td>" for k, each in enumerate(row))
        style = ' class="main"' if number == main else ""
        lines.append(f"<tr{style}>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
