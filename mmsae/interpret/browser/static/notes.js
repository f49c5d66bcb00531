/* What a person adds: bookmarks and names, kept by this browser for each SAE and saved as names.json. */
"use strict";

(() => {
  const memory = new Map(); // where storage is blocked
  const read = (key) => {
    try {
      return JSON.parse(localStorage.getItem(key) ?? "null");
    } catch {
      return memory.get(key) ?? null;
    }
  };
  const write = (key, value) => {
    memory.set(key, value);
    try {
      localStorage.setItem(key, JSON.stringify(value));
    } catch {
      mmsae.say("This browser keeps nothing for files: save names.json before you close the page.");
    }
  };

  const listeners = new Set();
  const state = new Map(); // by SAE

  const of = (panel) => {
    const sae = panel.meta.sae;
    if (!state.has(sae)) {
      const kept = read(`mmsae:${sae}`) ?? {};
      state.set(sae, { names: new Map(Object.entries(kept.names ?? {}).map(([j, n]) => [+j, n])), stars: new Set(kept.stars ?? []) });
    }
    return state.get(sae);
  };
  const changed = (panel) => {
    const { names, stars } = of(panel);
    write(`mmsae:${panel.meta.sae}`, { names: Object.fromEntries(names), stars: [...stars] });
    listeners.forEach((f) => f(panel));
  };

  mmsae.notes = {
    read,
    write,
    onchange: (f) => listeners.add(f),
    /** The person's own name of a latent, "" where it was taken away, undefined where there is none. */
    name: (panel, j) => of(panel).names.get(j),
    renames: (panel) => of(panel).names,
    rename(panel, j, name) {
      const own = of(panel).names;
      const clean = name.trim();
      if (clean === (panel.names.get(j)?.name ?? "")) own.delete(j);
      else own.set(j, clean);
      changed(panel);
    },
    starred: (panel, j) => of(panel).stars.has(j),
    stars: (panel) => of(panel).stars,
    star(panel, j) {
      const { stars } = of(panel);
      if (!stars.delete(j)) stars.add(j);
      changed(panel);
    },

    /** names.json as filter, steer and reports read it: found names, with the person's in their place. */
    toNames(panel) {
      const names = {};
      for (const [j, n] of panel.names) names[j] = n;
      for (const [j, name] of of(panel).names)
        names[j] = { name: name || null, method: "person", score: null, margin: null, z: null, auroc: null, by: "", note: "" };
      const order = Object.keys(names).sort((a, b) => a - b);
      const text = order.map((j) => `  ${JSON.stringify(j)}: ${JSON.stringify(names[j])}`).join(",\n");
      const stars = JSON.stringify([...of(panel).stars].sort((a, b) => a - b));
      return `{"format": 1, "sae": ${JSON.stringify(panel.meta.sae)}, "bookmarks": ${stars}, "names": {\n${text}\n}}\n`;
    },

    /** Take names (and bookmarks) from a file; says what it did. */
    fromNames(panel, text) {
      const file = JSON.parse(text);
      if (file.sae && file.sae !== panel.meta.sae)
        throw new Error(`These are names of SAE ${file.sae.slice(0, 12)}, this browser shows ${panel.meta.sae.slice(0, 12)}.`);
      const own = of(panel);
      let n = 0;
      for (const [j, said] of Object.entries(file.names ?? file)) {
        const name = typeof said === "string" ? said : (said?.name ?? "");
        if (!(+j >= 0 && +j < panel.size) || name === (panel.names.get(+j)?.name ?? "")) continue;
        own.names.set(+j, name);
        n++;
      }
      for (const j of file.bookmarks ?? []) own.stars.add(j);
      changed(panel);
      return `${mmsae.count(n, "name")} and ${mmsae.count((file.bookmarks ?? []).length, "bookmark")} taken from the file.`;
    },
  };
})();
