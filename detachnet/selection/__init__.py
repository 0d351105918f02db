"""trained family + budgets -> front: the sub-models worth having, found by trying them.

candidate -> space             what a sub-model can leave out, its neighbours, what each costs
worth                          its accuracy on held-out images, its norms recalibrated
journal                        every candidate that was tried, in a file that a search goes on from
greedy, evolution -> searching  which to try next, until the budgets are met (costs: MACs, bytes; images: of a run)
front                          what was found, as a table and as sub-models of the family
"""
