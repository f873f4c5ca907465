// A page of rows. Their HTML was made, and escaped, in Python; a button names its row, so that a late click cannot mean another one.
function render({ model, el }) {
  const list = node('div', 'sdlab-rows', el, { role: 'list', 'data-lm-suppress-shortcuts': 'true' }), slots = []
  const act = (o, row) => model.send({ act: o, row: row === undefined ? null : Number(row) })
  const focus = o => o && o.focus({ preventScroll: false })

  function put(slot, html) { // only what changed, and the focus stays on the button it was on
    if (slot.source === html) return
    const at = el.getRootNode().activeElement, held = at && slot.contains(at) ? at.dataset.act || 'row' : ''
    slot.source = html; slot.innerHTML = html
    if (held) (slot.querySelector(`button[data-act="${held}"]`) || slot.querySelector('article')).focus({ preventScroll: true })
  }

  function fill() {
    const items = model.get('items')
    items.forEach((html, i) => { slots[i] = slots[i] || node('div', 'sdlab-slot', list, { role: 'listitem' }); slots[i].hidden = false; put(slots[i], html) })
    slots.slice(items.length).forEach(o => { o.hidden = true; o.source = ''; o.replaceChildren() })
    list.setAttribute('aria-label', model.get('label'))
  }

  const letters = { k: 'keep', d: 'drop', r: 'reference', w: 'rewrite' }, moves = { ArrowDown: 1, ArrowUp: -1 }, turns = { PageDown: 'next', PageUp: 'previous', u: 'undo' }
  function key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey) return
    const row = e.target.closest('article'), own = letters[e.key] && row && row.querySelector(`button[data-act="${letters[e.key]}"]`)
    const all = slots.filter(o => !o.hidden).map(o => o.querySelector('article')), next = moves[e.key] && all[all.indexOf(row) + moves[e.key]]
    if (own) act(own.dataset.act, own.dataset.row)
    else if (next) focus(next)
    else if (turns[e.key]) act(turns[e.key])
    else if (!moves[e.key]) return
    e.preventDefault(); e.stopPropagation()
  }
  list.addEventListener('click', e => { const o = e.target.closest('button[data-act]'); if (o) act(o.dataset.act, o.dataset.row) })
  list.addEventListener('keydown', key)
  model.on('change:items', fill); model.on('change:label', fill)
  model.on('change:page', () => { list.scrollTop = 0 })
  fill()
}
export default { render }
