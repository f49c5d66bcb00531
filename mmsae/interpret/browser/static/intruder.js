/* A test that measures interpretability with a person: which of six samples does the latent not fire on? */
"use strict";

(() => {
  const { h } = mmsae;
  const SHOWN = 6;

  /** Share, and Wilson's interval of 95 %. */
  mmsae.wilson = (hits, n) => {
    if (!n) return [NaN, NaN, NaN];
    const [p, z] = [hits / n, 1.959964];
    const mid = (p + (z * z) / (2 * n)) / (1 + (z * z) / n);
    const half = (z / (1 + (z * z) / n)) * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n));
    return [p, hits ? mid - half : 0, hits < n ? mid + half : 1];
  };

  mmsae.pages.intruder = async () => {
    const panels = await Promise.all(mmsae.site.panels.map((p) => mmsae.panel(p.id)));
    const main = panels[0];
    const kinds = main.meta.modalities;
    const start = h("form.start", {}, h("label", {}, "seed ", h("input", { name: "seed", type: "number", value: 1, min: 0 })), h("label", {}, "trials ", h("input", { name: "trials", type: "number", value: 20, min: 1, max: 500 })),
      h("label", {}, "samples ", h("select", { name: "modality" }, kinds.map((m) => h("option", { value: m }, `${m}s`)))), h("label", {}, "which ", h("select", { name: "which" }, [["all", "any living latent"], ["named", "named latents"], ["starred", "bookmarked latents"]].map(([v, t]) => h("option", { value: v }, t)))),
      h("button.primary", {}, "Start"));
    const stage = h("section.stage");
    const root = h("div.page", {}, h("h1", {}, "Intruder"), h("p", {}, `Five samples are from one latent, drawn from all its strengths; the sixth is one on which it is silent. Find it, by pointing or with the keys 1 to ${SHOWN}. No name is shown. `, panels.length > 1 && "Latents of the controls and of the second SAE are mixed in, and not told apart before the end. ", `Chance is ${mmsae.percent(1 / SHOWN)}.`), start, stage);
    start.addEventListener("submit", (event) => {
      event.preventDefault();
      const of = new FormData(start);
      run({ panels, seed: +of.get("seed"), trials: +of.get("trials"), modality: of.get("modality"), which: of.get("which") }, stage);
    });
    return root;
  };

  async function draw(panels, random, modality, which) {
    for (let tries = 0; tries < 400; tries++) {
      const panel = panels[Math.floor(random() * panels.length)];
      const j = Math.floor(random() * panel.size);
      const wanted = which === "named" ? panel.meta.control || panel.name(j) : which === "starred" ? mmsae.notes.starred(panel, j) : true;
      if (!wanted || !(panel.columns[`${modality}.n`]?.[j] > 0)) continue;
      const [on] = await panel.list(j, modality);
      const record = (await panel.latent(j))[modality];
      const strata = record.quantiles.filter((q) => q.length);
      const own = [];
      for (const q of strata.concat([record.top])) {
        const pick = q[Math.floor(random() * q.length)]?.item;
        if (pick !== undefined && !own.includes(pick)) own.push(pick);
      }
      for (const e of record.top) if (!own.includes(e.item)) own.push(e.item);
      if (own.length < SHOWN - 1) continue;
      const fires = new Set(on);
      [...record.top, ...record.quantiles.flat()].forEach((e) => fires.add(e.item));
      let odd = -1;
      for (let t = 0; t < 200 && odd < 0; t++) {
        const e = Math.floor(random() * panel.meta.shown);
        if (!fires.has(e) && !(await silentIsCut(panel, e, j, modality))) odd = e;
      }
      if (odd < 0) continue;
      const place = Math.floor(random() * SHOWN);
      const items = own.slice(0, SHOWN - 1);
      items.splice(place, 0, odd);
      return { panel, j, items, place };
    }
    return null;
  }

  /** A sample of which as many latents are kept as are ever kept may fire weakly where its list says nothing. */
  const silentIsCut = async (panel, e, j, modality) => (await panel.sample(e)).codes[modality].latents.length >= panel.meta.codes;

  async function run({ panels, seed, trials, modality, which }, stage) {
    const random = mmsae.random(seed);
    const results = [];
    const next = async () => {
      if (results.length >= trials) return finish();
      const trial = await draw(panels, random, modality, which);
      if (!trial) {
        stage.replaceChildren(mmsae.empty("No latent has five samples of its own and one on which it is surely silent."));
        return;
      }
      const shownAt = performance.now();
      const answer = (k) => {
        removeEventListener("keydown", key);
        results.push({ ...trial, answer: k, right: k === trial.place, ms: Math.round(performance.now() - shownAt), uids: frames.map((f) => f.uid) });
        next();
      };
      const key = (event) => {
        if (!stage.isConnected) removeEventListener("keydown", key);
        else if (+event.key >= 1 && +event.key <= SHOWN) answer(+event.key - 1);
      };
      const frames = trial.items.map((e, k) => {
        const text = h("span.caption");
        const asText = modality === "text" || !trial.panel.meta.images;
        const frame = h("button.choice", { type: "button", onclick: () => answer(k) }, h("kbd", {}, k + 1), !asText && mmsae.picture(trial.panel, { item: e }, { link: false, caption: false, plain: true }), asText && text);
        trial.panel.sample(e).then((s) => {
          frame.uid = s.uid;
          text.textContent = s.caption || s.key;
        });
        return frame;
      });
      addEventListener("keydown", key);
      stage.replaceChildren(h("p.hint", {}, `Trial ${results.length + 1} of ${trials}: which one does not belong?`), h("div.choices" + (modality === "text" ? ".words" : ""), {}, frames), h("button.small", { type: "button", onclick: () => { removeEventListener("keydown", key); finish(); } }, "Stop here"));
    };

    const finish = () => {
      const rows = panels.map((panel) => {
        const own = results.filter((r) => r.panel === panel);
        const hits = own.filter((r) => r.right).length;
        const [share, low, high] = mmsae.wilson(hits, own.length);
        return h("tr", {}, h("th", {}, panel.meta.title), h("td", {}, own.length), h("td", {}, hits), h("td", {}, mmsae.percent(share)), h("td", {}, own.length ? `${mmsae.percent(low)} to ${mmsae.percent(high)}` : "–"));
      });
      stage.replaceChildren(h("h2", {}, "Result"), h("table", {}, h("thead", {}, h("tr", {}, ["latents of", "trials", "found", "share", "95 % interval"].map((t) => h("th", {}, t)))), h("tbody", {}, rows)), h("p.hint", {}, `Chance is ${mmsae.percent(1 / SHOWN)}.`), h("button.primary", { type: "button", onclick: () => mmsae.save("intruder.csv", csv(), "text/csv") }, "Save intruder.csv"),
        h("div.review", {}, results.map((r) => h("span" + (r.right ? ".right" : ".wrong"), {}, mmsae.latentLink(r.panel, r.j), r.right ? "found" : "missed"))));
    };
    const quote = (v) => (/[",\n]/.test(v) ? `"${`${v}`.replaceAll('"', '""')}"` : `${v}`);
    const csv = () => ["trial,panel,control,sae,latent,name,modality,items,intruder,answer,right,ms,seed", ...results.map((r, i) => [i, r.panel.id, r.panel.meta.control, r.panel.meta.sae, r.j, r.panel.name(r.j) ?? "", modality, r.uids.join(" "), r.place, r.answer, r.right, r.ms, seed].map(quote).join(","))].join("\n") + "\n";
    mmsae.intruderCsv = csv;
    next();
  }
})();
