"""The texts that math-verify is asked to compare: written in one way, and only if they can be equal at all.

`normalise` rewrites one text, a reference or an answer, without a look at the other. `comparable` sees both:
units, bases, choices and intervals mean something only beside the reference. Repetitions in the patterns are
bounded or end at a fixed character, so that the time is linear in the length of a text.
"""
import math
import re
import unicodedata
from collections import Counter
from fractions import Fraction

CHARACTERS = str.maketrans({
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012", "-"), **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("\u200b\u2060\u2062\ufeff", ""), **dict.fromkeys("°º˚", r"^{\circ}"),
    **dict.fromkeys("·⋅∙•", r"\cdot "), "×": r"\times ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ", "⁄": "/",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "→": r"\to ",
    "∞": r"\infty ", "π": r"\pi ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∠": r"\angle ", "△": r"\triangle ",
    "ℤ": r"\mathbb{Z}", "ℝ": r"\mathbb{R}", "㎡": r"\text{m}^2", "㎠": r"\text{cm}^2", "¥": "元",
    "。": ".", "、": ",", "∶": ":",
})
RAISED, LOWERED = "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+", "[₀₁₂₃₄₅₆₇₈₉₊₋]+"
LEADING, TRAILING = ' "*_#=:,;', ' .,;:*_"\\\n'  # what says nothing before or after an answer

WHOLE = {  # answers in words for which there is a sign or a number
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions", "none", "{}",
                     "empty set", "the empty set", r"\varnothing", r"\{\}", r"\{ \}"), r"\emptyset"),
    **dict.fromkeys(("infinity", "infinite", "infinitely many", "infinitely many solutions"), r"\infty"),
    **dict.fromkeys(("all real numbers", "all reals", r"\mathbb{r}", r"\mathbb r"), r"(-\infty,\infty)"),
    **dict.fromkeys(("dne", "does not exist"), "undefined"),
    **{word: str(number) for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split())},
}
UNITS = {name: (dimension, Fraction(size)) for dimension, sizes in {  # size: in the dimension's first unit
    "metre": {"1": "m metre meter 米", "0.001": "mm millimetre millimeter 毫米", "0.1": "dm decimetre decimeter",
              "0.01": "cm centimetre centimeter 厘米", "1000": "km kilometre kilometer 千米 公里"},
    "inch": {"1": "in inch inches", "12": "ft foot feet", "36": "yd yard", "63360": "mi mile"},
    "gram": {"1": "g gram 克", "0.001": "mg milligram", "1000": "kg kilogram 千克 公斤"},
    "pound": {"1": "lb pound", "1/16": "oz ounce"},
    "second": {"1": "s sec second 秒", "60": "min minute 分钟", "3600": "h hr hour 小时", "86400": "day 天",
               "604800": "week 周"},
    "year": {"1": "yr year 年", "1/12": "month 月"},
    "litre": {"1": "l litre liter 升", "0.001": "ml millilitre milliliter 毫升"},
    "dollar": {"1": "dollar usd", "0.01": "cent ¢"}, "euro": {"1": "€ euro eur"},
    "yuan": {"1": "元 yuan rmb"}, "sterling": {"1": "£ gbp"}, "rupee": {"1": "₹ rupee rs"},
    "degree": {"1": "degree deg 度"}, "radian": {"1": "rad radian"}, "am": {"1": "am"}, "pm": {"1": "pm"},
}.items() for size, names in sizes.items() for name in names.split()}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
NO_UNITS = set("and or not if maybe perhaps possibly either neither but mod where for with to than".split())
NO_UNITS |= set("hundred dozen trillion".split())
FUNCTIONS = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|gcd|lcm|max|min|det"

