"""family -> device: exported, measured, chosen from and run.

archive, formats, quantize, manifest -> export
                                           a folder with a graph per model
backends, peak -> profile                  models that run, and what they cost here
segments                                   what each part of a model takes here, to choose routes by
budget -> family                           the model that a budget allows
cascade, rests -> deadline                 a model for each image, a model for each load
"""
