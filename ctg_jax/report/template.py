"""The page of a report: one HTML file that needs no other, readable on a light and on a dark background."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ground: #ffffff; --ink: #222222; --soft: #666666; --rule: #dddddd; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181d; --ink: #e4e4e4; --soft: #a0a4ad; --rule: #3a3d45; --card: #1f2229; }
}
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 72rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; font-weight: 600; }
p.note, figcaption, small { color: var(--soft); } p.note, figcaption { font-size: .88rem; max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
         white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th.wrap { white-space: normal; min-width: 5rem; }
th.word, td.word { text-align: left; } td small { display: block; font-size: .78rem; }
td.best { font-weight: 700; } td.best small { font-weight: 400; }
th.word:first-child, td.word:first-child { position: sticky; left: 0; background: var(--ground); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); font-size: .88rem; margin: .6rem 0; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } .wide img { max-width: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .7rem; }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; font-size: .9rem;
        overflow-wrap: anywhere; }
.card b { display: block; font-size: .78rem; color: var(--soft); margin-bottom: .2rem; }
.card p { margin: .2rem 0; white-space: pre-wrap; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ note }}</p>
{% macro table(headings, body) %}
<div class="wide"><table>
<thead><tr>{% for h in headings %}
<th class="{{ 'word' if h.word else 'wrap' }}">{{ h.name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in body %}<tr>
{% for c in cells %}
<td{% if c.word %} class="word"{% elif c.best %} class="best"{% endif %}>{{ c.value }}
{%- if c.interval %}<small>{{ c.interval }}</small>{% endif %}</td>{% endfor %}
</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{% macro picture(image) %}<figure>
<div{% if image.width > 700 %} class="wide"{% endif %}>
<picture><source srcset="data:image/png;base64,{{ image.dark }}" media="(prefers-color-scheme: dark)">
<img src="data:image/png;base64,{{ image.light }}" alt="{{ image.caption }}" width="{{ image.width }}"></picture></div>
<figcaption>{{ image.caption }}</figcaption></figure>
{% endmacro %}
<h2>Results</h2>
{{ table(*main) }}
<details><summary>What the columns mean</summary>
<dl>{% for name, value in columns %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<p class="note">The best value of a column is bold, where one direction is better. A table that is wider than the page
scrolls sideways, and so does a picture.</p></details>
{% for image in images %}{{ picture(image) }}{% endfor %}
{% if smooth %}<h2>Smooth control</h2>
<p class="note">{{ smooth_note }}</p>
{{ table(*smooth) }}{% endif %}
{% if turns %}<h2>Rounds</h2>
<p class="note">{{ turns_note }}</p>
{% if turns_picture %}{{ picture(turns_picture) }}{% endif %}
{{ table(*turns) }}{% endif %}
{% if samples %}<h2>Samples, side by side</h2>
{% for prompt in samples %}<h3>{{ prompt.prompt }} …</h3>
<div class="cards">{% for card in prompt.cards %}<div class="card"><b>{{ card.label }}</b>
{% for text in card.texts %}<p>{{ text }}</p>{% endfor %}</div>{% endfor %}</div>
{% endfor %}{% endif %}
{% if rest[0] | length > words %}<h2>All other figures</h2>
{{ table(*rest) }}{% endif %}
<h2>How it was measured</h2>
<dl>{% for name, value in about %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</body>
</html>
"""
