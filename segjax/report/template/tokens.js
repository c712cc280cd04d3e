// What stands beside a token when one points at it or walks there, and the marks of a search.

function highlight(words) {
  if (!CSS.highlights) return;
  CSS.highlights.delete('found');
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
    const place = (at) => {
      const [from, node] = nodes.findLast(([start]) => start <= at);
      return [node, Math.min(at - from, node.length)];
    };
    for (let at = text.indexOf(words.toLowerCase()); at >= 0; at = text.indexOf(words.toLowerCase(), at + 1)) {
      const range = new Range();
      range.setStart(...place(at));
      const [node, offset] = place(at + words.length - 1); // the end is that of its last letter
      range.setEnd(node, Math.min(offset + 1, node.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set('found', new Highlight(...ranges));
}

function showTip(token) {
  const { row, segment, index, i } = token.about;
  const tip = $('tip');
  const list = make('dl');
  const say = (name, text) => list.append(make('dt', '', name), make('dd', '', text));
  const above = known(row.threshold) && segment[1][i] > row.threshold;
  if (known(segment[1][i])) say('entropy, nats', plain(segment[1][i]) + (above ? ` > ${row.threshold}` : ''));
  say('segment', `${index + 1} of ${row.segments.length}`);
  say('token of the segment', `${i + 1} of ${segment[0].length}`);
  if (known(segment[2])) say('score of the segment', signed(segment[2], 3));
  if (known(segment[3])) {
    say('reward of the segment', signed(segment[3], 3));
    say('reward of a token of it', signed(segment[3] / segment[0].length, 3));
  }
  tip.replaceChildren(make('div', 'what', escaped(JSON.stringify(segment[0][i]))), list);
  tip.hidden = false;
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const below = at.bottom + own.height + 10 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - own.height - 6)}px`;
  token.setAttribute('aria-describedby', 'tip');
}

function hideTip() {
  $('tip').hidden = true;
}

function moved(token, key) {
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
  const of = (event) => event.target.closest?.('.token');
  list.addEventListener('pointerover', (event) => { const token = of(event); if (token) showTip(token); });
  list.addEventListener('pointerout', (event) => { if (of(event) && event.pointerType === 'mouse') hideTip(); });
  list.addEventListener('focusin', (event) => {
    const token = of(event);
    if (!token) return;
    for (const other of token.closest('.text').querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    token.tabIndex = 0;
    showTip(token);
  });
  list.addEventListener('focusout', hideTip);
  list.addEventListener('keydown', (event) => {
    const token = of(event);
    if (!token) return;
    if (event.key === 'Escape') hideTip();
    const next = moved(token, event.key);
    if (next) { event.preventDefault(); next.focus(); }
  });
  addEventListener('scroll', hideTip, { passive: true });
}
