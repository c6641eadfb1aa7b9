"use strict";
// Move a category's threshold on the page. Nothing is stored or sent, and only the overlays beside the page are loaded.
// Text enters the page as text (textContent), never as HTML: file names may hold markup.

const OUTCOMES = {
  missed: "Missed defects",
  alarm: "False alarms",
  found: "Found defects",
  good: "Good images",
  anomalous: "Anomalous images", // these two without ground truth
  normal: "Normal images",
};
const WORDS = { ...Object.fromEntries(Object.keys(OUTCOMES).map((name) => [name, name])), alarm: "false alarm" };
const outcomeOf = (label, score, threshold) => {
  const anomalous = score > threshold;
  if (label === null) return anomalous ? "anomalous" : "normal";
  return anomalous ? (label ? "found" : "alarm") : label ? "missed" : "good";
};
const short = (value) => String(Number(value.toPrecision(4)));
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

/** Return a short decimal from `rate` up, so close that `threshold_for` takes the same score of `count` for it. */
function written(rate, count) {
  const most = Math.min(0.5 / (count + 1), 0.02 * rate);
  for (let digits = 1; ; digits++) {
    const rounded = Math.ceil(rate * 10 ** digits - 1e-9) / 10 ** digits;
    if (rounded < 1 && rounded - rate < most) return rounded.toFixed(digits);
  }
}

class Explorer {
  constructor(box) {
    this.box = box;
    this.section = box.closest(".category");
    this.data = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    this.thumbnails = new Map();
    this.cards = [...this.section.querySelectorAll(".card")].map((card) => ({
      card,
      score: Number(card.dataset.score),
      label: card.dataset.label === undefined ? null : Number(card.dataset.label),
      grouped: Boolean(card.closest(".groups")),
    }));
    for (const { card, grouped } of this.cards) {
      const picture = card.querySelector("a img");
      if (picture && grouped) this.thumbnails.set(picture.parentNode.getAttribute("href"), picture.src);
    }
    this.rows = null;
    this.selected = -1;
    this.slider = this.find(".slider");
    this.exact = this.find(".exact");
    this.link = element("a", "");
    this.image = new Image();
    this.link.append(this.image);
    this.link.hidden = true;
    this.find(".viewer").prepend(this.link);
    this.listen();
    box.hidden = false;
    this.find(".was").style.left = `${100 * this.shareOf(this.data.threshold)}%`;
    this.move(this.data.threshold);
  }

  find(selector) {
    return this.box.querySelector(selector);
  }

