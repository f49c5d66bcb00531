/* One sample: which latents fire on its image, its text or both, where, and what is like it. */
"use strict";

(() => {
  const { h } = mmsae;

  mmsae.pages.sample = async (panel, { uid }) => {
    const e = await panel.find(uid);
    if (e < 0) return mmsae.empty(`Sample ${uid} is not in this browser: it shows the ${panel.meta.shown.toLocaleString("en")} samples that some latent is largest on.`);
    const s = await panel.sample(e);
    const { modalities, images } = panel.meta;
    const example = { item: e, modality: "image", heat: null };
    const picture = images && mmsae.picture(panel, example, { link: false });
    const where = h("p.hint", {}, images ? "Point at a latent to see where it fires." : "");

    const strength = Object.fromEntries(modalities.map((m) => [m, new Map(s.codes[m].latents.map(([j, share, value]) => [j, [share, value]]))]));
    const all = [...new Set(modalities.flatMap((m) => [...strength[m].keys()]))];
    const size = (j) => Math.max(...modalities.map((m) => Math.abs(strength[m].get(j)?.[0] ?? 0)));
    all.sort((a, b) => size(b) - size(a));
    const groups = modalities.length > 1
      ? [["Image and text", "fire in both", all.filter((j) => strength.image.has(j) && strength.text.has(j))], ["Image only", "the caption does not say it", all.filter((j) => !strength.text.has(j))], ["Text only", "the image does not show it", all.filter((j) => !strength.image.has(j))]]
      : [["Latents", "", all]];

    const show = async (j) => {
      if (!picture) return;
      const record = await panel.latent(j);
      const m = modalities.includes("image") ? "image" : modalities[0];
      const hit = [...record[m].top, ...record[m].quantiles.flat()].find((x) => x.item === e);
      example.heat = hit?.heat ?? null;
      mmsae.drawHeat(panel, picture);
      where.textContent = example.heat ? `Where ${panel.name(j) ?? `#${j}`} fires.` : panel.meta.grid[m].rows ? `#${j}: a map is kept of the latent’s own examples only, and this sample is none of them.` : "This SAE reads the whole image at once: there is no map.";
    };
    const line = (j) => h("li", { onmouseenter: () => show(j), onfocusin: () => show(j) }, mmsae.latentLink(panel, j), h("span.pair", {}, modalities.filter((m) => strength[m].has(j)).map((m) => mmsae.bar(Math.abs(strength[m].get(j)[0]), mmsae.number(strength[m].get(j)[1], 2), `.${m}`))));
    const near = modalities.filter((m) => s.codes[m].near.length).map((m) => h("section", {}, h("h2", {}, `Nearest by ${m} codes`, h("small", {}, "cosine of codes, rare latents count more")), h("div.samples", {}, s.codes[m].near.map(([to, cosine]) => mmsae.sampleCard(panel, to, mmsae.number(cosine, 2))))));
    return h("div.page.one", {}, mmsae.controlNote(panel), h("div.columns.sample-page", {},
      h("aside.portrait", {}, picture, where, h("p.caption", {}, s.caption || h("span.hint", {}, "no caption")), h("dl", {}, [["label", s.label], ["uid", s.uid], ["shard", s.shard], ["key", s.key]].filter(([, v]) => v).map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]))),
      h("div.main", {}, h("p.hint", {}, `Bars are shares of each latent’s largest value in the data; at most ${panel.meta.codes} latents are kept of a sample and modality.`), h("div.thirds", {}, groups.map(([title, help, list]) => h("section", {}, h("h2", {}, title, h("small", {}, `${list.length}${help && ` · ${help}`}`)), h("ul.bars.pairs", {}, list.slice(0, 40).map(line))))), near)));
  };
})();
