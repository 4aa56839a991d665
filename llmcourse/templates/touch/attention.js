// The softmax of the scores of one head, over what a mask lets each token see.
(data, now, { percent, sum }) => {
  const T = data.tokens.length, scores = data.heads[now.head], row = now.row - 1;
  const may = (i, j) => now.mask === "none" || (j <= i && (now.mask === "causal" || i - j < now.window));
  const weights = scores.map((line, i) => {
    const most = Math.max(...line.filter((_, j) => may(i, j)));
    const e = line.map((s, j) => may(i, j) ? Math.exp(s - most) : 0), all = sum(e);
    return e.map(x => x / all);
  });
  const marks = [];
  weights.forEach((line, i) => line.forEach((w, j) => {
    if (may(i, j)) marks.push(["cell", j + 0.04, i + 0.04, j + 0.96, i + 0.96, Math.round(w * 1e4) / 1e4]);
    else marks.push(["dot", j + 0.5, i + 0.5, "faint"]);
  }));
  marks.push(["bar", 0, row, T, row + 1, "frame"]);
  const order = weights[row].map((w, j) => [w, j]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, 3);
  const told = order.filter(([w]) => w > 0.0005).map(([w, j]) => `“${data.tokens[j]}” (${j + 1}) with ${percent(w)}`);
  const seen = scores[row].filter((_, j) => may(row, j)).length;
  return {
    width: 460, height: 68 + 24 * T, left: 84, marks,
    x: { low: 0, high: T, label: "token that is looked at", ticks: data.tokens.map((_, j) => [j + 0.5, `${j + 1}`]) },
    y: { low: T, high: 0, label: "token that looks", ticks: data.tokens.map((t, i) => [i + 0.5, `${t} ${i + 1}`]) },
    say: `“${data.tokens[row]}” (${row + 1}) may look at ${seen} of ${T} tokens. It looks most at ${told.join(", ")}.`,
    values: { weights, seen },
  };
}
