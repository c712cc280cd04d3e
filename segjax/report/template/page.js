'use strict';
// The table of responses: decodes the data, filters it, and shows a few at a time. Text is only ever
// put into text nodes, so that it cannot become markup. A segment is
// [tokens, entropies, score, reward, normalised score, parts of the reward by name].

const PAGE_SIZE = 5;
const MAX_TOKENS = 800; // of a response that are shown before "Show all" is pressed
// Invisible characters and those that reorder their neighbours; the joiners of emoji are kept.
const HIDDEN = new RegExp(
  '[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f' +
  '\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]', 'g');

const $ = (id) => document.getElementById(id);
const escapeHidden = (text) =>
  text.replace(HIDDEN, (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
const isKnown = (x) => x !== null && x !== undefined;
const signed = (x, digits = 2) => {
  const text = Math.abs(x).toFixed(digits);
  return (Number(text) === 0 ? '' : x < 0 ? '\u2212' : '+') + text;
};
const unsigned = (x, digits = 2) => x.toFixed(digits).replace('-', '\u2212');

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

async function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

// The number that a segment's colour shows: [its name, its index in a segment], the first available.
const NUMBERS = [['reward', 3], ['normalised score', 4], ['score', 2]];
const shownNumber = (segment) => segment[3] ?? segment[4] ?? segment[2];

// Responses to compare are shown side by side: an item is a list of rows.
function groupPairs(rows) {
  const items = new Map();
  rows.forEach((row, i) => {
    // Steps are counted from 1, as on the console.
    row.source = isKnown(row.pair) || !isKnown(row.step) ? row.stage : `${row.stage}, step ${row.step + 1}`;
    const key = isKnown(row.pair) ? `${row.stage} ${row.pair}` : `row ${i}`;
    items.set(key, [...(items.get(key) ?? []), row]);
  });
  return [...items.values()];
}

function quantile(values, share) {
  const sorted = values.filter(isKnown).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(share * (sorted.length - 1))] : 0;
}

const SORTS = {
  'as logged': null,
  'newest first': (a, b) => (last(b).step ?? 0) - (last(a).step ?? 0),
  'highest reward': (a, b) => total(b, 'reward') - total(a, 'reward'),
  'lowest reward': (a, b) => total(a, 'reward') - total(b, 'reward'),
  'largest gain': (a, b) => gain(b) - gain(a),
  'largest KL': (a, b) => total(b, 'kl') - total(a, 'kl'),
  'longest': (a, b) => total(b, 'length') - total(a, 'length'),
};
// The lower-case text that a search reads, built at the first search.
function searchText(row) {
  row.search ??= [...row.prompt.map((m) => m[1]), row.segments.map((s) => s[0].join('')).join('')]
    .join('\n').toLowerCase();
  return row.search;
}

const last = (item) => item[item.length - 1];
const total = (item, name) => last(item).totals[name] ?? 0;
const gain = (item) => (item.length > 1 ? total(item, 'reward') - (item[0].totals.reward ?? 0) : 0);

function fillSelect(select, values, all) {
  if (all) select.append(new Option(all, ''));
  for (const value of values) select.append(new Option(value, value));
  select.closest('label').hidden = select.options.length < 2 + Boolean(all) * 1;
}

class Table {
  constructor(rows) {
    this.rows = rows;
    this.items = groupPairs(rows);
    this.begin = 0;
    // About 200 responses are enough to scale the colours.
    const subset = rows.filter((_, i) => i % Math.ceil(rows.length / 200) === 0);
    const segments = subset.flatMap((row) => row.segments);
    this.maxNumber = quantile(segments.map((s) => (isKnown(shownNumber(s)) ? Math.abs(shownNumber(s)) : null)), 0.95);
    this.maxEntropy = quantile(segments.flatMap((s) => s[1]), 0.98);
    const has = (test) => rows.some(test);
    const sorts = Object.keys(SORTS).filter((name) =>
      name === 'as logged' || name === 'longest' ||
      (name === 'newest first' ? has((r) => isKnown(r.step)) :
        name === 'largest KL' ? has((r) => isKnown(r.totals.kl)) :
          name === 'largest gain' ? this.items.some((i) => i.length > 1) :
            has((r) => isKnown(r.totals.reward))));
    fillSelect($('step'), [...new Set(rows.map((row) => row.source))].filter(Boolean), 'all');
    fillSelect($('model'), [...new Set(rows.map((row) => row.model))].filter(Boolean), 'all');
    fillSelect($('sort'), sorts);
    // Responses to compare come first, as they were logged; without any, the newest.
    const pair = this.items.find((item) => item.length > 1);
    if (pair) $('step').value = pair[0].source;
    else if (sorts.includes('newest first')) $('sort').value = 'newest first';
    const number = NUMBERS.find(([, k]) => has((r) => r.segments.some((s) => isKnown(s[k]))));
    fillSelect($('colour'), number ? [number[0], 'entropy'] : ['entropy']);
    this.listen();
    this.show();
  }

  listen() {
    const restart = () => { this.begin = 0; this.show(); };
    for (const id of ['step', 'model', 'sort', 'colour']) $(id).addEventListener('change', restart);
    let timer = 0;
    $('search').addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(restart, 120); });
    $('numbers').addEventListener('change', () => $('list').classList.toggle('bare', !$('numbers').checked));
    document.querySelector('.controls').addEventListener('submit', (e) => e.preventDefault());
    for (const button of document.querySelectorAll('[data-move]')) {
      button.addEventListener('click', () => {
        this.begin += PAGE_SIZE * Number(button.dataset.move);
        this.show();
        $('responses').scrollIntoView({ block: 'start' });
      });
    }
  }

  matches() {
    const words = $('search').value.toLowerCase();
    const [source, model] = [$('step').value, $('model').value];
    const isSelected = (row) => (!source || row.source === source) && (!model || row.model === model);
    const matches = this.items
      .map((item) => item.filter(isSelected))
      .filter((item) => item.length && (!words || item.some((row) => searchText(row).includes(words))));
    const sort = SORTS[$('sort').value];
    return sort ? matches.sort(sort) : matches;
  }

  show() {
    const matches = this.matches();
    this.begin = Math.max(0, Math.min(this.begin, matches.length - 1));
    this.begin -= this.begin % PAGE_SIZE;
    const end = Math.min(this.begin + PAGE_SIZE, matches.length);
    const list = $('list');
    list.replaceChildren(...matches.slice(this.begin, end).map((item) => this.item(item)));
    if (!matches.length) list.append(make('p', 'empty', 'No response matches.'));
    const text = matches.length ? `${this.begin + 1}\u2013${end} of ${matches.length.toLocaleString('en')}` : '0';
    for (const range of document.querySelectorAll('.range')) range.textContent = text;
    for (const button of document.querySelectorAll('[data-move]')) {
      button.disabled = button.dataset.move < 0 ? this.begin === 0 : end === matches.length;
    }
    this.legend();
    hideTip();
    highlight($('search').value);
  }

  legend() {
    const isEntropy = $('colour').value === 'entropy';
    const legend = document.querySelector('.legend');
    legend.classList.toggle('entropy', isEntropy);
    legend.hidden = !(isEntropy ? this.maxEntropy : this.maxNumber); // texts without numbers
    $('shown-number').textContent = isEntropy ? 'entropy at its first token' : $('colour').value;
    $('low').textContent = isEntropy ? '0' : `${$('colour').value} ${signed(-this.maxNumber)}`;
    $('high').textContent = isEntropy ? `${unsigned(this.maxEntropy)} nats` : signed(this.maxNumber);
  }

  item(rows) {
    const node = make('article', 'item');
    if (rows[0].prompt.length) {
      const prompt = make('div', 'prompt');
      for (const [role, content] of rows[0].prompt) {
        const line = make('p');
        line.dir = 'auto';
        line.tabIndex = content.length > 500 ? 0 : -1;
        line.append(make('b', '', role), make('bdi', '', escapeHidden(content)));
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
    const writer = [isKnown(row.pair) ? row.model : row.source, isKnown(row.pair) ? '' : row.model];
    if (row.stage) meta.append(make('span', 'writer', writer.filter(Boolean).join(' \u00b7 ')));
    const add = (name, text) => {
      const part = make('span', '', `${name} `);
      part.append(make('b', '', text));
      meta.append(part);
    };
    const t = row.totals;
    if (isKnown(t.gold)) add('gold', signed(t.gold));
    if (isKnown(t.reward)) add(row.reward, signed(t.reward));
    for (const [name, part] of Object.entries(t.parts ?? {})) if (isKnown(part)) add(name, signed(part));
    if (isKnown(t.kl)) add('KL', unsigned(t.kl));
    add('tokens', t.length.toLocaleString('en'));
    if (row.segments.some((segment) => isKnown(segment[1][0]) || isKnown(shownNumber(segment)))) {
      add('segments', row.segments.length.toLocaleString('en'));
    }
    if (t.finished === false) meta.append(make('span', '', 'stopped at the length limit'));
    const text = make('div', 'text');
    text.dir = 'auto';
    side.append(meta, text);
    this.write(text, row, MAX_TOKENS);
    if (text.dataset.truncated) {
      const more = make('button', 'more', `Show all ${t.length.toLocaleString('en')} tokens`);
      more.type = 'button';
      more.addEventListener('click', () => { this.write(text, row, Infinity); more.remove(); });
      side.append(more);
    }
    return side;
  }

  write(text, row, maxTokens) {
    text.replaceChildren();
    delete text.dataset.truncated;
    if (!row.segments.length) text.append(make('span', 'empty', 'no content'));
    let count = 0;
    for (const [index, segment] of row.segments.entries()) {
      if (count >= maxTokens) { text.dataset.truncated = '1'; break; }
      // The space before a segment is not coloured: at the end of a line it would show as a stripe.
      const token = segment[0].find((text) => text !== '') ?? '';
      if (token.startsWith(' ') && token.length > 1) text.append(' ');
      text.append(this.segment(row, segment, index, maxTokens - count));
      count += segment[0].length;
      if (count > maxTokens) text.dataset.truncated = '1';
    }
    const first = text.querySelector('.token');
    if (first) first.tabIndex = 0;
  }

  segment(row, segment, index, maxTokens) {
    const node = make('span', 'segment');
    const value = shownNumber(segment);
    const isEntropy = $('colour').value === 'entropy';
    if (isKnown(value) && !isEntropy) {
      node.classList.add(value < 0 ? 'down' : 'up');
      node.style.setProperty('--size', Math.min(1, Math.abs(value) / (this.maxNumber || 1)).toFixed(3));
    }
    segment[0].slice(0, maxTokens).forEach((token, i) => {
      if (token === '') return; // a part of the character that a later token completes
      const shown = !node.firstChild && token.length > 1 ? token.replace(/^ /, '') : token;
      const part = make('span', 'token', escapeHidden(shown).replaceAll('\n', '\u21b5\n'));
      part.tabIndex = -1;
      part.info = { row, segment, index, i };
      if (isEntropy && isKnown(segment[1][i])) {
        part.classList.add('hot');
        part.style.setProperty('--size', Math.min(1, segment[1][i] / (this.maxEntropy || 1)).toFixed(3));
      }
      node.append(part);
    });
    const entropy = isKnown(segment[1][0]) ? unsigned(segment[1][0]) : '';
    const shown = isEntropy ? entropy : isKnown(value) ? signed(value) : '';
    if (shown) node.append(make('small', 'value', shown));
    return node;
  }
}
