"""How the page looks: one style sheet, inline, light and dark. Colours are told apart in every kind of colour vision.

Bytes wear four of Okabe and Ito's colours, the use of codes ColorBrewer's YlGnBu, turned round in the dark.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --ink: #1b2330; --soft: #5b6675; --rule: #dfe3e9; --accent: #0b62a8;
  --on-accent: #fff;
  --tint: #e4effa; --codes: #0072b2; --values: #e69f00; --vocabulary: #009e73; --other: #cc79a7; --rest: #9aa3ae;
  --full: #c3cad4; --wedge: #dfe5ed; --hatch: #c9d0d9;
  --u1: #f2f7c4; --u2: #d3eeb4; --u3: #a3dbb7; --u4: #62c3be; --u5: #2fa4c2; --u6: #1f80b8; --u7: #2255a4;
  --u8: #0b2161;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151c; --card: #1a2029; --ink: #e7ebf1; --soft: #9ba7b6; --rule: #313a47; --accent: #6cb6ff;
    --on-accent: #0c1420; --tint: #1d3147; --codes: #3d9be0; --values: #e6a926; --vocabulary: #2bb58b;
    --other: #d48cb5;
    --rest: #6d7886; --full: #4a5563; --wedge: #2c3542; --hatch: #3a4452;
    --u1: #16265c; --u2: #23408c; --u3: #2363a8; --u4: #1f86b8; --u5: #3fabc0; --u6: #73cbb9; --u7: #b3e2b6;
    --u8: #f4f8c8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 26px 0 2px; }
p { margin: 2px 0 10px; max-width: 100ch; }
.note { color: var(--soft); font-size: 13.5px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 24px 24px;
  margin-top: 22px; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0 0; padding: 0; list-style: none; font-size: 13px; }
.chips li { border: 1px solid var(--rule); border-radius: 999px; padding: 1px 10px; color: var(--soft); }
.chips b { color: var(--ink); font-weight: 600; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.tile.first { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
.tile.first span { color: inherit; opacity: .9; }

.scroll { overflow-x: auto; }
.list { width: 100%; font-size: 14px; margin-top: 6px; }
.list th { color: var(--soft); font-weight: 500; font-size: 12.5px; text-align: right; white-space: nowrap; }
.list td { text-align: right; white-space: nowrap; }
.list th, .list td { padding: 5px 0 5px 16px; border-bottom: 1px solid var(--rule); }
.list th:first-child, .list td:first-child { text-align: left; padding-left: 0; }
.list tr.total td { font-weight: 600; border-bottom: 0; }

.barline { display: grid; grid-template-columns: 62px 1fr 72px; gap: 0 12px; align-items: center; font-size: 13px;
  margin: 5px 0; }
.barline span { color: var(--soft); } .barline b { font-weight: 600; text-align: right;
  font-variant-numeric: tabular-nums; }
.zoom { margin-top: -5px; }
.bar { display: flex; height: 20px; min-width: 2px; } .bar i { min-width: 0; }
.zoom .bar { height: 26px; }
.wedge { display: block; width: 100%; height: 18px; } .wedge polygon { fill: var(--wedge); }
.p-codes { background: var(--codes); } .p-values { background: var(--values); } .p-other { background: var(--other); }
.p-vocabulary { background: var(--vocabulary); } .p-rest { background: var(--rest); }
.p-full { background: var(--full); }
.keys { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 8px 0 0 74px; padding: 0; list-style: none;
  font-size: 13px;
  font-variant-numeric: tabular-nums; }
.keys i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 7px; }
.keys span { color: var(--soft); }

svg text { font: 12px system-ui, "Segoe UI", Roboto, sans-serif; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
svg text.tick { fill: var(--soft); font-size: 11.5px; } svg text.axis { fill: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 0 36px; }
.pair > div { display: flex; flex-direction: column; } .pair > div > .chart { margin-top: auto; }
.chart { display: block; width: 100%; max-width: 440px; height: auto; }
.grid { stroke: var(--rule); } .mark { stroke: var(--soft); stroke-dasharray: 4 3; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; } .dot { fill: var(--accent); }
.band { fill: var(--accent); opacity: .16; }

.heatgrid { display: grid; grid-template-columns: 56px minmax(0, 1fr) 194px; gap: 4px 14px; margin-top: 8px; }
.heatgrid .head { color: var(--soft); font-size: 12.5px; line-height: 1.25; align-self: end; }
.heatgrid .two { display: flex; justify-content: space-between; padding-right: 4px; }
.heat { display: block; width: 100%; shape-rendering: crispEdges;
  background: repeating-linear-gradient(135deg, var(--hatch) 0 1.5px, transparent 1.5px 6px); }
.heat rect { stroke: var(--card); stroke-width: 1px; vector-effect: non-scaling-stroke; }
.heat.fine rect { stroke: none; }
.edge { stroke: var(--ink); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.u0 { fill: none; } .u1 { fill: var(--u1); } .u2 { fill: var(--u2); } .u3 { fill: var(--u3); }
.u4 { fill: var(--u4); } .u5 { fill: var(--u5); } .u6 { fill: var(--u6); } .u7 { fill: var(--u7); }
.u8 { fill: var(--u8); }
.rail { fill: var(--rule); opacity: .55; } .fill { fill: var(--accent); }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 0; margin: 12px 0 0 70px; font-size: 12px;
  color: var(--soft); }
.scale .heat { width: 62px; height: 12px; } .scale div { text-align: center; }
.scale div:first-of-type { margin-right: 10px; } .scale > span { margin-right: 12px; }

.near { width: 100%; font-size: 14px; margin: 10px 0 0; }
.near td { padding: 2px 14px 2px 0; vertical-align: middle; }
.near td.number { text-align: right; color: var(--soft); white-space: nowrap; width: 1%; }
.near td.name { max-width: 330px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.near td.codes { padding-right: 0; width: 55%; }
.near th { color: var(--soft); font-weight: 500; font-size: 12.5px; text-align: left; padding: 0 14px 3px 0;
  white-space: nowrap; }
.near th.number { text-align: right; }
.near tr.chosen td { background: var(--tint); padding-top: 5px; padding-bottom: 5px; }
.near tr.chosen td:first-child { border-radius: 6px 0 0 6px; padding-left: 8px; }
.near tr.chosen td:last-child { border-radius: 0 6px 6px 0; }
.near tr:not(.chosen) td:first-child, .near th:first-child { padding-left: 8px; }
.near tr.chosen .name { font-weight: 650; }
.near .id { color: var(--soft); font-weight: 400; }
.plain-lists .near td.name { white-space: normal; }
.plain-lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px 32px;
  align-items: start; }
.strip { display: block; width: 100%; height: auto; } .strip.plain { height: 14px; shape-rendering: crispEdges; }
.strip rect.same, .strip path.same { fill: var(--accent); } .strip rect.other { fill: var(--rule); opacity: .5; }
.strip text { font-size: 11px; } .strip text.same { fill: var(--on-accent); font-weight: 600; }
.strip text.other { fill: var(--soft); }
footer { color: var(--soft); font-size: 13px; margin-top: 26px; }

@media (max-width: 900px) {
  main { padding: 18px 12px 40px; } section { padding: 16px 14px 20px; }
  .near.coded, .near.coded tbody { display: block; } .near.coded tr.heads th:last-child { display: none; }
  .near.coded tr { display: grid; grid-template-columns: 1fr 68px 58px; align-items: center; margin-top: 3px; }
  .near.coded td.number { width: auto; } .near.coded td.name { max-width: none; }
  .near.coded td.codes { grid-column: 1 / -1; width: auto; padding-left: 8px; padding-right: 8px; }
  .near.coded tr.chosen { background: var(--tint); border-radius: 6px; } .near.coded tr.chosen td { background: none;
  }
  .keys { margin-left: 0; } .scale { margin-left: 0; } .scale .heat { width: 50px; } .scale > span { flex-basis: 100%; }
  .list :is(th, td):nth-child(n+3):nth-child(-n+7) { display: none; } .list { font-size: 13px; }
  .list th, .list td { padding-left: 10px; } .tile { padding: 10px 12px; } .tile b { font-size: 21px; }
}
@media print { section { break-inside: auto; } body { background: none; } }
"""
