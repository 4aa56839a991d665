// Student's interval of a perplexity after the first documents of a text.
(data, now, { percent, short, sum }) => {
  const level = Number(now.level) / 100;
  // Simpson's rule for the tail of Student's t, and bisection for its quantile: as in llmcourse.verdicts
  const inside = (first, freedom) => {
    let all = 0;
    for (let i = 0; i <= 1000; i++) {
      const angle = first + (Math.PI / 2 - first) * i / 1000;
      all += (i === 0 || i === 1000 ? 1 : i % 2 ? 4 : 2) * Math.max(Math.cos(angle), 0) ** (freedom - 1);
    }
    return all * (Math.PI / 2 - first);
  };
  const quantile = freedom => {
    const whole = inside(0, freedom), tail = t => inside(Math.atan(t / Math.sqrt(freedom)), freedom) / whole;
    let low = 0, high = 1;
    while (tail(high) > 1 - level) high *= 2;
    for (let i = 0; i < 40; i++) {
      const middle = (low + high) / 2;
      if (tail(middle) > 1 - level) low = middle; else high = middle;
    }
    return high;
  };
  const at = k => {
    const docs = data.documents.slice(0, k), n = sum(docs.map(d => d[0])), mean = sum(docs.map(d => d[1])) / n;
    const single = now.unit === "tokens";
    const spread = single ? sum(docs.map(d => d[2])) - n * mean ** 2 : sum(docs.map(d => (d[1] - mean * d[0]) ** 2));
    const units = single ? n : k, error = Math.sqrt(units / (units - 1) * spread) / n;
    const reach = quantile(units - 1) * error;
    return { n, value: Math.exp(mean), low: Math.exp(mean - reach), high: Math.exp(mean + reach), reach };
  };
  const found = data.stops.map(at), here = at(data.stops[now.stop - 1]), last = found[found.length - 1];
  const cut = v => Math.min(Math.max(v, data.low), data.high), line = key => found.map(f => [f.n, cut(f[key])]);
  const need = here.n * (here.reach / Math.log(1 + now.goal / 100)) ** 2;
  return {
    width: 640, height: 300, left: 44,
    x: { low: found[0].n, high: last.n, log: true, label: "scored tokens",
      ticks: [0, 0.5, 1].map(v => found[Math.round(v * (found.length - 1))].n).map(n => [n, `${n}`]) },
    y: { low: data.low, high: data.high, log: true, grid: true, label: "perplexity (line), and its interval (dashed)",
      ticks: data.ticks.map(v => [v, `${v}`]) },
    marks: [["line", line("low"), "b"], ["line", line("high"), "b"], ["line", line("value"), "a"],
      ["line", [[here.n, cut(here.low)], [here.n, cut(here.high)]], "plain"],
      ["dot", here.n, cut(here.value), "plain"]],
    say: `After ${data.stops[now.stop - 1]} documents (${here.n} tokens) the perplexity is ${here.value.toFixed(2)}, `
      + `${now.level} % interval ${here.low.toFixed(2)} to ${here.high.toFixed(2)}: it reaches `
      + `${percent(Math.exp(here.reach) - 1)} upward. `
      + `For ${now.goal} % it takes about ${short(need)} tokens like these.`,
    values: { value: here.value, low: here.low, high: here.high, need },
  };
}
