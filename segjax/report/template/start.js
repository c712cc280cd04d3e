// A link to a closed section opens it.
addEventListener('hashchange', () => {
  const section = document.getElementById(location.hash.slice(1));
  if (section instanceof HTMLDetailsElement) { section.open = true; section.scrollIntoView(); }
});

(async () => {
  listenToCharts(await decode($('curves').textContent));
  const rows = await decode($('data').textContent);
  if (rows.length) {
    $('responses').hidden = false;
    listenToTokens();
    window.table = new Table(rows);
  }
  document.documentElement.dataset.ready = 'yes';
})();
