/* Connected areas of a latent's map, as mmsae/interpret/areas/connected.py has them and count() of queries counts them. */
"use strict";

(() => {
  const TIMES = 2; // finer than the patches
  const LEVEL = 0.5; // share of the map's maximum
  const LEAST = 3; // patches

  /** Bilinear interpolation of n places to TIMES as many: [place below, weight of the one above] of each. */
  const between = (n) =>
    Array.from({ length: n * TIMES }, (_, i) => {
      const at = Math.min(Math.max((i + 0.5) / TIMES - 0.5, 0), n - 1);
      const low = Math.min(Math.floor(at), Math.max(n - 2, 0));
      return [low, at - low];
    });

  /** {areas: [{size in patches, box: [left, top, right, bottom] in shares}], label: area of each cell or -1, w, t}. */
  mmsae.areas = (heat, shape, step = 0) => {
    const { rows, cols } = shape;
    const map = mmsae.heatGrid(heat, shape, step);
    const [w, t] = [cols * TIMES, rows * TIMES];
    const [across, down] = [between(cols), between(rows)];
    const least = LEVEL * Math.max(...map) * (1 - 1e-5);
    const label = new Int32Array(w * t).fill(-1);
    const at = (r, c) => map[Math.min(r, rows - 1) * cols + Math.min(c, cols - 1)];
    const on = new Uint8Array(w * t);
    if (least > 0)
      down.forEach(([r, f], y) => across.forEach(([c, g], x) => {
        const value = (1 - f) * ((1 - g) * at(r, c) + g * at(r, c + 1)) + f * ((1 - g) * at(r + 1, c) + g * at(r + 1, c + 1));
        on[y * w + x] = value >= least;
      }));
    const areas = [];
    for (let first = 0; first < on.length; first++) {
      if (!on[first]) continue;
      const cells = [first];
      const box = [w, t, 0, 0];
      on[first] = 0;
      for (let k = 0; k < cells.length; k++) {
        const [x, y] = [cells[k] % w, Math.floor(cells[k] / w)];
        box.splice(0, 4, Math.min(box[0], x), Math.min(box[1], y), Math.max(box[2], x + 1), Math.max(box[3], y + 1));
        for (let v = Math.max(y - 1, 0); v <= Math.min(y + 1, t - 1); v++)
          for (let u = Math.max(x - 1, 0); u <= Math.min(x + 1, w - 1); u++)
            if (on[v * w + u]) {
              on[v * w + u] = 0;
              cells.push(v * w + u);
            }
      }
      const size = cells.length / TIMES ** 2;
      if (size < LEAST) continue;
      for (const cell of cells) label[cell] = areas.length;
      areas.push({ size, box: [box[0] / w, box[1] / t, box[2] / w, box[3] / t] });
    }
    return { areas, label, w, t };
  };

  /** The outlines of areas as a drawing over the host's view: light on dark, to be seen on any image. */
  mmsae.outlines = ({ label, w, t }) => {
    const at = (x, y) => (x < 0 || y < 0 || x >= w || y >= t ? -1 : label[y * w + x]);
    let path = "";
    for (let y = 0; y <= t; y++)
      for (let x = 0; x <= w; x++) {
        if (at(x, y) !== at(x, y - 1)) path += `M${x} ${y}h1`;
        if (at(x, y) !== at(x - 1, y)) path += `M${x} ${y}v1`;
      }
    return mmsae.h("svg.outlines", { viewBox: `0 0 ${w} ${t}`, preserveAspectRatio: "none", "aria-hidden": "true" }, mmsae.h("path", { d: path }), mmsae.h("path", { d: path }));
  };
})();
