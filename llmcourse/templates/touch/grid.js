// Rounding to a grid of 2^bits values, a scale (in 16 bits, rounded up) and a zero point for each group of weights.
(data, now, { percent, short, sum }) => {
  const f = Math.fround, W = data.weights.map(f), size = Number(now.group), top = 2 ** now.bits - 1;
  const up16 = x => {  // the smallest float16 that is at least x ≥ 0
    if (x === 0) return 0;
    const step = 2 ** (Math.max(Math.floor(Math.log2(x)), -14) - 10);
    return Math.ceil(x / step) * step;
  };
  const even = x => {  // to the nearest whole number, ties to the even one
    const low = Math.floor(x), rest = x - low;
    return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
  };
  const rounded = [], marks = [];
  for (let g = 0; g < W.length; g += size) {
    const group = W.slice(g, g + size), low = Math.min(...group, 0), high = Math.max(...group, 0);
    const range = now.symmetric ? f(2 * Math.max(-low, high)) : f(high - low);
    const scale = up16(f(range / top)) || 1;
    const zero = now.symmetric ? 2 ** (now.bits - 1) : even(f(-low / scale));
    for (const w of group) {
      const code = Math.min(Math.max(even(f(w / scale)) + zero, 0), top);
      rounded.push(f((code - zero) * scale));
    }
    if (now.bits <= 4) {
      for (let q = 0; q <= top; q++) {
        const v = (q - zero) * scale;
        if (Math.abs(v) <= data.most) marks.push(["line", [[g - 0.4, v], [g + size - 0.6, v]], "faint"]);
      }
    }
  }
  W.forEach((w, i) => marks.push(["line", [[i, w], [i, rounded[i]]], "plain"]));
  W.forEach((w, i) => marks.push(["dot", i, rounded[i], "b"], ["dot", i, w, "a"]));
  const error = Math.sqrt(sum(W.map((w, i) => (w - rounded[i]) ** 2)) / sum(W.map(w => w * w)));
  const zeros = rounded.filter(r => r === 0).length, own = (now.symmetric ? 16 : 16 + now.bits) / size;
  const edge = Math.ceil(data.most * 10) / 10, groups = W.length / size;
  return {
    width: 640, height: 300, left: 48, marks,
    x: { low: -1, high: W.length, label: "number of the weight", ticks: [0, 16, 32, 48].map(v => [v, `${v}`]) },
    y: { low: -edge, high: edge, grid: true, label: "weight: solid; rounded: hollow",
      ticks: [-edge, 0, edge].map(v => [v, v.toFixed(1)]) },
    say: `${now.bits} bits, ${groups} ${groups === 1 ? "grid" : "grids"} of ${top + 1} values, `
      + `${now.symmetric ? "symmetric" : "affine"}. The rounding error is ${percent(error)} of the weights' own size; `
      + `${zeros} of ${W.length} weights become 0. With its share of the scales`
      + `${now.symmetric ? "" : " and zero points"} a weight takes ${short(now.bits + own)} bits.`,
    values: { error, zeros, rounded, bits: now.bits + own },
  };
}
