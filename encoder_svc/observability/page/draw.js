// Text, tables, bars and lines. Everything from the server is set as text, never as markup.

// All with a space that does not break, between the figure and its unit.

function seconds(value) {
  if (value === undefined || Number.isNaN(value)) return '–';
  if (value < 5e-7) return '0\u00a0ms';
  if (value < 1e-4) return `${figure(value * 1e6)}\u00a0µs`;
  if (value < 0.9995) return `${figure(value * 1e3)}\u00a0ms`;
  return value < 120 ? `${figure(value)}\u00a0s` : `${Math.round(value / 60)}\u00a0min`;
}

// Two figures that count, three from ten on.
function figure(value) {
  return value < 10 ? value.toPrecision(2) : value < 99.95 ? value.toFixed(1).replace('.0', '') : String(Math.round(value));
}

function amount(value) {
  if (value === undefined || Number.isNaN(value)) return '–';
  if (value >= 1e6) return `${(value / 1e6).toPrecision(3)}\u00a0M`;
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString('en');
  return value < 0.01 ? '<\u00a00.01' : figure(value);
}

function bytes(value) {
  if (value === undefined || Number.isNaN(value)) return '–';
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? figure(value) : Math.round(value)}\u00a0${units[unit]}`;
}

function percent(value) {
  if (value === undefined || Number.isNaN(value)) return '–';
  if (value > 0 && value < 0.001) return '<\u00a00.1\u00a0%';
  return `${value > 0 && value < 0.0995 ? (value * 100).toFixed(1) : Math.round(value * 100)}\u00a0%`;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function show(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

// A table whose first column names the rows. A cell is text or an element; a heading that starts with ~ is for wide screens.
function table(id, headings, rows, nothing) {
  const hidden = headings.map((heading) => (heading.startsWith('~') ? { class: 'wide' } : {}));
  const head = headings.map((heading, i) => element('th', { scope: 'col', ...hidden[i] }, heading.replace('~', '')));
  const lines = rows.map((row) =>
    element('tr', {}, ...row.map((cell, i) => element(i ? 'td' : 'th', i ? hidden[i] ?? {} : { scope: 'row' }, cell))),
  );
  if (!rows.length) lines.push(element('tr', {}, element('td', { colspan: headings.length || 2, class: 'quiet' }, nothing)));
  const parts = [element('tbody', {}, ...lines)];
  if (headings.length && rows.length) parts.unshift(element('thead', {}, element('tr', {}, ...head)));
  show(id, ...parts);
}

// Meters: [name, what is used, of how much, how to write both].
function meters(id, entries) {
  show(
    id,
    ...entries.flatMap(([name, used, limit, write]) => {
      const share = limit ? Math.min((used ?? 0) / limit, 1) : 0;
      const text = limit === 1 ? percent(used) : `${write(used)} of ${write(limit)} (${percent(share)})`;
      const rect = shape('rect', { width: `${share * 100}%`, height: '100%' });
      const meter = { role: 'meter', 'aria-label': name, 'aria-valuemin': 0, 'aria-valuemax': 100 };
      return [
        element('dt', {}, element('span', {}, name), element('span', {}, text)),
        element(
          'dd',
          { ...meter, class: share > 0.9 ? 'high' : '', 'aria-valuenow': Math.round(share * 100), 'aria-valuetext': text },
          shape('svg', { 'aria-hidden': 'true' }, rect),
        ),
      ];
    }),
  );
}

function path(points, x, y) {
  let drawing = false;
  return points
    .map(([at, value]) => {
      const step = value === undefined ? '' : `${drawing ? 'L' : 'M'}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      drawing = value !== undefined;
      return step;
    })
    .join('');
}

function sparkline(points, spanS) {
  const end = points.at(-1)?.[0] ?? 0;
  const top = Math.max(...points.map(([, value]) => value ?? 0)) || 1;
  const d = path(points, (at) => 100 - ((end - at) / spanS) * 100, (value) => 27 - (value / top) * 25);
  const line = shape('path', { class: 'line', d, 'vector-effect': 'non-scaling-stroke' });
  return shape('svg', { viewBox: '0 0 100 28', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, line);
}

// Lines over the last `spanS` seconds. `lines`: [class, name, points].
function chart(id, lines, spanS, write) {
  const box = document.getElementById(id);
  const [width, height, left, bottom] = [box.clientWidth, box.clientHeight, 58, 18];
  const values = lines.flatMap(([, , points]) => points.map(([, value]) => value ?? 0));
  const top = niceTop(Math.max(...values, 0));
  const end = lines[0][2].at(-1)?.[0] ?? 0;
  const x = (at) => width - ((end - at) / spanS) * (width - left);
  const y = (value) => height - bottom - (value / top) * (height - bottom - 8);
  const grid = [0, 0.5, 1].flatMap((share) => [
    shape('line', { class: 'grid', x1: left, x2: width, y1: y(share * top), y2: y(share * top) }),
    shape('text', { x: left - 6, y: y(share * top) + 4, 'text-anchor': 'end' }, write(share * top)),
  ]);
  const times = [
    shape('text', { x: left, y: height - 4 }, `${spanS / 60}\u00a0min ago`),
    shape('text', { x: width, y: height - 4, 'text-anchor': 'end' }, 'now'),
  ];
  const drawn = lines.map(([kind, , points]) => shape('path', { class: `line ${kind}`, d: path(points, x, y) }));
  const label = lines.map(([, name, points]) => `${name} ${write(points.at(-1)?.[1])}`).join(', ');
  box.replaceChildren(
    shape('svg', { role: 'img', 'aria-label': label, viewBox: `0 0 ${width} ${height}` }, ...grid, ...times, ...drawn),
  );
}

function niceTop(value) {
  if (!value) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].find((step) => step * power >= value) * power;
}

function lineKey(kind) {
  return shape('svg', { class: 'key', 'aria-hidden': 'true' }, shape('line', { class: `line ${kind}`, x1: 0, x2: '100%', y1: 5, y2: 5 }));
}
