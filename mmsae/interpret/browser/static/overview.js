/* All latents: two plots to choose in, filters, and a list of what is chosen. */
"use strict";

(() => {
  const { h } = mmsae;
  const DENSE = 0.1;
  const LOW = 0.1; // phi below which image and text of pairs disagree

  const FILTERS = [
    ["all", "All", "every latent", () => true],
    ["shared", "Shared", "fires in images and in texts", (p, j) => p.kind[j] === 3],
    ["image", "Image only", "95 % of its mean value is in images", (p, j) => p.kind[j] === 1],
    ["text", "Text only", "95 % of its mean value is in texts", (p, j) => p.kind[j] === 2],
    ["disagree", "Disagreement", `fires in both, but not on the same pairs: phi below ${LOW}`, (p, j) => p.kind[j] === 3 && !(p.columns.agree?.[j] >= LOW)],
    ["dead", "Dead", "never fires", (p, j) => p.kind[j] === 0],
    ["dense", "Dense", "fires on more than 10 % of the samples", (p, j) => p.density[j] > DENSE],
    ["named", "Named", "has a name", (p, j) => !!p.name(j)],
    ["unnamed", "Unnamed", "fires and has no name", (p, j) => p.kind[j] !== 0 && !p.name(j)],
    ["starred", "Bookmarked", "your bookmarks", (p, j) => mmsae.notes.starred(p, j)],
  ];

  /** The index over names and words, built when nothing else is to do. */
  mmsae.index = (panel) => {
    if (!panel.index) {
      const mini = new MiniSearch({ fields: ["name", "words", "labels"], storeFields: [], searchOptions: { boost: { name: 4 }, prefix: (word, i, words) => word.length > 1 || words.length === 1, combineWith: "AND" } });
      const doc = (j) => ({ id: j, name: panel.name(j) ?? "", words: panel.words[j] ?? "", labels: panel.labelsOf(j).join(" ") });
      const ready = (async () => {
        for (let from = 0; from < panel.size; from += 300) {
          await new Promise((resolve) => setTimeout(resolve)); // what a person does comes between
          for (let j = from; j < Math.min(from + 300, panel.size); j++) mini.add(doc(j));
        }
      })();
      panel.index = { mini, done: false, ready };
      mmsae.notes.onchange((p) => p === panel && panel.index.ready.then(() => panel.index.stale?.forEach((j) => mini.replace(doc(j)))));
      panel.index.ready.then(() => (panel.index.done = true));
      panel.index.stale = { forEach: (f) => mmsae.notes.renames(panel).forEach((_, j) => f(j)) };
    }
    return panel.index;
  };

  /** Latents by cosine with a sum of latents and words, "#12 - #40 + dog": null where nothing of it has a vector. */
  mmsae.like = (panel, text) => {
    const { latents, words } = panel.vectors;
    const width = latents.s[1];
    const [rows, own] = [mmsae.array(latents), mmsae.array(words.vectors)];
    const query = new Float32Array(width);
    let any = false;
    const add = (from, i, sign) => {
      if (i < 0 || (i + 1) * width > from.length) return false;
      any = true;
      for (let d = 0; d < width; d++) query[d] += (sign === "-" ? -1 : 1) * from[i * width + d];
      return true;
    };
    for (const [, sign, number, phrase] of text.toLowerCase().matchAll(/([+-])?\s*(?:#(\d+)|([\p{L}\p{N}_][\p{L}\p{N}_'-]*(?:\s+[\p{L}\p{N}_][\p{L}\p{N}_'-]*)*))/gu)) {
      if (number) add(rows, +number, sign);
      const said = phrase?.split(/\s+/) ?? [];
      for (let i = 0; i < said.length; i++) // the longest phrase that is known, from each word on
        for (let n = said.length - i; n > 0; n--) if (add(own, words.text.indexOf(said.slice(i, i + n).join(" ")), sign)) { i += n - 1; break; }
    }
    if (!any) return null;
    const score = new Float32Array(panel.size);
    for (let j = 0; j < panel.size; j++) for (let d = 0; d < width; d++) score[j] += rows[j * width + d] * query[d];
    return Array.from(score.keys()).filter((j) => panel.kind[j] && score[j] > 0).sort((a, b) => score[b] - score[a]).slice(0, 200);
  };

  /** Latents by relevance to words, or the one with a number, or those like some others. */
  mmsae.search = (panel, text) => {
    const like = /^like\s+(.+)$/i.exec(text.trim());
    if (like && panel.vectors) {
      const near = mmsae.like(panel, like[1]);
      if (near) return near;
    }
    const number = /^#?(\d+)$/.exec(text.trim());
    if (number && +number[1] < panel.size) return [+number[1]];
    const { mini, done } = mmsae.index(panel);
    if (!done) return scan(panel, text);
    const found = mini.search(text);
    return (found.length ? found : mini.search(text, { fuzzy: 0.25 })).map((r) => r.id); // misspelt, perhaps
  };

  /** What has all words somewhere, names first: until the index is built. */
  const scan = (panel, text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const has = (said) => words.every((w) => said.includes(w));
    const [named, other] = [[], []];
    for (let j = 0; j < panel.size; j++) {
      const name = (panel.name(j) ?? "").toLowerCase();
      if (has(name)) named.push(j);
      else if (has(`${name} ${panel.words[j]} ${panel.labelsOf(j).join(" ")}`.toLowerCase())) other.push(j);
    }
    return named.concat(other);
  };

  const columnsOf = (panel) => {
    const { modalities, images } = panel.meta;
    const has = (name) => name in panel.columns;
    const out = [];
    for (const m of modalities) {
      out.push({ id: `${m}.density`, title: `in ${m}s`, help: `share of the ${m}s on which it fires`, cell: (j, v) => mmsae.bar(Math.sqrt(v), mmsae.percent(v), `.${m}`) });
      out.push({ id: `${m}.mean`, title: `mean, ${m}`, help: `mean value where it fires in ${m}s`, cell: (j, v) => mmsae.number(v, 2) });
    }
    if (has("agree")) out.push({ id: "agree", title: "agreement", help: "phi over pairs: does it fire in the image and in the text of the same pairs?", cell: (j, v) => mmsae.number(v, 2) });
    if (has("purity")) out.push({ id: "purity", title: "purest label", help: "largest share of its labelled samples with one label", cell: (j, v) => (Number.isNaN(v) ? "–" : h("span", {}, `${mmsae.percent(v)} `, h("small", {}, panel.meta.labels[panel.columns.label[j]] ?? ""))) });
    if (has("match")) out.push({ id: "match", title: "in second SAE", help: "cosine with (or correlation of activations with) the nearest latent of the second SAE", cell: (j, v) => mmsae.number(v, 2) });
    for (const name of Object.keys(panel.columns).filter((c) => c.startsWith("score."))) out.push({ id: name, title: name.slice(6).replaceAll("_", " ").replace(".", ", "), help: `score: ${name.slice(6)}`, cell: (j, v) => mmsae.number(v, 2) });
    return { columns: out, images };
  };

  /** What is listed is what the address says: at {query, filter, order ("": the usual one), up, area {plot, box} or null}. */
  mmsae.pages.overview = async (panel, at) => {
    let view = at;
    let mode = mmsae.notes.read("mmsae:mode") ?? "cards";
    const { columns, images } = columnsOf(panel);
    const first = panel.meta.modalities[0];
    let chosen = [];

    const scored = Object.keys(panel.columns).filter((k) => k.startsWith("score.")).map((k) => panel.columns[k]);
    const fired = panel.meta.modalities.map((m) => panel.columns[`${m}.n`]);
    const interest = (j) => {
      const c = panel.columns;
      if (!panel.kind[j]) return -5;
      let [sum, many, n] = [0, 0, Infinity];
      for (const column of scored) if (!Number.isNaN(column[j])) [sum, many] = [sum + column[j], many + 1];
      for (const column of fired) if (column[j] > 0 && column[j] < n) n = column[j];
      const s = many && sum / many;
      const sure = n / (n + 10); // one item agrees with itself
      const rare = 0.05 / (0.05 + panel.density[j]); // where nothing else tells them apart
      const holds = panel.names.get(j)?.auroc ?? 0.75;
      return (panel.name(j) ? 0.5 + 2 * Math.max(holds - 0.5, 0) : 0) + s + sure * ((c.agree?.[j] || 0) + (c.purity?.[j] || 0) / 2) - (panel.density[j] > 0.5 ? 1 : 0) + 0.2 * rare * sure;
    };
    const keyOf = (sort) => {
      if (sort === "index") return (j) => -j;
      if (sort === "name") return (j) => panel.name(j) ?? "";
      if (sort === "density") return (j) => panel.density[j];
      if (sort === "interesting") return interest;
      const column = panel.columns[sort];
      return (j) => column[j];
    };
    /** All latents in an order, and how many of them it is known of; the rest comes last, whichever way around. */
    const ordered = (id) => {
      panel.orders ??= new Map();
      if (!panel.orders.has(id)) {
        const keys = Array.from({ length: panel.size }, (_, j) => j).map(keyOf(id));
        const [has, none] = [[], []];
        keys.forEach((k, j) => (k === "" || Number.isNaN(k) ? none : has).push(j));
        const { compare } = new Intl.Collator();
        has.sort(typeof keys[has[0]] === "string" ? (a, b) => compare(keys[a], keys[b]) || a - b : (a, b) => keys[b] - keys[a] || a - b);
        panel.orders.set(id, { all: has.concat(none), known: has.length });
      }
      return panel.orders.get(id);
    };

    const table = () => mode === "table";
    const order = () => view.order || (view.query ? "relevance" : "interesting");
    const go = (change) => mmsae.go(panel.listLink({ ...view, ...change }));
    const reorder = (id, up = false) => go({ order: id === (view.query ? "relevance" : "interesting") ? "" : id, up });
    const cover = (j) => h("a.cover", { href: panel.link(j), title: panel.name(j) ?? mmsae.wordsOf(panel, j) }, panel.name(j) ?? h("span.unnamed", {}, mmsae.wordsOf(panel, j)));
    const row = (i) => {
      const j = chosen[i];
      const pictures = images ? panel.top(j, "image").concat(panel.meta.modalities.includes("image") ? [] : panel.top(j, "text")).slice(0, 4) : [];
      return h(`div.row.k${panel.kind[j]}`, {},
        mmsae.star(panel, j), h("span.which", {}, h("b", {}, cover(j)), h("small", {}, `#${j}  `, mmsae.kind(panel, j))),
        images && h("span.thumbs", {}, pictures.map((e) => mmsae.picture(panel, { item: e }, { link: false, plain: true }))),
        columns.map((c) => h("span.cell", {}, c.cell(j, panel.columns[c.id][j]))));
    };
    const card = (i) => {
      const j = chosen[i];
      const m = panel.meta.modalities.includes("image") && panel.top(j, "image").length ? "image" : panel.meta.modalities.at(-1);
      const top = panel.top(j, m).slice(0, 6);
      const said = h("span.said");
      const texts = panel.meta.captions ? panel.top(j, panel.meta.modalities.includes("text") && panel.top(j, "text").length ? "text" : m) : [];
      const element = h("div.slot", {}, h(`div.tile.k${panel.kind[j]}`, {},
        h("span.head", {}, h("b", {}, cover(j)), h("small", {}, `#${j}`), mmsae.star(panel, j)),
        images && h("span.six", {}, top.map((e) => mmsae.picture(panel, { item: e }, { link: false, plain: true }))),
        said,
        h("span.foot", {}, panel.meta.modalities.map((k) => h("span", {}, `${mmsae.percent(panel.columns[`${k}.density`][j])} of ${k}s`)))));
      if (texts.length)
        mmsae.seen(element, () =>
          Promise.all(texts.slice(0, 4).map((e) => panel.sample(e))).then((samples) => {
            said.append(...[...new Set(samples.map((s) => s.caption).filter(Boolean))].slice(0, images ? 2 : 4).map((t) => h("span", {}, t)));
          }));
      return element;
    };
    const makeList = () => (table() ? mmsae.virtual({ make: row, height: images ? 66 : 46, label: "latents" }) : mmsae.virtual({ make: card, height: images ? (w) => Math.round((2 * (w - 42)) / 3) + (panel.meta.captions ? 136 : 96) : 150, least: 232, label: "latents" }));
    let list = makeList();
    const holder = h("div.holder");
    const heading = h("div.row.heading");
    const counts = h("span.hint", { role: "status" });
    const none = h("p.hint.none");
    const samples = h("span.hint");

    const choose = () => {
      const test = FILTERS.find(([id]) => id === view.filter)[3];
      const found = view.query && mmsae.search(panel, view.query);
      plots.forEach((p, id) => id !== view.area?.plot && p.choose(null));
      const inside = view.area && plots.get(view.area.plot).choose(view.area.box);
      const byRelevance = order() === "relevance";
      let listed = found;
      if (!byRelevance) {
        const { all, known } = ordered(order());
        listed = view.up ? all.slice(0, known).reverse().concat(all.slice(known)) : all;
        if (found) {
          const has = new Uint8Array(panel.size);
          for (const j of found) has[j] = 1;
          listed = listed.filter((j) => has[j]);
        }
      }
      chosen = listed.filter((j) => test(panel, j) && (!inside || inside.has(j)));
      counts.replaceChildren(`${mmsae.count(chosen.length, "latent")}${view.query ? ` for “${view.query}”` : ""}${view.area ? " in the chosen area " : ""}`,
        view.area || view.query ? h("button.small", { type: "button", onclick: () => go({ query: "", area: null }) }, "clear") : "");
      samples.replaceChildren(...(view.query ? [h("a", { href: panel.samplesLink(view.query) }, "samples with these words")] : []));
      none.textContent = chosen.length ? "" : nothing();
      list.fill(chosen.length);
      sorts.querySelector("[value=relevance]").hidden = !view.query;
      sorts.value = order();
      direction.textContent = view.up ? "↑" : "↓";
      direction.disabled = byRelevance;
      chips.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.filter === view.filter));
      dimmed = view.query || view.filter !== "all" || view.area ? new Set(chosen) : null;
      clearTimeout(later);
      later = setTimeout(() => plots.forEach((p) => p.draw()), 120); // the list first
    };
    /** An address may be written by hand, or be of a browser with other columns. */
    const known = (said) => {
      const orders = [...sorts.options].map((o) => o.value);
      const ok = { filter: FILTERS.some(([id]) => id === said.filter), order: !said.order || (orders.includes(said.order) && (said.order !== "relevance" || !!said.query)), area: !said.area || plots.has(said.area.plot) };
      const wrong = Object.keys(ok).filter((k) => !ok[k]);
      if (wrong.length) mmsae.say(`Left out: ${wrong.map((k) => `${k} “${said[k].plot ?? said[k]}”`).join(", ")} of the address ${wrong.length > 1 ? "are" : "is"} nothing here.`);
      return { ...said, filter: ok.filter ? said.filter : "all", order: ok.order ? said.order : "", area: ok.area ? said.area : null };
    };
    let [dimmed, later] = [null, 0];
    const nothing = () => {
      if (view.area) return "No latent lies in the chosen area. Click beside it to choose all again.";
      if (view.query && view.filter === "all") return `No latent has “${view.query}” in its name${panel.meta.captions ? ", or in the captions" : ""}${panel.lifted ? " or labels" : ""} that it is largest on.${panel.meta.vectors ? ` “like ${view.query}” looks for vectors that are near.` : ""}`;
      if (view.filter === "starred" && !view.query) return "No bookmarks yet: the star on a latent, or the key b on its page, sets one.";
      return "No latent is in this filter.";
    };

    const heads = () => {
      const sortable = (id, title, help) => h("button.sort", { type: "button", title: help, "aria-pressed": order() === id, onclick: () => reorder(id, order() === id && !view.up) }, title, order() === id ? (view.up ? " ↑" : " ↓") : "");
      heading.replaceChildren(h("span"), h("span.which", {}, sortable("name", "latent", "by name")), ...(images ? [h("span.thumbs")] : []), ...columns.map((c) => h("span.cell", {}, sortable(c.id, c.title, c.help))));
      const template = `26px minmax(150px,1.6fr) ${images ? "228px " : ""}${columns.map((c) => (c.id.endsWith("density") || c.id === "purity" ? "minmax(92px,1fr)" : "minmax(74px,.7fr)")).join(" ")}`;
      holder.style.setProperty("--columns", template);
      holder.style.setProperty("--least", table() ? `${220 + (images ? 240 : 0) + 92 * columns.length}px` : "0"); // then it scrolls
      heading.hidden = !table();
    };
    const show = () => {
      heads();
      const fresh = makeList();
      list.replaceWith(fresh);
      list = fresh;
      choose();
    };
    const sorts = h("select", { "aria-label": "order", onchange: (e) => reorder(e.target.value) },
      [["relevance", "relevance"], ["interesting", "most telling"], ["density", "most frequent"], ["index", "number"], ["name", "name"], ...columns.map((c) => [c.id, c.title])].map(([id, text]) => h("option", { value: id }, text)));
    const direction = h("button.small", { type: "button", title: "Turn the order around", "aria-label": "turn the order around", onclick: () => go({ up: !view.up }) });

    const chips = h("div.chips", { role: "group", "aria-label": "filters" }, FILTERS.filter(([id]) => panel.meta.modalities.length > 1 || !["shared", "image", "text", "disagree"].includes(id)).map(([id, text, help, test]) => {
      let n = 0;
      for (let j = 0; j < panel.size; j++) n += test(panel, j);
      return h("button.chip", { type: "button", title: help, "aria-pressed": false, "data-filter": id, onclick: () => go({ filter: id }) }, text, h("small", {}, n.toLocaleString("en")));
    }));

    const tones = ["--dead", "--image", "--text", "--both"];
    const describe = (j) => `${panel.name(j) ?? mmsae.wordsOf(panel, j)}  #${j}`;
    const pick = (j) => (location.hash = panel.link(j));
    const plots = new Map();
    const plot = (id, title, help, options) => {
      const s = mmsae.scatter({ ...options, kind: panel.kind, tones, dim: (j) => dimmed && !dimmed.has(j), label: title, onpick: pick, onbrush: (box) => go({ area: box && { plot: id, box } }) });
      s.describe = describe;
      plots.set(id, s);
      return h("figure.plot", {}, h("figcaption", { title: help }, h("b", {}, title), h("span.hint", {}, help)), s);
    };
    const spread = (m) => plot(m, `Frequency and strength, ${m}s`, "drag to choose", {
      x: panel.columns[`${m}.density`].map((d) => (d > 0 ? d : NaN)), y: panel.columns[`${m}.mean`].map(Math.abs), axes: { x: { log: true, label: `share of ${m}s on which it fires` }, y: { log: true, label: "mean value" } } });
    const figures = [spread(first)];
    if (panel.columns.x) figures.push(plot("map", "Map", panel.meta.layout === "tsne" ? "atoms that are alike lie together (t-SNE)" : `atoms by ${panel.meta.layout.toUpperCase()}`, { x: panel.columns.x, y: panel.columns.y, axes: null }));
    else if (panel.meta.modalities[1]) figures.push(spread(panel.meta.modalities[1]));

    const beside = mmsae.site.panels.find((p) => p.control);
    if (beside && !panel.meta.control)
      mmsae.panel(beside.id).then((other) => {
        const [x, y] = [`${first}.density`, `${first}.mean`].map((c) => other.columns[c]);
        plots.get(first).beneath(Array.from(x.keys()).filter((j) => x[j] > 0 && y[j]).map((j) => [Math.log10(x[j]), Math.log10(Math.abs(y[j]))]));
        legend.append(h("span.k0", { title: "latents of an SAE with random weights on the same samples: what chance looks like" }, h("i"), `${other.meta.title}: random weights`));
      });
    const legend = h("div.legend", {}, panel.meta.modalities.length > 1 && [3, 1, 2].map((k) => h(`span.k${k}`, {}, h("i"), mmsae.KINDS[k])));
    const modes = mmsae.segmented([["cards", "Cards"], ["table", "Table"]], mode, (v) => { mode = v; mmsae.notes.write("mmsae:mode", v); show(); }, "how latents are listed");
    view = known(view);
    heads();
    holder.append(heading, list);
    mmsae.listMove = (by, rows) => list.move(by, rows);
    const aside = h("aside.plots", {}, mmsae.controlNote(panel), h("button.small.unfold", { type: "button", "aria-expanded": false, onclick: (e) => e.currentTarget.setAttribute("aria-expanded", aside.classList.toggle("open")) }, "Plots"), h("div.figures", {}, figures), legend);
    const root = h("div.overview", {}, h("h1.unseen", {}, "Latents"), aside, h("section.results", {}, chips, h("div.tools", {}, counts, samples, h("span.grow"), h("label.hint", {}, "order ", sorts), direction, modes), none, holder));
    if (panel.meta.vectors && !panel.vectors) mmsae.load(`${panel.id}/vectors`).then((v) => (panel.vectors = v));
    requestAnimationFrame(async () => {
      if (/^like /i.test(view.query) && panel.meta.vectors) panel.vectors = await mmsae.load(`${panel.id}/vectors`);
      choose();
      if (panel.seen?.address === panel.listLink(view)) list.scrollTop = panel.seen.scroll;
      setTimeout(() => {
        const { done, ready } = mmsae.index(panel);
        if (!done) ready.then(() => root.isConnected && view.query && choose()); // by relevance now
      }, view.query ? 100 : 1500); // pictures first
    });
    root.update = (at) => {
      view = known(at);
      heads();
      choose();
    };
    root.leave = () => (panel.seen = { address: panel.listLink(view), scroll: list.scrollTop });
    return root;
  };
})();
