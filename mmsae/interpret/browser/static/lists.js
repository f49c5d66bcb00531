/* A long list of which only what is in view exists, as rows or as a grid of cards. */
"use strict";

(() => {
  const { h } = mmsae;

  /** make(i) gives the element of entry i; height: of a row in pixels, or a function of the width; least: of a card's width, 0 for rows. */
  mmsae.virtual = ({ make, height: tall, least = 0, label }) => {
    const inner = h("div.inner");
    const root = h("div.virtual", { tabIndex: -1, role: "list", "aria-label": label }, inner);
    const shown = new Map();
    let [n, columns, focus, height] = [0, 1, -1, 1];

    const place = () => {
      columns = least ? Math.max(1, Math.floor(root.clientWidth / least)) : 1;
      height = typeof tall === "function" ? tall(root.clientWidth / columns) : tall;
      const rows = Math.ceil(n / columns);
      inner.style.height = `${rows * height}px`;
      const from = Math.max(0, Math.floor(root.scrollTop / height) - 2) * columns;
      const to = Math.min(n, (Math.ceil((root.scrollTop + root.clientHeight) / height) + 2) * columns);
      for (const [i, element] of shown)
        if (i < from || i >= to) {
          element.remove();
          shown.delete(i);
        }
      for (let i = from; i < to; i++) {
        let element = shown.get(i);
        if (!element) {
          element = make(i);
          element.setAttribute("role", "listitem");
          shown.set(i, element);
          inner.append(element);
        }
        const share = 100 / columns;
        Object.assign(element.style, { position: "absolute", top: `${Math.floor(i / columns) * height}px`, left: `${(i % columns) * share}%`, width: `${share}%`, height: `${height}px` });
        element.classList.toggle("at", i === focus);
      }
    };

    root.fill = (count, keep = false) => {
      n = count;
      shown.forEach((e) => e.remove());
      shown.clear();
      if (!keep) {
        root.scrollTop = 0;
        focus = -1;
      }
      place();
    };
    /** Go on by some entries, or with rows by as many of what lies below each other. */
    root.move = (by, rows = false) => {
      if (!n) return -1;
      focus = Math.max(0, Math.min(n - 1, focus < 0 ? 0 : focus + by * (rows ? columns : 1)));
      const top = Math.floor(focus / columns) * height;
      if (top < root.scrollTop) root.scrollTop = top;
      if (top + height > root.scrollTop + root.clientHeight) root.scrollTop = top + height - root.clientHeight;
      place();
      shown.get(focus)?.querySelector("a")?.focus({ preventScroll: true });
      return focus;
    };
    root.addEventListener("scroll", place, { passive: true });
    new ResizeObserver(place).observe(root);
    return root;
  };
})();
