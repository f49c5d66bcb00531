/* What this browser is of, what was measured, and files in and out. */
"use strict";

(() => {
  const { h } = mmsae;
  const size = (n) => (n > 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${Math.round(n / 1e3)} kB`);

  mmsae.pages.about = async (panel) => {
    const { meta } = panel;
    const job = Object.entries(meta.job).map(([k, v]) => [k, typeof v === "string" ? v : JSON.stringify(v)]).filter(([, v]) => v && v !== "{}" && v !== "[]");
    const open = async () => {
      try {
        mmsae.say(mmsae.notes.fromNames(panel, await mmsae.pick(".json")));
        mmsae.route();
      } catch (error) {
        mmsae.say(error.message);
      }
    };
    const tiles = [[meta.d_sae, "latents", `${meta.living.toLocaleString("en")} of them fire`], [meta.n, "samples in the data", `${meta.shown.toLocaleString("en")} are shown here`], [meta.named, "names found", `and ${mmsae.notes.renames(panel).size} of yours`], [meta.modalities.join(" and "), "modalities", `${meta.grid[meta.modalities[0]].rows ? `maps of ${meta.grid[meta.modalities[0]].rows} × ${meta.grid[meta.modalities[0]].cols} patches` : "whole items"}`]];
    return h("div.page", {}, mmsae.controlNote(panel), h("h1", {}, "About"), h("div.tiles", {}, tiles.map(([v, t, s]) => h("div.tile-button", {}, h("b", {}, typeof v === "number" ? v.toLocaleString("en") : v), h("span", {}, t), h("small", {}, s)))),
      h("h2", {}, "Your names and bookmarks"), h("p", {}, `Names and bookmarks stay in this web browser, for this SAE. names.json is what mmsae filter, steer and the reports read.`), h("div.tools", {}, h("button.primary", { type: "button", onclick: () => mmsae.save("names.json", mmsae.notes.toNames(panel)) }, "Save names.json"), h("button", { type: "button", onclick: open }, "Open names.json"), h("button", { type: "button", onclick: () => mmsae.save("latents.csv", csv(panel), "text/csv") }, "Save the table as CSV")),
      meta.scores.length > 0 && h("section", {}, h("h2", {}, "Scores"), h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, ["scorer", "modality", "of", "mean", "95 % interval", "chance", "above chance", "latents"].map((t) => h("th", {}, t)))), h("tbody", {}, meta.scores.map(([scorer, m, control, value, chance, low, high, above, n]) => h("tr" + (control ? ".dim" : ""), {}, h("th", {}, scorer.replaceAll("_", " ")), h("td", {}, m), h("td", {}, { "": "the SAE’s latents", random: "random weights", shuffled: "names of others", dealt: "items dealt at random" }[control] ?? control), h("td", {}, mmsae.number(value, 3)), h("td", {}, low === null ? "–" : `${mmsae.number(low, 3)} to ${mmsae.number(high, 3)}`), h("td", {}, mmsae.number(chance, 3)), h("td", {}, mmsae.percent(above)), h("td", {}, n.toLocaleString("en")))))))),
      h("h2", {}, "Where it is from"), h("dl.job", {}, job.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])), Object.keys(meta.faults).length > 0 && h("p.hint", {}, `Samples that could not be read: ${JSON.stringify(meta.faults)}`),
      h("h2", {}, "Size"), h("p", {}, `Latents ${size(meta.bytes.latents)}, samples ${size(meta.bytes.samples)}, maps ${size(meta.bytes.maps)}, images ${size(meta.bytes.images)}. Everything lies in this folder; nothing is loaded from elsewhere.`));
  };

  function csv(panel) {
    const names = Object.keys(panel.columns);
    const quote = (v) => (/[",\n]/.test(v) ? `"${`${v}`.replaceAll('"', '""')}"` : `${v}`);
    const rows = Array.from({ length: panel.size }, (_, j) => [j, quote(panel.name(j) ?? ""), mmsae.KINDS[panel.kind[j]], ...names.map((n) => (Number.isNaN(panel.columns[n][j]) ? "" : n === "label" ? quote(panel.meta.labels[panel.columns[n][j]] ?? "") : panel.columns[n][j]))].join(","));
    return [["latent", "name", "kind", ...names].join(","), ...rows].join("\n") + "\n";
  }

  /** A latent as a drawing of its own: name, figures, strongest images with maps, captions. */
  mmsae.exportPanel = async (panel, record, kind) => {
    const j = record.latent;
    const examples = (panel.meta.images && record.image?.top.length ? record.image.top : []).slice(0, 8);
    const texts = (record.text?.top.length ? record.text.top : (record.image?.top ?? [])).slice(0, 8);
    const [cell, gap, w] = [150, 10, 660];
    const samples = await Promise.all(examples.map((e) => panel.sample(e.item)));
    const captions = [...new Set((await Promise.all(texts.map((e) => panel.sample(e.item)))).map((s) => s.caption).filter(Boolean))].slice(0, 5);
    const rows = Math.ceil(examples.length / 4);
    const top = 72;
    const height = top + rows * (cell + gap) + captions.length * 22 + 24;
    const sizes = await Promise.all(samples.map((s) => new Promise((resolve) => {
      const i = new Image();
      i.onload = () => resolve([i.naturalWidth, i.naturalHeight]);
      i.onerror = () => resolve([1, 1]);
      i.src = s.picture;
    })));
    const XLINK = "http://www.w3.org/2000/svg";
    const make = (tag, attributes, text) => {
      const e = document.createElementNS(XLINK, tag);
      Object.entries(attributes).forEach(([k, v]) => e.setAttribute(k, v));
      if (text) e.textContent = text;
      return e;
    };
    const svg = make("svg", { xmlns: XLINK, width: w, height, viewBox: `0 0 ${w} ${height}`, "font-family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif" });
    svg.append(make("rect", { width: w, height, fill: "#fff" }), make("text", { x: 14, y: 32, "font-size": 21, "font-weight": 650, fill: "#1c1e21" }, panel.name(j) ?? `latent ${j}`),
      make("text", { x: 14, y: 54, "font-size": 12.5, fill: "#5d6470" }, [`#${j}`, ...panel.meta.modalities.map((m) => `${m}s ${mmsae.percent(panel.columns[`${m}.density`][j])}`), panel.meta.control ? "CONTROL: random weights" : ""].filter(Boolean).join("   ")));
    samples.forEach((s, k) => {
      const [x, y] = [14 + (k % 4) * (cell + gap), top + Math.floor(k / 4) * (cell + gap)];
      const [iw, ih] = sizes[k];
      const f = cell / Math.max(iw, ih);
      const [dw, dh] = [iw * f, ih * f];
      const [dx, dy] = [x + (cell - dw) / 2, y + (cell - dh) / 2];
      svg.append(make("image", { href: s.picture, x: dx, y: dy, width: dw, height: dh }));
      const shape = s.grid.image;
      if (examples[k].heat && shape?.rows && mmsae.heatMode !== "off") {
        const [l, t, r, b] = s.view;
        svg.append(make("image", { href: mmsae.heatCanvas(examples[k].heat, shape).toDataURL(), x: dx + l * dw, y: dy + t * dh, width: (r - l) * dw, height: (b - t) * dh, preserveAspectRatio: "none" }));
      }
    });
    captions.forEach((c, k) => svg.append(make("text", { x: 14, y: top + rows * (cell + gap) + 20 + k * 22, "font-size": 14, fill: "#1c1e21" }, c.length > 90 ? `${c.slice(0, 89)}…` : c)));
    const text = new XMLSerializer().serializeToString(svg);
    if (kind === "svg") return mmsae.save(`latent-${j}.svg`, text, "image/svg+xml");
    const image = new Image();
    image.src = `data:image/svg+xml;base64,${btoa(Array.from(new TextEncoder().encode(text), (c) => String.fromCharCode(c)).join(""))}`;
    await image.decode();
    const canvas = mmsae.h("canvas", { width: 2 * w, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * w, 2 * height);
    return new Promise((resolve) => canvas.toBlob((blob) => resolve(mmsae.save(`latent-${j}.png`, blob))));
  };
})();
