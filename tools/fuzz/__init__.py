"""Random graphs of registered ops over random specs, each rewritten and verified.

    python -m tools.fuzz --seconds 600

A program is a list of steps over a pool of values: a case of an op's rule (`rule_cases`), a layer (`layers`), a view or
a write (`shapes`), something that looks across rows (`crossing`). It is written down as ATen (`recorder`) and, one in
`--export`, traced by torch.export like any model; else the recorded graph stands for the trace, and all that follows is
`rewrite` and `verify`. The oracle is the program itself in eager, on the expanded batch. What goes wrong is
shrunk by leaving steps out, and printed.
"""
