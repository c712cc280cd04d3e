// The tip with the numbers of a token under the pointer or the keyboard focus, and search highlights.

function highlight(words) {
  if (!CSS.highlights) return;
  CSS.highlights.delete('search');
  if (!words) return;
  const ranges = [];
  for (const block of document.querySelectorAll('#list .text, #list .prompt bdi')) {
    const nodes = [];
    const walk = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(), at = 0; node; node = walk.nextNode()) {
      if (node.parentNode.className === 'value') continue;
      nodes.push([at, node]);
      at += node.length;
    }
    const text = nodes.map(([, node]) => node.data).join('').toLowerCase();
    const position = (offset) => {
      const [begin, node] = nodes.findLast(([start]) => start <= offset);
      return [node, Math.min(offset - begin, node.length)];
    };
    for (let at = text.indexOf(words.toLowerCase()); at >= 0; at = text.indexOf(words.toLowerCase(), at + 1)) {
      const range = new Range();
      range.setStart(...position(at));
      const [node, offset] = position(at + words.length - 1); // of the last letter
      range.setEnd(node, Math.min(offset + 1, node.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set('search', new Highlight(...ranges));
}

function showTip(token) {
  const { row, segment, index, i } = token.info;
  const tip = $('tip');
  const list = make('dl');
  const add = (name, text) => list.append(make('dt', '', name), make('dd', '', text));
  const above = isKnown(row.threshold) && segment[1][i] > row.threshold;
  if (isKnown(segment[1][i])) add('entropy, nats', unsigned(segment[1][i]) + (above ? ` > ${row.threshold}` : ''));
  add('segment', `${index + 1} of ${row.segments.length}`);
  add('token', `${i + 1} of ${segment[0].length} in the segment`);
  if (isKnown(segment[2])) add('segment score', signed(segment[2], 3));
  if (isKnown(segment[4])) add('normalised segment score', signed(segment[4], 3));
  if (isKnown(segment[3])) {
    add(`segment ${row.reward}`, signed(segment[3], 3));
    add(`${row.reward}, per token`, signed(segment[3] / segment[0].length, 3));
  }
  for (const [name, part] of Object.entries(segment[5] ?? {})) {
    if (isKnown(part)) add(`of it ${name}`, signed(part, 3));
  }
  tip.replaceChildren(make('div', 'what', escapeHidden(JSON.stringify(segment[0][i]))), list);
  tip.hidden = false;
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const below = at.bottom + size.height + 10 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - size.height - 6)}px`;
  token.setAttribute('aria-describedby', 'tip');
}

function hideTip() {
  $('tip').hidden = true;
  for (const cursor of document.querySelectorAll('.cursor:not([hidden])')) cursor.hidden = true;
}

function neighbour(token, key) {
  const text = token.closest('.text');
  const tokens = [...text.querySelectorAll('.token')];
  const at = tokens.indexOf(token);
  const sibling = (direction) => {
    let segment = token.parentNode[direction];
    while (segment && !segment.querySelector('.token')) segment = segment[direction];
    return segment && segment.querySelector('.token');
  };
  return {
    ArrowRight: tokens[at + 1], ArrowLeft: tokens[at - 1], Home: tokens[0], End: tokens.at(-1),
    ArrowDown: sibling('nextElementSibling'), ArrowUp: sibling('previousElementSibling'),
  }[key];
}

function listenToTokens() {
  const list = $('list');
  const target = (event) => event.target.closest?.('.token');
  list.addEventListener('pointerover', (event) => { const token = target(event); if (token) showTip(token); });
  list.addEventListener('pointerout', (event) => { if (target(event) && event.pointerType === 'mouse') hideTip(); });
  list.addEventListener('focusin', (event) => {
    const token = target(event);
    if (!token) return;
    for (const other of token.closest('.text').querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    token.tabIndex = 0;
    showTip(token);
  });
  list.addEventListener('focusout', hideTip);
  list.addEventListener('keydown', (event) => {
    const token = target(event);
    if (!token) return;
    if (event.key === 'Escape') hideTip();
    const next = neighbour(token, event.key);
    if (next) { event.preventDefault(); next.focus(); }
  });
}
