"""model -> a narrower one: which of a network's filters go together, which are kept, and the network of those.

opening -> channels                layers that were kept whole traced into; which channels are one class
layers, functions -> propagation   what layers and functions do to channels, and the graph run once on numbers
groups                             which filters go together, and what they cost
order -> choice                    which of them a narrower network keeps, the important ones first
check -> patch                     the moves run again on those, and numbers in the graph that follow
slicing, reading                   that network: cut out of the model, or reading parts of its layers
storing                            a choice as a few numbers in a plan

It builds on traced graphs and routes, and knows nothing of plans, of ownership and of families.
"""
