"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element. What is inside, texts of others above all, is never read as HTML. */
function el(tag, properties = {}, ...inside) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...inside);
  return node;
}

const SMALL = 128; // pixels: pictures up to this are enlarged in squares, as the grids of PNGs are

/** Whether a key belongs to what is being typed into. */
const typing = (event) =>
  event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);

