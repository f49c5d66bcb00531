/* What everything else stands on: data that scripts bring, elements without markup, numbers in words. */
"use strict";

const mmsae = { pages: {} };

(() => {
  const found = new Map();
  const waiting = new Map();
  const KEPT = 800; // shards and packs in memory; the oldest go

  /** A data script calls this with its key and what it holds. */
  mmsae.put = (key, value) => {
    found.set(key, value);
    waiting.get(key)?.resolve(value);
    waiting.delete(key);
    if (found.size > KEPT) {
      const old = [...found.keys()].find((k) => k.split("/").length > 2);
      if (old) found.delete(old);
    }
  };

  /** What the script data/KEY.js holds; scripts work from a disk, where files may not be read. */
  mmsae.load = (key) => {
    if (found.has(key)) {
      const value = found.get(key);
      if (key.split("/").length > 2) {
        found.delete(key);
        found.set(key, value); // used last
      }
      return Promise.resolve(value);
    }
    if (!waiting.has(key)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      waiting.set(key, entry);
      const script = document.createElement("script");
      script.src = `data/${key}.js`;
      script.onload = () => script.remove();
      script.onerror = () => {
        waiting.delete(key);
        script.remove();
        entry.reject(new Error(`data/${key}.js is missing: was the folder copied whole?`));
      };
      document.head.append(script);
    }
    return waiting.get(key).promise;
  };

  const TYPES = { i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, f4: Float32Array };

  /** The numbers of a packed array, decoded once. */
  mmsae.array = (packed) => {
    if (!packed.array) {
      const text = atob(packed.d);
      const bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      packed.array = new TYPES[packed.t](bytes.buffer);
      packed.d = null;
    }
    return packed.array;
  };

  /** Row i of a packed table of indices, without the places that hold none. */
  mmsae.row = (packed, i) => {
    const width = packed.s[1];
    return Array.from(mmsae.array(packed).subarray(i * width, (i + 1) * width));
  };
  mmsae.none = (packed) => (packed.t === "u2" ? 65535 : -1);

  /** h("div.card", {title: "..."}, "text", element, ...): texts stay texts, so nothing in the data is ever markup. */
  mmsae.h = (kind, attributes = {}, ...children) => {
    const [tag, ...classes] = kind.split(".");
    const svg = mmsae.SVG.has(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag || "div");
    if (classes.length) element.setAttribute("class", classes.join(" "));
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || (value === false && !name.startsWith("aria-"))) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") Object.entries(value).forEach(([k, v]) => element.style.setProperty(k, v));
      else if (name.startsWith("aria-")) element.setAttribute(name, value);
      else if (name in element && !svg && name !== "list") element[name] = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(9).filter((c) => c !== null && c !== undefined && c !== false));
    return element;
  };
  mmsae.SVG = new Set(["svg", "rect", "line", "path", "g", "text", "circle", "polyline", "title"]);

  /** A number as a person would write it. */
  mmsae.number = (x, digits = 3) => {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (Number.isInteger(x)) return x.toLocaleString("en");
    if (size >= 1000) return Math.round(x).toLocaleString("en");
    if (size < 5e-4) return x.toExponential(1);
    const places = size < 0.5 * 10 ** -digits ? 3 : size < 10 ? digits : size < 100 ? 2 : 1; // nothing else is a 0
    return x.toFixed(places).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  };
  mmsae.percent = (x) => {
    if (x === null || Number.isNaN(x)) return "–";
    const p = 100 * x;
    return `${p === 0 ? "0" : p < 0.01 ? "<0.01" : p < 1 ? p.toFixed(2) : p < 10 ? p.toFixed(1) : Math.round(p)} %`;
  };
  mmsae.count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

  mmsae.save = (name, content, type = "application/json") => {
    const blob = content instanceof Blob ? content : new Blob([content], { type });
    const link = mmsae.h("a", { href: URL.createObjectURL(blob), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  /** A text file that the person picks. */
  mmsae.pick = (accept) =>
    new Promise((resolve) => {
      const input = mmsae.h("input", { type: "file", accept });
      input.addEventListener("change", async () => input.files[0] && resolve(await input.files[0].text()));
      input.click();
    });

  /** Numbers that look random and come again with the same seed (mulberry32). */
  mmsae.random = (seed) => {
    let a = seed >>> 0;
    return () => {
      a = (a + 0x6d2b79f5) | 0;
      let t = Math.imul(a ^ (a >>> 15), 1 | a);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  };

  mmsae.say = (text) => {
    document.querySelector(".toast")?.remove();
    const toast = mmsae.h("div.toast", { role: "status" }, text);
    document.body.append(toast);
    setTimeout(() => toast.remove(), 3500);
  };
})();
