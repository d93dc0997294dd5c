// What the page shows, each part from the scrapes of the last minute.

const WINDOW_S = 60;
const SMOOTH_S = 10;
const CHART_SPANS_S = [60, 120, 300];
const CHART_S = CHART_SPANS_S.at(-1);

const scrapes = [];
const points = [];
let build = {};

const succeeded = ({ method, code }) => method === 'EncodeImages' && code === 'OK';
const done = ({ outcome }) => ['encoded', 'cached', 'shared', 'fetched'].includes(outcome);
const ended = ({ code }) => code !== 'OK';
const DURATION = 'encoder_request_duration_seconds';
const FIRST = 'encoder_time_to_first_embedding_seconds';
const encodes = ({ method }) => method === 'EncodeImages';

// The oldest scrape that is at most so many seconds older than the newest.
function earlier(spanS) {
  const now = scrapes.at(-1);
  return scrapes.find(({ at }) => at >= now.at - spanS - 0.5);
}

function point() {
  const [before, now] = [earlier(SMOOTH_S), scrapes.at(-1)];
  const of = (q, name, where) => quantile(q, before, now, name, where);
  return {
    at: now.at,
    images: perSecond(before, now, 'encoder_images_total', done),
    patches: perSecond(before, now, 'encoder_batch_patches_sum'),
    bytes: perSecond(before, now, 'encoder_response_bytes_total'),
    notOk: perSecond(before, now, 'encoder_requests_total', ended),
    busy: perSecond(before, now, 'encoder_device_busy_seconds_total'),
    p50: of(0.5, DURATION, succeeded),
    p95: of(0.95, DURATION, succeeded),
    p99: of(0.99, DURATION, succeeded),
    first: of(0.95, FIRST, encodes),
    queue: total(now, 'encoder_queue_patches'),
    delay: total(now, 'encoder_predicted_queue_delay_seconds'),
  };
}

// What the charts span: five minutes, or less while this page has not been open for so long.
function chartSpan() {
  const open = points.at(-1).at - points[0].at;
  return CHART_SPANS_S.find((span) => open <= span) ?? CHART_S;
}

function series(field) {
  return points.map((one) => [one.at, one[field]]);
}

function drawTiles() {
  const last = points.at(-1);
  const tiles = [
    ['Images', amount(last.images), '/s', 'images'],
    ['Patches', amount(last.patches), '/s', 'patches'],
    ['Embeddings sent', bytes(last.bytes), '/s', 'bytes'],
    ['Call, p95', seconds(last.p95), '', 'p95'],
    ['First embedding, p95', seconds(last.first), '', 'first'],
    ['Predicted delay', seconds(last.delay), '', 'delay'],
    ['Device busy', percent(last.busy), '', 'busy'],
    ['Not OK', amount(last.notOk), '/s', 'notOk'],
  ];
  show(
    'tiles',
    ...tiles.map(([name, value, unit, field]) =>
      element(
        'li',
        { 'data-tile': field },
        element('p', { class: 'quiet' }, name),
        element('p', { class: 'value' }, value, element('small', {}, unit)),
        sparkline(series(field), chartSpan()),
      ),
    ),
  );
}

function drawStages(before, now) {
  const name = 'encoder_stage_duration_seconds';
  const images = increase(before, now, `${name}_count`, ({ stage }) => stage === 'admission');
  const means = increaseBy('stage', before, now, `${name}_sum`).map(([stage, sum]) => [stage, images ? sum / images : 0]);
  const all = means.reduce((sum, [, mean]) => sum + mean, 0);
  const seen = means.filter(([, mean]) => mean > 0);
  let left = 0;
  const bar = seen.flatMap(([, mean], i) => {
    const share = (mean / all) * 100;
    const rect = shape('rect', { class: `stage-${i % 8}`, x: `${left}%`, width: `${share}%`, height: '100%' });
    const number = shape('text', { x: `${left + share / 2}%`, y: 20 }, share > 3.5 ? String(i + 1) : '');
    left += share;
    return [rect, number];
  });
  const label = seen.map(([stage, mean]) => `${stage} ${percent(mean / all)}`).join(', ');
  show('stages-bar', shape('svg', { role: 'img', 'aria-label': label }, ...bar));
  const rows = seen.map(([stage, mean], i) => {
    const swatch = element('span', { class: `swatch stage-${i % 8}`, 'aria-hidden': 'true' }, String(i + 1));
    const of = (q) => seconds(quantile(q, before, now, name, (labels) => labels.stage === stage));
    return [element('span', { class: 'stage' }, swatch, stage), seconds(mean), percent(mean / all), of(0.5), of(0.95), of(0.99)];
  });
  if (rows.length) rows.push(['all', seconds(all), '100 %', '', '', '']);
  table('stages', ['stage', 'mean', 'share', '~p50', 'p95', '~p99'], rows, 'No image in the last minute.');
}

