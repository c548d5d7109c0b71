"""Bridges to other systems, each a module that needs its own extra: `dask`, `prometheus`.

Nothing in the package imports them; a program does, one by one. Sits above all of the library.
"""
