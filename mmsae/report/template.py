"""The page that :mod:`mmsae.report.page` fills: HTML and CSS in one string, no scripts, nothing external."""

CSS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--panel:#fff;--ink:#1c1e21;--soft:#5d6470;--line:#e3e5e8;--accent:#2563eb;
--image:#3b82f6;--text:#f97316;--best:#dcfce7;--warn:#fff7e0;--warn-line:#eab308;--shade:#f2f3f5}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--panel:#1c1f25;--ink:#e7e9ec;--soft:#9aa3b0;--line:#2e333c;
--accent:#7aa7ff;--best:#14402a;--warn:#332b10;--shade:#23272f}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);line-height:1.6;font-size:16px;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main,header{max-width:72rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3rem}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.2;letter-spacing:-.02em;margin:0 0 .75rem}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:0 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .6rem}
section{margin:2.75rem 0;padding-top:1.75rem;border-top:1px solid var(--line)}
p,ul{max-width:46rem;margin:.5rem 0 .9rem}
.lead{font-size:1.08rem}
.meta,.small,figcaption,caption{color:var(--soft);font-size:.86rem}
.meta span{margin-right:1.25rem;white-space:nowrap}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;background:var(--shade);
padding:.1em .35em;border-radius:4px}
a{color:var(--accent)}
nav{margin:1.25rem 0 0;display:flex;flex-wrap:wrap;gap:.35rem .5rem}
nav a{text-decoration:none;font-size:.88rem;padding:.2rem .7rem;border:1px solid var(--line);border-radius:99px;
background:var(--panel)}
nav a:hover{border-color:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.75rem;margin:1rem 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.tile b{display:block;font-size:1.55rem;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.86rem}
.warning{background:var(--warn);border-left:4px solid var(--warn-line);padding:.6rem .9rem;border-radius:4px;
max-width:60rem;margin:.6rem 0}
.scroll{overflow-x:auto;margin:1rem 0;background:var(--panel);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
caption{caption-side:top;text-align:left;padding:.7rem .9rem .2rem}
th,td{padding:.45rem .9rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child>*{border-bottom:0}
th{font-weight:600}
thead th{font-size:.82rem;color:var(--soft);vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:500;position:sticky;left:0;background:var(--panel)}
td.word{min-width:11rem}
th.word,td.word{text-align:left;white-space:normal}
td.best{background:var(--best);font-weight:600}
figure{margin:1.25rem 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 2rem;align-items:start}
.figures figure:only-child{max-width:60rem}
figure img{max-width:100%}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19.5rem),1fr));gap:1rem;margin:1rem 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem;min-width:0}
.card h4{margin:0;font-size:1rem;display:flex;gap:.5rem;align-items:baseline}
.card h4 small{color:var(--soft);font-weight:400;font-variant-numeric:tabular-nums}
.card .small{margin:.15rem 0 .6rem}
.strip{display:grid;grid-template-columns:repeat(4,1fr);gap:4px}
.strip img,.portrait img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:5px;display:block;
background:var(--shade);outline:1px solid var(--line);outline-offset:-1px}
.strip.three{grid-template-columns:repeat(3,1fr)}
img.tiny{image-rendering:pixelated}
.card ol{list-style:none;padding:0;margin:.7rem 0 0;font-size:.86rem;line-height:1.35}
.card li{display:flex;justify-content:space-between;gap:.75rem;padding:.28rem 0;border-top:1px solid var(--line)}
.card li span{color:var(--soft);font-variant-numeric:tabular-nums}
.heat{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.2rem,1fr));gap:.5rem}
.heat figure{margin:0;display:flex;flex-wrap:wrap;gap:3px;align-items:end}
.heat img{image-rendering:pixelated;border-radius:4px;width:4rem}
.heat img:first-child{width:5.4rem}
.heat figcaption{width:100%;font-size:.78rem;font-variant-numeric:tabular-nums}
.tokens q{quotes:none}
.tokens q span{color:inherit;background:color-mix(in srgb,var(--text) var(--heat),transparent);border-radius:3px}
.tokens q .peak{font-weight:600;text-decoration:underline}
.tokens b{font-weight:400;color:var(--soft);font-variant-numeric:tabular-nums}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem;margin:1rem 0}
.pair{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:1rem;min-width:0}
.pair h4{margin:0 0 .6rem;display:flex;justify-content:space-between;gap:1rem;font-size:1rem}
.pair h4 span{font-weight:400;color:var(--soft);font-variant-numeric:tabular-nums}
.portrait{display:grid;grid-template-columns:5rem 1fr;gap:.9rem;align-items:center;margin-bottom:.8rem}
.portrait p{margin:0}
.bars{width:100%;table-layout:fixed;font-size:.82rem}
.bars th,.bars td{border:0;padding:.14rem .3rem;overflow:hidden;text-overflow:ellipsis}
.bars thead th{text-align:center}
.bars tbody th{position:static;text-align:center;font-weight:400;color:var(--soft);background:none}
.bars .shared th{color:var(--ink);font-weight:600}
.bars i{display:block;height:.8rem;border-radius:3px;opacity:.5}
.bars .shared i{opacity:1}
.bars .l i{background:var(--image);margin-left:auto}
.bars .r i{background:var(--text)}
details{margin:2.5rem 0}
summary{cursor:pointer;font-weight:600}
pre{overflow:auto;max-height:32rem;background:var(--shade);padding:1rem;border-radius:10px;font-size:.8rem}
footer{max-width:72rem;margin:0 auto;padding:1rem 1.25rem 3rem}
@media print{nav,details{display:none}body{background:#fff}.card,.pair,.scroll,figure{break-inside:avoid}}
"""

TABLE = """
{% macro table_of(t) %}{% set best = best_rows(t) %}{% set words = word_columns(t) %}
<div class="scroll" tabindex="0"><table>
{% if t.caption %}<caption>{{ t.caption }}</caption>{% endif %}
<thead><tr>{% for c in t.columns %}
<th scope="col"{{ ' class=word' if loop.index0 in words }}>{{ c }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in t.rows %}{% set r = loop.index0 %}
<tr><th scope="row">{{ row[0]|number }}</th>{% for cell in row[1:] %}
<td class="{{ 'word ' if loop.index in words }}{{ 'best' if r in best.get(loop.index, ()) }}">{{ cell|number }}</td>
{%- endfor %}</tr>{% endfor %}</tbody></table></div>
{% endmacro %}
"""

CARD = """
{% macro card_of(c) %}
<article class="card"><h4>{{ c.name or 'latent' }} <small>#{{ c.latent }}</small></h4>
<p class="small">{% for k, v in c.facts %}{{ k }} {{ v }}{{ ' · ' if not loop.last }}{% endfor %}</p>
{% set three = c.images|length % 4 and c.images|length % 3 == 0 %}
{% if c.images %}<div class="strip{{ ' three' if three }}">{% for p in c.images %}
<img src="{{ p.uri }}" alt="{{ p.alt }}" title="{{ p.alt }} ({{ p.value|number }})"{{ ' class=tiny' if p.tiny }}>
{%- endfor %}</div>{% endif %}
{% if c.captions %}<ol>{% for text, value in c.captions %}
<li>{{ text }}<span>{{ '%.2f'|format(value) }}</span></li>{% endfor %}</ol>{% endif %}
</article>
{% endmacro %}
"""

PAIR = """
{% macro pair_of(p) %}
<article class="pair"><h4>{{ p.title }}
{% if p.cosine == p.cosine %}<span>code cosine {{ '%.2f'|format(p.cosine) }}</span>{% endif %}</h4>
<div class="portrait">{% if p.picture %}<img src="{{ p.picture.uri }}" alt="{{ p.picture.alt }}"
{{ 'class=tiny' if p.picture.tiny }}>{% endif %}
<p>{{ p.caption }}</p></div>
<table class="bars"><thead><tr>
<th scope="col">image</th><th scope="col">latent</th><th scope="col">text</th></tr></thead>
<tbody>{% for b in p.bars %}<tr{{ ' class=shared' if b.shared }}>
<td class="l" title="{{ b.image_value|number }}"><i style="width:{{ '%.1f'|format(100 * b.image) }}%"></i></td>
<th scope="row">{{ b.label }}</th>
<td class="r" title="{{ b.text_value|number }}"><i style="width:{{ '%.1f'|format(100 * b.text) }}%"></i></td></tr>
{% endfor %}</tbody></table></article>
{% endmacro %}
"""

BODY = """
<header><h1>{{ title }}</h1>
{% if lead %}<div class="lead">{{ lead|prose }}</div>{% endif %}
{% if meta %}<p class="meta">{% for k, v in meta.items() %}<span>{{ k }} <b>{{ v|number }}</b></span> {% endfor %}</p>
{% endif %}
{% if sections|length > 2 %}<nav aria-label="Contents">{% for s in sections %}
<a href="#{{ s.title|slug }}">{{ s.title }}</a>{% endfor %}</nav>{% endif %}
</header>
<main>
{% for s in sections %}
<section id="{{ s.title|slug }}"><h2>{{ s.title }}</h2>
{% for w in s.warnings %}<p class="warning" role="note"><strong>Warning.</strong> {{ w }}</p>{% endfor %}
{{ s.intro|prose }}
{% if s.facts %}<div class="tiles">{% for f in s.facts %}<div class="tile"><b>{{ f.value|number }}</b>
<span>{{ f.label }}</span>{% if f.note %}<span class="small">{{ f.note }}</span>{% endif %}</div>{% endfor %}</div>
{% endif %}
{% for t in s.tables %}{{ table_of(t) }}{% endfor %}
{% if s.figures %}<div class="figures">{% for f in s.figures %}<figure>{{ f.html }}
{% if f.caption %}<figcaption>{{ f.caption }}</figcaption>{% endif %}</figure>{% endfor %}</div>{% endif %}
{% if s.pairs %}<div class="pairs">{% for p in s.pairs %}{{ pair_of(p) }}{% endfor %}</div>{% endif %}
{% for g in s.galleries %}{% if g.title %}<h3>{{ g.title }}</h3>{% endif %}
<div class="cards">{% for c in g.cards %}{{ card_of(c) }}{% endfor %}</div>{% endfor %}
</section>
{% endfor %}
{% if data %}<details><summary>All numbers as JSON</summary><pre>{{ data }}</pre></details>{% endif %}
</main>
<footer class="small">Made by mmsae.</footer>
"""

PAGE = (
    TABLE
    + CARD
    + PAIR
    + '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    + '<meta name="viewport" content="width=device-width,initial-scale=1"><title>{{ title }}</title>'
    + f"<style>{CSS}</style></head><body>{BODY}</body></html>\n"
)
