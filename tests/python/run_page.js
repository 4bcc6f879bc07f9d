// Runs the script of a report page against a document that only keeps what is put into it, and
// prints the text of every element as JSON: node run_page.js report.html
"use strict";
const page = require("fs").readFileSync(process.argv[2], "utf8");
const between = (from, to) => page.slice(page.lastIndexOf(from) + from.length, page.lastIndexOf(to));
const start = '<script type="application/json" id="data">';
const data = page.slice(page.indexOf(start) + start.length).split("</script>")[0];

const elements = new Map(), removed = [];
function element(id) {
  const context = { createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }) };
  for (const name of ["drawImage", "putImageData", "strokeRect", "fillRect", "beginPath", "moveTo", "lineTo", "stroke", "clearRect"]) context[name] = () => {};
  return {
    id, textContent: "", innerHTML: "", value: "0", dataset: {}, style: {}, readyState: 0, currentTime: 0,
    children: [], append(...more) { this.children.push(...more); }, remove() { removed.push(id); },
    querySelectorAll: () => [], querySelector: () => element(""), setAttribute() {}, addEventListener() {},
    getContext: () => context, getBoundingClientRect: () => ({ left: 0, top: 0, width: 1, height: 1 }),
    play: () => Promise.resolve(), pause() {},
  };
}
const document = {
  title: "",
  getElementById(id) {
    // What the page's text declares, or what the script itself put in.
    const made = [...elements.values()].some((e) => e.innerHTML.includes(`id="${id}"`));
    if (!page.includes(`id="${id}"`) && !made) throw new Error("no element " + id);
    if (!elements.has(id)) elements.set(id, element(id));
    return elements.get(id);
  },
  createElement: element, querySelectorAll: () => [], addEventListener() {},
};
document.getElementById("data").textContent = data;
const names = ["document", "innerWidth", "matchMedia", "addEventListener", "requestAnimationFrame", "getComputedStyle"];
const values = [document, 390, () => ({ matches: false, addEventListener() {} }), () => {}, () => {}, () => ({ getPropertyValue: () => "#000" })];
new Function(...names, between("<script>", "</script>"))(...values);
const shown = { title: document.title, removed };
for (const [id, e] of elements) if (id !== "data") shown[id] = e.textContent + e.innerHTML;
console.log(JSON.stringify(shown));
