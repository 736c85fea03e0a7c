# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lay out the page of a report."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1c1f23;--soft:#5c636b;--line:#e2e3e0;--bar:#5b7fa6;
--good:#1b7340;--bad:#b3261e;--warn:#8a5700;--badbg:#fdf1f0}
@media(prefers-color-scheme:dark){:root{--page:#141618;--card:#1c1f22;--ink:#e7e8e6;--soft:#9ca3aa;--line:#30353a;
--bar:#6f95bf;--good:#66c38a;--bad:#ff8a80;--warn:#e0b060;--badbg:#2a1c1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 12px}
p{margin:0}a{color:inherit}
.soft,.kicker{color:var(--soft)}.kicker{font-size:13px}
.verdict{font-size:18px;margin:10px 0 2px}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.word{font-weight:600}time,li .word,td .word{white-space:nowrap}
.share{display:block;width:100%;height:8px;margin:18px 0 0;border-radius:4px;overflow:hidden}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:20px 0 0;
background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tiles div{flex:1 0 calc(100%/var(--columns) - 2px);padding:12px 16px;box-shadow:0 0 0 1px var(--line)}
.tiles dt{font-size:13px;color:var(--soft)}
.tiles dd{margin:0;white-space:nowrap;word-spacing:-.12em;font-size:21px;font-weight:600;line-height:1.3}
.tiles dd small{word-spacing:0;font-size:13px;font-weight:400;color:var(--soft)}
.card,details{background:var(--card);border:1px solid var(--line);border-radius:8px}
.failures{list-style:none;margin:0;padding:0;border-left:4px solid var(--bad)}
.failures li{padding:12px 16px;border-top:1px solid var(--line)}.failures li:first-child{border-top:0}
.failures p,.note td{overflow-wrap:anywhere;white-space:pre-line}
b,td{unicode-bidi:isolate}
b.name{overflow-wrap:anywhere}
pre{margin:12px 0 0;padding:12px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.charts{display:grid;grid-template-columns:1fr 1fr;gap:16px}
figure{margin:0;padding:14px 16px}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:12px;font-weight:600}
figcaption span{font-weight:400;color:var(--soft);font-size:13px}
td small{font-size:inherit;color:var(--soft)}
.plot{display:flex;gap:8px;margin:16px 0 8px}
.axis{display:flex;flex-direction:column;justify-content:space-between;flex:0 0 56px;height:138px;margin:-9px 0;
text-align:right;white-space:nowrap;line-height:18px}
.axis,.ids{font-size:12px;color:var(--soft)}
.bars{flex:1;min-width:0;display:flex;height:120px;border-bottom:1px solid var(--soft);
background:linear-gradient(var(--line),var(--line)) 0 0/100% 1px no-repeat,
linear-gradient(var(--line),var(--line)) 0 50%/100% 1px no-repeat}
.bars a{flex:1 1 0;min-width:0;padding:0 2px;display:flex;align-items:flex-end;justify-content:center}
.bars i{width:100%;max-width:48px;min-height:2px;background:var(--bar);-webkit-print-color-adjust:exact;
print-color-adjust:exact}
.bars .bad i{background:var(--bad)}.bars a:hover i{background:var(--ink)}
.bars .now{box-shadow:0 4px 0 -1px var(--ink)}
.ids{display:flex;margin-left:64px}
.ids span{flex:1 1 0;min-width:0;padding:0 2px;text-align:center;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}
.ids.some span:first-child{text-align:left}.ids.some span:last-child{text-align:right}
.legend{margin:8px 0 12px;font-size:13px}
rect.x{fill:var(--bad)}rect.g{fill:var(--good)}rect.s{fill:var(--soft)}rect.l{fill:var(--line)}
.top{display:flex;flex-wrap:wrap;justify-content:space-between;gap:4px 24px;margin-bottom:4px}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:13px}
.list{overflow:hidden;margin-top:20px}.list tr:first-child th{border-top:0}
.older{margin:0;padding:12px 16px;list-style:none;columns:160px auto}.older li{overflow-wrap:anywhere}
.names{margin:6px 0 0;padding:0;list-style:none}
.failures .names li{padding:1px 0;border:0;overflow-wrap:anywhere}
details.plain{border:0;margin:0;background:none}
.plain summary{padding:6px 0 0;gap:2px 16px;color:var(--soft);font-size:14px}
.warnings{margin:0;padding:0 16px 10px 32px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
details{margin:0 0 8px}
summary{padding:12px 16px;cursor:pointer;display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline}
summary b{flex:1 1 200px;overflow-wrap:anywhere}
summary::before{content:"+";color:var(--soft);width:10px;margin-right:-6px}details[open]>summary::before{content:"\\2212"}
summary::-webkit-details-marker{display:none}
summary span{color:var(--soft);font-size:14px}summary span.num{min-width:80px;text-align:right}
summary .word{font-size:15px;min-width:88px;text-align:right}
summary .good{color:var(--good)}summary .bad{color:var(--bad)}
.about{padding:0 16px 10px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;font-size:14px}
th{font-size:12px;font-weight:500;color:var(--soft);text-align:left;white-space:nowrap}
th,td{padding:7px 8px;border-top:1px solid var(--line);vertical-align:baseline}
th:first-child,td:first-child{padding-left:16px}th:last-child,td:last-child{padding-right:16px}
.r{text-align:right;white-space:nowrap}td:first-child{overflow-wrap:anywhere}
.note td{border-top:0;padding-top:0;font-size:13px}
footer{margin-top:40px;font-size:13px;color:var(--soft)}
.no-verified td:nth-child(8),.no-verified th:nth-child(8),.no-images td:nth-child(7){padding-right:16px}
.no-speed td:nth-child(6),.no-speed th:nth-child(6),.no-images td:nth-child(8),.no-images th:nth-child(8),
.no-verified td:nth-child(9),.no-verified th:nth-child(9),.no-set td:nth-child(n+3),
.no-set th:nth-child(n+3){display:none}
@media(max-width:700px){
main{padding:20px 16px 32px}h1{font-size:25px}
.tiles div{flex-basis:calc(50% - 1px);min-width:0}.tiles dd{font-size:19px}
.tiles dd,.tiles dt{overflow:hidden;text-overflow:ellipsis}.charts{grid-template-columns:1fr}
summary{column-gap:12px}summary b{flex-basis:calc(100% - 20px)}summary span.num,summary .word{min-width:0;
text-align:left}.vms small{display:none}.runs td,.runs th{font-size:13px;padding-left:4px;padding-right:4px}
.vms,.vms tbody,.vms tr,.vms td{display:block}.vms thead{display:none}
.vms tr{display:grid;grid-template-columns:minmax(0,11fr) minmax(0,10fr);padding:10px 16px;
border-top:1px solid var(--line);gap:2px 16px}
.vms td{border:0;padding:0!important;text-align:left;display:flex;justify-content:space-between;gap:8px}
.vms td:nth-child(n+3){font-size:13px}.vms td:nth-child(2){justify-content:flex-end}
.vms td:nth-child(n+3)::before{color:var(--soft)}.vms td:empty{display:none}
.vms td:nth-child(3)::before{content:"Level"}.vms td:nth-child(4)::before{content:"Size"}
.vms td:nth-child(5)::before{content:"Time"}.vms td:nth-child(6)::before{content:"Speed"}
.vms td:nth-child(7)::before{content:"Consistency"}.vms td:nth-child(8)::before{content:"Images"}
.vms td:nth-child(9)::before{content:"Verified"}
.vms tr.note{display:block;border:0;padding-top:0}.vms .note td{display:block}
.runs td:nth-child(2),.runs th:nth-child(2){display:none}}
@media print{body{background:#fff}details,.card,.tiles{break-inside:avoid}}
"""
