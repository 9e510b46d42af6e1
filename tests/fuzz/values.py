"""Strategies for texts and values that break careless code."""

from __future__ import annotations

from hypothesis import strategies as st

AWKWARD = [
    "",
    " ",
    "\n",
    "\t\r\n",
    "\x00",
    "a\x00b",
    "\x1b[31mred\x1b[0m",
    "\ud800",  # half of a surrogate pair
    "\udfff\ud800",
    "\ufeff",  # byte order mark
    "\u200b\u200d",  # zero width
    "\u2028\u2029\x85\x0b\x0c",  # line breaks of other kinds
    "שלום עולם",
    "\u202eabc\u202c",  # right-to-left override
    "日本語のテキスト",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301\u0301\u0301",
    "ﷺ" * 20,
    "x" * 5000,
    "null",
    "none",
    "nan",
    "-inf",
    "1e400",
    "0x10",
    "1_000",
    "yes",
    "~",
    "~nobody/x",
    "../..",
    "/etc/hostname",
    "C:\\x",
    "file:///etc",
    "https://example.org/x",
    "{{ 7 * 7 }}",
    "%s%n",
    "${HOME}",
    "!!python/object/apply:os.system",
    "<|im_end|>",
    "<s>",
    "</s>",
]

text = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=40), st.text(alphabet=st.characters(), max_size=8))
readable_text = text.filter(lambda value: not any("\ud800" <= c <= "\udfff" for c in value))
numbers = st.one_of(
    st.integers(-5, 5),
    st.integers(),
    st.integers(min_value=2**63, max_value=2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.1, 1e-300, 1e300, -0.0, 10**400]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, text)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
