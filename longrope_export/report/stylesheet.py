"""The page's only style sheet: readable on a wide screen and on a phone, light and dark."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #555; --back: #fff; --panel: #f5f6f8; --rule: #d5d8dd; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #b5b8bd; --back: #16181c; --panel: #22252b; --rule: #3a3e46; --link: #8cbcf0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 1.2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .6rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 2px solid var(--rule); overflow-wrap: anywhere; }
h3 { font-size: 1.12rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
nav a { margin-right: 1.1rem; }
.facts { display: grid; grid-template-columns: repeat(3, 1fr); gap: .7rem; margin: 1rem 0; padding: 0; list-style: none; }
.facts li { background: var(--panel); border-radius: 8px; padding: .55rem .9rem; }
.facts b { display: block; font-size: 1.25rem; line-height: 1.3; overflow-wrap: anywhere; }
.facts span, small, figcaption, .title { color: var(--soft); }
.facts span { font-size: .87rem; }
figure { margin: .8rem 0 1.2rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-size: .9rem; margin-top: .45rem; max-width: 46rem; }
.scroll { overflow-x: auto; margin: .7rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
.title { font-size: .9rem; margin: .9rem 0 -.3rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; min-width: 8.5rem; max-width: 20rem; overflow-wrap: break-word; }
th:first-child { font-weight: 500; }
thead th { font-weight: 600; background: var(--panel); white-space: normal; vertical-align: bottom; }
td strong { border-bottom: 2px solid currentColor; }
td small { font-size: .78rem; }
pre { background: var(--panel); border-radius: 6px; padding: .7rem .9rem; font-size: .88rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(7rem, 13rem) 1fr; gap: .15rem 1rem; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--link); margin: .5rem 0; }
@media (max-width: 620px) {
  main { padding: .7rem .8rem 3rem; }
  h1 { font-size: 1.35rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .facts li { padding: .45rem .7rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .45rem; }
  nav a { display: inline-block; padding: .25rem 0; }
  th, td { padding: .28rem .5rem; }
}
@media print { .scroll { overflow: visible; } details { display: block; } }
"""