  listen() {
    const plot = this.find(".plot");
    const drag = (event) => {
      const { left, width } = plot.getBoundingClientRect();
      this.move(this.valueAt((event.clientX - left) / width));
    };
    plot.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      plot.setPointerCapture(event.pointerId);
      drag(event);
      this.slider.focus({ preventScroll: true });
      event.preventDefault();
    });
    plot.addEventListener("pointermove", (event) => plot.hasPointerCapture(event.pointerId) && drag(event));
    this.slider.addEventListener("input", () => this.move(this.valueAt(this.slider.value / 1000)));
    this.exact.addEventListener("input", () => {
      const value = this.exact.valueAsNumber;
      if (Number.isFinite(value)) this.move(value);
    });
    this.exact.addEventListener("change", () => this.move(this.threshold)); // what is no number is replaced
    this.find(".reset").addEventListener("click", () => this.move(this.data.threshold));
    for (const button of this.box.querySelectorAll(".copy")) {
      button.addEventListener("click", () => this.copy(button.parentNode.querySelector("code")));
    }
    this.find(".browse").addEventListener("toggle", () => this.list());
    this.find(".filter").addEventListener("change", () => this.filter());
    this.find(".previous").addEventListener("click", () => this.step(-1));
    this.find(".next").addEventListener("click", () => this.step(1));
    this.image.addEventListener("error", () => this.picture(null, "The picture is not beside this page."));
    for (const name of ["pointerdown", "focusin"]) this.box.addEventListener(name, () => (Explorer.current = this));
  }

  valueAt(share) {
    const { low, high, log } = this.data.axis;
    const inside = Math.min(1, Math.max(0, share));
    // As many digits as a step of the slider needs: what is shown is the threshold, not a rounded copy.
    if (log) return Number((low * (high / low) ** inside).toPrecision(4));
    const decimals = Math.min(100, Math.max(0, Math.ceil(3 - Math.log10(high - low))));
    return Number((low + inside * (high - low)).toFixed(decimals));
  }

  shareOf(value) {
    const { low, high, log } = this.data.axis;
    const share = log ? (value > 0 ? Math.log(value / low) / Math.log(high / low) : 0) : (value - low) / (high - low);
    return Math.min(1, Math.max(0, share));
  }

  move(threshold) {
    this.threshold = threshold;
    const share = this.shareOf(threshold);
    this.find(".at").style.left = this.find(".above").style.left = `${100 * share}%`;
    this.slider.value = Math.round(1000 * share);
    if (document.activeElement !== this.exact || this.exact.valueAsNumber !== threshold) {
      this.exact.value = threshold;
    }
    this.totals = Object.fromEntries(Object.keys(OUTCOMES).map((outcome) => [outcome, 0]));
    this.outcomes = this.data.score.map((score, index) => outcomeOf(this.data.label[index], score, threshold));
    for (const outcome of this.outcomes) this.totals[outcome]++;
    const { missed, alarm, found, good, anomalous, normal } = this.totals;
    let text;
    if (this.find('[data-count="anomalous"]')) {
      this.count("anomalous", anomalous, anomalous + normal);
      text = `anomalous ${anomalous}`;
    } else {
      this.count("alarms", alarm, alarm + good);
      this.count("misses", missed, missed + found);
      text = `false alarms ${alarm}, misses ${missed}`;
    }
    this.slider.setAttribute("aria-valuetext", `${short(threshold)}: ${text}`);
    this.calibrate();
    this.label();
    this.group();
    this.mark();
  }

  count(name, part, whole) {
    const [number, rate] = this.find(`[data-count="${name}"]`).querySelectorAll("td");
    number.textContent = `${part} of ${whole}`;
    rate.textContent = percent(part, whole);
  }

  /** Write the commands: the inverse of `bkd_fast.decisions.threshold_for`. */
  calibrate() {
    const { normal, run } = this.data;
    if (!normal.length) return;
    const rank = normal.filter((score) => score <= this.threshold).length;
    this.count("normal", normal.length - rank, normal.length);
    if (!run) return;
    const commands = this.find(".commands");
    commands.hidden = rank === 0;
    this.find(".copied").textContent = "";
    if (rank === 0) {
      this.find(".sets").textContent = "All of these scores are above this threshold: no rate of false alarms sets it.";
      return;
    }
    const rate = (normal.length + 1 - rank) / (normal.length + 1);
    this.find(".sets").textContent =
      `Expect ${percent(rate, 1)} false alarms on good images like these ${normal.length}. ` +
      `The first command sets the threshold to ${short(normal[rank - 1])}, the highest of their scores up to this one.`;
    const [plain, renewed] = commands.querySelectorAll("code");
    const option = `--false-alarms ${written(rate, normal.length)}`;
    plain.textContent = `bkd-fast calibrate ${run} ${option}`;
    renewed.textContent = `bkd-fast calibrate ${run} good/ ${option}`;
  }

  async copy(code) {
    getSelection().selectAllChildren(code);
    let copied = false;
    try {
      await navigator.clipboard.writeText(code.textContent);
      copied = true;
    } catch {
      copied = document.execCommand("copy"); // a page without access to the clipboard
    }
    this.find(".copied").textContent = copied ? "Copied." : "Selected: press Ctrl+C to copy.";
  }

  /** Label the pictures anew. */
  label() {
    for (const { card, score, label } of this.cards) {
      const anomalous = score > this.threshold;
      card.querySelector(".compared").textContent = `${anomalous ? ">" : "≤"} ${short(this.threshold)}`;
      const word = card.querySelector(".predicted-is");
      word.textContent = anomalous ? "anomalous" : "normal";
      if (label === null) continue;
      word.classList.toggle("right", anomalous === Boolean(label));
      word.classList.toggle("wrong", anomalous !== Boolean(label));
    }
  }

  /** Put the pictures under their outcomes: the worst first, as in the page without this script. */
  group() {
    const groups = this.section.querySelector(".groups");
    const keys = Object.fromEntries(Object.keys(OUTCOMES).map((outcome) => [outcome, []]));
    for (const entry of this.cards) {
      if (entry.grouped) keys[outcomeOf(entry.label, entry.score, this.threshold)].push(entry);
    }
    const signature = JSON.stringify([this.totals, ...Object.values(keys).map((cards) => cards.length)]);
    if (signature === this.signature) return;
    this.signature = signature;
    groups.replaceChildren();
    for (const [outcome, cards] of Object.entries(keys)) {
      if (!this.totals[outcome]) continue;
      cards.sort((one, other) => (outcome === "missed" ? one.score - other.score : other.score - one.score));
      const heading = element("h4", `${OUTCOMES[outcome]} `);
      heading.append(element("small", `${cards.length} of ${this.totals[outcome]}`));
      const shown = element("div", "", "cards");
      shown.append(...cards.map(({ card }) => card));
      const group = element("div", "", "group");
      group.append(heading, shown);
      groups.append(group);
    }
  }

  /** Make the table of images when it is opened for the first time. */
  list() {
    if (this.rows || !this.find(".browse").open) return;
    const { name, truth, label, score } = this.data;
    this.rows = name.map((text, index) => {
      const row = document.createElement("tr");
      const cells = [short(score[index]), ""].map((cell) => element("td", cell));
      if (label[index] !== null) cells.unshift(element("td", truth[index]));
      row.append(element("th", text), ...cells);
      row.addEventListener("click", () => this.select(index));
      return row;
    });
    this.find(".list tbody").append(...this.rows);
    this.mark();
  }

  mark() {
    if (!this.rows) return;
    this.rows.forEach((row, index) => {
      const outcome = this.outcomes[index];
      if (row.dataset.outcome === outcome) return;
      row.dataset.outcome = outcome;
      row.lastChild.textContent = WORDS[outcome];
    });
    this.filter();
    this.caption();
  }

  filter() {
    const wanted = this.find(".filter").value;
    if (!this.rows) return;
    this.rows.forEach((row, index) => (row.hidden = Boolean(wanted) && this.outcomes[index] !== wanted));
  }

  step(by) {
    this.find(".browse").open = true;
    this.list();
    let index = this.selected < 0 && by < 0 ? this.rows.length : this.selected;
    do index += by;
    while (index >= 0 && index < this.rows.length && this.rows[index].hidden);
    if (index >= 0 && index < this.rows.length) this.select(index);
    this.find(".pair").scrollIntoView({ block: "nearest" });
  }

  select(index) {
    if (this.selected >= 0) this.rows[this.selected].removeAttribute("aria-current");
    this.selected = index;
    const row = this.rows[index];
    row.setAttribute("aria-current", "true");
    const list = this.find(".list");
    const head = list.querySelector("thead").offsetHeight;
    const top = row.offsetTop;
    if (top - head < list.scrollTop) list.scrollTop = top - head;
    else if (top + row.offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = top + row.offsetHeight - list.clientHeight;
    }
    const link = this.data.link[index];
    this.picture(link, "There is no picture of this image.");
    this.caption();
  }

  /** Show an image's thumbnail, or its overlay from the folder beside the page. */
  picture(link, otherwise) {
    this.link.hidden = link === null;
    this.find(".viewer .empty").hidden = link !== null;
    this.find(".viewer .empty").textContent = otherwise;
    if (link === null) return;
    this.link.setAttribute("href", link);
    this.image.src = this.thumbnails.get(link) ?? link;
  }

  caption() {
    if (this.selected < 0) return;
    const { name, truth, score } = this.data;
    const index = this.selected;
    const outcome = this.outcomes[index];
    const word = element("b", WORDS[outcome]);
    word.dataset.outcome = outcome;
    this.find(".viewer figcaption").replaceChildren(
      element("b", name[index]),
      element("span", truth[index]),
      element("span", `score ${short(score[index])}`),
      word,
    );
    this.image.alt = `${name[index]}: image, heat map, outlines`;
  }
}

const explorers = [...document.querySelectorAll(".explorer")].map((box) => new Explorer(box));
Explorer.current = explorers[0];
document.addEventListener("keydown", (event) => {
  if (!Explorer.current || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const typing = event.target.closest("select, textarea, input:not([type=range])");
  const arrow = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const by = event.target.matches(".slider") ? undefined : arrow; // the arrows of the slider move the threshold
  const step = by ?? { k: -1, j: 1 }[event.key];
  if (typing || !step) return;
  event.preventDefault();
  Explorer.current.step(step);
});
