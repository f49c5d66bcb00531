/* One SAE's data: its table, and records of latents and samples that are loaded as they are needed. */
"use strict";

(() => {
  const panels = new Map();

  /** The panel of an SAE, once its table is there. */
  mmsae.panel = (id) => {
    if (!panels.has(id)) panels.set(id, open(id));
    return panels.get(id);
  };

  async function open(id) {
    const [meta, table, names, tops] = await Promise.all(
      ["meta", "table", "names", "tops"].map((what) => mmsae.load(`${id}/${what}`)),
    );
    return new Panel(meta, table, names, tops);
  }

  class Panel {
    constructor(meta, table, names, tops) {
      Object.assign(this, { meta, id: meta.id, size: meta.d_sae, words: names.words.split("\n"), lifted: names.labels, tops });
      this.columns = Object.fromEntries(Object.entries(table).map(([name, packed]) => [name, mmsae.array(packed)]));
      this.names = new Map(
        names.names.map(([j, name, method, score, margin, z, auroc, by, note]) => [
          j,
          { name, method, score, margin, z, auroc, by, note },
        ]),
      );
      this.kind = Uint8Array.from({ length: this.size }, (_, j) => this.#kind(j));
      this.density = new Float32Array(this.size);
      for (const m of meta.modalities) this.columns[`${m}.density`].forEach((d, j) => d > this.density[j] && (this.density[j] = d));
      mmsae.notes.onchange((panel) => panel === this && this.orders?.clear()); // names are part of some
    }

    /** 0 dead, 1 image only, 2 text only, 3 both; "only" is 95 % of the mean value. */
    #kind(j) {
      const fires = (m) => (this.columns[`${m}.n`]?.[j] ?? 0) > 0;
      const image = fires("image");
      const text = fires("text");
      if (!image || !text) return (image ? 1 : 0) + (text ? 2 : 0);
      const share = this.columns.modality[j];
      return share >= 0.95 ? 1 : share <= 0.05 ? 2 : 3;
    }

    /** The record of a latent: examples of each modality with maps, neighbours, words, scores. */
    async latent(j) {
      const { shard, modalities } = this.meta;
      const data = await mmsae.load(`${this.id}/latents/${Math.floor(j / shard)}`);
      const i = j % shard;
      const near = (what) =>
        data[what] &&
        mmsae
          .row(data[what].to, i)
          .map((to, k) => [to, mmsae.row(data[what].value, i)[k]])
          .filter(([to]) => to !== mmsae.none(data[what].to));
      const record = { latent: j, words: data.words[i], scores: data.scores[i], near: near("near"), bridge: near("bridge") };
      record.together = Object.fromEntries(modalities.map((m) => [m, near(`co.${m}`)]));
      for (const m of modalities) record[m] = this.#examples(data[m], i, j, m);
      return record;
    }

    #examples(data, i, j, m) {
      const max = this.columns[`${m}.max`][j];
      const width = data.item.s[1];
      const none = mmsae.none(data.item);
      const value = mmsae.row(data.value, i);
      const heat = data.heat && { ...data.heat, at: offsets(data.heat) };
      const all = mmsae.row(data.item, i).map((item, k) => ({
        item,
        modality: m,
        value: (value[k] / 32767) * max,
        heat: heat && this.#heat(heat, i * width + k, i),
      }));
      const { top, quantiles } = this.meta;
      const parts = [];
      const each = (width - top) / quantiles[m];
      for (let q = 0; q < quantiles[m]; q++) parts.push(all.slice(top + q * each, top + (q + 1) * each));
      const fired = (list) => list.filter((e) => e.item !== none && e.item >= 0);
      return {
        top: fired(all.slice(0, top)),
        quantiles: parts.map(fired),
        rows: mmsae.array(data.rows)[i],
        histogram: { ...data.histogram, height: mmsae.row(data.histogram.height, i), tall: mmsae.array(data.histogram.tall)[i] },
        lift: data.lift ? this.#lift(data.lift, i) : [],
        upper: heat ? mmsae.array(data.heat.upper)[i] : 0,
      };
    }

    #heat(heat, pair, i) {
      const from = heat.at[pair];
      const to = heat.at[pair + 1];
      if (from === to) return null;
      return {
        position: mmsae.array(heat.position).subarray(from, to),
        value: mmsae.array(heat.value).subarray(from, to),
        upper: mmsae.array(heat.upper)[i],
      };
    }

    #lift(lift, i) {
      const none = mmsae.none(lift.label);
      const [count, share, times] = ["count", "share", "lift"].map((k) => mmsae.row(lift[k], i));
      return mmsae
        .row(lift.label, i)
        .map((label, k) => ({ label: this.meta.labels[label], count: count[k], share: share[k], lift: times[k] }))
        .filter((x, k) => mmsae.row(lift.label, i)[k] !== none && x.count > 0);
    }

    /** A sample: ids, caption, label, image, and which latents fire on it. */
    async sample(e) {
      const { pack, modalities, labels } = this.meta;
      const data = await mmsae.load(`${this.id}/items/${Math.floor(e / pack)}`);
      const i = e % pack;
      const out = { item: e, label: labels[data.label[i]] ?? "", picture: data.picture?.[i] ?? "", tokens: data.tokens?.[i], grid: {}, codes: {} };
      for (const k of ["uid", "shard", "key", "caption", "view"]) out[k] = data[k][i];
      for (const m of modalities) {
        const d = data[m];
        const own = data[`grid.${m}`]?.[i];
        out.grid[m] = own ? { ...this.meta.grid[m], rows: own[0], cols: own[1] } : this.meta.grid[m];
        const [start, latent, value] = [d.start, d.latent, d.value].map(mmsae.array);
        out.codes[m] = { latents: [], near: [] };
        for (let at = start[i]; at < start[i + 1]; at++)
          out.codes[m].latents.push([latent[at], value[at] / 127, (value[at] / 127) * this.columns[`${m}.max`][latent[at]]]);
        const cosine = mmsae.row(d.cosine, i);
        out.codes[m].near = mmsae.row(d.near, i).map((to, k) => [to, cosine[k] / 255]).filter(([to]) => to !== mmsae.none(d.near));
      }
      return out;
    }

    /** {modality: Map(latent -> {position, value, upper})} where the strongest latents of a sample fire in it. */
    async maps(e) {
      const { pack, maps } = this.meta;
      const out = Object.fromEntries(this.meta.modalities.map((m) => [m, new Map()]));
      if (!maps) return out;
      const i = e % pack;
      for (const [m, data] of Object.entries(await mmsae.load(`${this.id}/maps/${Math.floor(e / pack)}`))) {
        const [start, latent, upper] = [data.start, data.latent, data.upper].map(mmsae.array);
        const heat = { ...data, at: offsets(data) };
        for (let k = start[i]; k < start[i + 1]; k++) {
          const found = this.#heat(heat, k, k);
          if (found) out[m].set(latent[k], { ...found, upper: upper[k] });
        }
      }
      return out;
    }

    /** Up to three labels that the samples on which a latent fires have more often than all samples. */
    labelsOf(j) {
      return this.lifted ? mmsae.row(this.lifted, j).filter((l) => l !== mmsae.none(this.lifted)).map((l) => this.meta.labels[l]) : [];
    }

    /** The number of the sample with a uid, or -1. */
    async find(uid) {
      const { uid: all } = await mmsae.load(`${this.id}/samples`);
      return all.indexOf(uid);
    }

    /** [shown items, percentiles in 0..1] on which a latent fires in a modality; empty where it has none. */
    async list(j, m) {
      const [items, rank, n] = await this.#listed(j, m, "rank");
      return [items, Float32Array.from(rank, (r) => Math.max(mmsae.onGrid(r / n), mmsae.onGrid.step))];
    }

    /** [shown items, numbers of areas] where a latent has any: all of them, also where `list` leaves weak ones out. */
    async areas(j) {
      return this.#listed(j, "areas", "count");
    }

    /** [shown items, numbers of areas] where latents together have any, if they have one name; else null. */
    async areasTogether(latents) {
      const found = (await mmsae.load(`${this.id}/together`))[latents.join(",")];
      return found ? [mmsae.array(found.item), mmsae.array(found.count)] : null;
    }

    async #listed(j, which, what) {
      const data = (await mmsae.load(`${this.id}/lists/${Math.floor(j / this.meta.shard)}`))[which];
      if (!data) return [[], [], 0];
      const i = j % this.meta.shard;
      const start = mmsae.array(data.start);
      const part = (packed) => mmsae.array(packed).subarray(start[i], start[i + 1]);
      return [part(data.item), part(data[what]), data.n ? mmsae.array(data.n)[i] : 0];
    }

    /** The first items of a latent, without its record. */
    top(j, m) {
      const packed = this.tops[m];
      return packed ? mmsae.row(packed, j).filter((e) => e !== mmsae.none(packed)) : [];
    }

    name(j) {
      return mmsae.notes.name(this, j) ?? this.names.get(j)?.name ?? null;
    }

    link(j) {
      return `${this.home()}latent/${j}`;
    }

    sampleLink(uid) {
      return `${this.home()}sample/${encodeURIComponent(uid)}`;
    }

    samplesLink(words) {
      return `${this.home()}samples/${encodeURIComponent(words)}`;
    }

    searchLink(words) {
      return this.listLink({ query: words });
    }

    /** The list of latents that is searched, filtered, ordered and chosen from an area in some way; {} is all of them. */
    listLink({ query, filter, order, up, area }) {
      const said = { q: query, filter: filter !== "all" && filter, order, up: up && 1, area: area && `${area.plot}:${area.box.join(",")}` };
      const parts = Object.entries(said).filter(([, v]) => v).map(([k, v]) => `${k}=${encodeURIComponent(v).replaceAll("%3A", ":").replaceAll("%2C", ",")}`);
      return `${this.home()}${parts.length ? `?${parts.join("&")}` : ""}`;
    }

    queryLink(text) {
      return `${this.home()}query${text ? `?q=${encodeURIComponent(text)}` : ""}`;
    }

    /** The list of latents as it was last. */
    listed() {
      return this.seen?.address ?? this.home();
    }

    home() {
      return this.id === "main" ? "#/" : `#/${this.id}/`;
    }
  }

  function offsets(heat) {
    if (!heat.size.starts) {
      const size = mmsae.array(heat.size);
      const at = new Int32Array(size.length + 1);
      for (let k = 0; k < size.length; k++) at[k + 1] = at[k] + size[k];
      heat.size.starts = at;
    }
    return heat.size.starts;
  }
})();