# Units at the end of a text: \text{...}, words or signs, some with a power, "/", "per" or \cdot between them.
CHINESE = "[\u3400-\u9fff]"
NAME = (r"(?:\\text ?\{[^{}]{1,40}\}|(?<![a-zA-Z\\])[a-zA-Z]{2,20}(?![a-zA-Z])|\\\$|\^\{\\circ\}|[€£₹¢]"
        rf"|(?<!{CHINESE}){CHINESE}{{1,9}}(?!{CHINESE}))(?: ?\^ ?\{{?-?[1-4]\}}?)?")
NAMES = rf"{NAME}(?:(?: ?(?:/|\\cdot))? ?{NAME})*"
UNIT = re.compile(rf" ?(\({NAMES}\)|{NAMES})$")


def repeating(match: re.Match) -> str:
    r"""0.1\overline{6}, 0.1\dot{6}, 0.1(6) or 0.1666\ldots as a fraction."""
    whole, fixed = match["whole"] or "0", match["fixed"] or ""
    repeat = match["bar"] or match["round"] or match["digits"] or match["dot"] + (match["dots"] or "")
    repeat = re.sub(r"\D", "", repeat)
    difference = int(whole + fixed + repeat) - int(whole + fixed)
    fraction = Fraction(difference, 10**len(fixed) * (10**len(repeat) - 1))
    return rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"


def interval(match: re.Match) -> str:
    """]0,3[ as (0,3)"""
    return {"[": "[", "]": "("}[match[1]] + match[2] + {"[": ")", "]": "]"}[match[3]]


def integers(match: re.Match) -> str:
    r"""2n\pi, n \in \mathbb{Z}: the name of the integer is k, and that it is one goes without saying."""
    return re.sub(rf"(?<![a-zA-Z\\]){match[2]}(?![a-zA-Z])", "k", match[1])


