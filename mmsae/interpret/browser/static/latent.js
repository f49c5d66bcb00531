/* One latent: what it fires on in each modality, how strongly, what else is like it, and what it is called. */
"use strict";

(() => {
  const { h } = mmsae;

  mmsae.pages.latent = async (panel, { latent: j }) => {
    if (!(j >= 0 && j < panel.size)) return mmsae.empty(`There is no latent ${j}: this SAE has ${panel.size.toLocaleString("en")}, from 0.`);
    const record = await panel.latent(j);
    const { modalities, captions, images } = panel.meta;
    const twin = panel.columns.match && (await mmsae.counterpart(j));
    const root = h("div.page.one");
    const redraw = () => root.querySelectorAll(".picture").forEach((p) => mmsae.drawHeat(panel, p));
    const hasMaps = modalities.some((m) => panel.meta.grid[m].rows && record[m].top.some((e) => e.heat));

    root.append(mmsae.controlNote(panel) || "", head(panel, j, record, root), h("div.columns", {},
      h("div.main", {},
        hasMaps && images && h("div.tools", {}, h("span.hint", {}, "where it fires"), mmsae.heatChoice(redraw),
          h("span.scale", { title: "one scale for all pictures of a latent" }, "0", h("i"), mmsae.number(record[modalities.find((m) => panel.meta.grid[m].rows)].upper, 2)),
          steps(panel, record, root)),
        panel.kind[j] ? h("div.sides" + (modalities.length > 1 ? ".two" : ""), {}, modalities.map((m) => side(panel, record, m, captions, images))) : h("p.warning", {}, h("strong", {}, "Dead. "), `This latent fired on none of the ${panel.meta.n.toLocaleString("en")} samples.`),
        mmsae.strips(panel, j)),
      h("aside.facts", {}, facts(panel, j, record, twin))));
    if (mmsae.site.pages.includes("attributes")) root.querySelector(".facts").append(await mmsae.attributesOf(j));
    root.title = panel.name(j) ?? mmsae.wordsOf(panel, j);
    return root;
  };

  function head(panel, j, record, root) {
    const found = panel.names.get(j);
    const own = mmsae.notes.name(panel, j);
    const like = record.words.length ? record.words.slice(0, 4).map(([w]) => w) : panel.labelsOf(j);
    const name = h("input.rename", { value: panel.name(j) ?? "", title: "Type to rename (n)", placeholder: ["unnamed", like.join(", ")].filter(Boolean).join(" · "), "aria-label": "name of the latent", spellcheck: false,
      onchange: (e) => { mmsae.notes.rename(panel, j, e.target.value); mmsae.say("Kept in this browser; save names.json under About to use it elsewhere."); },
      onkeydown: (e) => e.key === "Enter" && e.target.blur() });
    const from = own !== undefined ? "your name" : found?.name ? `by ${found.method}${found.by && found.by !== found.method ? `, ${found.by}` : ""}` : found ? `no name held up (${found.method}${found.note ? `: ${found.note}` : ""})` : "nobody named it";
    const figures = found && own === undefined ? ["score", "margin", "z", "auroc"].filter((k) => found[k] !== null).map((k) => h("span", { title: { score: "what the method ranks phrases by", margin: "lead over the runner-up", z: "among the same phrase’s scores over all latents", auroc: "how well the name tells samples on which it fires from others" }[k] }, `${k === "auroc" ? "AUROC" : k} `, h("b", {}, mmsae.number(found[k], 2)))) : [];
    const step = (by) => h("a.step", { href: panel.link((j + by + panel.size) % panel.size), title: by < 0 ? "Previous latent (k)" : "Next latent (j)" }, by < 0 ? "‹" : "›");
    const query = (sign, does) => h("button.small", { type: "button", title: `Add to the query: ${does} this`, onclick: () => mmsae.addToQuery(panel, j, sign) }, sign === "~" ? "& not" : `${sign} ${does}`);
    return h("div.masthead", {}, h("h1.unseen", {}, `${panel.name(j) ?? mmsae.wordsOf(panel, j)}, latent ${j}`), h("div.title", {}, step(-1), step(1), h("span.number", {}, `#${j}`), name, mmsae.star(panel, j)),
      h("p.meta", {}, mmsae.kind(panel, j), h("span", {}, from), figures, h("span.actions", {}, panel.meta.vectors && h("a.button", { href: panel.searchLink(`like #${j}`), title: "Latents nearest to this one; in the search also with + and -, and words" }, "like this"), query("&", "and"), query("|", "or"), query("~", "and not"), mmsae.linkButton(), h("button.small", { type: "button", onclick: () => mmsae.exportPanel(panel, record, "svg"), title: "Save as a drawing" }, "SVG"), h("button.small", { type: "button", onclick: () => mmsae.exportPanel(panel, record, "png"), title: "Save as a picture" }, "PNG"))));
  }

  function side(panel, record, m, captions, images) {
    const data = record[m];
    const isText = m === "text";
    const n = panel.columns[`${m}.n`][record.latent];
    const titled = h("h2", {}, isText ? "Texts" : "Images", h("small", {}, n ? `fires on ${mmsae.count(n, m)} · ${mmsae.percent(panel.columns[`${m}.density`][record.latent])}` : `never fires on ${m}s`));
    if (!data.top.length && isText && captions && record.image?.top.length)
      return h(`section.side.${m}`, {}, titled, h("h3", {}, "Captions of its images"), texts(panel, record.image.top, "image", images));
    if (!data.top.length) return h(`section.side.${m}`, {}, titled, mmsae.empty(n ? "Only near-duplicates of other samples." : "Nothing to show."));
    const show = isText || !images ? (list) => texts(panel, list, m, images) : (list) => h("div.grid", {}, list.map((e) => withValue(panel, e)));
    const parts = data.quantiles.map((list, q) => [list, q]).filter(([list]) => list.length);
    return h(`section.side.${m}`, {}, titled, h("h3", {}, isText ? "Strongest captions" : "Strongest images"), show(data.top),
      parts.length > 0 && h("h3", { title: "samples drawn equally from equal parts of all values: what it fires on when it fires weakly says more about a latent than its best" }, `From strong to weak, ${mmsae.count(parts.length, "equal part")} of its values`),
      parts.length > 0 && (isText || !images ? parts.map(([list, q]) => h("div.quantile", {}, h("span.q", {}, q + 1), show(list))) : h("div.quantiles", {}, parts.map(([list, q]) => h("div.quantile", {}, h("span.q", { title: `part ${q + 1} of ${data.quantiles.length}` }, q + 1), show(list))))),
    );
  }

  const withValue = (panel, e) => h("figure.shot", {}, mmsae.picture(panel, e), h("figcaption", {}, mmsae.number(e.value, 2)));

  function texts(panel, list, m, images) {
    const most = Math.max(...list.map((e) => Math.abs(e.value)), 1e-9);
    const seen = new Map();
    const out = h("ol.texts");
    list.forEach((e) => {
      const words = h("a.words");
      const line = h("li", {}, images && mmsae.picture(panel, { ...e, heat: m === "image" ? e.heat : null }, { caption: false }), words, mmsae.bar(Math.abs(e.value) / most, mmsae.number(e.value, 2), `.${m}`));
      out.append(line);
      mmsae.seen(line, () => panel.sample(e.item).then((s) => {
        words.href = panel.sampleLink(s.uid);
        const before = seen.get(s.caption);
        if (before && s.caption) {
          line.remove();
          const times = before.querySelector(".times") ?? before.querySelector(".words").appendChild(h("small.times", { title: "samples with this caption" }));
          times.textContent = ` ×${(times.n = (times.n ?? 1) + 1)}`;
          return;
        }
        seen.set(s.caption, line);
        const places = panel.meta.grid[m].places;
        const read = m === "text" && e.heat && places > 1 && mmsae.tokenHeat(e.heat, s.tokens, places);
        if (!(read && s.tokens)) words.append(s.caption || `${s.label || "no caption"} (${s.key})`);
        if (read) words.append(read);
      }));
    });
    return out;
  }

  /** Denoising steps: how strongly it fires at each, and which one the maps show. */
  function steps(panel, record, root) {
    const shape = panel.meta.grid.image;
    if (!shape?.steps?.length) return null;
    const mean = new Float32Array(shape.steps.length);
    record.image.top.forEach((e) => e.heat && mmsae.heatSteps(e.heat, shape).forEach((x, s) => (mean[s] += x / record.image.top.length)));
    const label = h("b", {}, `step ${shape.steps[0]}`);
    const set = (s) => {
      label.textContent = `step ${shape.steps[s]}`;
      root.querySelectorAll(".picture").forEach((p) => mmsae.drawHeat(panel, p, s));
    };
    return h("span.steps", {}, label, h("span.profile", {}, Array.from(mean, (x, s) => h("button", { type: "button", title: `step ${shape.steps[s]}: ${mmsae.percent(x)} of the largest`, onclick: () => set(s) }, h("i", { style: { height: `${4 + 26 * x}px` } })))));
  }

  function facts(panel, j, record, twin) {
    const { modalities, grid } = panel.meta;
    const out = [];
    const rows = [];
    for (const m of modalities) rows.push([`largest value, ${m}s`, mmsae.number(panel.columns[`${m}.max`][j], 3)], [`mean where it fires, ${m}s`, mmsae.number(panel.columns[`${m}.mean`][j], 3)]);
    if (panel.columns.modality) rows.push(["modality (1 image, 0 text)", mmsae.number(panel.columns.modality[j], 2)], ["agreement of pairs, phi", mmsae.number(panel.columns.agree[j], 2)]);
    out.push(h("dl", {}, rows.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])));
    const unit = (m) => (grid[m].rows ? "patch" : grid[m].places > 1 ? "token" : m);
    for (const m of modalities) if (record[m].rows) out.push(mmsae.histogram(m, record[m].histogram, record[m].rows, unit(m)));
    if (record.scores.length)
      out.push(box("Scores", "beside their chance and 95 % intervals", h("table.scores", {}, h("thead", {}, h("tr", {}, ["scorer", "value", "chance", "n"].map((t) => h("th", {}, t)))), h("tbody", {}, record.scores.map(([scorer, m, control, value, chance, low, high, n]) => h("tr" + (control ? ".dim" : ""), {}, h("th", {}, scorer.replaceAll("_", " "), h("small", {}, ` ${m}${control ? ` (${control})` : ""}`)), h("td", { title: low === null ? "" : `${mmsae.number(low, 2)} to ${mmsae.number(high, 2)}` }, mmsae.number(value, 2), low !== null && h("small", {}, ` ${mmsae.number(low, 2)}–${mmsae.number(high, 2)}`)), h("td", {}, mmsae.number(chance, 2)), h("td", {}, n)))))));
    for (const m of modalities)
      if (record[m].lift.length)
        out.push(box(`Labels, ${m}s`, "share of its labelled samples, and how many times more often than in all", h("ul.bars", {}, record[m].lift.map((x) => h("li", {}, h("a", { href: panel.samplesLink(x.label), title: "samples with this label" }, x.label), mmsae.bar(x.share, `${mmsae.percent(x.share)} · ${mmsae.number(x.lift, 1)}×`, `.${m}`))))));
    if (record.words.length) out.push(box("Words of its captions", "that stand out in the strongest ones", h("p.wordlist", {}, record.words.slice(0, 10).map(([w, n]) => h("a", { href: panel.searchLink(w) }, w, h("small", {}, n))))));
    const near = (title, help, list, say, tone = "") => list?.length && out.push(box(title, help, h("ul.bars", {}, list.slice(0, 8).map(([to, v]) => h("li", {}, mmsae.latentLink(panel, to), mmsae.bar(v, say(v), tone))))));
    if (twin) out.push(box("In the second SAE", "the nearest latent: cosine of atoms, or correlation of activations", h("ul.bars", {}, h("li", {}, twin, mmsae.bar(panel.columns.match[j], mmsae.number(panel.columns.match[j], 2))))));
    near("Like it, by atoms", "cosine of the two atoms", record.near, (v) => mmsae.number(v, 2));
    for (const m of modalities) near(`Fires together, ${m}s`, "Jaccard: share of samples with both among those with either", record.together[m], (v) => mmsae.number(v, 2), `.${m}`);
    near("Bridge to texts", "text latents in captions of its images, weighted by values and the cosine of atoms; shares", record.bridge, (v) => mmsae.percent(v));
    return out;
  }

  const box = (title, help, ...body) => h("section.info", {}, h("h3", { title: help }, title), body);

  /** What a feature draws at each strength, where a run of steering has it. */
  mmsae.strips = (panel, j) => {
    if (panel.id !== "main" || !mmsae.site.strips?.[j]) return null;
    const root = h("section.strips");
    mmsae.site.strips[j].forEach((file) => mmsae.load(file).then((s) => root.append(h("h2", {}, "Steered", h("small", {}, `${s.name} · ${s.unit} · same noise in each row`)), h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, h("th"), s.strengths.map((x) => h("th", {}, x === 0 ? "unsteered" : mmsae.number(x))))), h("tbody", {}, s.rows.map((r) => h("tr" + (r.control ? ".dim" : ""), {}, h("th", {}, r.prompt, r.control ? h("small", {}, "another live feature, as large") : ""), r.images.map((src) => h("td", {}, src && h("img", { src, alt: `${r.prompt}, steered` })))))))))));
    return root;
  };
})();
