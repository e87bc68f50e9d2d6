"""What a page looks like and how its tables sort: the CSS and JavaScript of `page`, small and written by hand."""

from clustermim.render.palette import THEME


def style() -> str:
    """The style sheet of a page: light and dark by the reader's setting, one column on a phone, ink only in print."""
    day = ";".join(f"--{name}:{value}" for name, (value, _) in THEME.items())
    night = ";".join(f"--{name}:{value}" for name, (_, value) in THEME.items())
    return (
        f":root{{color-scheme:light dark;{day}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{night}}}}}\n{_STYLE}"
    )


_STYLE = """
*{box-sizing:border-box}
html{font:17px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
 -webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink)}
.page{max-width:76rem;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:0 0 .75rem;text-wrap:balance;
 overflow-wrap:anywhere}
h2{font-size:1.35rem;line-height:1.25;letter-spacing:-.01em;margin:3.25rem 0 .75rem;padding-top:1.1rem;
 border-top:1px solid var(--rule);text-wrap:balance}
p,ul,ol{max-width:42rem;margin:.6rem 0}
.lead{font-size:1.15rem;line-height:1.5;max-width:46rem}
a{color:var(--link);text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-999px}.skip:focus{left:1rem;top:1rem;background:var(--paper);padding:.5rem}
nav ul{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;list-style:none;margin:1.25rem 0 0;padding:0;max-width:none;
 font-size:.9rem}
nav a{display:inline-block;padding:.25rem 0}
code{font:.88em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;background:var(--panel);
 border-radius:3px;padding:.08em .3em;overflow-wrap:anywhere}
.note{max-width:46rem;margin:1rem 0;padding:.7rem 1rem;background:var(--mark);border-radius:6px}
.note p{margin:.25rem 0}
figure{margin:1.25rem 0}
figcaption,caption,.soft{color:var(--soft);font-size:.86rem;line-height:1.45}
figcaption{max-width:42rem;margin-top:.5rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 2rem;align-items:start}
.chart svg{display:block;width:100%;max-width:38rem;height:auto;overflow:visible}
.chart svg text{font-family:inherit!important}
img{image-rendering:pixelated;display:block}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--side)),1fr));gap:.8rem .6rem;
 list-style:none;margin:0;padding:0;max-width:none}
.gallery li{min-width:0;font-size:.78rem;line-height:1.3;color:var(--soft);font-variant-numeric:tabular-nums;
 break-inside:avoid;overflow-wrap:anywhere}
.gallery img{width:100%;max-width:var(--side);border:1px solid var(--rule);margin-bottom:.2rem}
.gallery img.framed{box-sizing:content-box;max-width:min(var(--side),100% - 6px);border:3px solid var(--token)}
summary{cursor:pointer;padding:.4rem 0;color:var(--link)}
.gallery img.shrunk{image-rendering:auto}
.bar{display:block;height:3px;max-width:var(--side);background:var(--rule);margin-bottom:.15rem}
.bar i{display:block;height:100%;background:var(--series-1)}
.scroll{overflow-x:auto;margin:1.25rem 0;max-width:100%;
 background:linear-gradient(to left,var(--paper) 40%,transparent) right/3rem 100% no-repeat local,
 linear-gradient(to left,var(--rule),transparent) right/.8rem 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.86rem;line-height:1.35;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .5rem;caption-side:top}
caption span{display:block;position:sticky;left:0;width:min(42rem,100vw - 3rem)}
th,td{padding:.34rem .7rem;text-align:right;border-bottom:1px solid var(--rule);vertical-align:baseline;
 white-space:nowrap}
th.text,td.text{text-align:left}.number+.text{padding-left:1.4rem}
tbody th{font-weight:500;text-align:left;position:sticky;left:0;background:var(--paper)}
thead th{border-bottom:2px solid var(--rule);vertical-align:bottom;font-weight:600;white-space:normal;line-height:1.2}
thead th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:.2rem 0;cursor:pointer;
 text-align:inherit}
th button::after{content:"\\2195";opacity:.35;margin-left:.3em;font-size:.85em}
th[aria-sort=ascending] button::after{content:"\\2191";opacity:1}
th[aria-sort=descending] button::after{content:"\\2193";opacity:1}
tr.muted td,tr.muted th{color:var(--soft)}
td.best{font-weight:700;color:var(--ink)}
td small{color:var(--soft)}
.commands{counter-reset:c;list-style:none;padding:0;max-width:58rem}
.commands li{margin:.9rem 0}
.commands pre{margin:.25rem 0 0;padding:.7rem .9rem;background:var(--panel);border-radius:6px;white-space:pre-wrap;
 overflow-wrap:anywhere}
.commands code{background:none;padding:0}.whole{display:inline-block;max-width:100%}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;font-size:.88rem;max-width:46rem}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
@media (max-width:40rem){html{font-size:16px}.page{padding:1.5rem 1rem 3rem}h1{font-size:1.65rem}
 h2{margin-top:2.5rem}th,td{padding:.34rem .5rem}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.4rem}
 .gallery img,.bar{max-width:none}.gallery img.framed{max-width:calc(100% - 6px)}
 tbody th:first-child{white-space:normal;min-width:7rem;max-width:9rem}}
@media print{html{font-size:10pt}.page{max-width:none;padding:0}nav,.skip{display:none}
 h2{break-after:avoid;margin-top:1.5rem}summary,caption,thead{break-after:avoid}
 figure,.note,tr,.commands li{break-inside:avoid}figure:has(.gallery){break-inside:auto}
 .scroll{overflow:visible;background:none}table{width:100%;font-size:7pt}caption span{width:auto}
 th,td,tbody th:first-child{white-space:normal;padding:.2rem .25rem;position:static;min-width:0;max-width:none}
 td.number{white-space:nowrap}td small{display:block}.chart svg{max-width:12cm}
 th button::after{content:none} *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = head.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      const next = now === first ? second : now === second ? null : first;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (next === null) { body.append(...original); return; }
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const key = (row) => row.cells[head.cellIndex].dataset.value;
      const number = head.dataset.kind === "number";
      body.append(...[...original].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (number ? x - y : x.localeCompare(y, "en", {numeric: true}));
      }));
    });
  }
}
for (const box of document.querySelectorAll(".filtered")) {
  const field = box.querySelector("input"), count = box.querySelector("output");
  const rows = [...box.querySelector("tbody").rows];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  });
}
"""
