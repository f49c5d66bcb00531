/* Where a latent fires: over the patches of an image, the tokens of a text, the steps of a diffusion. */
"use strict";

(() => {
  // inferno, which those who see fewer colours can read; from 0 to 1
  const STOPS = [[20, 11, 54], [87, 16, 110], [150, 38, 103], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
  mmsae.ramp = (x) => {
    const at = Math.min(Math.max(x, 0), 1) * (STOPS.length - 1);
    const i = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[i].map((c, k) => Math.round(c + (STOPS[i + 1][k] - c) * (at - i)));
  };

  mmsae.heatModes = [["over", "Heat", "colour where it fires"], ["light", "Spotlight", "dark where it does not fire"], ["areas", "Areas", "connected areas of at least three patches in which it reaches half of its largest value in the image"], ["off", "Off", "the image alone"]];
  mmsae.heatMode = mmsae.notes.read("mmsae:heat") ?? "over";

  /** Buttons for how maps are drawn; redraw() draws them. */
  mmsae.heatChoice = (redraw) =>
    mmsae.segmented(mmsae.heatModes, mmsae.heatMode, (v) => {
      mmsae.heatMode = v;
      mmsae.notes.write("mmsae:heat", v);
      redraw();
    }, "maps");

  /** Values in [0, 1] of a step on the patch grid. */
  mmsae.heatGrid = (heat, shape, step) => {
    const out = new Float32Array(shape.rows * shape.cols);
    heat.position.forEach((p, k) => {
      const at = p % shape.places; // several rows may share a cell, as tiles over the whole image do
      if (Math.floor(p / shape.places) === step && at < out.length) out[at] = Math.max(out[at], heat.value[k] / 255);
    });
    return out;
  };

  /** A canvas of the grid's size, in which opacity grows with the share of the latent's upper bound. */
  mmsae.heatCanvas = (heat, shape, mode = mmsae.heatMode, step = 0) => {
    const canvas = document.createElement("canvas");
    canvas.width = shape.cols;
    canvas.height = shape.rows;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(shape.cols, shape.rows);
    mmsae.heatGrid(heat, shape, step).forEach((x, p) => {
      const [r, g, b] = mode === "light" ? [8, 8, 12] : mmsae.ramp(0.3 + 0.7 * x);
      pixels.data.set([r, g, b, 255 * (mode === "light" ? 0.82 * (1 - x) : 0.68 * x ** 0.7)], 4 * p);
    });
    context.putImageData(pixels, 0, 0);
    canvas.className = "map";
    return canvas;
  };

  /** Largest value of each step, in [0, 1]. */
  mmsae.heatSteps = (heat, shape) => {
    const out = new Float32Array(Math.max(shape.steps.length, 1));
    heat.position.forEach((p, k) => {
      const s = Math.floor(p / shape.places);
      out[s] = Math.max(out[s], heat.value[k] / 255);
    });
    return out;
  };

  /** A text with its tokens marked; tokens are [positions, pieces] as they read, or missing: then bars by position. */
  mmsae.tokenHeat = (heat, tokens, places) => {
    const by = new Map(Array.from(heat.position, (p, k) => [p, heat.value[k] / 255]));
    const mark = (x, text) => mmsae.h("mark", { style: { "--heat": `${Math.round(15 + 70 * x)}%` }, title: mmsae.number(x * heat.upper) }, text);
    if (tokens) return mmsae.h("span.tokens", {}, tokens[1].map((text, i) => (by.has(tokens[0][i]) ? mark(by.get(tokens[0][i]), text) : text)));
    const last = Math.max(...by.keys(), 7);
    return mmsae.h("span.ticks", { title: `by position of the token: ${[...by].map(([p, x]) => `${p}: ${mmsae.number(x * heat.upper)}`).join(", ")}` },
      Array.from({ length: Math.min(last + 1, places) }, (_, p) => mmsae.h("i", { style: { height: `${2 + 10 * (by.get(p) ?? 0)}px`, opacity: by.has(p) ? 1 : 0.25 } })));
  };
})();
