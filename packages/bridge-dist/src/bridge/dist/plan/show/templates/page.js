"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const findAll = selector => document.querySelectorAll(selector);
const models = name => Bokeh.documents.map(one => one.get_model_by_name(name)).filter(one => one !== null);

/** Give the text and lines of the charts the colours of the page. */
function paint() {
  // Charts are not drawn again to be printed: the style sheet gives dark ones a dark ground.
  if (matchMedia("print").matches) return;
  document.body.dataset.painted = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const style = getComputedStyle(document.documentElement);
  const [text, line, page] = ["--text", "--line", "--page"].map(name => style.getPropertyValue(name).trim());
  const colours = { major_label_text_color: text, axis_label_text_color: text, grid_line_color: line };
  for (const model of Bokeh.documents.flatMap(one => one.roots()).flatMap(root => [...root.references()])) {
    for (const name in colours) {
      if (name in model.properties && model[name] !== null) model[name] = colours[name];
    }
    if (model.glyph?.type === "Text" && model.name !== "on colour") {
      model.glyph.text_color = { value: text };
      model.glyph.background_fill_color = { value: page };  // a label may lie on the line that marks the limit
    }
  }
}

/** Leave room for the label of the longest bar, whatever the width of the page. */
function makeRoom() {
  const width = document.querySelector(".chart").clientWidth - 130;  // without the names of the bars
  const room = Math.min(150, width / 2);
  for (const range of models("padded")) range.range_padding = 2 * room / (width - room);  // Bokeh takes half of it
}

/** Write the number of its microbatch on each pass in the window that has room for it. */
function labelPasses() {
  const [range] = models("window"), [labels] = models("labels");
  const width = document.getElementById("schedule").clientWidth / (range.end - range.start);
  const shown = { x: [], y: [], label: [] };
  for (const { data: passes } of [...models("forward"), ...models("backward")]) {
    for (let index = 0; index < passes.left.length; index++) {
      const left = passes.left[index], right = passes.right[index], label = String(passes.microbatch[index]);
      if (left < range.start || right > range.end || (right - left) * width < 7 * label.length) continue;
      shown.x.push((left + right) / 2);
      shown.y.push(passes.rank[index]);
      shown.label.push(label);
    }
  }
  labels.data = shown;
}

function jump(place) {
  const [range] = models("window");
  const [first, last] = range.bounds, width = place === "whole step" ? last - first : (data.window ??= range.end - range.start);
  const start = { start: first, middle: (first + last - width) / 2, end: last - width }[place] ?? first;
  range.setv({ start, end: start + width });
}

/** Show the plan on the chosen machine with the chosen number of microbatches, computed when the page was written. */
function choose() {
  const read = name => Number(document.getElementById(name)?.value ?? 0);
  const chosen = data.grid.cells[read("machine")][read("count")];
  document.querySelector("#what-if output").textContent = data.grid.counts[read("count")];
  document.getElementById("verdict").className = `banner ${chosen.state}`;
  const texts = { ...chosen, ...chosen.numbers };
  for (const element of findAll("[data-value]")) element.textContent = texts[element.dataset.value];
  const columns = { memory: data.grid.memory[read("count")], time: chosen.time };
  for (const name in columns) {
    for (const source of models(name)) source.data = { ...source.data, ...columns[name] };
  }
  for (const range of models("memory range")) range.end = chosen.end;
  for (const line of models("limit")) line.location = chosen.limit_gib;
}

function offerCopies() {
  for (const button of findAll("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      // Deprecated; unlike the clipboard API, it works in every browser on a page opened from a file.
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected: copy it";
    });
  }
}

async function start() {
  offerCopies();
  for (const element of findAll("[data-chart]")) {
    element.textContent = "";
    await Bokeh.embed.embed_item(data.charts[element.dataset.chart], element);
  }
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  makeRoom();
  addEventListener("resize", makeRoom);
  if (models("window").length) {
    let waits = false;
    const relabel = () => {
      if (!waits) requestAnimationFrame(() => { waits = false; labelPasses(); });
      waits = true;
    };
    models("window")[0].change.connect(relabel);
    addEventListener("resize", relabel);
    labelPasses();
    document.getElementById("jumps").hidden = false;
    for (const button of findAll("[data-jump]")) button.addEventListener("click", () => jump(button.dataset.jump));
  }
  const form = document.getElementById("what-if");
  if (form !== null) {
    form.hidden = false;
    form.addEventListener("input", choose);
    form.addEventListener("reset", () => setTimeout(choose));  // after the inputs have their values back
  }
  document.body.dataset.ready = "";
}

start();
