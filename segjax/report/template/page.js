'use strict';
// The table of responses: unpacks the data, filters, and shows ten at a time. Text only ever goes
// into text nodes. A segment is [tokens, entropies, score, reward].

const PAGE = 10;
const TOKENS = 800; // of a response that are shown before one asks for all
// Characters that show nothing, or reorder what stands beside them; joiners of emoji stay.
const HIDDEN = new RegExp(
  '[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f' +
  '\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]', 'g');

const $ = (id) => document.getElementById(id);
const escaped = (text) =>
  text.replace(HIDDEN, (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
const known = (x) => x !== null && x !== undefined;
const signed = (x, digits = 2) => {
  const text = Math.abs(x).toFixed(digits);
  return (Number(text) === 0 ? '' : x < 0 ? '\u2212' : '+') + text;
};
const plain = (x, digits = 2) => x.toFixed(digits).replace('-', '\u2212');

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

// What a segment's colour stands for: its reward, or its score where there is no reward.
const worth = (segment) => segment[3] ?? segment[2];

// Responses to the same prompt stand side by side: an item is a list of rows.
function itemsOf(rows) {
  const items = new Map();
  rows.forEach((row, i) => {
    row.where = known(row.pair) ? row.stage : `${row.stage}, step ${row.step}`;
    const key = known(row.pair) ? `${row.stage} ${row.pair}` : `row ${i}`;
    items.set(key, [...(items.get(key) ?? []), row]);
  });
  return [...items.values()];
}

function quantile(values, share) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(share * (sorted.length - 1))] : 0;
}

const SORTS = {
  'as they come': null,
  'newest first': (a, b) => (last(b).step ?? 0) - (last(a).step ?? 0),
  'highest reward': (a, b) => total(b, 'reward') - total(a, 'reward'),
  'lowest reward': (a, b) => total(a, 'reward') - total(b, 'reward'),
  'largest gain': (a, b) => gain(b) - gain(a),
  'largest KL': (a, b) => total(b, 'kl') - total(a, 'kl'),
  'longest': (a, b) => total(b, 'length') - total(a, 'length'),
};
// What is searched in, made when it is first asked for.
function searched(row) {
  row.search ??= [...row.prompt.map((m) => m[1]), row.segments.map((s) => s[0].join('')).join('')]
    .join('\n').toLowerCase();
  return row.search;
}

const last = (item) => item[item.length - 1];
const total = (item, name) => last(item).totals[name] ?? 0;
const gain = (item) => (item.length > 1 ? total(item, 'reward') - (item[0].totals.reward ?? 0) : 0);

function fill(select, values, all) {
  if (all) select.append(new Option(all, ''));
  for (const value of values) select.append(new Option(value, value));
  select.closest('label').hidden = select.options.length < 2 + Boolean(all) * 1;
}

class Table {
  constructor(rows) {
    this.rows = rows;
    this.items = itemsOf(rows);
    this.begin = 0;
    const some = rows.filter((_, i) => i % Math.ceil(rows.length / 200) === 0); // enough for scales
    const segments = some.flatMap((row) => row.segments);
    this.most = quantile(segments.map((s) => (known(worth(s)) ? Math.abs(worth(s)) : null)), 0.95);
    this.wide = quantile(segments.flatMap((s) => s[1]), 0.98);
    const has = (test) => rows.some(test);
    const sorts = Object.keys(SORTS).filter((name) =>
      name === 'as they come' || name === 'longest' ||
      (name === 'newest first' ? has((r) => known(r.step)) :
        name === 'largest KL' ? has((r) => known(r.totals.kl)) :
          name === 'largest gain' ? this.items.some((i) => i.length > 1) :
            has((r) => known(r.totals.reward))));
    fill($('step'), [...new Set(rows.map((row) => row.where))].filter((w) => w !== ', step null'), 'all');
    fill($('model'), [...new Set(rows.map((row) => row.model))].filter(Boolean), 'all');
    fill($('sort'), sorts);
    if (sorts.includes('newest first')) $('sort').value = 'newest first';
    const named = has((r) => r.segments.some((s) => known(s[3]))) ? 'reward' : 'score';
    fill($('colour'), segments.some((s) => known(worth(s))) ? [named, 'entropy'] : ['entropy']);
    this.listen();
    this.show();
  }

  listen() {
    const again = () => { this.begin = 0; this.show(); };
    for (const id of ['step', 'model', 'sort', 'colour']) $(id).addEventListener('change', again);
    let waiting = 0;
    $('search').addEventListener('input', () => { clearTimeout(waiting); waiting = setTimeout(again, 120); });
    $('numbers').addEventListener('change', () => $('list').classList.toggle('bare', !$('numbers').checked));
    document.querySelector('.controls').addEventListener('submit', (e) => e.preventDefault());
    for (const button of document.querySelectorAll('[data-move]')) {
      button.addEventListener('click', () => {
        this.begin += PAGE * Number(button.dataset.move);
        this.show();
        $('responses').scrollIntoView({ block: 'start' });
      });
    }
  }

  chosen() {
    const words = $('search').value.toLowerCase();
    const [where, model] = [$('step').value, $('model').value];
    const fits = (row) => (!where || row.where === where) && (!model || row.model === model);
    const found = this.items
      .map((item) => item.filter(fits))
      .filter((item) => item.length && (!words || item.some((row) => searched(row).includes(words))));
    const sort = SORTS[$('sort').value];
    return sort ? found.sort(sort) : found;
  }

