// Temperature, top-k and top-p on the logits of a whole vocabulary, largest first.
(data, now, { percent, sum }) => {
  let total = 0;
  const logits = data.steps.map(step => (total += step) / 1000 / now.temperature);  // the first step is the largest
  const weights = logits.map(l => Math.exp(l - logits[0]));
  const all = sum(weights), before = weights.map(w => w / all);
  const top = now.top_k === "off" ? before.length : Number(now.top_k);
  // as in next_probabilities: all that tie with the k-th stay
  const possible = logits.filter(l => l >= logits[top - 1]), mass = sum(weights.slice(0, possible.length));
  let seen = 0, kept = 0;
  while (kept < possible.length && (now.top_p === 1 || seen < now.top_p)) seen += weights[kept++] / mass;
  while (weights[kept - 1] / mass < 1e-30) kept--;  // a probability that is none in float32
  const left = sum(before.slice(0, kept)), after = before.map((p, i) => i < kept ? p / left : 0);
  const shown = data.tokens.length, more = data.next;
  const part = (list, from, to) => sum(list.slice(from, to));
  const grouped = list => [...list.slice(0, shown), part(list, shown, shown + more), part(list, shown + more)];
  const names = [...data.tokens.map(t => `“${t}”`), `the next ${more}`, `the other ${before.length - shown - more}`];
  const [was, is] = [grouped(before), grouped(after)], marks = [];
  names.forEach((name, i) => {
    marks.push(["bar", 0, i + 0.12, is[i], i + 0.88, "a"], ["bar", 0, i + 0.12, was[i], i + 0.88, "hollow"]);
  });
  const entropy = -sum(after.filter(p => p > 0).map(p => p * Math.log(p))), open = Math.exp(entropy);
  return {
    width: 560, height: 68 + 20 * names.length, left: 104, marks,
    x: { low: 0, high: 1, grid: true, label: "probability",
      ticks: [0, 0.25, 0.5, 0.75, 1].map(v => [v, `${100 * v} %`]) },
    y: { low: names.length, high: 0, label: "next token", ticks: names.map((name, i) => [i + 0.5, name]) },
    say: `${kept} of ${before.length} tokens can be drawn; without the cut they have ${percent(left)} of the `
      + `probability. ${names[0]} comes first with ${percent(after[0])}. The draw is as open as one among `
      + `${open.toFixed(1)} tokens of equal probability.`,
    values: { kept, left, first: after[0], open },
  };
}
