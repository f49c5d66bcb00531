/* All samples that are shown, found by the words of their captions, labels and keys. */
"use strict";

(() => {
  const { h } = mmsae;

  /** Samples whose captions, labels or keys have some words; all samples for none. */
  mmsae.pages.samples = async (panel, { query }) => {
    const { uid, caption, key, label } = await mmsae.load(`${panel.id}/samples`);
    const { labels, shown, captions } = panel.meta;
    const number = label && mmsae.array(label);
    panel.said ??= caption.map((c, e) => `${c}\n${labels[number?.[e]] ?? ""}`.toLowerCase());
    let found = [];
    const list = mmsae.virtual({ make: (i) => h("div.slot", {}, mmsae.sampleCard(panel, found[i])), ...mmsae.cardSize(panel, 0), label: "samples" });
    const count = h("p.hint", { role: "status" });
    const fill = (text) => {
      const words = text.toLowerCase().split(/\s+/).filter(Boolean);
      const own = labels.indexOf(text); // a label as it is: those with it, and not those with one that begins so
      const test = number && own >= 0 ? (e) => number[e] === own || caption[e].includes(text) : (e) => words.every((w) => panel.said[e].includes(w)) || key[e].includes(text) || uid[e] === text;
      found = uid.map((_, e) => e).filter(test);
      count.textContent = `${mmsae.count(found.length, "sample")} of the ${shown.toLocaleString("en")} that this browser shows${found.length ? "" : ", of some of the data: those that some latent is largest on, or drawn from its other values"}.`;
      list.fill(found.length);
    };
    const input = h("input.query", { type: "search", value: query, placeholder: [captions && "words of captions", number && "labels", "keys", "uids"].filter(Boolean).join(", "), "aria-label": "search samples", spellcheck: false, autocomplete: "off" });
    input.addEventListener("input", () => {
      clearTimeout(input.later);
      input.later = setTimeout(() => {
        mmsae.typed(input, panel.samplesLink(input.value.trim()));
      }, 90);
    });
    const root = h("div.page.fill", {}, mmsae.controlNote(panel), h("h1", {}, "Samples"), h("div.tools", {}, input), count, list);
    root.update = (at) => {
      if (document.activeElement !== input) input.value = at.query;
      fill(at.query);
    };
    requestAnimationFrame(() => fill(query));
    mmsae.listMove = (by, rows) => list.move(by, rows);
    return root;
  };

  /** How large cards of samples are in a list; with some lines beneath. */
  mmsae.cardSize = (panel, notes = 1) => (panel.meta.images ? { height: (w) => Math.round(w + 40 + 20 * notes), least: 150 } : { height: 100, least: 180 });

  /** A sample in a list; over its image the map of the first of some latents that there is one of. */
  mmsae.sampleCard = (panel, e, note, where = []) => {
    const text = h("span.caption");
    const image = panel.meta.images && mmsae.picture(panel, { item: e, modality: "image" }, { link: false, caption: false });
    const card = h("a.sample", {}, image, text, note && h("small", {}, note));
    mmsae.seen(card, () => {
      panel.sample(e).then((s) => {
        card.href = panel.sampleLink(s.uid);
        text.textContent = s.caption || s.label || s.key;
        text.title = s.caption;
      });
      if (image && where.length)
        panel.maps(e).then((maps) => {
          image.example.heat = where.map((j) => maps.image?.get(j)).find(Boolean);
          image.outlined = true;
          mmsae.drawHeat(panel, image); // where the image is there; else it does so itself
        });
    });
    return card;
  };
})();