  show() {
    const found = this.chosen();
    this.begin = Math.max(0, Math.min(this.begin, found.length - 1));
    this.begin -= this.begin % PAGE;
    const end = Math.min(this.begin + PAGE, found.length);
    const list = $('list');
    list.replaceChildren(...found.slice(this.begin, end).map((item) => this.item(item)));
    if (!found.length) list.append(make('p', 'empty', 'No response fits.'));
    const text = found.length ? `${this.begin + 1}\u2013${end} of ${found.length.toLocaleString('en')}` : '0';
    for (const range of document.querySelectorAll('.range')) range.textContent = text;
    for (const button of document.querySelectorAll('[data-move]')) {
      button.disabled = button.dataset.move < 0 ? this.begin === 0 : end === found.length;
    }
    this.legend();
    hideTip();
    highlight($('search').value);
  }

  legend() {
    const isEntropy = $('colour').value === 'entropy';
    document.querySelector('.legend').classList.toggle('entropy', isEntropy);
    $('low').textContent = isEntropy ? '0' : `${$('colour').value} ${signed(-this.most)}`;
    $('high').textContent = isEntropy ? `${plain(this.wide)} nats` : signed(this.most);
  }

  item(rows) {
    const node = make('article', 'item');
    if (rows[0].prompt.length) {
      const prompt = make('div', 'prompt');
      for (const [role, content] of rows[0].prompt) {
        const line = make('p');
        line.dir = 'auto';
        line.tabIndex = content.length > 500 ? 0 : -1;
        line.append(make('b', '', role), make('bdi', '', escaped(content)));
        prompt.append(line);
      }
      node.append(prompt);
    }
    const sides = make('div', 'sides');
    for (const row of rows) sides.append(this.side(row));
    node.append(sides);
    return node;
  }

  side(row) {
    const side = make('div');
    const meta = make('p', 'meta');
    const who = [known(row.pair) ? row.model : row.where, known(row.pair) ? '' : row.model];
    if (row.stage) meta.append(make('span', 'who', who.filter(Boolean).join(' \u00b7 ')));
    const say = (name, text) => {
      const part = make('span', '', `${name} `);
      part.append(make('b', '', text));
      meta.append(part);
    };
    const t = row.totals;
    if (known(t.gold)) say('gold', signed(t.gold));
    if (known(t.reward)) say('reward', signed(t.reward));
    if (known(t.kl)) say('KL', plain(t.kl));
    say('tokens', t.length.toLocaleString('en'));
    say('segments', row.segments.length.toLocaleString('en'));
    if (t.finished === false) meta.append(make('span', '', 'cut off at the length limit'));
    const text = make('div', 'text');
    text.dir = 'auto';
    side.append(meta, text);
    this.write(text, row, TOKENS);
    if (text.dataset.left) {
      const more = make('button', 'more', `Show all ${t.length.toLocaleString('en')} tokens`);
      more.type = 'button';
      more.addEventListener('click', () => { this.write(text, row, Infinity); more.remove(); });
      side.append(more);
    }
    return side;
  }

  write(text, row, most) {
    text.replaceChildren();
    delete text.dataset.left;
    if (!row.segments.length) text.append(make('span', 'empty', 'no content'));
    let count = 0;
    for (const [index, segment] of row.segments.entries()) {
      if (count >= most) { text.dataset.left = '1'; break; }
      // A space before a segment is not coloured: at the end of a line it would be a stripe.
      const token = segment[0].find((one) => one !== '') ?? '';
      if (token.startsWith(' ') && token.length > 1) text.append(' ');
      text.append(this.segment(row, segment, index, most - count));
      count += segment[0].length;
      if (count > most) text.dataset.left = '1';
    }
    const first = text.querySelector('.token');
    if (first) first.tabIndex = 0;
  }

  segment(row, segment, index, most) {
    const node = make('span', 'segment');
    const value = worth(segment);
    const isEntropy = $('colour').value === 'entropy';
    if (known(value) && !isEntropy) {
      node.classList.add(value < 0 ? 'down' : 'up');
      node.style.setProperty('--size', Math.min(1, Math.abs(value) / (this.most || 1)).toFixed(3));
    }
    segment[0].slice(0, most).forEach((token, i) => {
      if (token === '') return; // a part of the character that a later token completes
      const shown = !node.firstChild && token.length > 1 ? token.replace(/^ /, '') : token;
      const part = make('span', 'token', escaped(shown).replaceAll('\n', '\u21b5\n'));
      part.tabIndex = -1;
      part.about = { row, segment, index, i };
      if (isEntropy && known(segment[1][i])) {
        part.classList.add('hot');
        part.style.setProperty('--size', Math.min(1, segment[1][i] / (this.wide || 1)).toFixed(3));
      }
      node.append(part);
    });
    const shown = isEntropy ? plain(segment[1][0] ?? 0) : known(value) ? signed(value) : '';
    if (shown) node.append(make('small', 'value', shown));
    return node;
  }
}

// A link to a closed section opens it.
addEventListener('hashchange', () => {
  const place = document.getElementById(location.hash.slice(1));
  if (place instanceof HTMLDetailsElement) { place.open = true; place.scrollIntoView(); }
});

(async () => {
  const rows = await unpacked($('data').textContent);
  if (!rows.length) return;
  $('responses').hidden = false;
  listenToTokens();
  window.table = new Table(rows);
  document.documentElement.dataset.ready = 'yes';
})();
