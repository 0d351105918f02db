"""family -> device: exported, measured, chosen from and run.

archive, formats, quantize, manifest -> export
                                           a folder with a graph per model
backends, peak -> profile                  models that run, and what they cost here
stopwatch, segments                        what modules, and the parts of a model, take here
budget -> family                           the model that a budget allows
cascade, rests -> deadline                 a model for each image, a model for each load
"""
