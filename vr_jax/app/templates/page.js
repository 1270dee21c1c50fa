// The figures of the page: the map of an insertion over the image, or the window of the token under the pointer.
(() => {
  const state = new WeakMap();

  function load(figure) {
    if (state.has(figure)) return state.get(figure);
    const source = figure.dataset.figure, data = JSON.parse(source);
    const loaded = url => { const image = new Image(); image.onload = () => draw(figure); image.src = url; return image; };
    const one = { source, data, insertion: data.insertions.length - 1, token: -1, pinned: -1 };
    state.set(figure, one);
    one.maps = data.insertions.map(insertion => loaded(insertion.map));
    one.atlases = data.insertions.map(insertion => loaded(insertion.atlas));
    one.observer = new ResizeObserver(() => draw(figure));
    one.observer.observe(figure.querySelector(".vr-stage"));
    return one;
  }

  function draw(figure) {
    const one = state.get(figure), canvas = figure.querySelector("canvas"), scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight, context = canvas.getContext("2d");
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    say(figure);
    if (one.insertion < 0) return;
    const { data } = one;
    if (one.token < 0) {
      const map = one.maps[one.insertion];
      if (map.complete && map.naturalWidth) context.drawImage(map, 0, 0, width, height);
      return;
    }
    const [left, top, right, bottom] = data.boxes[one.token].map((edge, k) => edge * (k % 2 ? height : width));
    context.fillStyle = "rgba(0, 0, 0, .5)";
    context.fillRect(0, 0, width, height);
    context.clearRect(left, top, right - left, bottom - top);
    const atlas = one.atlases[one.insertion], [wide, high] = data.slot, [rows, columns] = data.patches[one.token];
    const x = one.token % data.columns * wide, y = Math.floor(one.token / data.columns) * high;
    if (atlas.complete && atlas.naturalWidth)
      context.drawImage(atlas, x, y, columns, rows, left, top, right - left, bottom - top);
    context.lineWidth = 2; context.strokeStyle = "#fff"; context.strokeRect(left, top, right - left, bottom - top);
  }

  function say(figure) {
    const one = state.get(figure), line = figure.querySelector(".vr-token"), insertion = one.data.insertions[one.insertion];
    if (!one.data.insertions.length) return;
    let text = "Choose an insertion to see what its vision tokens re-read.";
    if (insertion && one.token < 0) text = `Whole image: ${insertion.note}.`;
    if (insertion && one.token >= 0) {
      const [row, column] = one.data.places[one.token];
      text = `Token in row ${row + 1}, column ${column + 1}${one.pinned === one.token ? " (pinned)" : ""}: `
        + `largest weight ${insertion.largest[one.token].toFixed(2)} times uniform, `
        + `update ${(100 * insertion.updates[one.token]).toFixed(1)}% of its state.`;
    }
    if (line.textContent !== text) line.textContent = text;
  }

  // Windows can overlap; the token is that whose window has its middle nearest.
  function tokenAt(figure, event) {
    const box = figure.querySelector("canvas").getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    let best = -1, nearest = Infinity;
    load(figure).data.boxes.forEach(([left, top, right, bottom], k) => {
      if (x < left || x >= right || y < top || y >= bottom) return;
      const far = ((left + right) / 2 - x) ** 2 + ((top + bottom) / 2 - y) ** 2;
      if (far < nearest) { nearest = far; best = k; }
    });
    return best;
  }

  function show(figure, token) {
    const one = load(figure);
    if (one.token !== token) { one.token = token; draw(figure); }
  }

  const figureOf = event => event.target instanceof Element ? event.target.closest(".vr-figure") : null;
  const onStage = event => event.target instanceof Element && event.target.closest(".vr-stage") !== null;

  document.addEventListener("pointermove", event => {
    const figure = figureOf(event);
    if (figure && onStage(event) && load(figure).pinned < 0 && event.pointerType !== "touch") show(figure, tokenAt(figure, event));
  });
  document.addEventListener("pointerout", event => {
    const figure = figureOf(event);
    if (figure && onStage(event) && load(figure).pinned < 0 && !event.relatedTarget?.closest?.(".vr-stage")) show(figure, -1);
  });
  document.addEventListener("click", event => {
    const figure = figureOf(event);
    if (!figure) return;
    const one = load(figure), button = event.target.closest("[data-insertion]");
    if (button) {
      one.insertion = button.dataset.insertion === "" ? -1 : Number(button.dataset.insertion);
      figure.querySelectorAll("[data-insertion]").forEach(other => other.classList.toggle("chosen", other === button));
    } else if (onStage(event)) {
      const token = tokenAt(figure, event);
      one.pinned = token === one.pinned ? -1 : token;
      one.token = one.pinned;
    } else return;
    draw(figure);
  });
  document.addEventListener("keydown", event => {
    const figure = figureOf(event);
    if (!figure || !onStage(event)) return;
    const one = load(figure), move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") one.pinned = one.token = -1;
    else if (move && one.data.places.length) {
      const [row, column] = one.token < 0 ? [-move[0], -move[1]] : one.data.places[one.token];
      const next = one.data.places.findIndex(([r, c]) => r === row + move[0] && c === column + move[1]);
      if (next >= 0) one.pinned = one.token = next;
    } else return;
    event.preventDefault();
    draw(figure);
  });

  // Gradio puts the figures into the page whenever an answer is ready. From the second answer on it changes the figure that
  // is there into the new one: the element stays, its data may be others, and its canvas and its line are empty.
  function isShown(figure) {
    const one = state.get(figure);
    if (one?.source !== figure.dataset.figure) return false;
    return !one.data.insertions.length || figure.querySelector(".vr-token").textContent !== "";
  }
  const find = () => document.querySelectorAll(".vr-figure").forEach(figure => {
    if (isShown(figure)) return;
    state.get(figure)?.observer.disconnect();
    state.delete(figure);
    load(figure);
    draw(figure);
  });
  const watched = { childList: true, subtree: true, attributes: true, attributeFilter: ["data-figure"] };
  new MutationObserver(find).observe(document.documentElement, watched);
  find();
})();
