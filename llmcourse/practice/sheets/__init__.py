"""The checkers of the exercise sheets, one module per sheet, exported from the masters in `solutions/`.

They hold the solutions: do not look before you have tried.
"""