RULES = [(re.compile(pattern), replacement) for pattern, replacement in (  # one after the other
    # what changes only the look
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
    (r"\{ ?\\(?:rm|bf|it) ([^{}]{1,40})\}", r"\\text{\1}"),
    (r"\\(?:display|text)style(?![a-zA-Z])|\\(?:bf|rm|it|large|Large)(?![a-zA-Z])", ""),
    (r"\\(?:text)?color ?\{[^{}]{0,40}\}", ""),
    (r"\\(?:underline|mathbf|boldsymbol|bm|mathit|mathsf|mathtt|emph|boxed|fbox)(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|`", ""),
    (r"(?<=\d),\\!\s?(?=\d)|\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|enspace|thinspace|space)(?![a-zA-Z])|&nbsp;|\s", " "),
    (r"  +", " "),
    (r"^(?i:(?:(?:the|so|thus|final|correct) )*(?:answer|option|choice)(?: is)?)(?: ?[:=] ?| )(?=\S)", ""),
    # one name for each thing
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (r"\\(?:(?:text|math)(?:rm|bf|it|sf|tt|normal|up)|mbox|hbox|operatorname\*?)(?![a-zA-Z])", r"\\text"),
    (r"\\text ?\{ ?(\\?[eid$%]|[AC](?= ?\} ?_)) ?\}", r"\1"), (r"\\pounds(?![a-zA-Z]) ?", "£"),
    (rf"\\text ?\{{ ?({FUNCTIONS}) ?\}}|(?<![a-zA-Z\\])({FUNCTIONS})(?![a-zA-Z])", r"\\\1\2 "),
    (r"\\leq(?:slant|q)?(?![a-zA-Z])|<=|\\le(?![a-zA-Z]) ?", r"\\le "),
    (r"\\geq(?:slant|q)?(?![a-zA-Z])|>=|\\ge(?![a-zA-Z]) ?", r"\\ge "),
    (r"\\lt(?![a-zA-Z]) ?", "<"), (r"\\gt(?![a-zA-Z]) ?", ">"), (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\[lc]?dots(?:[cbom])?(?![a-zA-Z])", r"\\ldots"),
    (r"\\(?:text ?\{ ?)?(?i:percent(?:age)?)\b ?\}?| ?(?<![a-zA-Z\\])(?i:percent(?:age)?)\b", r"\\%"),
    (r"\^ ?(?:\{ ?\\(?:circ|degree) ?\}|\\(?:circ|degree)(?![a-zA-Z]))|\\degree(?![a-zA-Z])", r"^{\\circ}"),
    (r"\^\{\\circ\} ?(?:\\text ?\{ ?([CF]) ?\}|([CF])(?![a-zA-Z]))", r" \\text{degree \1\2}"),
    (r"(?<![a-zA-Z\\])mph(?![a-zA-Z])", "miles/hour"), (r"(?<=\d) ?(?i:([ap])\.m)(?![a-zA-Z])", r" \1m"),
    (r"_ ?(\w)(?!\w)|_ ?\{ ?(\w) ?\}", r"_{\1\2}"),
    (r"\\[pb]?mod(?![a-zA-Z]) ?\{? ?(\w{1,9}) ?\}?", r"\\mod{\1}"),
    *[(rf"(?<=\d) ?(?:\\text ?\{{ ?)?{word}(?![a-z])(?: ?\}})?", rf" \\cdot 10^{{{zeros}}}")
      for word, zeros in (("thousand", 3), ("million", 6), ("billion", 9))],
    (r"(?<![a-zA-Z])sq\. ?", "sq "), (r"∛ ?(\d{1,30}|[a-zA-Z])", r"\\sqrt[3]{\1}"),
    (r"√ ?(\d{1,30}(?:\.\d{1,30})?|[a-zA-Z])", r"\\sqrt{\1}"), (r"√", r"\\sqrt"),
    (r"\\?sqrt ?\(([^()]{1,200})\)", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi"), (r"(?<=\d)i(?![a-zA-Z])", " i"),
    (r"^C_ ?\{?(\d{1,6})\}? ?\^ ?\{?(\d{1,6})\}?$", r"\\binom{\1}{\2}"),
    (r"^A_ ?\{?(\d{1,6})\}? ?\^ ?\{?(\d{1,6})\}?$", r"\\frac{\1!}{(\1-\2)!}"),
    # numbers
    (r"(?<![\w.])(?<![\w}] )[1-9]\d{0,2}(?:(?: \d{3})+|(?:\{,\}\d{3})+|(?:'\d{3})+|(?:\.\d{3}){2,})(?!\d)",
     lambda match: re.sub(r"\D", "", match[0])),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"(?<![\w.])(\d{1,30}(?:\.\d{0,30})?)[eE](?:\+?|(-))0*(\d{1,9})(?![\w.])", r"\1 \\cdot 10^{\2\3}"),
    (r"\^-(\d{1,9})", r"^{-\1}"),
    (r"(?<![\w./^}\\])(?<!frac )(\d{1,9}) (\d{1,9}) ?/ ?(\d{1,9})(?![\w./])", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)\.(?=[/*+) -]|$)", ""),
    (r"^(\d{1,9}) ?(?:\^ ?)?\{?(?:\\text ?)?\{? ?(?:st|nd|rd|th)[ }]*$", r"\1"),
    (r"(?<![\w.])(?P<whole>\d{0,15})\.(?P<fixed>\d{0,15}?)(?:\\(?:overline|bar) ?\{(?P<bar>\d{1,15})\}"
     r"|\((?P<round>\d{1,15})\)|\\dot ?\{?(?P<dot>\d)\}?(?P<dots>\d{0,12}\\dot ?\{?\d\}?)?"
     r"|(?P<digits>(?P<one>\d)(?=(?P=one){2})|\d{2,6}?)(?P=digits){1,9} ?\\ldots)", repeating),
    (r"(?<=\.)(\d{1,30}) ?\\ldots$", r"\1"),
    # the rest
    (r"^(-?) ?(?:\\\$|(?i:usd|us\\\$)) ?(?=[\d.\\-])(.*)$", r"\1\2 \\text{dollar}"),
    (r"^(-?) ?([€£₹元]|(?i:rs)\.?) ?(?=[\d.\\-])(.*)$", r"\1\3 \\text{\2}"),
    (r"([\[\]])([^\[\](),]{1,200},[^\[\](),]{1,200})([\[\]])", interval),
    (r"^(.{1,300}?)[,;]? ?\(? ?([a-zA-Z]) ?(?:\\in ?\{?(?:\\mathbb ?)?\{?Z\}*|is an integer) ?\)?$",
     integers),
    (r"^\\?\{ ?[a-zA-Z] ?(?:\\mid|\||:) ?([^{}|]*?) ?\\?\}$", r"\1"),
)]


def unfold(match: re.Match) -> str:
    """One character outside ASCII: digits of all scripts, fractions, fullwidth and other compatible forms."""
    character = match[0]
    plain = unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return r"\frac{" + plain.replace("⁄", "}{") + "}"
    return str(unicodedata.decimal(character)) if character.isdecimal() else plain


def normalise(text: str) -> str:
    r"""The text in one way of writing: `value`, or `value \text{unit}` if it ends with a unit.

    The same for references and answers. Words come out bare: `\text{even}` as `even`, `(C)` as `C`.
    """
    text = re.sub(RAISED, lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = re.sub(LOWERED, lambda match: "_{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = re.sub(r"[^\x00-\x7f]", unfold, text.translate(CHARACTERS)).translate(CHARACTERS)
    text = text.replace("...", r" \ldots ").lstrip(LEADING).rstrip(TRAILING)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    value, unit = cut_unit(text.lstrip(LEADING).rstrip(TRAILING))
    value = re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", value)
    value = re.sub(r"  +", " ", value).lstrip(LEADING).rstrip(TRAILING)
    value = re.sub(r"^(?:\(?([A-Z])\)|\{([^{}]+)\})$", lambda match: match[1] or match[2], value)
    if re.fullmatch(r"[1-9]\d{0,15}(?: ?: ?[1-9]\d{0,15}){2,9}", value):
        parts = [int(part) for part in value.split(":")]
        value = ":".join(str(part // math.gcd(*parts)) for part in parts)
    value = WHOLE.get(value.lower(), value)
    return rf"{value} \text{{{unit}}}" if unit else value


def cut_unit(text: str) -> tuple[str, str]:
    """The text before a unit at its end, and the unit; or the text and nothing."""
    match = UNIT.search(text, max(0, len(text) - 80))
    value = text[:match.start()].rstrip() if match else ""
    if not re.search(r"[\d)}\]!]$|\\[a-zA-Z]+$|(?<![a-zA-Z])[a-zA-Z]$", value):
        return text, ""
    marked = match[1].replace(r"{\circ}", " degree ").replace(r"\$", " dollar ")
    plain = re.findall(r"[a-zA-Z]+", re.sub(r"\\[a-z]+(?: ?\{[^{}]*\})?", "", marked))  # not in a \text{...}
    known = [name_of(word) in UNITS or word.lower() in POWERS or word == "per" for word in plain]
    apart = match[0][0] == " " and value[-1] in "0123456789})]!"
    if not all(known) and not (apart and (known[-1] or len(plain[-1]) > 3)):
        return text, ""
    marked = re.sub(r"\\text|\\cdot|[\\{}()]", " ", marked).lower().replace("^ degree", "degree")
    unit = re.sub(r" ?\^ ?", "^", " ".join(marked.split()))
    if NO_UNITS & set(re.findall("[a-z]+", unit)) or re.search(r"(?<![a-z^-])\d", unit):
        return text, ""
    return value, unit


def name_of(word: str) -> str:
    """A unit's name in the singular, where the table has it."""
    word = word.lower()
    return word if word in UNITS else word.removesuffix("s")


def measure(unit: str) -> tuple[Fraction, Counter, set]:
    """Size of a unit in the first units of its dimensions, the dimensions' powers, words of no dimension."""
    factor, dimensions, words, sign, prefix = Fraction(1), Counter(), set(), 1, 1
    unit = unit.replace("平方", "square ").replace("立方", "cubic ")
    for word, power in re.findall(r"([^\W\d_]+|[/€£₹¢])(?:\^?(-?\d))?", unit):
        if word in ("/", "per"):
            sign = -1
        elif word in POWERS:
            prefix = POWERS[word]
        elif name_of(word) in UNITS:
            dimension, size = UNITS[name_of(word)]
            power, prefix = sign * prefix * int(power or 1), 1
            dimensions[dimension] += power
            factor *= size**power
        else:
            words.add(name_of(word))
    return factor, dimensions, words


WORD = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+){0,3}")  # up to four words, or a letter
LETTERS = re.compile(r"[A-J](?:(?:,| |and)*[A-J])*")
LABEL = re.compile(r"([A-J])|\(?([A-J])[.:)] ?(?!(?:[A-J]|or|and|not)\b)([^ ].*)", re.DOTALL)  # C. 12
TIME = re.compile(r"\d{1,2}:[0-5]\d(?: \\text\{[ap]m\})?")
BASE = re.compile(r"\(?(\d[0-9A-Fa-f]{0,98}|[0-9A-Fa-f]{1,99}(?=\)?_ ?\{16))\)?_ ?\{ ?\(?(\d\d?)\)? ?\}")
SET = re.compile(r"[\[(][^,]*,.*[\])]", re.DOTALL)
SIGN = r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))"
RELATION = re.compile(rf"(?:([^<>=,]+?) ?{SIGN} ?)?([a-zA-Z]|\\[a-z]+) ?(?:{SIGN} ?([^<>=,]+))?")
HEDGES = [re.compile(pattern, re.DOTALL) for pattern in (
    r"\\mod(?![a-z])", r", ?\\ldots", r"(?<!frac )\d \d",
    r"^(?!.*\\lim).*\\(?:to|[a-zA-Z]{0,9}arrow|implies|iff)(?![a-zA-Z])")]


def same(gold: str, answer: str) -> bool:
    """The same text, spaces beside signs apart; words also in other letter case."""
    gold, answer = [re.sub(r" ?([^\w ]) ?", r"\1", text) for text in (gold, answer)]
    return gold == answer or len(gold) > 1 and gold.lower() == answer.lower() and bool(WORD.fullmatch(gold))


def comparable(gold: str, answer: str) -> tuple[str, str] | None:
    """What to compare of two normalised texts; None if the answer is another one in any case."""
    for look_at in (units, names, choices, bases, forms):
        pair = look_at(gold, answer)
        if pair is None:
            return None
        gold, answer = pair
    return gold, answer


def units(gold: str, answer: str) -> tuple[str, str] | None:
    """Values in one unit. A unit on one side alone is none; units of other dimensions are other answers."""
    splits = [re.fullmatch(r"(.*) \\text\{([^{}]*)\}", text, re.DOTALL) for text in (gold, answer)]
    (gold, gold_unit), (answer, answer_unit) = [
        split.groups() if split else (text, "") for split, text in zip(splits, (gold, answer))]
    letter = re.fullmatch(r"(.*\d) ?([mshgl])", answer)
    if letter and not answer_unit and not re.search(r"[a-zA-Z]", gold):  # beside a number it is no variable
        answer, answer_unit = letter.groups()
    if gold_unit and answer_unit:
        gold_size, gold_dimensions, gold_words = measure(gold_unit)
        size, dimensions, words = measure(answer_unit)
        if dimensions != gold_dimensions or words and gold_words and not words & gold_words:
            return None
        if size != gold_size:
            answer = r"({}) \cdot \frac{{{}}}{{{}}}".format(answer, *(size / gold_size).as_integer_ratio())
    elif gold_unit == "degree" and r"\pi" in answer:
        gold = rf"({gold}) \cdot \frac{{\pi}}{{180}}"
    elif answer_unit == "degree" and r"\pi" in gold:
        answer = rf"({answer}) \cdot \frac{{\pi}}{{180}}"
    return gold, answer


def names(gold: str, answer: str) -> tuple[str, str]:
    """x = 5 without the name if only one side has a name."""
    named = [re.fullmatch(r"[a-zA-Z] ?= ?([^=<>]+)", text) for text in (gold, answer)]
    relation = [re.search(r"[=<>]|\\(?:le|ge|ne|in)(?![a-z])", text) for text in (gold, answer)]
    return (named[0][1] if named[0] and not relation[1] else gold,
            named[1][1] if named[1] and not relation[0] else answer)


def choices(gold: str, answer: str) -> tuple[str, str] | None:
    """For a reference `C`, answers such as `C. 12` are its letter; for `C. 12`, letter or value will do."""
    if LETTERS.fullmatch(gold) and LETTERS.fullmatch(answer):
        return tuple("".join(sorted(set(re.findall("[A-J]", text)))) for text in (gold, answer))
    (gold_letter, gold_rest), (letter, rest) = [
        (label[1] or label[2], label[3]) if label else (None, text)
        for text in (gold, answer) for label in [LABEL.fullmatch(text)]]
    if gold_letter and letter and gold_letter != letter or gold_letter and not gold_rest and not letter:
        return None
    return (gold_rest, rest) if gold_rest and rest else (gold, gold) if gold_letter else (gold, answer)


def bases(gold: str, answer: str) -> tuple[str, str] | None:
    """Numbers with the base as subscript by their value, or by their digits where one side has no base."""
    found = [BASE.fullmatch(text) for text in (gold, answer)]
    if all(found):
        try:
            return tuple(str(int(number[1], int(number[2]))) for number in found)
        except ValueError:  # a base without such a digit
            return None
    return tuple(number[1] if number else text for number, text in zip(found, (gold, answer)))


def forms(gold: str, answer: str) -> tuple[str, str] | None:
    """Conditions as intervals beside intervals; words and hedges only where the reference has them."""
    for hedge in HEDGES:
        if hedge.search(answer) and not hedge.search(gold):
            return None
    if WORD.fullmatch(gold) and re.search(r"[^\W\d_]{4}", gold) and not same(gold, answer):
        return None  # math-verify takes words for products of letters: east = seat
    if SET.fullmatch(re.sub(r"^[a-zA-Z] ?\\in ?", "", gold)):
        answer = intervals(answer)
    elif SET.fullmatch(re.sub(r"^[a-zA-Z] ?\\in ?", "", answer)):
        gold = intervals(gold)
    return gold, answer


def intervals(text: str) -> str:
    r"""x<1 or 2 \le x as (-\infty,1)\cup[2,\infty); the text itself if it is no such condition."""
    found = []
    for part in re.split(r",? ?(?:\bor\b|\\lor(?![a-z])|\\cup(?![a-z])) ?", text):
        match = RELATION.fullmatch(part)
        if not match or not (match[2] or match[4]):
            return text
        ends = [r"(-\infty", r"\infty)"]
        for value, sign, above in ((match[1], match[2], False), (match[5], match[4], True)):
            if sign:
                above ^= sign in (">", r"\ge")  # 5 > x: the value is the upper end
                closed = sign in (r"\le", r"\ge")
                ends[above] = value + (")]"[closed]) if above else "(["[closed] + value
        found.append(",".join(ends))
    return r"\cup".join(found)


def usable_as_text(gold: str) -> bool:
    """A letter, up to four words, a time: whoever gives this answer at all gives it in this form."""
    return any(form.fullmatch(gold) for form in (WORD, LABEL, TIME))


def prose(gold: str) -> bool:
    """Words among the mathematics, which math-verify reads as products of letters."""
    return bool(re.search(r"(?<![\\a-zA-Z])[a-z]{4,}", re.sub(r"(?:_|\\begin|\\end) ?\{[^{}]*\}", "", gold)))
