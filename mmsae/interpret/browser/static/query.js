/* Queries over latents: AND is the minimum, OR the maximum, NOT one minus, on percentiles of each latent's values. */
"use strict";

(() => {
  const { h } = mmsae;
  const CALLS = { count: 1, left_of: 2, overlap: 2 }; // and their numbers of arguments
  const DEEPEST = 100; // levels
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
    let [i, depth] = [0, 0];
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
      if (++depth > DEEPEST) throw new Error(`The query has more than ${DEEPEST} levels`);
      const out = next("~") ? { kind: "not", of: [inverse()] } : compared();
      depth--;
      return out;
    };
    const compared = () => {
      const left = value();
      if (!COMPARE[tokens[i]?.[0]]) return left.call === "count" ? fail("a comparison of the count, as in count(#12) >= 2,") : left;
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
      if (tokens[i]?.[0] === "word" && tokens[i][1] in CALLS && tokens[i + 1]?.[0] === "(") {
        const call = tokens[i][1];
        i += 2;
        const args = [leaf()];
        while (args.length < CALLS[call]) {
          next(",") || fail("a comma");
          args.push(leaf());
        }
        next(")") || fail("a closing bracket");
        return { kind: "call", call, args };
      }
      return leaf();
    };
    const leaf = () => {
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

  /** Numbers as multiples of 2^-23, on which 1 - (1 - x) is x, as mmsae.metrics.concepts.query has them. */
  mmsae.onGrid = (x) => Math.round(x / mmsae.onGrid.step) * mmsae.onGrid.step;
  mmsae.onGrid.step = 2 ** -23;

  /** (shown samples,) scores in [0, 1]; with `fires` whether the query holds, 1 or 0: a latent counts as 1 where it fires. */
  mmsae.evaluateQuery = async (panel, node, fires = false) => {
    const n = panel.meta.shown;
    const out = new Float32Array(n);
    if (node.kind === "all") return out.fill(1);
    if (node.kind === "call") return measured(panel, node, out);
    const of = await Promise.all((node.of ?? []).map((child) => mmsae.evaluateQuery(panel, child, fires && node.kind !== "compare")));
    if (node.kind === "and") for (let e = 0; e < n; e++) out[e] = of.reduce((least, x) => Math.min(least, x[e]), 1);
    else if (node.kind === "or") for (let e = 0; e < n; e++) out[e] = of.reduce((most, x) => Math.max(most, x[e]), 0);
    else if (node.kind === "not") for (let e = 0; e < n; e++) out[e] = 1 - of[0][e];
    else if (node.kind === "compare") for (let e = 0; e < n; e++) out[e] = +COMPARE[node.sign](of[0][e], mmsae.onGrid(node.than));
    else for (const j of latentsOf(panel, node)) await fill(panel, j, node.only, out, fires);
    return out;
  };

  /** Numbers of areas. */
  async function measured(panel, { call, args }, out) {
    const elsewhere = "mmsae analyse retrieve and mmsae scenarios take the same query";
    if (!panel.meta.grid.image?.rows) throw new Error(`${call}() is of areas of patches, and this SAE reads no patches`);
    if (call !== "count") throw new Error(`${call}() is of where areas lie, which this browser does not keep: ${elsewhere}`);
    if (!panel.meta.areas) throw new Error(`count() is of areas, which this browser was written without (--maps 0): ${elsewhere}`);
    const latents = latentsOf(panel, args[0]);
    const found = latents.length > 1 ? await panel.areasTogether(latents) : await panel.areas(latents[0]);
    if (!found) throw new Error(`“${args[0].name}” is ${latents.length} latents, whose areas this browser has counted one by one only: write one of them, as in count(#${latents[0]}) >= 1; ${elsewhere}`);
    found[0].forEach((e, k) => (out[e] = found[1][k]));
    return out;
  }

  // letters of any case are one, ß and ss as well
  const folded = (text) => text.toUpperCase().toLowerCase();
  const latentsOf = (panel, node) => {
    if (node.kind === "latent") {
      if (node.latent >= panel.size) throw new Error(`there is no latent #${node.latent}: the SAE has ${panel.size}`);
      return [node.latent];
    }
    const wanted = folded(node.name).replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
    const pattern = new RegExp(`^${wanted}$`, "su");
    const found = [];
    for (let j = 0; j < panel.size; j++) {
      const name = panel.name(j);
      if (name && pattern.test(folded(name))) found.push(j);
    }
    if (!found.length) throw new Error(`no latent is named “${node.name}”; #12 stands for latent 12`);
    return found;
  };

  async function fill(panel, j, only, out, fires) {
    if (only && !panel.meta.modalities.includes(only)) throw new Error(`${only}:#${j} asks for ${only}, and there are codes of ${panel.meta.modalities.join(", ")}`);
    for (const m of only ? [only] : panel.meta.modalities) {
      const [items, percentile] = await panel.list(j, m);
      items.forEach((e, k) => (out[e] = fires ? 1 : Math.max(out[e], percentile[k])));
    }
  }

  // of each SAE its own: files share what a web browser keeps
  const kept = (panel) => `mmsae:query:${panel.meta.sae}`;

  /** Add a latent to the query that is being made: "&" it, "|" it, or "~" for and not. */
  mmsae.addToQuery = (panel, j, sign) => {
    const before = mmsae.notes.read(kept(panel)) ?? "";
    const mixed = sign !== "|" && topmost(before) === "or"; // & binds stronger
    const part = `${sign === "~" ? "~" : ""}#${j}`;
    const text = !before ? part : `${mixed ? `(${before})` : before} ${sign === "|" ? "|" : "&"} ${part}`;
    mmsae.notes.write(kept(panel), text);
    mmsae.say(`Query: ${text}`);
  };

  const topmost = (text) => {
    try {
      return mmsae.parseQuery(text).kind;
    } catch {
      return ""; // not written to its end
    }
  };

  mmsae.pages.query = async (panel, { query }) => {
    const before = query ?? mmsae.notes.read(kept(panel)) ?? "";
    if (query === undefined && before) history.replaceState(null, "", panel.queryLink(before));
    const input = h("input.query", { value: before, placeholder: `#12 & ~#40, (image:#3 | "red circle") & ~text:#3, #7 > .9${panel.meta.areas ? ", count(#12) >= 2" : ""}`, "aria-label": "query", spellcheck: false, autocomplete: "off" });
    const said = h("p.hint", { role: "status" });
    const parts = h("div.chips");
    let found = [];
    let counted = []; // latents whose areas are asked for
    let [score, holds] = [new Float32Array(0), new Float32Array(0)];
    const list = mmsae.virtual({ make: (i) => h("div.slot" + (holds[found[i]] ? "" : ".faint"), { title: holds[found[i]] ? "" : "the query does not hold of it" }, mmsae.sampleCard(panel, found[i], mmsae.number(score[found[i]], 2), counted)), ...mmsae.cardSize(panel), label: "samples" });
    const calls = (node) => (node.kind === "call" ? [node] : (node.of ?? []).flatMap(calls));
    const leaves = (node) => (node.kind === "all" ? [] : ["latent", "name"].includes(node.kind) ? latentsOf(panel, node) : (node.of ?? node.args).flatMap(leaves));
    const run = async () => {
      const text = input.value.trim();
      mmsae.notes.write(kept(panel), text);
      const mine = (input.turn = (input.turn ?? 0) + 1);
      if (!text) {
        found = [];
        parts.replaceChildren();
        said.classList.remove("wrong");
        said.textContent = `Write latents as #12 or by name; & both, | either, ~ not, ( ), image: or text: for one side, #12 > .9 for the strongest tenth${panel.meta.areas ? ", count(#12) >= 2 for two areas or more" : ""}.`;
        list.fill(0);
        return;
      }
      try {
        const tree = mmsae.parseQuery(text);
        parts.replaceChildren(...[...new Set(leaves(tree))].slice(0, 12).map((j) => mmsae.latentLink(panel, j)));
        const values = await Promise.all([false, true].map((fires) => mmsae.evaluateQuery(panel, tree, fires)));
        const of = calls(tree).flatMap(leaves);
        const strong = new Float32Array(panel.meta.shown); // among equal ones, what is counted is strongest in the first
        for (const j of of) await fill(panel, j, "", strong, false);
        if (mine !== input.turn) return; // something else is asked by now
        [score, holds] = values;
        counted = of;
        found = Array.from(score.keys()).filter((e) => score[e] > 0 || holds[e]).sort((a, b) => holds[b] - holds[a] || score[b] - score[a] || strong[b] - strong[a] || a - b);
        const held = found.filter((e) => holds[e]).length;
        said.classList.remove("wrong");
        said.textContent = `Holds of ${mmsae.count(held, "sample")} of the ${panel.meta.shown.toLocaleString("en")} that this browser shows${found.length > held ? `; ${(found.length - held).toLocaleString("en")} that fit in part come after, pale` : ""}. ${counted.length ? "mmsae analyse retrieve and mmsae scenarios judge all samples whose patches the evidence has" : "mmsae filter --query query.json judges all of the data"}.`;
        list.fill(found.length);
      } catch (error) {
        if (mine !== input.turn) return;
        found = [];
        list.fill(0);
        said.classList.add("wrong");
        said.textContent = `${error.message}.`;
      }
    };
    input.addEventListener("input", () => {
      clearTimeout(input.later);
      input.later = setTimeout(() => mmsae.typed(input, panel.queryLink(input.value.trim())), 120);
    });
    const set = (text) => {
      input.value = text;
      mmsae.go(panel.queryLink(text));
    };
    const save = () => {
      try {
        if (calls(mmsae.parseQuery(input.value)).length) mmsae.say("mmsae filter sees no areas: this one is for mmsae analyse retrieve and mmsae scenarios.");
        mmsae.save("query.json", `${JSON.stringify({ format: 1, sae: panel.meta.sae, query: input.value.trim(), name: "" }, null, 2)}\n`);
      } catch (error) {
        mmsae.say(`${error.message}.`);
      }
    };
    const open = async () => {
      try {
        const file = JSON.parse(await mmsae.pick(".json"));
        if (file.sae && file.sae !== panel.meta.sae) throw new Error("This is a query over another SAE");
        set(file.query);
      } catch (error) {
        mmsae.say(`${error.message}.`);
      }
    };
    const stars = [...mmsae.notes.stars(panel)];
    const root = h("div.page.fill", {}, mmsae.controlNote(panel), h("h1", {}, "Query"), h("div.tools", {}, input, h("button", { type: "button", onclick: save }, "Save query.json"), h("button", { type: "button", onclick: open }, "Open"), stars.length > 0 && h("button", { type: "button", title: "all bookmarked latents, with |", onclick: () => set(stars.map((j) => `#${j}`).join(" | ")) }, "Bookmarks")), parts, said, list);
    mmsae.listMove = (by, rows) => list.move(by, rows);
    root.update = (at) => {
      if (input.value.trim() !== (at.query ?? "")) input.value = at.query ?? "";
      run();
    };
    requestAnimationFrame(run);
    return root;
  };
})();
