"""The texts that math-verify is asked to compare: written in one way, and only if they can be equal at all.

`normalise` rewrites one text, a reference or an answer, without a look at the other. `comparable` sees both:
units and hedges mean something only beside the reference.
"""
import math
import re
import unicodedata

CHARACTERS = str.maketrans({
    **dict.fromkeys("−–—‐‑‒", "-"), **dict.fromkeys("·⋅∙•", r"\cdot "), **dict.fromkeys("\u200b\u2060\ufeff"),
    "⁄": "/", "。": ".", "、": ",", "∶": ":", "∞": r"\infty ", "∈": r"\in ",
})
MARKED = (  # what NFKC would make x2, a1, 41/2 and o of
    ("[⁰¹²³⁴-⁻ⁱⁿ]+", r"^{\g<0>}"), ("[₀-₋]+", r"_{\g<0>}"), ("[¼-¾⅐-⅞]", r" \g<0>"),
    (r"\\(?:text|mathrm) ?\{ ?[°º˚] ?\}|[°º˚]", r"^{\\circ}"), (r"\.\.\.|…|\\[cd]dots|\\dots", r"\\ldots "),
)
BEFORE, AFTER = ' \n,:;=*_#"“”', ' \n,:;*_"“”.\\'  # what says nothing before or after an answer

# A unit: \text{...}, a word of four letters or more, a short name, or a sign; with a power or without.
UNIT = (r"(?:\\text\{[^{}\d]*\}|(?<![a-zA-Z\\])(?:[a-zA-Z]{4,}|[cdkm]m|[km]g|[km]?m/s|km/h|mph|in|ft|yd|mi"
        r"|usd|USD|EUR|GBP|sq\.?|min|hr|[apAP]\.?[mM])(?![a-zA-Z])|[€£¥₹¢\u3400-\u9fff])(?:\^\{?\d\}?)?")
NO_UNIT = re.compile(
    r"\b(?:and|or|to|through|vs|versus|not|if|but|when|unless|except|maybe|perhaps|possibly|plus|minus|over"
    r"|divided|mod(?:ulo)?|root|pi|infinity|alpha|beta|theta|[xyzn]|gross|hal(?:f|ves)"
    r"|(?:dozen|hundred|thousand|lakh|crore|[mbtrquad]+illion"
    r"|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth)s?)\b"
    r"|^(?:squared|cubed|factorial)\b"   # 9 squared, but not 9 meters squared
    r"|[万亿半或负]|分之|以[上下]|[百千]$")  # 9千, but not 9千米


def unit(match: re.Match) -> str:
    r"""`\text{ square Meters}` as ` \text{square meters}`; words that are no unit without \text{...}"""
    words = re.sub(r"[{}()\\]|(?<=\\)text", " ", match[1].replace(".", "").replace("$", "dollar"))
    words = re.sub(r" ?([/^]) ?", r"\1", " ".join(words.lower().split()))
    return f" {words}" if NO_UNIT.search(words) else rf" \text{{{words}}}"


def repeating(match: re.Match) -> str:
    r"""0.1\overline{6} as \frac{15}{90}: (16 - 1) / 90"""
    whole, fixed, repeat = match.groups()
    difference = int(whole + fixed + repeat) - int("0" + whole + fixed)
    return rf"\frac{{{difference}}}{{{'9' * len(repeat) + '0' * len(fixed)}}}"


def ratio(match: re.Match) -> str:
    """2:4:6 as (1,2,3)"""
    parts = [int(part) for part in match[0].split(":")]
    return f"({','.join(str(part // (math.gcd(*parts) or 1)) for part in parts)})"


