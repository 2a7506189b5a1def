"""The style sheet and the script of the page of a plan."""

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --faint: #ececec; --line: #8a8a8a; --limit: #c00000; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #16181c; --faint: #2b2f36; --line: #7d838c; --limit: #ff6b6b; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; }
dt { font-weight: 600; }
dd { margin: 0; }
svg { display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .pass text { font-size: 10px; fill: #111; text-anchor: middle; }
svg .pass rect { stroke: var(--page); stroke-width: .5; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--faint); }
svg .limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 6 3; }
svg .over, svg text.limit-label { fill: var(--limit); font-weight: 600; stroke: none; }
svg .bubble { fill: url(#hatch); }
svg .hatch-back { fill: var(--faint); }
svg .hatch-line { stroke: var(--line); stroke-width: .7; }
.fit svg { width: 100%; min-width: 40rem; height: auto; }
.scroll { overflow-x: auto; }
.pipeline { display: flex; }
.pipeline svg { flex: none; }
.pipeline .names { position: sticky; left: 0; background: var(--page); }
ul.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; list-style: none; padding: 0; }
ul.legend svg { display: inline-block; vertical-align: -2px; margin-right: .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); font-weight: normal; }
thead th { font-weight: 600; }
td.words { text-align: left; }
td span + span { margin-left: .2em; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
"""

# `execCommand` is deprecated. Unlike the clipboard API, it works in every browser on a page opened from a file.
SCRIPT = """
for (const button of document.querySelectorAll("button[data-table]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(document.getElementById(button.dataset.table));
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected: copy it";
  });
}
"""
