// The factor on the peak learning rate, step by step.
(data, now, { sum }) => {
  const total = data.total, factor = (kind, step) => {
    if (step < now.warmup) return (step + 1) / now.warmup;
    if (kind === "constant") return 1;
    let start = now.warmup;
    // wsd: the last step at the peak
    if (kind === "wsd") start = Math.max(now.warmup, total - Math.max(1, Math.round(now.decay / 100 * total))) - 1;
    const t = total - 1 > start ? Math.min(1, Math.max(0, (step - start) / (total - 1 - start))) : Number(step > start);
    const shape = kind === "cosine" ? (1 + Math.cos(Math.PI * t)) / 2 : 1 - t;
    return now.final + (1 - now.final) * shape;
  };
  const steps = Array.from({ length: total }, (_, i) => i), line = kind => steps.map(s => [s + 1, factor(kind, s)]);
  const marks = data.kinds.filter(kind => kind !== now.kind).map(kind => ["line", line(kind), "faint"]);
  const chosen = line(now.kind), here = factor(now.kind, now.step - 1);
  marks.push(["line", chosen, "a"], ["line", [[now.step, 0], [now.step, here]], "b"], ["dot", now.step, here, "plain"]);
  const mean = sum(chosen.map(([, v]) => v)) / total, high = chosen.filter(([, v]) => v > 0.5).length;
  return {
    width: 640, height: 260, left: 40, marks,
    x: { low: 0, high: total, label: "step", ticks: [1, 25, 50, 75, 100].map(v => [v, `${v}`]) },
    y: { low: 0, high: 1.05, grid: true, label: "factor on the peak rate",
      ticks: [0, 0.5, 1].map(v => [v, v.toFixed(1)]) },
    say: `${now.kind}: step ${now.step} of ${total} has ${here.toFixed(3)} of the peak rate. Over the run the mean is `
      + `${mean.toFixed(3)}, and ${high} steps are above half of the peak.`,
    values: { here, mean, factors: chosen.map(([, v]) => v) },
  };
}
