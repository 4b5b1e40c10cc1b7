"""The page's style sheet.

Series are s0 to s7, which eyes without red or green cones tell apart too; text keeps the ink's colour,
whatever the series.
"""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f4f5f7; --ink: #1c2026; --soft: #5a6270;
  --rule: #d7dbe0; --grid: #e6e8ec; --met: #00694c; --missed: #a8320c;
  --s0: #d55e00; --s1: #0072b2; --s2: #1f3d4a; --s3: #a02c8c; --s4: #45a062; --s5: #4b4a00; --s6: #4a1fd0;
  --s7: #8a8f99 }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1e2329; --ink: #e6e9ed;
  --soft: #a3abb7; --rule: #3a414b; --grid: #2a3038; --met: #4cc79b; --missed: #ff9166;
  --s0: #ff8a3d; --s1: #56b4f5; --s2: #f5e2bd; --s3: #de7bb5; --s4: #3aa56b; --s5: #966740; --s6: #8f5cff;
  --s7: #9ff0f2 } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444;
  --rule: #bbb; --grid: #e3e3e3; --met: #00694c; --missed: #a8320c;
  --s0: #d55e00; --s1: #0072b2; --s2: #1f3d4a; --s3: #a02c8c; --s4: #45a062; --s5: #4b4a00; --s6: #4a1fd0;
  --s7: #8a8f99 }
  nav { display: none } figure, .card, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  * { print-color-adjust: exact } .scroll { overflow: visible }
  details::details-content { content-visibility: visible; block-size: auto } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem }
p { margin: .5rem 0; max-width: 48rem }
a { color: inherit }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem }
code { font: .92em ui-monospace, monospace }
small { display: block; color: var(--soft); font-size: .8rem }
.note { white-space: pre-wrap }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: .75rem }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .75rem 1rem }
.card p { margin: 0; font-size: .85rem; color: var(--soft) }
.card .name { color: var(--ink) }
.card .big { font-size: 1.8rem; line-height: 1.35; font-weight: 600; color: var(--ink) }
.met { color: var(--met) } .missed { color: var(--missed) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); gap: 1rem 1.5rem;
  align-items: start }
@media (min-width: 60rem) { .twos { grid-template-columns: repeat(2, minmax(0, 28rem)); column-gap: 3rem } }
figure { margin: 0; max-width: 28rem }
.chart { display: block; width: 100%; height: auto; overflow: visible; font: 11px system-ui, sans-serif }
.chart text { fill: var(--soft) } .chart .label, .chart .row, .chart .value { fill: var(--ink) }
.chart .label, .chart .row { font-weight: 600 }
.chart .value, .chart .number, data { font-variant-numeric: tabular-nums }
.grid { stroke: var(--grid) } .axis, .tick { stroke: var(--soft) }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
.band { fill: currentColor; opacity: .15 }
.bar { fill: currentColor; opacity: .35 }
.whisker { stroke: currentColor; stroke-width: 1.5 }
.shape { fill: currentColor; stroke: var(--page) }
.dot { fill: var(--page); stroke: currentColor; stroke-width: 1.2; opacity: .8 }
.ghost { opacity: 0 }
.s0 { color: var(--s0) } .s1 { color: var(--s1) } .s2 { color: var(--s2) } .s3 { color: var(--s3) }
.s4 { color: var(--s4) } .s5 { color: var(--s5) } .s6 { color: var(--s6) } .s7 { color: var(--s7) }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0 .75rem; padding: 0; list-style: none;
  font-size: .9rem }
.legend li { display: flex; align-items: center; gap: .5rem }
.swatch { flex: none }
.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; padding: .25rem 0 }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule) }
thead th { vertical-align: bottom; font-weight: 600 }
th:first-child, th[scope^=row], .facts td, .targets td, .targets th { text-align: left }
tbody th { font-weight: 500; max-width: 16rem; overflow-wrap: break-word }
td data, td small { white-space: nowrap }
.all th[scope=rowgroup], .heat th:first-child, .k th:first-child { position: sticky; left: 0; background: var(--page) }
.all { font-size: .82rem } .all th, .all td { padding: .3rem .5rem }
.heat td { text-align: center } .heat thead th:not(:first-child) { text-align: center }
.heat td small { color: inherit } .heat .own { font-style: italic }
.targets td { overflow-wrap: anywhere }
.facts td { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .8rem }
.facts th { max-width: 50vw; padding-left: 0 }
@media (max-width: 40rem) { th, td { padding: .35rem .45rem } tbody th { max-width: 9rem } .card { padding: .6rem .7rem } }
details { margin: .75rem 0 } summary { cursor: pointer }
"""
