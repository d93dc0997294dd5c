// Prometheus' text format, and the arithmetic of two scrapes.

// What a series key, such as 'encoder_images_total{outcome="cached"}', stands for; parsed once for all scrapes.
const seriesOf = new Map();
const keysOf = new Map();

function parseKey(key) {
  const [, name, text = ''] = key.match(/^([^{]+)(?:\{(.*)\})?$/s);
  const labels = {};
  for (const [, label, value] of text.matchAll(/(\w+)="((?:\\.|[^"\\])*)"/gs)) {
    labels[label] = value.replace(/\\(.)/gs, (_, character) => (character === 'n' ? '\n' : character));
  }
  return { name, labels };
}

// A scrape: when it was taken (seconds) and the value of each series.
function parseScrape(text, at) {
  const values = new Map();
  for (const line of text.split('\n')) {
    if (!line || line[0] === '#') continue;
    const end = line.lastIndexOf('} ') + 1 || line.indexOf(' ');
    const key = line.slice(0, end);
    if (!seriesOf.has(key)) {
      const series = parseKey(key);
      seriesOf.set(key, series);
      if (!keysOf.has(series.name)) keysOf.set(series.name, []);
      keysOf.get(series.name).push(key);
    }
    const value = line.slice(end).trim().split(' ')[0];
    values.set(key, value === '+Inf' ? Infinity : Number(value));
  }
  return { at, values };
}

// The sum of a metric's series that `where` accepts by their labels; undefined if there is none.
function total(scrape, name, where = () => true) {
  let sum;
  for (const key of keysOf.get(name) ?? []) {
    const value = scrape.values.get(key);
    if (value !== undefined && where(seriesOf.get(key).labels)) sum = (sum ?? 0) + value;
  }
  return sum;
}

function increase(before, now, name, where) {
  return (total(now, name, where) ?? 0) - (total(before, name, where) ?? 0);
}

function perSecond(before, now, name, where) {
  return increase(before, now, name, where) / (now.at - before.at);
}

// The increase of each value of a label, as [value, increase].
function increaseBy(label, before, now, name) {
  const sums = new Map();
  for (const key of keysOf.get(name) ?? []) {
    const value = seriesOf.get(key).labels[label];
    const added = (now.values.get(key) ?? 0) - (before.values.get(key) ?? 0);
    sums.set(value, (sums.get(value) ?? 0) + added);
  }
  return [...sums];
}

// As Prometheus' histogram_quantile, over what a histogram was told between two scrapes; undefined if that is nothing.
function quantile(q, before, now, name, where = () => true) {
  const counts = new Map();
  for (const key of keysOf.get(`${name}_bucket`) ?? []) {
    const { labels } = seriesOf.get(key);
    if (!where(labels)) continue;
    const bound = labels.le === '+Inf' ? Infinity : Number(labels.le);
    const added = (now.values.get(key) ?? 0) - (before.values.get(key) ?? 0);
    counts.set(bound, (counts.get(bound) ?? 0) + added);
  }
  const buckets = [...counts].sort(([a], [b]) => a - b);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (!all) return undefined;
  let low = 0;
  let below = 0;
  for (const [bound, count] of buckets) {
    if (count >= q * all) {
      return bound === Infinity ? low : low + ((bound - low) * (q * all - below)) / (count - below || 1);
    }
    [low, below] = [bound, count];
  }
  return low;
}
