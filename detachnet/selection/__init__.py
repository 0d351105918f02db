"""trained family + budgets -> front: the sub-models worth having, found by trying them.

candidate -> space             what a sub-model can leave out, its neighbours, what each costs
worth                          its accuracy on held-out images, its norms recalibrated
journal                        every candidate that was tried, in a file that a search goes on from
greedy, even, drawn, evolution -> searching  which to try next, until the budgets are met
cluster                        a Ray cluster that tries them
costs, latency                 what a candidate costs: counted, or measured on this machine
images                         of a run: some that decide, some to measure norms on
front -> adopting              what was found: a table, sub-models of the family, a recipe that trains them on
"""