RULES = [(re.compile(pattern), replacement) for pattern, replacement in (  # one after the other
    # wrappers and spaces
    (r"(?<=[\w)}])\*\*(-?\d+|[a-z](?![a-z]))", r"^{\1}"),                          # x**2
    (r"\\[bB]igg?[lrm]?(?![a-zA-Z])|\*\*|`", ""),                                 # \big(; **5**
    (r"\\(?:(?:text)?color(?:box)?|[hv]?phantom|hspace) ?\{[^{}]*\}", ""),       # \color{red}5; \hspace{2pt}5
    (r"\\(?:underline|boxed|mathbf|boldsymbol|bm|bf|rm|emph|[lL]arge|displaystyle|therefore)(?![a-zA-Z])",
     ""),                                                                         # \mathbf{5}
    (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|,\\!(?=\d)|\\!", ""),                          # \[5\]; $5$; 12,\!500
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\s", " "), (r"  +", " "),          # 12\,500; 5\quad
    (r"\\(?:[dtcs]|nice)frac(?![a-zA-Z])", r"\\frac"),                              # \dfrac{1}{2}
    (r"\{:\}|\\colon(?![a-zA-Z])", ":"),                                          # 7{:}45
    (r"^\{([^{}]+)\}$", r"\1"),                                                   # {5}
    (r"^\\text ?\{ ?((?i:(?:the )?(?:final )?answer(?: is)?:?) )\}", r"\1"),      # \text{The answer is }5
    (r"^(?i:(?:the )?(?:final )?(?:answer|option)(?: is)?:? )", ""),              # The answer is 5
    # one name for each thing
    (r"\\(?:(?:text|math)(?:rm|bf|it|sf|tt)|mbox|operatorname|text)(?![a-zA-Z]) ?\{ ?([^{}]*)\}",
     r"\\text{\1}"),                                                              # \mathrm{ cm}
    (r"\\text\{((?:arc)?(?:sin|cos|tan)|ln|log|exp)\}", r"\\\1 "),                # \operatorname{ln}
    (r"^[a-zA-Z] ?\\in ?(?=[\[(])", ""),                                          # x \in [1,2]
    (r"^[a-zA-Z] ?= ?(\d{1,3}(?:,\d{3})+|\d+_.*|\\text\{[^{}]*\})$", r"\1"),      # x = 58,500; x = 52_8
    (r"\\text\{([eid]|\d+|\\?[$%])\}|^\\text\{([^{}]*)\}", r"\1\2"),              # \mathrm{e}; \text{(C) } 12
    (r"(?: |\\text\{)percent\}?", r"\\%"), (r"(?<=\d)i(?![a-zA-Z])", " i"),       # 5 percent; 2i
    (r"\^ ?\{? ?\\(?:circ|degree)(?![a-zA-Z])(?: ?\})?|\\(?:text)?degree(?![a-zA-Z])"
     r"|(?: |\\text\{)degrees?(?:\}|\b)",
     r"^{\\circ}"),                                                               # 90^\circ; 90 degrees
    (r"√ ?(\d+|\w)", r"\\sqrt{\1}"), (r"√", r"\\sqrt"),                           # √2; √{x+1}
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),                                     # \sqrt(2)
    (r"^C_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?$", r"\\binom{\1}{\2}"),                  # C_5^2
    (r"^(?i:no (?:real )?solutions?|none|(?:the )?empty set|\\varnothing)$", r"\\emptyset"),
    (r"^(?i:infinit(?:y|e|ely many)(?: solutions?)?)$", r"\\infty"),
    # numbers
    (r"(?<![\w.}])(?<![\w}] )[1-9]\d{0,2}(?:(?: \d{3})+|(?:\{[, ]\}\d{3})+|(?:'\d{3})+)(?![\d/])",
     lambda number: re.sub(r"\D", "", number[0])),                                # 12 500; 12{,}500; 12'500
    (r"(?<=\d)\{,\}(?=\d)", "."), (r"\^-(\d+)", r"^{-\1}"),                       # 3{,}5; 10^-3
    (r"(?<![\w.])(\d+(?:\.\d*)?)[eE]([-+]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),     # 1e-7
    (r"(?<![\w./^}\\])(?<!frac )(\d+) (\d+) ?/ ?(\d+)(?![\w./])", r"\1\\frac{\2}{\3}"),  # 7 1/3
    (r"(?<=\d)\.(?=[/*+) -]|$)", ""),                                             # -1./3
    (r"(?<=\d) ?\^? ?\{?(?:\\text\{)?(?:st|nd|rd|th)\}*$", ""),                   # 12^{\text{th}}
    (r"\\dot ?\{?(\d)\}?(?:(\d*)\\dot ?\{?(\d)\}?)?", r"\\overline{\1\2\3}"),     # 0.\dot{1}4\dot{2}
    (r"\.(\d{0,15}?)(\d{1,6}?)\2{2,15} ?\\ldots", r".\1\\overline{\2}"),          # 0.1666\ldots
    (r"(\.\d+) ?\\ldots$", r"\1"),                                                # 1.414\ldots
    (r"(?<![\d.])(\d{0,15})\.(\d{0,15})(?:\\(?:overline|bar) ?\{|\()(\d{1,15})[})]", repeating),
    (r"^\d{1,15}(?: ?: ?\d{1,15}){2,9}$", ratio),
    (r"^([\[\](][^\[\](),;]+);([^\[\](),;]+[\[\])])$", r"\1,\2"),                   # ]0;3[ as ]0,3[
    (r"\\langle(?![a-zA-Z])", "("), (r"\\rangle(?![a-zA-Z])", ")"),                # \langle 1,2 \rangle
    (r"\](?=[^\[\](),]+,[^\[\](),]+[\[\]])", "("),                                # ]0,3[ as (0,3[
    (r"([\[(][^\[\](),]+,[^\[\](),]+)\[", r"\1)"),                                # (0,3[ as (0,3)
    (r"^(.+?)[,;]? ?\(? ?([a-zA-Z]) ?\\in ?(?:\\mathbb ?)?\{?Z\}?\)?$",           # 2n\pi, n \in \mathbb{Z}
     lambda match: re.sub(rf"(?<![a-zA-Z\\]){match[2]}(?![a-zA-Z])", "k", match[1])),
    # units, choices, words
    (r"^(-?) ?(\\\$|\\pounds|[€£¥₹]|(?i:usd|rs\.?)) ?(?=[\d.\\])(.*)$", r"\1\3\\text{\2}"),  # \$5
    (r"^\(?(\d[\dA-Fa-f]*)\)?_ ?\{?(?:\\text\{)?\(?(\d+|[a-z]{3,})\)?\}*$",
     r"\1 \\text{base_\2}"),                                                      # 1011_2; 1011_{\text{two}}
    (rf"(?:(?<=[\d)}}\]!])|(?<=\\pi)) ?\(?({UNIT}(?:(?: ?/ ?| per | )?{UNIT})*)\)?$", unit),
    (r"^\(?([A-J])(?:[.:)](?!.*\b(?:[A-J]|or|and|not)\b).*)?$", r"option \1"),  # (C); C. 12
    (r"^[A-J](?:,? ?(?:and )?[A-J])+$",                                           # CA as A,C
     lambda letters: ",".join(sorted(re.findall("[A-J]", letters[0])))),
    (r"^(?:[a-zA-Z]{4,}(?: [a-zA-Z]+){0,3}|[\u3400-\u9fff]+|\d\d?:00)$",          # East; 8:00
     lambda words: rf"\text{{{words[0].lower()}}}"),
)]


def normalise(text: str) -> str:
    r"""The text in one way of writing: `value`, or `value \text{unit}` if it ends with a unit."""
    for pattern, replacement in MARKED:
        text = re.sub(pattern, replacement, text)
    text = unicodedata.normalize("NFKC", text).translate(CHARACTERS)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)  # ٣
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text.lstrip(BEFORE).rstrip(AFTER))
    return text.lstrip(BEFORE).rstrip(AFTER)


