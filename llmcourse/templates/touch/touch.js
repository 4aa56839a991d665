// What all figures share. In front of it stands `const figure = (data, now, help) => scene;`, the rule of one of them.
// The scene is drawn here as llmcourse/touch.py draws the still picture; a test compares the two, number by number.
const root = document.currentScript?.closest(".llmcourse-touch")
  ?? document.querySelector(".llmcourse-touch:not([data-live])");
const told = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
const BLUE = "#0072B2", RED = "#D55E00", INK = "currentColor";
const CSS = `
.llmcourse-touch { max-width: 42rem; margin: 0 0 1rem; }
.llmcourse-touch svg { display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.llmcourse-touch .touch-controls { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin: .5rem 0; }
.llmcourse-touch label { display: inline-flex; align-items: center; gap: .5rem; font-size: 14px; min-height: 24px; }
.llmcourse-touch :is(input, select) { font: inherit; color: inherit; background: transparent; margin: 0; }
.llmcourse-touch :is(select, input[type=number]) { border: 1px solid; border-radius: 4px; padding: 2px 4px; }
.llmcourse-touch input[type=number] { width: 7em; }
.llmcourse-touch input[type=range] { width: 9rem; accent-color: ${BLUE}; }
.llmcourse-touch option { color: #000; background: #fff; }
.llmcourse-touch :focus-visible { outline: 3px solid; outline-offset: 2px; }
.llmcourse-touch output { display: block; font-size: 14px; line-height: 1.5; min-height: 4.5em; }
@media print { .llmcourse-touch .touch-controls { display: none; } }`;

const help = {
  // three digits: 1230000 → 1,230,000 and 0.0012345 → 0.00123
  short: x => Number(x.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 12 }),
  percent: x => `${(100 * x).toFixed(1)} %`,
  sum: list => list.reduce((a, b) => a + b, 0),
};

const ALONG = { a: { stroke: BLUE, "stroke-width": 2 },
  b: { stroke: RED, "stroke-width": 2, "stroke-dasharray": "6 4" },
  plain: { stroke: INK, "stroke-width": 1.5 }, faint: { stroke: INK, "stroke-width": 1, opacity: 0.6 } };
const FILLED = { a: { fill: BLUE }, hollow: { fill: "none", stroke: INK },
  frame: { fill: "none", stroke: RED, "stroke-width": 3 } };
const POINT = { a: { r: 2.5, fill: BLUE }, b: { r: 3.5, fill: "none", stroke: RED, "stroke-width": 1.5 },
  plain: { r: 6, fill: INK }, faint: { r: 1.5, fill: INK, opacity: 0.6 } };

// The scene as [tag, attributes, text] in pixels of a drawing that is `width` wide.
function pieces(scene, width) {
  const place = (axis, from, to) => {
    const f = axis.log ? Math.log : v => v;
    return v => from + (to - from) * (f(v) - f(axis.low)) / (f(axis.high) - f(axis.low));
  };
  const { left, height, x, y } = scene, right = width - 24, top = 26, bottom = height - 42;
  const X = place(x, left, right), Y = place(y, bottom, top), list = [];
  const line = (x1, y1, x2, y2) => list.push(["line", { x1, y1, x2, y2, stroke: INK, opacity: 0.25 }, ""]);
  const say = (at, up, words, anchor) => list.push(["text", { x: at, y: up, "text-anchor": anchor, fill: INK }, words]);
  for (const [v, words] of x.ticks) {
    if (x.grid) line(X(v), top, X(v), bottom);
    say(X(v), bottom + 16, words, "middle");
  }
  for (const [v, words] of y.ticks) {
    if (y.grid) line(left, Y(v), right, Y(v));
    say(left - 6, Y(v) + 4, words, "end");
  }
  say((left + right) / 2, height - 8, x.label, "middle");
  say(4, 14, y.label, "start");
  for (const [kind, ...m] of scene.marks) {
    if (kind === "line") {
      const points = m[0].map(([u, v]) => `${X(u).toFixed(2)},${Y(v).toFixed(2)}`).join(" ");
      list.push(["polyline", { points, fill: "none", ...ALONG[m[1]] }, ""]);
    } else if (kind === "dot") {
      list.push(["circle", { cx: X(m[0]), cy: Y(m[1]), ...POINT[m[2]] }, ""]);
    } else if (kind === "text") {
      say(X(m[0]), Y(m[1]) + 4, m[2], m[3]);
    } else {  // bar with a look, or cell with a strength from 0 to 1
      const [a, b, c, d] = [X(m[0]), Y(m[1]), X(m[2]), Y(m[3])];
      const box = { x: Math.min(a, c), y: Math.min(b, d), width: Math.abs(c - a), height: Math.abs(d - b) };
      list.push(["rect", { ...box, ...(kind === "cell" ? { fill: BLUE, opacity: m[4] } : FILLED[m[4]]) }, ""]);
    }
  }
  return list;
}

