// The table of cuts that were tried: a click, Enter or the arrow keys go back to one.
function render({ model, el }) {
  const get = k => model.get(k)
  const root = node('div', 'sdlab-tried', el)
  const table = node('table', '', root, { role: 'grid' })
  const caption = node('caption', '', table), head = node('tr', '', node('thead', '', table)), body = node('tbody', '', table)

  function choose(i, focus) {
    const rows = get('rows')
    if (i < 0 || i >= rows.length) return
    if (i !== get('selected')) { model.set('selected', i); model.save_changes() }
    mark(focus)
  }

  function mark(focus) { // one row is in the tab order, the chosen one
    const at = Math.max(0, get('selected'))
    Array.from(body.children).forEach((tr, i) => {
      tr.setAttribute('aria-selected', String(i === get('selected')))
      tr.tabIndex = i === at ? 0 : -1
      if (i === at && focus) tr.focus({ preventScroll: true })
      if (i === get('selected')) keep(tr)
    })
  }

  function keep(tr) { // in view, within the box only: the page must not jump
    const top = tr.offsetTop - head.offsetHeight, end = tr.offsetTop + tr.offsetHeight
    if (top < root.scrollTop) root.scrollTop = top
    else if (end > root.scrollTop + root.clientHeight) root.scrollTop = end - root.clientHeight
  }

  function line(parent, cells, tag, attrs) {
    for (const c of cells) { const o = node(tag, '', parent, attrs); o.dir = 'auto'; o.textContent = c }
  }

  function draw() {
    const held = body.contains(document.activeElement)
    caption.textContent = get('caption')
    head.replaceChildren(); line(head, get('columns'), 'th', { scope: 'col' })
    body.replaceChildren()
    get('rows').forEach(cells => line(node('tr', '', body), cells, 'td', {}))
    mark(held)
  }

  const at = e => Array.from(body.children).indexOf(e.target.closest('tr'))
  body.addEventListener('click', e => choose(at(e), true))
  body.addEventListener('keydown', e => {
    const step = { ArrowUp: -1, ArrowDown: 1, Enter: 0, ' ': 0 }[e.key]
    if (step === undefined || e.ctrlKey || e.metaKey || e.altKey) return
    e.preventDefault(); e.stopPropagation()
    choose(at(e) + step, true)
  })
  for (const k of ['rows', 'columns', 'caption']) model.on(`change:${k}`, draw)
  model.on('change:selected', () => mark(false))
  draw()
}
export default { render }
