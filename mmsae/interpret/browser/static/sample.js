/* One sample: which latents fire on its image, its text or both, where, and what is like it. */
"use strict";

(() => {
  const { h } = mmsae;

  mmsae.pages.sample = async (panel, { uid }) => {
    const e = await panel.find(uid);
    if (e < 0) return mmsae.empty(`Sample ${uid} is not in this browser: it shows the ${panel.meta.shown.toLocaleString("en")} samples that some latent is largest on.`);
    const [s, maps] = await Promise.all([panel.sample(e), panel.maps(e)]);
    const { modalities, images } = panel.meta;
    const shape = s.grid.image;
    const stepOf = (heat) => mmsae.heatSteps(heat, shape).reduce((best, x, k, all) => (x > all[best] ? k : best), 0);
    const picture = images && modalities.includes("image") && mmsae.picture(panel, { item: e, modality: "image" }, { link: false });
    if (picture) picture.outlined = true;
    const title = s.caption || s.label || s.key;
    const said = h("h1.caption", {}, title);
    const where = h("p.hint", { role: "status" });

    const strength = Object.fromEntries(modalities.map((m) => [m, new Map(s.codes[m].latents.map(([j, share, value]) => [j, [share, value]]))]));
    const all = [...new Set(modalities.flatMap((m) => [...strength[m].keys()]))];
    const size = (j) => Math.max(...modalities.map((m) => Math.abs(strength[m].get(j)?.[0] ?? 0)));
    all.sort((a, b) => size(b) - size(a));
    const groups = modalities.length > 1
      ? [["Image and text", "fire in both", all.filter((j) => strength.image.has(j) && strength.text.has(j))], ["Image only", "the caption does not say it", all.filter((j) => !strength.text.has(j))], ["Text only", "the image does not show it", all.filter((j) => !strength.image.has(j))]]
      : [["Latents", "", all]];

    const found = new Map(); // areas of latents that have a map on the image
    if (shape?.rows) for (const [j, heat] of maps.image) found.set(j, mmsae.areas(heat, shape, stepOf(heat)).areas);
    const areasOf = (j) => {
      const step = shape.steps?.length > 1 ? ` at step ${shape.steps[stepOf(maps.image.get(j))]}` : "";
      const share = found.get(j).reduce((sum, a) => sum + a.size, 0) / (shape.rows * shape.cols);
      return found.get(j).length ? `${mmsae.count(found.get(j).length, "area")}${step}, ${mmsae.percent(share)} of what the host sees` : `too small for an area of three patches${step}`;
    };
    const show = (j) => {
      const [seen, read] = [maps.image?.get(j), maps.text?.get(j)];
      if (picture) {
        picture.example.heat = seen ?? null;
        mmsae.drawHeat(panel, picture, seen && shape.rows ? stepOf(seen) : 0);
      }
      const tokens = read && mmsae.tokenHeat(read, s.tokens, panel.meta.grid.text.places);
      said.replaceChildren(...(tokens && s.tokens ? [tokens] : [title, tokens || ""]));
      where.textContent = `${panel.name(j) ?? mmsae.wordsOf(panel, j)} #${j}: ${found.has(j) ? areasOf(j) : seen || read ? "marked in the text" : panel.meta.maps ? `maps are kept of the ${panel.meta.maps} strongest latents of a sample, and this is none of them` : "this SAE reads the whole sample at once, there is no map"}.`;
      root.querySelectorAll(".where").forEach((b) => b.setAttribute("aria-pressed", +b.dataset.latent === j));
    };

    const spot = (j) => {
      if (!found.has(j)) return null;
      const small = mmsae.picture(panel, { item: e, modality: "image", heat: maps.image.get(j) }, { link: false, caption: false });
      small.step = stepOf(maps.image.get(j));
      return h("button.where", { type: "button", title: `Where #${j} fires: ${areasOf(j)}`, "aria-label": `show where #${j} fires`, "aria-pressed": false, "data-latent": j, onclick: () => show(j) }, small);
    };
    const mapped = picture && found.size > 0;
    const line = (j) => h("li", { onmouseenter: () => show(j), onfocusin: () => show(j) }, mapped && (spot(j) ?? h("span")), h("span.what", {}, mmsae.latentLink(panel, j), found.get(j)?.length > 0 && h("small", {}, mmsae.count(found.get(j).length, "area"))), h("span.pair", {}, modalities.filter((m) => strength[m].has(j)).map((m) => mmsae.bar(Math.abs(strength[m].get(j)[0]), mmsae.number(strength[m].get(j)[1], 2), `.${m}`))));
    const near = modalities.filter((m) => s.codes[m].near.length).map((m) => h("section", {}, h("h2", {}, modalities.length > 1 ? `Nearest by ${m} codes` : "Nearest samples", h("small", {}, "cosine of codes, rare latents count more")), h("div.samples", {}, s.codes[m].near.map(([to, cosine]) => mmsae.sampleCard(panel, to, mmsae.number(cosine, 2))))));
    const redraw = () => root.querySelectorAll(".picture").forEach((p) => mmsae.drawHeat(panel, p));
    const facts = [["label", s.label && h("a", { href: panel.samplesLink(s.label), title: "samples with this label" }, s.label)], ["uid", s.uid], ["shard", s.shard], ["key", s.key]];
    const root = h("div.page.one", {}, mmsae.controlNote(panel), h("div.columns.sample-page", {},
      h("aside.portrait", {}, h("div.pinned", {}, picture, where), said, h("div.tools", {}, mapped && mmsae.heatChoice(redraw), mmsae.linkButton()), h("dl", {}, facts.filter(([, v]) => v).map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]))),
      h("div.main", {}, h("p.hint", {}, `Bars are shares of each latent’s largest value in the data; at most ${panel.meta.codes} latents are kept of a sample and modality. ${panel.meta.maps ? "Point at one to see where it fires." : ""}`), h("div.thirds", {}, groups.map(([title, help, list]) => h("section", {}, h("h2", {}, title, h("small", {}, `${list.length}${help && ` · ${help}`}`)), list.length ? h("ul.bars.pairs" + (mapped ? ".mapped" : ""), {}, list.map(line)) : mmsae.empty("None.")))), near)));
    root.title = title;
    if (all.length) show(all[0]);
    return root;
  };
})();