# The names of units, the first of which stands for all, and their sizes.
MEASURES = {name: (dimension, names.split()[0], size) for dimension, sizes in {
    "length": {"mm millimeter millimetre": "0.001", "cm centimeter centimetre 厘米": "0.01",
               "m meter metre 米": "1", "km kilometer kilometre": "1000"},
    "feet": {"in inch inche ''": "1", "ft foot feet '": "12", "yd yard": "36", "mi mile": "63360"},
    "mass": {"mg milligram": "0.001", "g gram": "1", "kg kilogram": "1000"},
    "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
    "money": {"dollar usd": "1", "¢ cent": "0.01"}, "yuan": {"元 yuan ¥": "1"},
    "angle": {r"^{\circ}": "1", "rad radian": "1"},  # `comparable` brings degrees to radians
    "base": dict.fromkeys(("2 two", "3 three", "4 four", "5 five", "6 six", "7 seven", "8 eight", "9 nine",
                           "10 ten", "12 twelve", "16 sixteen"), "1"),
}.items() for names, size in sizes.items() for name in names.split()}
# What a number may stand in without being the answer: 9 \mod 7, 1 \to 2, 2, \ldots, and 1 2.
HEDGE = re.compile(r"\\(?:[pb]?mod|to|[a-zA-Z]{0,9}arrow|implies|iff|ldots)(?![a-zA-Z])|(?<!frac )\d \d")


