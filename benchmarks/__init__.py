"""Benchmarks of numbabuf and its competitors: `python -m benchmarks NAME|all [--smoke] [--json OUT]`, `plot RESULTS`.

Each module here, but for the harness and names that begin with an underscore, is one benchmark: the first
line of its docstring says what it measures, `run(smoke, **options)` measures and returns what JSON can hold,
`table(result)` makes of that the text for people. Nothing in numbabuf imports this.
"""
