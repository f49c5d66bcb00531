/* Parts that several pages have: pictures, names of latents, bars, histograms. */
"use strict";

(() => {
  const { h } = mmsae;

  /** A sample's image with the map of a latent over it; it fills in when its pack is there; no caption: it stands beside. */
  mmsae.picture = (panel, example, { link = true, caption = true, plain = false } = {}) => {
    const box = h("span.box");
    const beside = link && !caption ? { tabIndex: -1, "aria-hidden": "true" } : {}; // the text's link leads there, too
    const frame = h(link ? "a.picture" : "span.picture", beside, box);
    frame.example = example;
    mmsae.seen(frame, () =>
      panel.sample(example.item).then((s) => {
        if (link) frame.href = panel.sampleLink(s.uid);
        frame.title = caption ? [s.caption, s.label, example.value !== undefined && mmsae.number(example.value)].filter(Boolean).join(" · ") : "";
        if (!s.picture) {
          frame.classList.add("bare");
          frame.append(h("span.nothing", {}, s.caption || "no image"));
          return;
        }
        const image = h("img", { src: s.picture, alt: caption ? s.caption || s.label || `sample ${s.uid}` : "", draggable: false });
        image.onload = () => {
          box.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
          if (image.naturalWidth < image.naturalHeight) box.classList.add("tall");
          if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.classList.add("tiny");
        };
        box.append(image);
        frame.sample = s;
        if (!plain) mmsae.drawHeat(panel, frame);
      }),
    );
    return frame;
  };

  /** Draw or remove the map of a picture, by the mode of the moment. */
  mmsae.drawHeat = (panel, frame, step = frame.step ?? 0) => {
    const { example, sample } = frame;
    frame.querySelectorAll(".map, .outlines").forEach((x) => x.remove());
    frame.step = step;
    const shape = sample?.grid[example.modality ?? "image"];
    if (!sample || !example.heat || !shape?.rows || mmsae.heatMode === "off") return;
    const [left, top, right, bottom] = sample.view;
    const percent = (x) => `${100 * x}%`;
    const place = { left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top) };
    const over = (drawing) => {
      Object.assign(drawing.style, place);
      frame.querySelector(".box").append(drawing);
    };
    if (mmsae.heatMode !== "areas") over(mmsae.heatCanvas(example.heat, shape, mmsae.heatMode, step));
    if (mmsae.heatMode === "areas" || frame.outlined) over(mmsae.outlines(mmsae.areas(example.heat, shape, step)));
  };

  const watcher = new IntersectionObserver(
    (entries) =>
      entries.forEach((e) => {
        if (e.isIntersecting) {
          watcher.unobserve(e.target);
          e.target.whenSeen();
        }
      }),
    { rootMargin: "300px" },
  );
  /** Do something once an element comes near the window. */
  mmsae.seen = (element, f) => {
    element.whenSeen = f;
    watcher.observe(element);
  };

  /** The name of a latent as a link. */
  mmsae.latentLink = (panel, j, ...more) => {
    const name = panel.name(j);
    return h(`a.latent.k${panel.kind[j]}`, { href: panel.link(j), title: name ?? `latent ${j}` },
      h("span.name" + (name ? "" : ".unnamed"), {}, name ?? wordsOf(panel, j)), h("small", {}, `#${j}`), ...more);
  };
  const wordsOf = (panel, j) => {
    const words = (panel.words[j] ? panel.words[j].split(" ").slice(0, 3) : panel.labelsOf(j)).join(" · ");
    return words ? `“${words}”` : panel.kind[j] ? "unnamed" : "dead";
  };
  mmsae.wordsOf = wordsOf;

  mmsae.KINDS = ["dead", "image only", "text only", "image and text"];
  mmsae.kind = (panel, j) => (panel.meta.modalities.length > 1 || !panel.kind[j]) && h(`span.kind.k${panel.kind[j]}`, {}, mmsae.KINDS[panel.kind[j]]);

  mmsae.bar = (share, text, tone = "") => h(`span.bar${tone}`, {}, h("i", { style: { width: `${100 * Math.min(Math.max(share, 0), 1)}%` } }), h("b", {}, text));

  mmsae.star = (panel, j) => {
    const button = h("button.star", { type: "button", title: "Bookmark (b)", "aria-label": `bookmark #${j}`, onclick: (event) => { event.preventDefault(); event.stopPropagation(); mmsae.notes.star(panel, j); draw(); } });
    const draw = () => {
      button.textContent = mmsae.notes.starred(panel, j) ? "★" : "☆";
      button.setAttribute("aria-pressed", mmsae.notes.starred(panel, j));
    };
    draw();
    return button;
  };

  /** Bars over log values, with the few labels that one needs. */
  mmsae.histogram = (m, { first, bins, height, tall }, rows, unit) => {
    const [w, t] = [280, 84];
    const edge = (i) => 10 ** (-4 + (8 * i) / bins);
    const used = height.length;
    const step = w / Math.max(used, 12);
    const bars = height.map((x, i) => x && h("rect", { x: i * step + 0.5, y: t - (t * x) / 255, width: Math.max(step - 1, 1), height: (t * x) / 255 }, h("title", {}, `${mmsae.number(edge(first + i))} to ${mmsae.number(edge(first + i + 1))}: about ${mmsae.number(Math.round((x / 255) * tall))}`)));
    const ticks = [];
    for (let p = -4; p <= 4; p++) {
      const x = ((p + 4) / 8) * bins - first;
      if (x >= 0 && x <= Math.max(used, 12)) ticks.push(h("text", { x: x * step, y: t + 13, "text-anchor": x < 1 ? "start" : "middle" }, p === 0 ? "1" : p === 1 ? "10" : p === -1 ? "0.1" : `1e${p}`), h("line", { x1: x * step, x2: x * step, y1: t, y2: t + 3 }));
    }
    return h("figure.histogram", {}, h(`svg.${m}`, { viewBox: `0 0 ${w} ${t + 16}`, role: "img", "aria-label": `histogram of values in ${m}s` }, bars, h("line", { x1: 0, x2: w, y1: t, y2: t }), ticks),
      h("figcaption", {}, `how strongly, on ${mmsae.count(rows, unit, unit === "patch" ? "patches" : undefined)} (log scale)`));
  };

  mmsae.segmented = (options, value, onchange, label) =>
    h("span.segmented", { role: "group", "aria-label": label }, options.map(([v, text, title]) => h("button", { type: "button", title: title ?? "", "aria-pressed": v === value, onclick: (e) => {
      e.currentTarget.parentNode.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b === e.currentTarget));
      onchange(v);
    } }, text)));

  mmsae.controlNote = (panel) =>
    panel.meta.control && h("p.warning", { role: "note" }, h("strong", {}, "Control. "), "These latents are not of the SAE: they are of one with random weights, on the same samples. What looks meaningful here is chance.");

  /** Put a text where it can be pasted from; files are no secure place to all web browsers. */
  mmsae.copy = async (text, said) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const field = h("textarea", { value: text });
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    mmsae.say(said);
  };
  mmsae.linkButton = () => h("button.small", { type: "button", title: "Copy the address of this page", onclick: () => mmsae.copy(location.href, "The address of this page is copied.") }, "Copy link");

  mmsae.empty = (text) => h("p.hint", {}, text);
})();
