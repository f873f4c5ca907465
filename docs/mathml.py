"""TeX as MathML, which browsers draw themselves: no script, no font and no picture has to be fetched for an equation.

It knows what the notebooks use and refuses everything else by name, so that a new command is seen here and not by a reader."""
import re
from html import escape

GREEK = dict(zip('alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi varphi chi psi omega '
                 'Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell'.split(), 'αβγδϵεζηθικλμνξπρστυϕφχψωΓΔΘΛΞΠΣΦΨΩℓ'))
SIGNS = {'cdot': '·', 'cdots': '⋯', 'ldots': '…', 'dots': '…', 'approx': '≈', 'neq': '≠', 'ne': '≠', 'leq': '≤', 'le': '≤', 'geq': '≥', 'ge': '≥', 'll': '≪', 'gg': '≫', 'in': '∈', 'notin': '∉',
         'sim': '∼', 'mid': '∣', 'to': '→', 'rightarrow': '→', 'leftarrow': '←', 'mapsto': '↦', 'Rightarrow': '⇒', 'iff': '⇔', 'pm': '±', 'mp': '∓', 'times': '×', 'top': '⊤', 'angle': '∠', 'infty': '∞',
         'partial': '∂', 'nabla': '∇', 'subset': '⊂', 'cup': '∪', 'cap': '∩', 'circ': '∘', 'odot': '⊙', 'otimes': '⊗', 'propto': '∝', 'equiv': '≡', 'perp': '⊥', 'forall': '∀', 'exists': '∃', 'setminus': '∖',
         'sum': '∑', 'prod': '∏', 'int': '∫', '|': '‖', 'lVert': '‖', 'rVert': '‖', 'Vert': '‖', 'lvert': '|', 'rvert': '|', 'langle': '⟨', 'rangle': '⟩', 'lfloor': '⌊', 'rfloor': '⌋', 'lceil': '⌈', 'rceil': '⌉',
         '{': '{', '}': '}', '%': '%', '_': '_', '$': '$', '#': '#', '&': '&'}
WORDS = 'log exp ln cos sin tan tanh arccos arcsin arctan max min arg argmax argmin det dim ker lim sup inf Pr tr rank'.split()
SPACES = {',': .167, ':': .222, ';': .278, ' ': .3, '!': -.167, 'quad': 1, 'qquad': 2, '~': .3}
ACCENTS = {'hat': 'ˆ', 'tilde': '˜', 'bar': '¯', 'vec': '→', 'dot': '˙', 'overline': '¯', 'widehat': 'ˆ', 'widetilde': '˜'}
FONTS = dict(mathrm='normal', mathbf='bold', mathcal='script', mathbb='double-struck', operatorname='normal', mathsf='sans-serif', mathit='italic')
LARGE = set('∑∏') | {'max', 'min', 'lim', 'sup', 'inf', 'argmax', 'argmin'}
BLOCKS = dict(script=0x1d49c, bold=0x1d400); HOLES = {('script', c): o for c,o in zip('BEFHILMR', 'ℬℰℱℋℐℒℳℛ')} | {('double-struck', c): o for c,o in zip('CHNPQRZ', 'ℂℍℕℙℚℝℤ')}

def _font(text, style): # Letters of another alphabet: MathML Core has no mathvariant but "normal"
    if style in ('normal', 'italic', 'sans-serif'): return text
    one = lambda c: HOLES.get((style, c)) or chr({'script': 0x1d49c, 'bold': 0x1d400, 'double-struck': 0x1d538}[style]+ord(c)-65) if 'A'<=c<='Z' else chr(0x1d41a+ord(c)-97) if style=='bold' and 'a'<=c<='z' else chr(0x1d7ce+int(c)) if style=='bold' and c.isdigit() else '𝟙' if style=='double-struck' and c=='1' else c
    return ''.join(map(one, text))

