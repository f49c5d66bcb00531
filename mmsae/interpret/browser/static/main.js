/* Addresses, the bar at the top, keys. */
"use strict";

(() => {
  const { h } = mmsae;
  let panel = null;
  let current = null;
  let turn = 0;

  /** #/ , #/?q=words&filter=shared&order=density&up=1&area=map:0,1,0,1 , #/latent/12 , #/control/latent/12 , #/sample/UID , #/query?q=... , #/about ... */
  function parse(hash) {
    const [path, search = ""] = hash.replace(/^#\/?/, "").split("?");
    const parts = path.split("/").filter(Boolean).map(decoded);
    const id = mmsae.site.panels.some((p) => p.id === parts[0]) ? parts.shift() : "main";
    const said = new URLSearchParams(search);
    const [page = "overview", what] = parts;
    const [plot, numbers = ""] = (said.get("area") ?? "").split(":");
    const box = numbers.split(",").map(Number);
    const area = box.length === 4 && box.every(Number.isFinite) ? { plot, box } : null;
    const of = { id, page, latent: page === "latent" ? Number(what) : undefined, uid: what, query: page === "samples" ? (what ?? "") : (said.get("q") ?? undefined) };
    return page === "overview" ? { ...of, query: of.query ?? "", filter: said.get("filter") ?? "all", order: said.get("order") ?? "", up: said.has("up"), area } : of;
  }
  const decoded = (part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part; // written by hand, with a % that stands for itself
    }
  };

  /** Show an address. It is one step back in the history of the web browser, or replaces the one that is there. */
  mmsae.go = (address, replace = false) => {
    if (address === location.hash) return null;
    history[replace ? "replaceState" : "pushState"](null, "", address);
    return mmsae.route();
  };
  /** Show what is typed into a field: all of it is one step back, and not every letter. */
  mmsae.typed = (input, address) => {
    mmsae.go(address, input.wrote !== undefined && input.wrote === location.hash);
    input.wrote = address;
  };

  mmsae.route = async () => {
    const mine = ++turn;
    const at = parse(location.hash);
    const main = document.getElementById("page");
    current?.leave?.();
    try {
      panel = await mmsae.panel(at.id);
      if (current?.update && current.isConnected && current.at.page === at.page && current.at.id === at.id) {
        if (mine !== turn) return;
        current.update(at);
        current.at = at;
        bar(at);
        return;
      }
      const make = mmsae.pages[at.page];
      const page = make ? await make(panel, at) : mmsae.empty(`There is no page ${at.page}.`);
      if (mine !== turn) return;
      current = page;
      current.at = at;
      main.replaceChildren(page);
      main.dataset.page = at.page;
      document.body.classList.toggle("control", panel.meta.control);
      bar(at);
      const what = page.title || PAGES.find(([id]) => id === at.page)?.[1];
      page.removeAttribute("title");
      document.title = `${what ? `${what}${at.page === "latent" ? ` #${at.latent}` : ""} · ` : ""}${mmsae.title}`;
      if (at.page !== "overview") main.scrollTo(0, 0);
      if (mine > 1 && !document.activeElement?.closest("#bar, dialog")) main.focus({ preventScroll: true }); // arrows scroll, readers read
    } catch (error) {
      if (mine !== turn) return;
      main.replaceChildren(h("p.warning", {}, h("strong", {}, "This page could not be made. "), error.message));
      console.error(error);
    }
  };

  const PAGES = [["overview", "Latents", ""], ["samples", "Samples", "samples/"], ["query", "Query", "query"], ["intruder", "Test", "intruder"], ["compare", "Compare", "compare"], ["tree", "Ontology", "tree"], ["attributes", "Attributes", "attributes"], ["about", "About", "about"]];
  const optional = ["compare", "tree", "attributes"];

  function bar(at) {
    const old = document.querySelector("#bar input.search");
    const search = old ?? h("input.search", { type: "search", "aria-label": "search", title: "words, #12, or like #12 - #40 + dog", spellcheck: false, autocomplete: "off" });
    if (!old) {
      search.addEventListener("input", () => {
        clearTimeout(search.later);
        search.later = setTimeout(() => {
          const at = parse(location.hash);
          mmsae.typed(search, panel.listLink({ ...(at.page === "overview" && at), query: search.value.trim(), order: "", up: false }));
        }, 90);
      });
      search.addEventListener("keydown", (e) => {
        if (e.key === "Escape") search.blur();
        if (e.key === "Enter" && /^#?\d+$/.test(search.value.trim())) location.hash = panel.link(+search.value.replace("#", ""));
        else if (["Enter", "ArrowDown"].includes(e.key) && parse(location.hash).page === "overview") {
          e.preventDefault();
          mmsae.listMove(0); // into what was found
        }
      });
    }
    const fields = ["names", panel.meta.captions && "captions", panel.lifted && "labels"].filter(Boolean);
    search.placeholder = `Search (/) ${fields.join(", ")}`;
    if (document.activeElement !== search) search.value = at.page === "overview" ? (at.query ?? "") : "";
    const pages = PAGES.filter(([id]) => !optional.includes(id) || mmsae.site.pages.includes(id));
    const here = { latent: "overview", sample: "samples" }[at.page] ?? at.page;
    const switcher = mmsae.site.panels.length > 1 && h("span.segmented", { role: "group", "aria-label": "which SAE" }, mmsae.site.panels.map((p) => h("a", { href: p.id === "main" ? "#/" : `#/${p.id}/`, "aria-current": p.id === panel.id ? "true" : null, title: p.control ? "random weights: what chance looks like" : "" }, p.title)));
    const theme = h("button.icon", { type: "button", title: "Light or dark (t)", "aria-label": "light or dark", onclick: flip }, "◐");
    const help = h("button.icon", { type: "button", title: "Keys (?)", "aria-label": "help", onclick: keys }, "?");
    const nav = h("nav", { "aria-label": "pages" }, pages.map(([id, text, path]) => h("a", { href: id === "overview" && at.page !== id ? panel.listed() : `${panel.home()}${path}`, "aria-current": id === here ? "page" : null }, text)));
    requestAnimationFrame(() => nav.scrollTo({ left: (nav.querySelector("[aria-current]")?.offsetLeft ?? 0) - 60 }));
    if (old) {
      document.querySelector("#bar nav").replaceWith(nav);
      document.querySelector("#bar .panels").replaceChildren(switcher || "");
    } else document.getElementById("bar").replaceChildren(h("a.brand", { href: "#/" }, mmsae.title.replace(/^Concepts of /, "")), h("span.panels", {}, switcher), search, nav, h("span.grow"), theme, help);
  }

  function flip() {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    mmsae.notes.write("mmsae:theme", document.documentElement.dataset.theme);
    dispatchEvent(new Event("resize"));
    document.querySelectorAll(".scatter").forEach((s) => s.draw());
  }

  const KEYS = [["/", "search: words, #12, or like #12 - #40 + dog"], ["j, k", "next and previous latent"], ["arrows", "about the list; left and right from latent to latent"], ["Enter", "from the search to what is found; open"], ["b", "bookmark"], ["n", "rename"], ["h", "heat, spotlight, areas, off"], ["u, Esc", "back to the list"], ["q", "query"], ["t", "light or dark"], ["?", "this list"]];
  function keys() {
    const dialog = h("dialog.help", {}, h("h2", {}, "Keys"), h("dl", {}, KEYS.map(([k, what]) => [h("dt", {}, k.split(/(?=, )/).map((x) => h("kbd", {}, x.replace(", ", "")))), h("dd", {}, what)])), h("p.hint", {}, "Plots: drag to choose, wheel to zoom, Shift and drag to move, double-click to reset."), h("form", { method: "dialog" }, h("button.primary", {}, "Close")));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }

  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape") || document.querySelector("dialog[open]")) return;
    const at = parse(location.hash);
    const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    const across = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const listed = ["overview", "samples", "query"].includes(at.page);
    const does = {
      "/": () => document.querySelector("#bar input.search").focus(),
      "?": keys,
      t: flip,
      q: () => (location.hash = `${panel.home()}query`),
      h: () => {
        const modes = [...document.querySelectorAll(".segmented[aria-label=maps] button")];
        modes[(modes.findIndex((b) => b.getAttribute("aria-pressed") === "true") + 1) % modes.length]?.click();
      },
    };
    const home = () => (location.hash = panel.listed());
    if (at.page === "latent") {
      if (by) location.hash = panel.link((at.latent + by + panel.size) % panel.size);
      Object.assign(does, { b: () => document.querySelector(".title .star").click(), n: () => document.querySelector("input.rename").select(), u: home, Escape: home });
    } else if (listed) {
      if (by) mmsae.listMove(by);
      if (across) mmsae.listMove(across, true);
    } else {
      does.u = home;
      if (at.page === "sample") does.Escape = () => (history.length > 1 ? history.back() : home());
    }
    if (typing) event.target.blur();
    else if (by || (listed && across) || does[event.key]) {
      event.preventDefault(); // or the key is typed where it leads
      does[event.key]?.();
    }
  });

  addEventListener("hashchange", mmsae.route);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // what follows # is an address here
    document.getElementById("page").focus();
  });
  mmsae.title = document.title;
  const theme = mmsae.notes.read("mmsae:theme");
  if (theme) document.documentElement.dataset.theme = theme;
  mmsae.load("site").then((site) => {
    mmsae.site = site;
    document.body.classList.toggle("blur", site.images === "blur");
    return mmsae.route();
  }).catch((error) => document.getElementById("page").replaceChildren(h("p.warning", {}, error.message)));
})();