function drawCalls(before, now) {
  chart('latency-chart', ['p50', 'p95', 'p99'].map((q) => [q, q, series(q)]), chartSpan(), seconds);
  const of = (name, where) => [0.5, 0.95, 0.99].map((q) => seconds(quantile(q, before, now, name, where)));
  const heading = (kind) => element('span', {}, lineKey(kind), ` ${kind}`);
  const rows = [
    ['to the end of the answer', ...of(DURATION, succeeded)],
    ['to the first embedding', ...of(FIRST, encodes)],
  ];
  table('latency', ['last minute', 'p50', 'p95', 'p99'], rows);
  document.querySelectorAll('#latency thead th').forEach((cell, i) => {
    if (i) cell.replaceChildren(heading(['p50', 'p95', 'p99'][i - 1]));
  });
  chart('throughput-chart', [['p50', 'images a second', series('images')]], chartSpan(), amount);
  const images = increaseBy('outcome', before, now, 'encoder_images_total').filter(([, added]) => added > 0);
  const span = now.at - before.at;
  const line = images.map(([outcome, added]) => [outcome, amount(added), amount(added / span)]);
  table('images', ['outcome', 'images', 'a second'], line, 'No image in the last minute.');
}

function drawRoom(now) {
  const gauge = (name) => total(now, name);
  const pair = (name) => [gauge(name), gauge(`${name}_limit`)];
  meters('room', [
    ['Pending patches', ...pair('encoder_inflight_patches'), amount],
    ['Pending images', ...pair('encoder_inflight_images'), amount],
    ['Pending bytes of requests', ...pair('encoder_inflight_bytes'), bytes],
    ['Leased embeddings', ...pair('encoder_leased_bytes'), bytes],
  ]);
  const facts = [
    ['Waiting for the device', `${amount(gauge('encoder_queue_patches'))} patches, ${amount(gauge('encoder_queue_images'))} images`],
    ['Predicted delay', seconds(gauge('encoder_predicted_queue_delay_seconds'))],
    ['Calls being answered', amount(gauge('encoder_requests_running'))],
  ];
  document
    .getElementById('room')
    .append(...facts.map(([name, value]) => element('dt', {}, element('span', {}, name), element('span', {}, value))));
}

function drawRefusals(before, now) {
  const rows = [];
  for (const [kind, name] of [['calls', 'encoder_requests_total'], ['images', 'encoder_image_failures_total']]) {
    for (const [reason, added] of increaseBy('reason', before, now, name)) {
      const all = total(now, name, (labels) => labels.reason === reason && labels.code !== 'OK');
      if (reason && all > 0) rows.push([reason, kind, amount(added), amount(all)]);
    }
  }
  rows.sort((a, b) => b[3].length - a[3].length || b[3].localeCompare(a[3]));
  table('refusals', ['reason', '~of', 'last minute', 'since start'], rows, 'None since the server started.');
}

function drawDevice(before, now) {
  const hits = increase(before, now, 'encoder_cache_hits_total');
  const lookups = hits + increase(before, now, 'encoder_cache_misses_total');
  meters('device', [
    ['Device busy with forward passes', perSecond(before, now, 'encoder_device_busy_seconds_total'), 1, percent],
    ['Look-ups that the cache answered', lookups ? hits / lookups : undefined, 1, percent],
    ['Cache', total(now, 'encoder_cache_bytes'), total(now, 'encoder_cache_bytes_limit'), bytes],
  ]);
  const batches = increase(before, now, 'encoder_batch_images_count');
  const each = (name) => (batches ? increase(before, now, name) / batches : undefined);
  const sent = increaseBy('transport', before, now, 'encoder_response_bytes_total');
  const span = now.at - before.at;
  table('traffic', [], [
    ['Batch, mean', `${amount(each('encoder_batch_images_sum'))} images, ${amount(each('encoder_batch_patches_sum'))} patches`],
    ['Padding of a batch, mean', percent(each('encoder_batch_padding_ratio_sum'))],
    ['Requests received', `${bytes(perSecond(before, now, 'encoder_request_bytes_total'))}/s`],
    ...sent.map(([transport, added]) => [`Embeddings sent, ${transport}`, `${bytes(added / span)}/s`]),
  ]);
}

function drawReplica(before, now) {
  const lag = quantile(0.99, before, now, 'encoder_event_loop_lag_seconds');
  const started = total(now, 'process_start_time_seconds');
  const known = ['model', 'revision', 'version', 'platform', 'device', 'dtype', 'attn_backend', 'attn_implementation', 'attn_source'];
  table('replica', [], [
    ...known.map((label) => [label.replace('attn_', 'attention '), build[label] || '–']),
    ['event loop lag, p99', seconds(lag)],
    ['CPU', `${amount(perSecond(before, now, 'process_cpu_seconds_total'))} cores`],
    ['memory', bytes(total(now, 'process_resident_memory_bytes'))],
    ['up for', seconds(now.at - started)],
  ]);
}
