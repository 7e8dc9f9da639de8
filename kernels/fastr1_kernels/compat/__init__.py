"""The signatures of other libraries' functions over this package's own: `liger`, `trl`, `verl`.

Each module imports torch and this package only; the libraries themselves are needed where something of theirs is
patched or registered. What cannot be honoured is refused with a ValueError; where a result differs from the library's,
the docstring says so.
"""
