// The least time of one pass of a model over some tokens, on a machine with two limits.
(data, now, { percent, short }) => {
  const peak = now.peak * 1e9, bandwidth = now.bandwidth * 1e9, ridge = peak / bandwidth;
  const tokens = 2 ** now.tokens, bytes = now.parameters * 1e6 * Number(now.element);
  const flops = 2 * now.parameters * 1e6 * tokens, intensity = flops / bytes;
  const seconds = Math.max(flops / peak, bytes / bandwidth), reached = flops / seconds;
  const roof = x => Math.min(x * bandwidth, peak), [low, high] = [0.25, 4096], floor = roof(low) / 2;
  const corner = Math.min(Math.max(ridge, low), high), line = [low, corner, high].map(x => [x, roof(x)]);
  const memory = intensity < ridge, marked = [0, 1, 2, 3, 4].map(d => peak / 10 ** d).filter(v => v >= floor);
  return {
    width: 640, height: 300, left: 64,
    x: { low, high, log: true, grid: true, label: "operations a byte",
      ticks: [1, 10, 100, 1000].map(v => [v, short(v)]) },
    y: { low: floor, high: peak * 3, log: true, grid: true, label: "operations a second, in GFLOP/s",
      ticks: marked.map(v => [v, short(v / 1e9)]) },
    marks: [["line", line, "a"], ["line", [[corner, floor], [corner, roof(corner)]], "b"],
      ["dot", intensity, reached, "plain"]],
    say: `${short(intensity)} operations a byte, and the ridge is at ${short(ridge)}: `
      + `${memory ? "memory" : "arithmetic"} is the limit. `
      + `A pass over ${tokens} ${tokens === 1 ? "token" : "tokens"} takes at least `
      + `${short(seconds * 1e3)} ms, which is at most `
      + `${short(tokens / seconds)} tokens a second and ${percent(reached / peak)} of the peak.`,
    values: { intensity, ridge, seconds, rate: tokens / seconds },
  };
}
