"""One HTML page without anything outside of it: elements that escape, style, script, frame."""

import html

# Nothing is fetched: pictures are in the page, the browser is told to refuse the rest.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already; `element` escapes every other text."""


def element(name: str, *children, **attributes) -> Html:
    """An element; texts and values are escaped, so names and paths can hold any character.

    Args:
      name: such as "td".
      children: `Html` as it is, anything else as text.
      attributes: an underscore is a hyphen, one at the end is dropped (class_); None: left out.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta"):
        return Html(f"<{name}{words}>")
    return Html(f"<{name}{words}>{join(children)}</{name}>")


def join(parts) -> Html:
    """Elements and texts one after the other; texts are escaped."""
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts))


def table(head, rows, *, caption: str | None = None, class_: str | None = None) -> Html:
    """A table that scrolls by itself where the screen is too narrow.

    Args:
      head: the names of the columns.
      rows: a list of cells each; the first names its row.
      caption: above it.
      class_: of the table.
    """
    parts = [element("caption", caption)] if caption else []
    parts.append(
        element("thead", element("tr", *(element("th", name, scope="col") for name in head)))
    )
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    parts.append(element("tbody", *body))
    return scroll(element("table", *parts, class_=class_))


def scroll(child: Html) -> Html:
    """A box with a scroll bar of its own, which the keyboard reaches too."""
    return element("div", child, class_="scroll", tabindex="0")


def facts(pairs) -> Html:
    """Names and values; pairs whose value is None are left out."""
    found = [(name, value) for name, value in pairs if value is not None]
    return element("dl", *(element("div", element("dt", n), element("dd", v)) for n, v in found))


def details(summary: str, *children) -> Html:
    """A part that is opened by a click."""
    return element("details", element("summary", summary), *children)


def note(text) -> Html:
    """A remark in small letters."""
    return element("p", text, class_="note")


def missing(text) -> Html:
    """What stands where there is nothing to show: why, and how to get it."""
    return element("p", text, class_="missing")


def page(title: str, *body) -> str:
    """The whole document."""
    return "<!doctype html>\n" + element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name_="color-scheme", content="light dark"),
            element("title", title),
            element("style", Html(STYLE)),
        ),
        element(
            "body",
            element("main", *body),
            element("div", id="tip", role="tooltip", hidden="hidden"),
            element("script", Html(SCRIPT)),
        ),
        lang="en",
    )


STYLE = """
:root{--ink:#1c2127;--soft:#5a6472;--paper:#fff;--card:#f4f6f8;--rule:#d5dae0;--link:#0b5cad;
--warn:#7a4b00;--light:42%;--frame:#e8440a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#a0a9b5;--paper:#14171b;
--card:#1f242a;--rule:#3a424c;--link:#7db8f5;--warn:#f0b95a;--light:66%;--frame:#ff7a3d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:12px}
h1{font-size:1.5rem;margin:.4em 0}
h2{font-size:1.3rem;margin:2em 0 .3em;padding-top:.5em;border-top:2px solid var(--rule)}
h3{font-size:1.05rem;margin:1.6em 0 .4em}
h4{font-size:.95rem;margin:1.2em 0 .4em}
a{color:var(--link)}
nav a{margin-right:1em;display:inline-block;padding:.2em 0}
.note,.missing{color:var(--soft);font-size:.86rem;margin:.4em 0;max-width:75ch}
.missing{color:var(--warn)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin:.4em 0}
caption{text-align:left;color:var(--soft);padding:.2em 0}
th,td{padding:.25em .6em;text-align:right;border-bottom:1px solid var(--rule);
overflow-wrap:normal;vertical-align:top}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
thead th:first-child{text-align:left}
tbody th{text-align:left;font-weight:600}
table.words td,table.words th{text-align:left;overflow-wrap:anywhere}
table.words thead th,table.words tbody th{overflow-wrap:normal}
table.words td{min-width:6em}
table.map th,table.map td{text-align:center;border:1px solid var(--paper);padding:.45em .5em;
min-width:3.2em}
table.map thead th,table.map tbody th{color:var(--soft);font-weight:400;white-space:nowrap}
table.map tbody th{position:sticky;left:0;background:var(--paper)}
figure table.map tbody th{background:var(--card)}
table.confusion td{min-width:2.2em;padding:.3em .2em}
table.confusion td.part{background:rgb(16 88 176/var(--share))}
table.confusion td.strong{color:#fff}
table.confusion tbody th{text-align:right}
table.confusion thead th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;
min-width:0;vertical-align:top}
table.confusion thead th:first-child{writing-mode:horizontal-tb;transform:none;
vertical-align:bottom}
td.framed{outline:3px solid var(--frame);outline-offset:-4px}
td.none{background:var(--card)}
.key{display:inline-block;width:1em;height:1em;vertical-align:-.15em;margin-right:.35em}
.key.framed{outline:3px solid var(--frame);outline-offset:-3px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr));
gap:.3em 1.2em;margin:.6em 0}
dl div{border-bottom:1px solid var(--rule);padding:.15em 0}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0}
details{margin:.6em 0;border:1px solid var(--rule);border-radius:6px;padding:.3em .7em}
summary{cursor:pointer;padding:.3em 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:12px;
margin:12px 0}
figure{margin:0;background:var(--card);border-radius:6px;padding:8px;min-width:0}
.pair{display:flex;flex-wrap:wrap;align-items:flex-start;gap:12px;margin:12px 0}
.pair figure{flex:0 1 auto;max-width:100%}
.pair figure.wide{flex:1 1 330px;max-width:min(100%,460px)}
figcaption{font-size:.86rem;font-weight:600}
svg{display:block;width:100%;height:auto;color:var(--ink)}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg.lines{touch-action:pan-y;cursor:crosshair}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:hsl(var(--hue) 70% var(--light));stroke-width:1.8;stroke-linejoin:round}
.dot{fill:hsl(var(--hue) 70% var(--light))}
.line.dashed{stroke-dasharray:5 3}
.front{fill:none;stroke:var(--soft);stroke-width:1.5}
.dot.framed{stroke:var(--frame);stroke-width:2.5}
.cross{stroke:var(--soft);stroke-width:1;visibility:hidden}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1em 1em;margin:.2em 0 0;padding:0;
font-size:.8rem}
ul.legend .key{width:1.5em;height:.3em;vertical-align:.22em;
background:hsl(var(--hue) 70% var(--light))}
ul.legend .key.dashed{background:none;border-top:2px dashed hsl(var(--hue) 70% var(--light))}
ul.legend .key.round{height:.8em;width:.8em;border-radius:50%;vertical-align:-.05em}
ul.legend .key.ring{background:none;border:2.5px solid var(--frame)}
ul.legend .key.front{background:var(--soft)}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:10px}
.sheet img,img.matrix{display:block;width:100%;height:auto;image-rendering:pixelated}
img.matrix{max-width:720px;border:1px solid var(--rule)}
@media(prefers-color-scheme:dark){img.matrix{filter:invert(1) hue-rotate(180deg)}}
.sheet figcaption{font-weight:400;font-size:.8rem;margin-top:.3em}
.sheet small{display:block;color:var(--soft)}
.wrong{color:#c03221}
@media(prefers-color-scheme:dark){.wrong{color:#ff8b7a}}
#tip{position:fixed;z-index:2;background:var(--ink);color:var(--paper);padding:.35em .6em;
border-radius:5px;font-size:.8rem;line-height:1.35;white-space:pre-line;pointer-events:none;
max-width:min(22em,90vw)}
"""

# Shows the label of what is pointed at, or the values of a chart's lines at a step. Text only, so
# nothing that the page quotes can become a part of it.
SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
function show(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  let left = event.clientX + gap, top = event.clientY + gap;
  const wide = document.documentElement.clientWidth;
  if (left + box.width > wide) left = event.clientX - box.width - gap;
  if (top + box.height > window.innerHeight) top = event.clientY - box.height - gap;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}
function read(svg, event) {
  const data = svg.chart || (svg.chart = JSON.parse(svg.dataset.chart));
  const box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * data.width;
  const share = Math.min(1, Math.max(0, (x - data.left) / (data.right - data.left)));
  const at = data.low + share * (data.high - data.low);
  let step = null;
  for (const line of data.lines)
    for (const s of line.x) if (step === null || Math.abs(s - at) < Math.abs(step - at)) step = s;
  if (step === null) return;
  const rows = ["step " + step];
  for (const line of data.lines) {
    let best = -1;
    line.x.forEach((s, i) => {
      if (best < 0 || Math.abs(s - step) < Math.abs(line.x[best] - step)) best = i;
    });
    if (best < 0) continue;
    const where = line.x[best] === step ? "" : " (step " + line.x[best] + ")";
    rows.push(line.name + ": " + Number(line.y[best].toPrecision(4)) + where);
  }
  const place = data.high > data.low ? (step - data.low) / (data.high - data.low) : 0;
  const left = data.left + place * (data.right - data.left);
  cross.setAttribute("transform", "translate(" + left + ")");
  cross.style.visibility = "visible";
  show(rows.join("\\n"), event);
}
let cross = null;
function point(event) {
  const over = event.target.closest(".tip, svg.lines");
  if (cross) cross.style.visibility = "";
  cross = over && over.querySelector(".cross");
  if (cross) read(over, event);
  else if (over) show(over.getAttribute("aria-label"), event);
  else tip.hidden = true;
}
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
"""