def _tag(name, body, **attrs): return f'<{name}'+''.join(f' {k}="{escape(str(v))}"' for k,v in attrs.items())+f'>{body}</{name}>'
def _row(nodes): return nodes[0] if len(nodes)==1 else _tag('mrow', ''.join(nodes))
def _space(em): return f'<mspace width="{em}em"></mspace>'

class _Reader:
    "What is left of an equation"
    def __init__(self, tex, display): self.toks,self.i,self.display = re.findall(r'\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\s+|.', tex, re.S), 0, display
    def peek(self):
        while self.i<len(self.toks) and self.toks[self.i].isspace(): self.i += 1
        return self.toks[self.i] if self.i<len(self.toks) else None
    def next(self):
        if (t := self.peek()) is None: raise ValueError('an equation ends too early')
        self.i += 1
        return t
    def raw(self): # The text between two braces, to the letter
        if self.next()!='{': raise ValueError('{ expected')
        start,depth = self.i,1
        while depth:
            if self.i>=len(self.toks): raise ValueError('a brace is not closed')
            depth += {'{': 1, '}': -1}.get(self.toks[self.i], 0)
            self.i += 1
        return ''.join(self.toks[start:self.i-1])
    def group(self): # One argument
        if self.peek()!='{':
            if (t := self.peek()) and t[0].isdigit() and len(t)>1: self.toks[self.i:self.i+1] = [t[0], t[1:]]       # \tfrac12 is a half
            return self.atom()
        self.next()
        out = _row(self.run('}'))
        self.next()
        return out
    def run(self, *ends): # Everything up to one of `ends`
        out = []
        while (t := self.peek()) is not None and t not in ends: out.append(self.scripts(self.atom()))
        if ends and t is None: raise ValueError(f'{ends[0]} expected')
        return out

    def scripts(self, base):
        sub = sup = None
        while self.peek() in ('_', '^', "'"):
            t = self.next()
            if t=='_': sub = self.group()
            elif t=='^': sup = self.group() if sup is None else _row([sup, self.group()])
            else: sup = (sup or '')+_tag('mo', '′')
        large = self.display and re.sub('<[^>]*>', '', base) in LARGE
        if sup and sup.count('<mo>′</mo>')>1: sup = _tag('mrow', sup)
        if sub and sup: return _tag('munderover' if large else 'msubsup', base+sub+sup)
        return _tag('munder' if large else 'msub', base+sub) if sub else _tag('mover' if large else 'msup', base+sup) if sup else base

    def atom(self):
        t = self.next()
        if t[0]=='\\' and len(t)>1: return self.command(t[1:])
        if t=='{': self.i -= 1; return self.group()
        if t[0].isdigit(): return _tag('mn', t)
        if t.isalpha(): return _tag('mi', t)
        if t in '}&^_': raise ValueError(f'{t} where nothing can take it')
        return _tag('mo', escape({'-': '−', '*': '∗'}.get(t, t)), **(dict(stretchy='false') if t in '()[]|/' else {}))

    def command(self, name):
        if name in GREEK: return _tag('mi', GREEK[name])
        if name in SIGNS: return _tag('mo', escape(SIGNS[name]), **(dict(stretchy='false') if SIGNS[name] in '‖|⟨⟩⌊⌋⌈⌉{}' else {}))
        if name in WORDS: return self.word(name)
        if name in SPACES: return _space(SPACES[name])
        if name in ACCENTS: return _tag('mover', self.group()+_tag('mo', ACCENTS[name], stretchy='true' if name in ('overline', 'widehat', 'widetilde') else 'false'), accent='true')
        if name in ('text', 'textbf', 'texttt', 'mbox'): return _tag('mtext', escape(re.sub(r"\\(.)", r'\1', self.raw())).replace(' ', '&#160;'))
        if name in FONTS: return _tag('mi', escape(_font(self.raw() if self.peek()=='{' else self.next(), FONTS[name])), mathvariant='normal')
        if name in ('frac', 'tfrac', 'dfrac'): return _tag('mfrac', self.group()+self.group(), **(dict(displaystyle='false') if name=='tfrac' else {}))
        if name=='sqrt': return self.root()
        if name in ('xrightarrow', 'overset'): return self.over(name)
        if name=='underbrace': return _tag('munder', self.group()+_tag('mo', '⏟'))
        if name in ('left', 'right', 'middle'): return self.fence('true')
        if re.fullmatch(r'[bB]igg?[lrm]?', name): return self.fence('false', minsize='1.2em', maxsize='1.2em', stretch='true')
        if name=='begin': return self.table(self.raw())
        raise ValueError(f'\\{name} is not known to docs/mathml.py: add it there, or write the equation without it')

    def word(self, name): # A function by name, apart from a letter that follows
        if (t := self.peek()) in (None, '_', '^', '(', ')', '}', '&') or re.fullmatch(r'\\(left|[bB]igg?[lrm]?|[,;: ])', t): return _tag('mi', name)
        return _tag('mrow', _tag('mi', name)+_space(.167))
    def root(self):
        if self.peek()!='[': return _tag('msqrt', self.group())
        self.next()
        n = _row(self.run(']'))
        self.next()
        return _tag('mroot', self.group()+n)
    def over(self, name):
        top = self.group()
        return _tag('mover', (_tag('mo', '→', stretchy='true') if name=='xrightarrow' else self.group())+top)
    def fence(self, stretchy, stretch=None, **size):
        t = self.next()
        sign = '' if t=='.' else SIGNS.get(t[1:], t) if t[0]=='\\' else t
        return _tag('mo', escape(sign), stretchy=stretch or stretchy, symmetric='true', **size)
    def table(self, kind):
        if kind not in ('cases', 'aligned', 'matrix', 'pmatrix', 'bmatrix'): raise ValueError(f'\\begin{{{kind}}} is not known to docs/mathml.py: add it there, or write the equation without it')
        rows,cells = [],[]
        while True:
            cells.append(_tag('mtd', ''.join(self.run('&', '\\\\', '\\end')), style='text-align:left' if kind=='cases' else 'text-align:center'))
            t = self.next()
            if t!='&': rows.append(_tag('mtr', ''.join(cells))); cells = []
            if t=='\\end': break
        self.raw()
        left,right = dict(cases='{', pmatrix='(', bmatrix='[').get(kind, ''), dict(pmatrix=')', bmatrix=']').get(kind, '')
        fence = lambda s: _tag('mo', s, stretchy='true') if s else ''
        return _tag('mrow', fence(left)+_tag('mtable', ''.join(rows), columnspacing='1em')+fence(right))

def mathml(
    tex,           # An equation without its dollars
    display=False, # On a line of its own?
)->str:            # `<math>`, with the TeX as what is read out and copied
    "An equation as MathML; raises `ValueError` at what it does not know"
    try: r = _Reader(tex, display); body = _tag('mrow', ''.join(r.run()))
    except ValueError as e: raise ValueError(f'{e}, in ${tex.strip()}$') from None
    note = _tag('annotation', escape(tex.strip()), encoding='application/x-tex')
    return _tag('math', _tag('semantics', body+note), display='block' if display else 'inline')

_CODE = re.compile(r'(```.*?```|~~~.*?~~~|`[^`\n]*`)', re.S)
_TEX = re.compile(r'\$\$(?P<block>.+?)\$\$|(?<![\\\w$])\$(?P<line>[^$\s](?:[^$\n]*[^$\s])?)\$(?![\w$])', re.S)

def equations(
    text,   # Markdown
    f,      # Function of (TeX, on a line of its own?) -> what stands in its place
)->str:
    "`text` with `f` of every equation outside code"
    one = lambda m: f(m['block'] or m['line'], m['block'] is not None)
    return ''.join(part if i%2 else _TEX.sub(one, part) for i,part in enumerate(_CODE.split(text)))
