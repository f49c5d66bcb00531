/* A plot of all latents on a canvas: pointing names a latent, dragging chooses some, the wheel zooms. */
"use strict";

(() => {
  const { h } = mmsae;
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /**
   * points {x, y: arrays of which NaN is left out, kind: number of each in tones, CSS variables}; axes {x: {log, label},
   * y: ...} or none (a map). It is drawn once the page is shown: root.draw().
   * onpick(j), onbrush(box or null): its left, right, lower and upper edge, logarithms where an axis is one.
   */
  mmsae.scatter = ({ x, y, axes, kind, tones, dim = () => false, label, onpick, onbrush }) => {
    const canvas = h("canvas", { role: "img", "aria-label": `${label}; the list beside it has the same latents` });
    const tip = h("div.tip");
    const root = h("div.scatter", {}, canvas, tip);
    const pad = axes ? { l: 44, r: 8, t: 8, b: 30 } : { l: 6, r: 6, t: 6, b: 6 };
    const value = (array, axis) => (axis?.log ? Float32Array.from(array, Math.log10) : array);
    const [vx, vy] = [value(x, axes?.x), value(y, axes?.y)];
    const inside = [];
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let j = 0; j < x.length; j++) {
      const [a, b] = [vx[j], vy[j]];
      if (!Number.isFinite(a) || !Number.isFinite(b)) continue;
      inside.push(j);
      if (a < x0) x0 = a;
      if (a > x1) x1 = a;
      if (b < y0) y0 = b;
      if (b > y1) y1 = b;
    }
    if (!(x1 > x0)) [x0, x1] = [x0 - 1, x0 + 1];
    if (!(y1 > y0)) [y0, y1] = [y0 - 1, y0 + 1];
    const margin = (lo, hi) => [lo - 0.04 * (hi - lo), hi + 0.04 * (hi - lo)];
    [x0, x1] = margin(x0, x1);
    [y0, y1] = margin(y0, y1);
    let whole = [x0, x1, y0, y1];
    let [w, t, drag, hover, box, drawn] = [0, 0, null, -1, null, false];
    const px = (a) => pad.l + ((a - x0) / (x1 - x0)) * (w - pad.l - pad.r);
    const py = (b) => t - pad.b - ((b - y0) / (y1 - y0)) * (t - pad.t - pad.b);
    const ax = (p) => x0 + ((p - pad.l) / (w - pad.l - pad.r)) * (x1 - x0);
    const ay = (p) => y0 + ((t - pad.b - p) / (t - pad.t - pad.b)) * (y1 - y0);

    function draw() {
      const ratio = devicePixelRatio || 1;
      [w, t] = [canvas.clientWidth, canvas.clientHeight];
      if (!w) return;
      canvas.width = w * ratio;
      canvas.height = t * ratio;
      const c = canvas.getContext("2d");
      c.scale(ratio, ratio);
      if (axes) drawAxes(c);
      c.save();
      c.beginPath();
      c.rect(pad.l - 3, pad.t - 3, w - pad.l - pad.r + 6, t - pad.t - pad.b + 6);
      c.clip();
      const zoom = Math.sqrt((whole[1] - whole[0]) / (x1 - x0));
      const size = Math.min(Math.max(Math.sqrt(9000 / Math.max(inside.length, 1)) * zoom, 1.3), 5);
      const dots = dotter(c, w, t, ratio, inside.length + (root.under?.length ?? 0));
      if (root.under) dots.paint(root.under.map(([a]) => px(a)), root.under.map(([, b]) => py(b)), size, style("--soft"), 0.18);
      const groups = [0, 1].map(() => tones.map(() => []));
      for (const j of inside) groups[dim(j) ? 0 : 1][kind[j]].push(j);
      groups.forEach((group, chosen) => group.forEach((some, k) => {
        if (!some.length) return;
        const wide = chosen && groups[0][k].length ? size + 1.2 : size; // chosen ones stand out
        const alpha = !chosen ? 0.2 : inside.length > 5000 ? 0.6 : 0.85;
        dots.paint(Float32Array.from(some, (j) => px(vx[j])), Float32Array.from(some, (j) => py(vy[j])), wide, style(tones[k]), alpha);
      }));
      dots.show();
      if (hover >= 0) {
        c.strokeStyle = style("--ink");
        c.lineWidth = 2;
        c.beginPath();
        c.arc(px(vx[hover]), py(vy[hover]), 6, 0, 7);
        c.stroke();
      }
      if (box) {
        c.strokeStyle = style("--accent");
        c.fillStyle = style("--accent");
        const [a, b] = [px(box[0]), py(box[3])];
        const size2 = [px(box[1]) - a, py(box[2]) - b];
        c.globalAlpha = 0.1;
        c.fillRect(a, b, ...size2);
        c.globalAlpha = 1;
        c.strokeRect(a, b, ...size2);
      }
      c.restore();
    }

    function drawAxes(c) {
      c.font = "11px system-ui, sans-serif";
      c.lineWidth = 1;
      const ticks = (lo, hi, log) => {
        const out = [];
        if (log && hi - lo > 0.4) {
          const every = Math.ceil((hi - lo) / 6);
          if (hi - lo < 2.2)
            for (let p = Math.floor(lo); p <= hi; p++) for (const f of hi - lo < 1 ? [2, 3, 4, 5, 6, 8] : [2, 5]) if (p + Math.log10(f) >= lo && p + Math.log10(f) <= hi) out.push([p + Math.log10(f), mmsae.number(f * 10 ** p, 4)]);
          for (let p = Math.ceil(lo); p <= hi; p += every) out.push([p, p >= 0 && p < 4 ? `${10 ** p}` : p > -4 && p < 0 ? `${(10 ** p).toFixed(-p)}` : `1e${p}`]);
          return out;
        }
        const step = 10 ** Math.floor(Math.log10((hi - lo) / 3));
        const wide = [1, 2, 5, 10].map((f) => f * step).find((s) => (hi - lo) / s <= 5);
        for (let v = Math.ceil(lo / wide) * wide; v <= hi; v += wide) out.push([v, mmsae.number(log ? 10 ** v : v, 2)]);
        return out;
      };
      c.strokeStyle = style("--line");
      c.fillStyle = style("--soft");
      c.textAlign = "center";
      for (const [v, text] of ticks(x0, x1, axes.x.log)) {
        c.beginPath();
        c.moveTo(px(v), pad.t);
        c.lineTo(px(v), t - pad.b);
        c.stroke();
        c.fillText(text, px(v), t - pad.b + 13);
      }
      c.fillText(axes.x.label, (pad.l + w - pad.r) / 2, t - 3);
      c.textAlign = "right";
      for (const [v, text] of ticks(y0, y1, axes.y.log)) {
        c.beginPath();
        c.moveTo(pad.l, py(v));
        c.lineTo(w - pad.r, py(v));
        c.stroke();
        c.fillText(text, pad.l - 5, py(v) + 4);
      }
      c.save();
      c.translate(10, (pad.t + t - pad.b) / 2);
      c.rotate(-Math.PI / 2);
      c.textAlign = "center";
      c.fillText(axes.y.label, 0, 0);
      c.restore();
    }

    const nearest = (mx, my) => {
      let [best, least] = [-1, 120];
      for (const j of inside) {
        const d = (px(vx[j]) - mx) ** 2 + (py(vy[j]) - my) ** 2;
        if (d < least && !dim(j)) [best, least] = [j, d];
      }
      return best;
    };
    const at = (e) => {
      const r = canvas.getBoundingClientRect();
      return [e.clientX - r.left, e.clientY - r.top];
    };
    /** Choose an area, or none; returns what lies in it. */
    root.choose = (area) => {
      box = area;
      return box && new Set(inside.filter((j) => vx[j] >= box[0] && vx[j] <= box[1] && vy[j] >= box[2] && vy[j] <= box[3]));
    };
    canvas.addEventListener("pointerdown", (e) => {
      if (!drawn) root.draw();
      drag = [...at(e), e.shiftKey || e.button === 1, [x0, x1, y0, y1]];
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener("pointermove", (e) => {
      if (!drawn) return;
      const [mx, my] = at(e);
      if (drag?.[2]) {
        const [a0, a1, b0, b1] = drag[3];
        const [dx, dy] = [((mx - drag[0]) / (w - pad.l - pad.r)) * (a1 - a0), ((my - drag[1]) / (t - pad.t - pad.b)) * (b1 - b0)];
        [x0, x1, y0, y1] = [a0 - dx, a1 - dx, b0 + dy, b1 + dy];
        return draw();
      }
      if (drag && Math.hypot(mx - drag[0], my - drag[1]) > 4) {
        const [p, q] = [[ax(Math.min(mx, drag[0])), ax(Math.max(mx, drag[0]))], [ay(Math.max(my, drag[1])), ay(Math.min(my, drag[1]))]];
        box = [...p, ...q];
        tip.hidden = true;
        return draw();
      }
      const j = nearest(mx, my);
      if (j !== hover) {
        hover = j;
        draw();
      }
      tip.hidden = j < 0;
      canvas.style.cursor = j < 0 ? "crosshair" : "pointer";
      if (j >= 0) {
        tip.textContent = root.describe?.(j) ?? `#${j}`;
        tip.style.left = `${Math.min(mx + 12, w - 150)}px`;
        tip.style.top = `${my + 14}px`;
      }
    });
    canvas.addEventListener("pointerup", (e) => {
      if (!drag) return;
      const [mx, my] = at(e);
      const moved = Math.hypot(mx - drag[0], my - drag[1]) > 4;
      const pan = drag[2];
      drag = null;
      if (pan) return;
      if (moved) onbrush?.(box.map((v) => +v.toPrecision(5)));
      else if (hover >= 0) onpick?.(hover);
      else {
        box = null;
        onbrush?.(null);
      }
      draw();
    });
    canvas.addEventListener("pointerleave", () => {
      hover = -1;
      tip.hidden = true;
      draw();
    });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      const [mx, my] = at(e);
      const [a, b, f] = [ax(mx), ay(my), Math.exp(Math.max(-60, Math.min(60, e.deltaY)) / 220)];
      [x0, x1, y0, y1] = [a + (x0 - a) * f, a + (x1 - a) * f, b + (y0 - b) * f, b + (y1 - b) * f];
      draw();
    }, { passive: false });
    canvas.addEventListener("dblclick", () => {
      [x0, x1, y0, y1] = whole;
      box = null;
      onbrush?.(null);
      draw();
    });
    /** Points to draw beneath, in the units of the axes; the window widens to show them. */
    root.beneath = (points) => {
      root.under = points;
      const [a, b] = [points.map((p) => p[0]), points.map((p) => p[1])];
      const least = (list, x) => list.reduce((m, v) => Math.min(m, v), x);
      const most = (list, x) => list.reduce((m, v) => Math.max(m, v), x);
      whole = [x0, x1, y0, y1] = [least(a, x0), most(a, x1), least(b, y0), most(b, y1)];
      if (drawn) draw();
    };
    root.canvas = canvas;
    tip.hidden = true;
    root.draw = () => {
      drawn = true;
      draw();
    };
    new ResizeObserver(() => drawn && draw()).observe(canvas);
    return root;
  };

  /** Paints points in one colour after the other: as circles, or where there are many as pixels, which are fast. */
  function dotter(c, w, t, ratio, n) {
    if (n <= 3000)
      return {
        paint(x, y, size, colour, alpha) {
          c.fillStyle = colour;
          c.globalAlpha = alpha;
          c.beginPath();
          for (let i = 0; i < x.length; i++) {
            c.moveTo(x[i] + size / 2, y[i]);
            c.arc(x[i], y[i], size / 2, 0, 7);
          }
          c.fill();
        },
        show: () => (c.globalAlpha = 1),
      };
    const own = document.createElement("canvas");
    [own.width, own.height] = [c.canvas.width, c.canvas.height];
    const context = own.getContext("2d");
    const image = context.createImageData(own.width, own.height);
    const { data } = image;
    return {
      paint(x, y, size, colour, alpha) {
        context.fillStyle = colour; // which reads any notation, and gives #rrggbb
        const rgb = [1, 3, 5].map((k) => parseInt(context.fillStyle.slice(k, k + 2), 16));
        const side = Math.max(1, Math.round(size * ratio));
        for (let i = 0; i < x.length; i++) {
          const [left, top] = [Math.round(x[i] * ratio - side / 2), Math.round(y[i] * ratio - side / 2)];
          if (left < 0 || top < 0 || left + side > own.width || top + side > own.height) continue;
          for (let v = top; v < top + side; v++)
            for (let k = 4 * (v * own.width + left), end = k + 4 * side; k < end; k += 4) {
              const under = (data[k + 3] / 255) * (1 - alpha);
              const all = alpha + under;
              for (let q = 0; q < 3; q++) data[k + q] = (rgb[q] * alpha + data[k + q] * under) / all;
              data[k + 3] = 255 * all;
            }
        }
      },
      show() {
        context.putImageData(image, 0, 0);
        c.drawImage(own, 0, 0, w, t);
      },
    };
  }
})();
