/* Queries over latents: AND is the minimum, OR the maximum, NOT one minus, on percentiles of each latent's values. */
"use strict";

(() => {
  const { h } = mmsae;
  const AREAS = ["count", "left_of", "overlap"];
  const COMPARE = { ">": (a, b) => a > b, "<": (a, b) => a < b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b, "==": (a, b) => a === b };

  const TOKEN = /\s*(?:(#\d+)|"((?:[^"\\]|\\.)*)"|([\p{L}_][\p{L}\p{N}_]*):|([\p{L}_][\p{L}\p{N}_'-]*)|(>=|<=|==|[<>&|~(),])|([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?))/iuy;

  /** The tree of a query, by the grammar of mmsae/metrics/concepts/query.py; throws what is wrong with it, in words. */
  mmsae.parseQuery = (text) => {
    const tokens = [];
    for (let at = 0; at < text.trimEnd().length; at = TOKEN.lastIndex) {
      TOKEN.lastIndex = at;
      const m = TOKEN.exec(text);
      if (!m) throw new Error(`“${text.slice(at).trim()[0]}” means nothing here`);
      const [, latent, quoted, modality, word, mark, number] = m;
      tokens.push(latent ? ["latent", +latent.slice(1)] : quoted !== undefined ? ["quoted", quoted.replace(/\\(.)/g, "$1")] : modality ? ["modality", modality] : word ? ["word", word] : mark ? [mark, mark] : ["number", +number]);
    }
    let i = 0;
    const next = (kind) => tokens[i]?.[0] === kind && tokens[i++];
    const fail = (wanted) => {
      throw new Error(`${wanted} should stand ${tokens[i] ? `where “${tokens[i][1]}” is` : "at the end"}`);
    };
    const many = (sign, part, kind) => {
      const of = [part()];
      while (next(sign)) of.push(part());
      return of.length > 1 ? { kind, of } : of[0];
    };
    const either = () => many("|", () => many("&", inverse, "and"), "or");
    const inverse = () => {
      if (next("~")) return { kind: "not", of: [inverse()] };
      const left = value();
      if (!COMPARE[tokens[i]?.[0]]) return left;
      const sign = tokens[i++][0];
      const than = next("number") || fail("a number");
      return { kind: "compare", of: [left], sign, than: than[1] };
    };
    const value = () => {
      if (next("(")) {
        const inside = either();
        next(")") || fail("a closing bracket");
        return inside;
      }
      if (tokens[i]?.[0] === "word" && AREAS.includes(tokens[i][1]) && tokens[i + 1]?.[0] === "(") throw new Error(`${tokens[i][1]}() is of areas of patches, which mmsae analyse retrieve and mmsae scenarios count`);
      const only = next("modality")?.[1] ?? "";
      const latent = next("latent");
      if (latent) return { kind: "latent", latent: latent[1], only };
      const quoted = next("quoted");
      if (quoted) return { kind: "name", name: quoted[1], only };
      const words = [];
      while (tokens[i]?.[0] === "word") words.push(tokens[i++][1]);
      return words.length ? { kind: "name", name: words.join(" "), only } : fail("a latent (#12) or a name (“red circle”)");
    };
    if (!tokens.length) return { kind: "all" };
    const tree = either();
    return i < tokens.length ? fail("& or |") : tree;
  };

  /** (shown samples,) scores in [0, 1]. */
  mmsae.evaluateQuery = async (panel, node) => {
    const n = panel.meta.shown;
    const of = await Promise.all((node.of ?? []).map((child) => mmsae.evaluateQuery(panel, child)));
    const out = new Float32Array(n);
    if (node.kind === "all") return out.fill(1);
    if (node.kind === "and") for (let e = 0; e < n; e++) out[e] = Math.min(...of.map((x) => x[e]));
    else if (node.kind === "or") for (let e = 0; e < n; e++) out[e] = Math.max(...of.map((x) => x[e]));
    else if (node.kind === "not") for (let e = 0; e < n; e++) out[e] = 1 - of[0][e];
    else if (node.kind === "compare") for (let e = 0; e < n; e++) out[e] = +COMPARE[node.sign](of[0][e], node.than);
    else for (const j of latentsOf(panel, node)) await fill(panel, j, node.only, out);
    return out;
  };

  const latentsOf = (panel, node) => {
    if (node.kind === "latent") {
      if (node.latent >= panel.size) throw new Error(`there is no latent ${node.latent}: the SAE has ${panel.size}`);
      return [node.latent];
    }
    const wanted = node.name.toLowerCase().replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
    const pattern = new RegExp(`^${wanted}$`, "su");
    const found = [];
    for (let j = 0; j < panel.size; j++) if (pattern.test(panel.name(j)?.toLowerCase() ?? "\0")) found.push(j);
    if (!found.length) throw new Error(`no latent is named “${node.name}”; #12 stands for latent 12`);
    return found;
  };

  async function fill(panel, j, only, out) {
    if (only && !panel.meta.modalities.includes(only)) throw new Error(`${only}:#${j} asks for ${only}, and there are codes of ${panel.meta.modalities.join(", ")}`);
    for (const m of only ? [only] : panel.meta.modalities) {
      const [items, percentile] = await panel.list(j, m);
      items.forEach((e, k) => (out[e] = Math.max(out[e], percentile[k])));
    }
  }

  mmsae.addToQuery = (panel, j, sign) => {
    const before = mmsae.notes.read("mmsae:query") ?? "";
    const part = `${sign === "~" ? "~" : ""}#${j}`;
    const text = before ? `${before} & ${part}` : part;
    mmsae.notes.write("mmsae:query", text);
    mmsae.say(`Query: ${text}`);
  };

  mmsae.pages.query = async (panel, { query }) => {
    const input = h("input.query", { value: query ?? mmsae.notes.read("mmsae:query") ?? "", placeholder: '#12 & ~#40, (image:#3 | "red circle") & ~text:#3, #7 > .9', "aria-label": "query", spellcheck: false, autocomplete: "off" });
    const said = h("p.hint", { role: "status" });
    const parts = h("div.chips");
    let found = [];
    let score = new Float32Array(0);
    const list = mmsae.virtual({ make: (i) => h("div.slot", {}, mmsae.sampleCard(panel, found[i], mmsae.number(score[found[i]], 2))), ...mmsae.cardSize(panel), label: "samples" });
    const leaves = (node) => (node.of ? node.of.flatMap(leaves) : node.kind === "all" ? [] : latentsOf(panel, node));
    const run = async () => {
      const text = input.value.trim();
      mmsae.notes.write("mmsae:query", text);
      if (root.isConnected) history.replaceState(null, "", `${panel.home()}query${text ? `?q=${encodeURIComponent(text)}` : ""}`);
      if (!text) {
        found = [];
        parts.replaceChildren();
        said.textContent = "Write latents as #12 or by name; & both, | either, ~ not, ( ), image: or text: for one side, #12 > .9 for the strongest tenth.";
        list.fill(0);
        return;
      }
      try {
        const tree = mmsae.parseQuery(text);
        parts.replaceChildren(...[...new Set(leaves(tree))].slice(0, 12).map((j) => mmsae.latentLink(panel, j)));
        score = await mmsae.evaluateQuery(panel, tree);
        found = Array.from(score.keys()).filter((e) => score[e] > 0).sort((a, b) => score[b] - score[a] || a - b);
        const sure = found.filter((e) => score[e] > 0.5).length;
        said.classList.remove("wrong");
        said.textContent = `${mmsae.count(sure, "sample")} above .5, ${found.length.toLocaleString("en")} above 0, of the ${panel.meta.shown.toLocaleString("en")} that this browser shows. mmsae filter --query query.json judges all.`;
        list.fill(found.length);
      } catch (error) {
        said.classList.add("wrong");
        said.textContent = `${error.message}.`;
      }
    };
    input.addEventListener("input", () => {
      clearTimeout(input.later);
      input.later = setTimeout(run, 120);
    });
    const save = () => {
      try {
        mmsae.parseQuery(input.value);
        mmsae.save("query.json", `${JSON.stringify({ format: 1, sae: panel.meta.sae, query: input.value.trim(), name: "" }, null, 2)}\n`);
      } catch (error) {
        mmsae.say(`${error.message}.`);
      }
    };
    const open = async () => {
      try {
        const file = JSON.parse(await mmsae.pick(".json"));
        if (file.sae && file.sae !== panel.meta.sae) throw new Error("This is a query over another SAE");
        input.value = file.query;
        run();
      } catch (error) {
        mmsae.say(`${error.message}.`);
      }
    };
    const stars = [...mmsae.notes.stars(panel)];
    const root = h("div.page.fill", {}, mmsae.controlNote(panel), h("h1", {}, "Query"), h("div.tools", {}, input, h("button", { type: "button", onclick: save }, "Save query.json"), h("button", { type: "button", onclick: open }, "Open"), stars.length > 0 && h("button", { type: "button", title: "all bookmarked latents, with |", onclick: () => { input.value = stars.map((j) => `#${j}`).join(" | "); run(); } }, "Bookmarks")), parts, said, list);
    mmsae.listMove = (by, rows) => list.move(by, rows);
    requestAnimationFrame(run);
    return root;
  };
})();
