"""The report's style sheet: system fonts, one accent, colours that stay apart for colour-blind eyes."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #59626d; --rule: #e2e5e9; --wash: #f6f7f8; --warn: #b3401b;
  --s0: #0b62a8; --s1: #c4501b; --s2: #00806a; --s3: #a14a8a;
  --s4: #86690a; --s5: #4a47b0; --s6: #64696f; --s7: #1287a8;
}
/* Only on screens: paper stays white. */
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e6e8ea; --soft: #9aa4ae; --rule: #2b3036; --wash: #1b1f23; --warn: #f2935c;
  --s0: #6db3f2; --s1: #f2935c; --s2: #4fc9ae; --s3: #dd9bc9;
  --s4: #d9b94a; --s5: #a9a8f7; --s6: #a9b0b6; --s7: #5fd0ea;
} }
.s0 { --hue: var(--s0) } .s1 { --hue: var(--s1) } .s2 { --hue: var(--s2) } .s3 { --hue: var(--s3) }
.s4 { --hue: var(--s4) } .s5 { --hue: var(--s5) } .s6 { --hue: var(--s6) } .s7 { --hue: var(--s7) }

* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 66rem; margin: 0 auto; padding: clamp(2rem, 7vw, 5rem) clamp(1.1rem, 4vw, 2.5rem) 4rem }
header { margin-bottom: 3.5rem }
.kind { margin: 0; color: var(--soft); font-size: .875rem }
h1 {
  margin: .1rem 0 1.4rem; font-size: clamp(1.9rem, 5vw, 2.75rem); line-height: 1.15;
  font-weight: 650; letter-spacing: -.022em; overflow-wrap: anywhere;
}
h2 { margin: 0 0 .35rem; font-size: 1.25rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em }
h3 { margin: 2rem 0 .75rem; font-size: 1rem; font-weight: 600 }
p { margin: 0 0 .9rem; max-width: 42rem; text-wrap: pretty }
.verdict { font-size: clamp(1.08rem, 2.4vw, 1.25rem); line-height: 1.55 }
.verdict b { font-weight: 650 }
section { padding-top: 2rem; margin-top: 3rem; border-top: 1px solid var(--rule) }
section > p { color: var(--soft) }
.caution { padding-left: 1rem; border-left: 3px solid var(--warn); color: var(--ink) }
code, pre { font: .8125rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
code { overflow-wrap: anywhere }

table { width: 100%; border-collapse: collapse; margin: 1.25rem 0 .5rem; font-size: .9375rem; line-height: 1.4 }
th, td {
  padding: .6rem 1.25rem .6rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule);
}
th:last-child, td:last-child { padding-right: 0 }
thead th { color: var(--soft); font-size: .8125rem; font-weight: 500; vertical-align: bottom }
tbody th { font-weight: 600; overflow-wrap: break-word }
.number { text-align: right }
thead th, .number, .whole, td.words > div { white-space: nowrap }
.fine {
  color: var(--soft); font-size: .8125rem; margin-top: .3rem; white-space: normal;
  max-width: 18rem; overflow-wrap: break-word;
}
.soft { color: var(--soft) }
tfoot td, tfoot th { border-bottom: 0; font-weight: 600 }

ul.legend {
  display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; margin: 1rem 0 0; padding: 0;
  list-style: none; font-size: .875rem;
}
ul.legend li { display: inline-flex; align-items: center; gap: .5rem; overflow-wrap: anywhere }
.grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr));
  gap: 2rem 2.5rem; margin-top: 1.5rem;
}
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0; break-inside: avoid }
figcaption { margin-bottom: .4rem; font-size: .875rem; font-weight: 600; overflow-wrap: anywhere }
figure svg { display: block; width: 100%; height: auto; max-width: 26rem; overflow: visible }
figure img {
  display: block; max-width: 100%; height: auto; border-radius: 6px; background: #000;
  image-rendering: auto;
}

svg text {
  font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  fill: var(--soft);
}
svg .end { text-anchor: end } svg .middle { text-anchor: middle }
svg .note { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round }
svg .name { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
svg .gridline { stroke: var(--rule); stroke-width: 1 }
svg .axis { stroke: var(--soft); stroke-width: 1 }
svg .reference { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3 }
svg .frame { fill: var(--wash); stroke: var(--rule) }
.line { fill: none; stroke: var(--hue); stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round }
circle, polygon { fill: var(--hue); stroke: var(--hue) }
.hollow { fill: var(--paper); stroke-width: 1.25 }
.hover { opacity: 0 } .hover:hover { opacity: 1 }
.dot { opacity: .78 } .dot .hollow { fill: none }
.bar { fill: var(--hue) }
.estimate { --hue: var(--s0) }
.estimate.before { --hue: var(--soft) }
.estimate.before circle { fill: var(--paper); stroke-width: 1.5 }
.cross { fill: none; stroke: var(--s1); stroke-width: 1.75; stroke-linecap: round }
.whisker { stroke: var(--hue); stroke-width: 2; stroke-linecap: round }
.strip { display: block; width: 8.25rem; height: .875rem; margin-top: .3rem }
.cell { fill: var(--s2) } .cell.refused, .cell.error { fill: var(--warn) } .cell.absent { fill: var(--soft) }
.swatch { width: 1.5rem; height: .75rem; flex: none } .swatch.dot { width: .75rem; opacity: 1 }

details { margin-top: 1rem }
summary { cursor: pointer; font-weight: 600 }
pre {
  margin: 1rem 0 0; padding: 1.25rem; background: var(--wash);
  border: 1px solid var(--rule); border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
footer { margin-top: 3.5rem; color: var(--soft); font-size: .8125rem }

@media screen and (max-width: 46rem) {
  table.cards, .cards tbody, .cards tfoot, .cards tr, .cards th, .cards td { display: block }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  .cards tr { padding: .9rem 0; border-bottom: 1px solid var(--rule) }
  .cards th, .cards td { border: 0; padding: .12rem 0; text-align: left; white-space: normal }
  .cards td[data-label] { display: grid; grid-template-columns: 8.5rem 1fr; column-gap: .75rem }
  .cards td[data-label]::before { content: attr(data-label); color: var(--soft); font-weight: 400 }
  .cards td:empty { display: none }
}
@media print {
  :root { color-scheme: light }
  main { max-width: none; padding: 0 } body { font-size: 10pt } table { font-size: 8.5pt }
  header { margin-bottom: 1.5rem } section { margin-top: 1.5rem; padding-top: 1rem }
  h2, h3, section > p, .legend { break-after: avoid } tr, p { break-inside: avoid }
  pre { columns: 3; font-size: 7pt }
  .grid { grid-template-columns: repeat(3, 1fr); gap: 1.25rem }
  .grid.wide { grid-template-columns: repeat(2, 1fr) }
  details::details-content { content-visibility: visible; display: block }
}
"""
