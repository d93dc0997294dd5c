// Asks for the metrics, keeps the last ones, and says how the server is.

const POLL_S = 2;
const GONE_AFTER_S = 10;

function clock(milliseconds) {
  return new Date(milliseconds).toLocaleTimeString('en-GB');
}

// Only what has changed, so that a screen reader says it once.
function write(into, text) {
  if (into.textContent !== text) into.textContent = text;
}

function setState(state, mark, text) {
  document.body.dataset.state = state;
  write(document.getElementById('state-mark'), mark);
  write(document.getElementById('state-text'), text);
  document.title = `${text} – encoder-svc`;
}

function drawHealth(now) {
  document.getElementById('gone').hidden = true;
  document.getElementById('updated').textContent = `as of ${clock(now.at * 1000)}`;
  document.getElementById('model').textContent = build.model ? `${build.model} · ${build.attn_backend} on ${build.platform}` : '';
  if (total(now, 'encoder_draining')) {
    const drained = seconds(total(now, 'encoder_draining_seconds'));
    setState('draining', '◐', `Draining: ${drained} of ${seconds(total(now, 'encoder_drain_limit_seconds'))}`);
  } else if (total(now, 'encoder_ready')) {
    setState('ready', '●', 'Ready');
  } else {
    setState('not-ready', '○', 'Not ready: takes no requests');
  }
}

function draw() {
  const [before, now] = [earlier(WINDOW_S), scrapes.at(-1)];
  const info = keysOf.get('encoder_build_info')?.find((key) => now.values.has(key));
  build = info ? seriesOf.get(info).labels : {};
  drawHealth(now);
  if (before === now) return;
  points.push(point());
  while (points[0].at < now.at - CHART_S) points.shift();
  drawTiles();
  drawStages(before, now);
  drawCalls(before, now);
  drawRoom(now);
  drawRefusals(before, now);
  drawDevice(before, now);
  drawReplica(before, now);
}

// A server that started anew counts from zero again.
function take(scrape) {
  const started = (one) => total(one, 'process_start_time_seconds');
  if (scrapes.length && started(scrapes.at(-1)) !== started(scrape)) scrapes.length = points.length = 0;
  scrapes.push(scrape);
  while (scrapes[0].at < scrape.at - WINDOW_S - POLL_S) scrapes.shift();
}

let lastAnswer = Date.now();

function miss(why) {
  const silence = (Date.now() - lastAnswer) / 1000;
  const since = scrapes.length ? `What you see is of ${clock(lastAnswer)}.` : 'There was no answer yet.';
  const [state, mark, text] =
    silence > GONE_AFTER_S ? ['gone', '✕', 'Server gone'] : ['stale', '▲', 'Stale: the server did not answer'];
  setState(state, mark, text);
  const banner = document.getElementById('gone');
  banner.hidden = false;
  write(banner, `${text} (${why}). ${since} Asking again every ${POLL_S} s.`);
}

async function ask() {
  const answer = await fetch('metrics', { cache: 'no-store', signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.text();
}

async function poll() {
  setTimeout(poll, POLL_S * 1000);
  let text;
  try {
    text = await ask();
  } catch (error) {
    miss(error.name === 'TimeoutError' ? 'no answer in 5 s' : error.name === 'TypeError' ? 'no connection' : error.message);
    return;
  }
  lastAnswer = Date.now();
  take(parseScrape(text, lastAnswer / 1000));
  draw();
}

poll();
