/* The ontology: a tree of classes with the latents that stand for its nodes; and attributes that steering sets. */
"use strict";

(() => {
  const { h } = mmsae;

  mmsae.pages.tree = async (panel) => {
    const data = await mmsae.load("tree");
    const children = data.nodes.map(() => []);
    data.nodes.forEach((node, i) => node.parent !== i && children[node.parent].push(i));
    const root = data.nodes.findIndex((node, i) => node.parent === i && node.size === data.classes);
    const covered = (i) => data.nodes[i].latents.some(([, purity]) => purity >= 0.5);
    const below = (i) => children[i].map(below).reduce(([a, b], [c, d]) => [a + c, b + d], [+covered(i), 1]);
    const branch = (i, depth) => {
      const node = data.nodes[i];
      const own = h("span.latents", {}, node.latents.slice(0, 6).map(([j, purity]) => mmsae.latentLink(panel, j, h("small", { title: "share of the classes below the node that the latent stands for" }, mmsae.percent(purity)))));
      const [held, nodes] = below(i);
      const label = h("span.node" + (covered(i) ? ".covered" : ""), {}, node.name, node.size > 1 && h("small", { title: "nodes from here down with a latent that stands for at least half of their classes" }, ` ${node.size} classes, ${held} of ${nodes} nodes covered`));
      if (!children[i].length) return h("li", {}, label, own);
      const inner = h("ul", { hidden: true });
      const fold = (open) => {
        if (open && !inner.firstChild) inner.append(...children[i].sort((a, b) => data.nodes[b].size - data.nodes[a].size).map((c) => branch(c, depth + 1)));
        inner.hidden = !open;
        toggle.setAttribute("aria-expanded", open);
      };
      const toggle = h("button.toggle", { type: "button", onclick: () => fold(inner.hidden) }, label);
      fold(depth < 3);
      return h("li", {}, toggle, own, inner);
    };
    const figure = (k, title, low) => data.measures[k] && h("div.tile-button", {}, h("b", {}, mmsae.number(data.measures[k].value, 2)), h("span", {}, title), h("small", {}, `chance ${mmsae.number(data.measures[k].null, 2)} ± ${mmsae.number(data.measures[k].null_sd, 2)}, p ${mmsae.number(data.measures[k].p, 3)}`));
    return h("div.page", {}, h("h1", {}, "Ontology"), h("p", {}, `A latent stands for the classes on most of whose images it is above a tenth of its maximum, and sits at the lowest node above all of them. Of ${mmsae.count(data.living, "latent")}, ${data.sizes.one ?? 0} stand for one class and ${data.sizes.more ?? 0} for several. Chance is of the same sets with classes exchanged.`),
      h("div.tiles", {}, figure("height", "mean height of nodes (lower is closer kin)"), figure("purity", "mean purity"), figure("coverage", "share of inner nodes with a latent of purity .5"), figure("coverage_f1", "mean best F1 of inner nodes")), h("p.hint", {}, "Marked nodes have a latent that stands for at least half of their classes."), h("ul.tree", {}, branch(root, 0)));
  };

  mmsae.attributesOf = async (j) => {
    const found = (await mmsae.load("attributes")).latents[j];
    if (!found?.length) return "";
    return h("section.info", {}, h("h3", { title: "words that images move towards when this feature is added, beside other words and random features" }, "Sets in images"), h("ul.bars", {}, found.map((a) => h("li", {}, h("span", {}, a.word, a.choice && h("small", {}, a.choice.low > 0.5 ? " confirmed" : " not confirmed")), mmsae.bar(a.choice ? a.choice.mean : 0, a.choice ? `${mmsae.percent(a.choice.mean)} chosen` : `z ${mmsae.number(Math.min(a.z_words, a.z_random), 1)}`)))));
  };

  mmsae.pages.attributes = async (panel) => {
    const { latents, rates } = await mmsae.load("attributes");
    const share = (r) => `${r.confirmed} of ${r.asked}` + (r.asked ? ` (${mmsae.percent(r.low)} to ${mmsae.percent(r.high)})` : "");
    const rows = Object.entries(latents).flatMap(([j, list]) => list.map((a) => [+j, a]));
    rows.sort((a, b) => Math.min(b[1].z_words, b[1].z_random) - Math.min(a[1].z_words, a[1].z_random));
    return h("div.page", {}, h("h1", {}, "Attributes"), h("p", {}, `Words that images move towards when a feature is added, against the other words and against random features at the same norm; chosen is the share of held-out pairs in which the steered image is nearer to the word. ${Object.values(latents).filter((l) => !l.length).length} of ${Object.keys(latents).length} features set no word.`),
      rates && h("p", {}, `A word was confirmed of ${share(rates.features)} features, and of ${share(rates.directions)} random directions, of which it is found by chance.`),
      rows.length > 0 && h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, ["latent", "word", "gain", "z among words", "z among random", "chosen", "95 % interval"].map((t) => h("th", {}, t)))), h("tbody", {}, rows.map(([j, a]) => h("tr" + (a.choice?.low > 0.5 ? "" : ".dim"), {}, h("th", {}, mmsae.latentLink(panel, j)), h("td", {}, a.word), h("td", {}, mmsae.number(a.gain, 3)), h("td", {}, mmsae.number(a.z_words, 1)), h("td", {}, mmsae.number(a.z_random, 1)), h("td", {}, a.choice ? mmsae.percent(a.choice.mean) : "–"), h("td", {}, a.choice ? `${mmsae.percent(a.choice.low)} to ${mmsae.percent(a.choice.high)}` : "–")))))));
  };
})();