function element(tag, attributes, parent, words = "", space = "http://www.w3.org/1999/xhtml") {
  const made = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = words;
  return parent.appendChild(made);
}

const now = Object.fromEntries(told.controls.map(c => [c.name, c.start]));
const svg = element("svg", { role: "img" }, root, "", "http://www.w3.org/2000/svg");
const panel = element("div", { class: "touch-controls", role: "group", "aria-label": told.title }, root);
const output = element("output", { "aria-live": "polite", "aria-atomic": "true" }, root);
let drawn = 0;

function draw() {
  const scene = figure(told.data, now, help);
  const width = drawn = Math.max(300, Math.min(root.clientWidth || 560, scene.width));
  const size = { width, height: scene.height, viewBox: `0 0 ${width} ${scene.height}` };
  for (const [name, value] of Object.entries(size)) svg.setAttribute(name, value);
  svg.setAttribute("aria-label", `${told.alt} Now: ${scene.say}`);
  svg.replaceChildren();
  for (const [tag, attributes, words] of pieces(scene, width)) {
    element(tag, attributes, svg, words, "http://www.w3.org/2000/svg");
  }
  output.textContent = scene.say;
  Object.assign(root, { scene, pieces: pieces(scene, width) });  // for the tests
}

for (const c of told.controls) {
  const label = element("label", {}, panel, c.label);
  // JupyterLab leaves the keys to an element with this attribute: `b` would insert a cell
  const own = { name: c.name, "data-lm-suppress-shortcuts": "true" };
  const input = element(c.kind === "select" ? "select" : "input", own, label);
  for (const [value, words] of c.options ?? []) element("option", { value }, input, words);
  if (c.kind !== "select") input.type = c.kind;
  for (const side of ["min", "max", "step"]) if (side in c) input.setAttribute(side, c[side]);
  if (c.kind === "checkbox") input.checked = c.start; else input.value = c.start;
  const shown = c.kind === "range" ? element("span", { "aria-hidden": "true" }, label) : null;
  const read = () => {
    if (c.kind === "checkbox") return input.checked;
    if (c.kind === "select") return input.value;
    return input.value !== "" && input.checkValidity() ? Number(input.value) : null;
  };
  const change = () => {
    const value = read();
    input.setAttribute("aria-invalid", value === null);
    if (value === null) {
      output.textContent = `${c.label} is '${input.value}'; allowed: a number from ${c.min} to ${c.max}.`;
      return;
    }
    now[c.name] = value;
    if (shown) {
      shown.textContent = c.words ? c.words[value - c.min] : value.toFixed(c.digits);
      input.setAttribute("aria-valuetext", shown.textContent);
    }
    draw();
  };
  input.addEventListener("input", change);
  change();
}
element("style", {}, root, CSS);
for (const still of root.querySelectorAll(".touch-still")) still.remove();
root.setAttribute("data-live", "");
new ResizeObserver(() => {
  const width = Math.max(300, Math.min(root.clientWidth || 560, root.scene.width));
  if (width !== drawn) draw();
}).observe(root);
