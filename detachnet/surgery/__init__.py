"""model -> family: what rewriting a network's graph takes, and nothing of images, files or training.

modules, stepdown, norms, codegen, detached   layers, and modules that run without torch.fx
variables, contents -> generators, state      what modules hold and read besides tensors, to be compared
attributes                                    which of it a forward pass reads by which name
bytecode                                      what a function does, as its steps tell
outside                                       what else they reach, and how it is put back
whole, listening                              what of a model is kept whole, and how that is noticed
batches, tracer -> graph, settle -> trace     a model's forward pass as a graph, with all shapes known
preparation -> analysis -> cuts, spans        how the image is prepared, where a network can be cut
routes -> choice                              what is left out
widths/                                       which filters go together, a choice of them, the narrower network
plan, figures, hints -> planning              what a family will be, how it is drawn, what is odd about it
coupling, halves -> finding, statistics       what joins the images of a batch, and which layers keep statistics
ownership, legs -> rewrite                    whose layer a node runs with, where models part, and all graphs
own_layers, detaching                         copies of layers, one model alone
turns                                         models one after another, as one pass has them
structure, views -> derived                   what of the model has changed, all passes; what a trace gives
difference, passes -> proof -> following      the family compared with the model, and again where that has changed
detachable -> making, enlarging               the family, what makes it of a model, a larger one of it
recalibration, importance, layout             statistics and worth of spans, measured; how images lie in memory
synchronizing                                 norms over all processes of a training
"""