def same(gold: str, answer: str) -> bool:
    """The same text, spaces beside signs apart."""
    gold, answer = [re.sub(r" ?([^\w ]) ?", r"\1", text) for text in (gold, answer)]
    return gold == answer


def comparable(gold: str, answer: str) -> tuple[str, str] | None:
    """What to compare of two normalised texts; None if the answer is another one in any case."""
    if HEDGE.search(answer) and not HEDGE.search(gold):
        return None
    gold, gold_unit = cut_unit(gold)
    if not re.search("[a-zA-Z]", gold):  # beside a number a letter is no variable: 5m
        answer = re.sub(r"(?<=\d) ?([mshgl])$", r" \\text{\1}", answer)
    answer, answer_unit = cut_unit(answer)
    signs = ["".join(re.findall(r"\^\{\\circ\}|%|'+", text)[:1]) for text in (gold, answer)]
    if signs[0] != signs[1]:  # 12\%, 12° or 12' beside 12 cm
        gold_unit, answer_unit = gold_unit or signs[0], answer_unit or signs[1]
    if gold_unit and answer_unit and gold_unit != answer_unit:
        (dimension, _, size), (other, _, other_size) = [
            MEASURES.get(unit, (unit, unit, "1")) for unit in (gold_unit, answer_unit)]
        if dimension != other:
            return None
        gold, answer = rf"({gold}) \cdot {size}", rf"({answer}) \cdot {other_size}"
    radians = r"\pi" in gold + answer or "rad" in (gold_unit, answer_unit)
    if radians and (r"^{\circ}" in gold) != (r"^{\circ}" in answer):
        gold, answer = [text.replace(r"^{\circ}", r" \cdot \frac{\pi}{180}") for text in (gold, answer)]
    return gold, answer


def cut_unit(text: str) -> tuple[str, str]:
    r"""A normalised text's value, and its unit in short: `5 \text{square meters}` as 5 and m^2"""
    def short(word: re.Match) -> str:
        name = word[0] if word[0] in MEASURES else word[0].rstrip("s")
        return MEASURES[name][1] if name in MEASURES else name

    value, unit = re.fullmatch(r"(.*?)(?: \\text\{([^{}]*)\})?", text, re.DOTALL).groups("")
    unit = re.sub(r"[^\W\d_]+", short, unit)
    unit = re.sub(r"cubic (\w+)", r"\1^3", re.sub(r"(?:square|sq) (\w+)", r"\1^2", unit))
    return value, re.sub(r" ?(?:/|\bper\b) ?", "/", unit)


def prose(gold: str) -> bool:
    """Words among the mathematics, which math-verify reads as products of letters."""
    bare = re.sub(r"(?:_|\\begin|\\end|\\text) ?\{[^{}]*\}", "", gold)
    return bool(re.search(r"(?<![\\a-zA-Z])[a-z]{4,}", bare))
