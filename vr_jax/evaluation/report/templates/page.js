"use strict";
const byId = id => document.getElementById(id);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const cards = all("article.item");

// An image that several items show is in the page once. The other elements take it from there.
for (const image of all("img[data-same]")) image.src = byId(image.dataset.same).src;

// --- Filters
const benchmark = byId("benchmark"), category = byId("category"), search = byId("search");
const texts = new Map();

// Returns the text of a card in lower case, for the search.
function textOf(card) {
  if (!texts.has(card)) texts.set(card, card.querySelector(".text").textContent.toLowerCase());
  return texts.get(card);
}

function fillCategories() {
  // The list holds the categories of the chosen benchmark, or those of all benchmarks, grouped by benchmark.
  const groups = new Map();
  for (const { dataset } of cards) {
    if (benchmark.value && dataset.benchmark !== benchmark.value) continue;
    if (!groups.has(dataset.benchmark)) groups.set(dataset.benchmark, new Map());
    const counts = groups.get(dataset.benchmark);
    counts.set(dataset.category, (counts.get(dataset.category) ?? 0) + 1);
  }
  category.replaceChildren(new Option("all", ""));
  for (const [name, counts] of groups) {
    const options = [...counts].map(
      ([value, count]) => new Option(`${value} (${count})`, JSON.stringify([name, value])));
    if (groups.size < 2) { category.append(...options); continue; }
    const group = document.createElement("optgroup");
    group.label = [...benchmark.options].find(option => option.value === name)?.text ?? name;
    group.append(...options);
    category.append(group);
  }
}

// Shows the cards that match all filters.
function filter() {
  const state = document.querySelector('input[name="state"]:checked').value;
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const [inBenchmark, inCategory] = category.value ? JSON.parse(category.value) : [benchmark.value, null];
  let shown = 0;
  for (const card of cards) {
    const { dataset } = card;
    const fits = (!state || dataset.state === state) && (!inBenchmark || dataset.benchmark === inBenchmark)
      && (inCategory === null || dataset.category === inCategory)
      && (!words.length || words.every(word => textOf(card).includes(word)));
    card.hidden = !fits;
    shown += fits;
  }
  byId("count").textContent = `${shown.toLocaleString("en")} of ${cards.length.toLocaleString("en")} shown`;
  byId("nothing").hidden = shown > 0 || !cards.length;
}

for (const input of all('input[name="state"]')) input.onchange = filter;
category.onchange = search.oninput = filter;
benchmark.onchange = () => { fillCategories(); filter(); };
byId("reset").onclick = () => {
  document.querySelector('input[name="state"][value=""]').checked = true;
  benchmark.value = search.value = "";
  fillCategories();
  filter();
};
// A browser may restore the user's choices when it reloads the page, so the filters are applied once at the start.
fillCategories();
filter();

// --- Heat maps
// Shows the heat map with a label over an image, hides the others, and returns the note of the map.
function showMap(place, label) {
  let note = "";
  for (const map of all(".map", place)) {
    map.hidden = map.dataset.label !== label;
    if (!map.hidden) note = map.dataset.note;
  }
  return note;
}

// Sets the switch of a card to a heat map, if the card has it.
function choose(card, label) {
  const input = all(".images .segments input", card).find(one => one.value === label);
  if (!input) return;
  input.checked = true;
  card.querySelector(".heatnote").textContent = showMap(card, label);
}

byId("items").addEventListener("change", event => {
  const card = event.target.closest("article.item");
  if (card && event.target.type === "radio") choose(card, event.target.value);
});
for (const input of all('input[name="maps"]')) {
  input.onchange = () => { for (const card of cards) if (card.querySelector(".map")) choose(card, input.value); };
}

// --- Large view
const large = byId("large"), stage = byId("stage"), stack = stage.firstElementChild;
let current = null;  // This is the button of the image that the large view shows.

// Makes the image as large as the stage allows, at most eight times its size.
function fit() {
  const image = stack.querySelector("img:not(.map)");
  if (!image) return;
  const width = Number(image.getAttribute("width")), height = Number(image.getAttribute("height"));
  const scale = Math.min((stage.clientWidth - 32) / width, stage.clientHeight / height, 8);
  stack.style.width = `${width * scale}px`;
  stack.style.height = `${height * scale}px`;
}

// Shows the image of a button in the large view, with its heat maps and its texts.
function show(button) {
  current = button;
  const card = button.closest("article.item");
  stack.replaceChildren(...all("img, i.map", button).map(one => { const copy = one.cloneNode(); copy.removeAttribute("id"); copy.removeAttribute("style"); return copy; }));
  const places = byId("largemaps"), switcher = stack.querySelector(".map") && card.querySelector(".images .segments");
  places.replaceChildren();
  const heatNote = document.createElement("span");
  if (switcher) {
    const copy = switcher.cloneNode(true);
    all("input", copy).forEach((input, place) => {
      input.name = "largemap";
      input.checked = all("input", switcher)[place].checked;
      input.onchange = () => { choose(card, input.value); heatNote.textContent = showMap(stack, input.value); };
    });
    heatNote.textContent = card.querySelector(".heatnote").textContent;
    places.append(copy, document.querySelector("#controls .legend").cloneNode(true), heatNote);
  }
  const line = (tag, text) => { const one = document.createElement(tag); one.dir = "auto"; one.textContent = text; return one; };
  const [question, answer] = [".question", ".answer"].map(selector => card.querySelector(selector).textContent);
  const expected = card.querySelector("dd").textContent;
  byId("caption").replaceChildren(line("b", question), "\n", line("span", `expected ${expected}  ·  answered ${answer}`));
  if (!large.open) large.showModal();
  fit();
}

// Goes to another image of the cards that are shown.
function step(by) {
  const buttons = all("article.item:not([hidden]) .zoom");
  const next = buttons[buttons.indexOf(current) + by];
  if (next) show(next);
}

byId("items").addEventListener("click", event => {
  const button = event.target.closest(".zoom");
  if (button) show(button);
});
stage.onclick = event => { if (event.target === stage) large.close(); };
byId("close").onclick = () => large.close();
byId("previous").onclick = () => step(-1);
byId("next").onclick = () => step(1);
large.addEventListener("close", () => { stack.replaceChildren(); current?.focus(); });
large.addEventListener("keydown", event => {
  if (event.key === "Escape") { event.preventDefault(); large.close(); }
  if (event.target.type === "radio") return;  // There, the arrow keys choose a heat map.
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
window.addEventListener("resize", () => { if (large.open) fit(); });
