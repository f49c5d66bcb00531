/* Two SAEs: which latents are in both, which are in one only. */
"use strict";

(() => {
  const { h } = mmsae;

  /** The latent of the second SAE that is nearest to one of the first, as a link. */
  mmsae.counterpart = async (j) => {
    const [data, other] = await Promise.all([mmsae.load("compare"), mmsae.panel("other")]);
    const to = (data.main.cosine ?? data.main.correlation)?.to;
    const k = to && mmsae.array(to)[j];
    return k >= 0 && k < other.size ? mmsae.latentLink(other, k) : null;
  };

  mmsae.pages.compare = async () => {
    const [data, a, b] = await Promise.all([mmsae.load("compare"), mmsae.panel("main"), mmsae.panel("other")]);
    const ways = ["correlation", "cosine"].filter((w) => data.main[w]);
    if (!ways.length) return mmsae.empty("The two SAEs have no samples in common and no atoms of equal width: nothing can be compared.");
    let [way, threshold, side] = [ways[0], 0.7, "matched"];
    const counts = h("div.tiles");
    const list = mmsae.virtual({ make: (i) => row(shown[i]), height: 120, label: "pairs of latents" });
    let shown = [];

    const split = () => {
      const [to, back] = [data.main[way], data.other[way]].map((d) => mmsae.array(d.to));
      const [value, valueBack] = [data.main[way], data.other[way]].map((d) => mmsae.array(d.value));
      const out = { matched: [], died: [], born: [] };
      const taken = new Set();
      for (let j = 0; j < a.size; j++) {
        if (!a.kind[j]) continue;
        const k = to[j];
        if (k < b.size && k >= 0 && back[k] === j && value[j] >= threshold) {
          out.matched.push([j, k, value[j]]);
          taken.add(k);
        } else out.died.push([j, k < b.size ? k : -1, value[j]]);
      }
      for (let k = 0; k < b.size; k++) if (b.kind[k] && !taken.has(k)) out.born.push([back[k] < a.size ? back[k] : -1, k, valueBack[k]]);
      for (const x of Object.values(out)) x.sort((p, q) => q[2] - p[2]);
      return out;
    };
    const cell = (panel, j, faint) => (j < 0 ? h("div.half", {}, mmsae.empty("none")) : h("div.half" + (faint ? ".faint" : ""), {}, mmsae.latentLink(panel, j), h("span.thumbs", {}, (panel.top(j, "image").length ? panel.top(j, "image") : panel.top(j, "text")).slice(0, 6).map((e) => mmsae.picture(panel, { item: e }, { link: false, plain: true })))));
    const row = ([j, k, v]) => h("div.pairing", {}, cell(a, j, side === "born"), h("b.score", {}, mmsae.number(v, 2)), cell(b, k, side === "died"));
    const update = () => {
      const found = split();
      const of = { matched: `mutual nearest, ${way} of ${threshold} or more`, died: "only in the first SAE; beside its nearest in the second", born: "only in the second SAE; beside its nearest in the first" };
      const total = { matched: a.meta.living, died: a.meta.living, born: b.meta.living };
      counts.replaceChildren(...Object.keys(found).map((s) => h("button.tile-button", { type: "button", "aria-pressed": s === side, onclick: () => { side = s; update(); } }, h("b", {}, found[s].length.toLocaleString("en")), h("span", {}, s, h("small", {}, ` · ${mmsae.percent(found[s].length / Math.max(total[s], 1))} of the living`)), h("small", {}, of[s]))));
      shown = found[side];
      list.fill(shown.length);
    };
    const slider = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: threshold, "aria-label": "threshold", oninput: (e) => { threshold = +e.target.value; label.textContent = threshold.toFixed(2); update(); } });
    const label = h("b", {}, threshold.toFixed(2));
    const root = h("div.page.fill", {}, h("h1", {}, "Two SAEs"), h("p.hint", {}, data.main.correlation ? `Activations are compared on ${mmsae.count(data.items, "sample")} in common.` : "They have too few samples in common to compare activations."),
      h("div.tools", {}, mmsae.segmented(ways.map((w) => [w, w === "cosine" ? "cosine of atoms" : "correlation of activations"]), way, (w) => { way = w; update(); }, "compared by"), h("label.hint", {}, "threshold ", slider, label)), counts, h("div.pairing.heading", {}, h("b", {}, a.meta.title), h("span"), h("b", {}, b.meta.title)), list);
    requestAnimationFrame(update);
    return root;
  };
})();
