// What a page gains where scripts run: the search, a button that copies code, answers that open for the printer.
// Without it every page is whole: the chapters stand in a list, answers open by themselves.
(() => {
  "use strict";
  const script = document.currentScript;
  const root = new URL(script.dataset.index, document.baseURI);
  const chinese = document.documentElement.lang.startsWith("zh");
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];

  // What scrolls inside itself has to be reached by the keyboard.
  function reach() {
    for (const box of all("main pre, main .table, main math[display=block], main .long")) {
      if (box.scrollWidth > box.clientWidth + 1) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  }
  addEventListener("load", reach);
  addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);

  // An answer that a link leads into is opened.
  function unfold() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const shut = target && target.closest("details:not([open])");
    if (!shut) return;
    shut.open = true;
    target.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  unfold();

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("main details:not([open])");
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });

  // The list of chapters shows where the reader is; a chosen heading shuts the list it was chosen from.
  const list = document.getElementById("book-chapters");
  const here = list.querySelector("[aria-current]");
  if (here) list.scrollTop = here.offsetTop - list.clientHeight / 3;
  const toc = document.getElementById("book-toc");
  if (toc && toc.hidePopover) {
    toc.addEventListener("click", (event) => {
      if (event.target.closest("a") && toc.matches(":popover-open")) toc.hidePopover();
    });
  }

  // Copy code.
  const said = chinese ? ["复制", "已复制"] : ["Copy", "Copied"];
  for (const block of all("main div.code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = said[0];
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = said[1];
      setTimeout(() => { button.textContent = said[0]; }, 2000);
    });
    if (navigator.clipboard) block.append(button);
  }

  // The search. The index is a script, because a page that is opened as a file may load no data.
  const form = document.getElementById("book-search");
  const box = form.querySelector("input");
  const status = form.querySelector("[role=status]");
  const found = form.querySelector("ol");
  let index = null;
  form.hidden = false;

  function load() {
    if (index) return;
    index = { pages: [], places: [] };
    const tag = document.createElement("script");
    tag.src = root.href;
    tag.addEventListener("load", () => {
      index = window.bookIndex;
      for (const place of index.places) place.push(place[3].toLowerCase(), place[2].toLowerCase());
      show();
    });
    document.head.append(tag);
  }

  const count = (text, word) => Math.min(text.split(word).length - 1, 5);

  function search(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = [];
    if (!words.length || (query.trim().length < 2 && /^[\x00-\x7f]*$/.test(query))) return hits;
    for (const place of index.places) {
      const [page, anchor, heading, text, lower, lowerHeading] = place;
      const title = index.pages[page][1].toLowerCase();
      let score = 0;
      for (const word of words) {
        const one = (anchor ? 1 : 20) * count(title, word) + 8 * count(lowerHeading, word) + count(lower, word);
        if (!one) { score = 0; break; }
        score += one;
      }
      if (score) hits.push({ score, page: index.pages[page], anchor, heading, text, lower, words });
    }
    return hits.sort((a, b) => b.score - a.score);
  }

  function excerpt(hit) {
    const p = document.createElement("span");
    p.className = "excerpt";
    const at = Math.max(0, hit.lower.indexOf(hit.words[0]));
    const start = at < 50 ? 0 : hit.text.indexOf(" ", at - 50) + 1 || at;
    const piece = hit.text.slice(start, start + 150);
    const escaped = hit.words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    piece.split(new RegExp(`(${escaped.join("|")})`, "i")).forEach((part, i) => {
      if (i % 2) p.append(Object.assign(document.createElement("mark"), { textContent: part }));
      else p.append(part);
    });
    if (start) p.prepend("… ");
    if (start + 150 < hit.text.length) p.append(" …");
    return p;
  }

  function show() {
    found.replaceChildren();
    const query = box.value;
    const hits = search(query);
    for (const hit of hits.slice(0, 30)) {
      const link = document.createElement("a");
      link.href = new URL(hit.page[0] + (hit.anchor ? `#${hit.anchor}` : ""), root).href;
      const title = Object.assign(document.createElement("span"), { className: "title" });
      title.textContent = hit.page[1] + (hit.heading ? `: ${hit.heading}` : "");
      link.lang = hit.page[2];
      link.append(title, excerpt(hit));
      const item = document.createElement("li");
      item.append(link);
      found.append(item);
    }
    found.hidden = !hits.length;
    const none = chinese ? "没有找到" : "Nothing found";
    const some = chinese ? `找到 ${hits.length} 处` : `${hits.length} places found`;
    status.textContent = query.trim().length > 1 ? (hits.length ? some : none) : "";
    status.classList.toggle("only-heard", Boolean(hits.length) || !status.textContent);
  }

  box.addEventListener("focus", load);
  box.addEventListener("input", () => { load(); show(); });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const first = found.querySelector("a");
    if (first) first.focus();
  });
  form.addEventListener("keydown", (event) => {
    const links = all("a", found);
    const at = links.indexOf(document.activeElement);
    if (event.key === "Escape") {
      box.value = "";
      show();
      box.focus();
    } else if (event.key === "ArrowDown" && links.length) {
      event.preventDefault();
      links[Math.min(at + 1, links.length - 1)].focus();
    } else if (event.key === "ArrowUp" && at >= 0) {
      event.preventDefault();
      (links[at - 1] || box).focus();
    }
  });
  found.addEventListener("click", (event) => {
    if (event.target.closest("a")) found.hidden = true;
  });
  document.addEventListener("click", (event) => {
    if (!form.contains(event.target)) found.hidden = true;
  });
  box.addEventListener("click", () => { if (found.children.length) found.hidden = false; });
})();
