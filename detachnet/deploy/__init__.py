"""family -> device: exported, measured, chosen from and run.

formats                                    what graphs of all formats have in common
program                                    a module as torch.export sees it
verify                                     a graph computes what PyTorch does
half                                       weights that float16 has, too
weights, parts, onnx_session -> onnx_writer, quantize
archive -> pt2, pte                        a module as a graph, and back
opening                                    a graph's file as a function
measurement -> manifest -> export          a folder with a graph per model
cache                                      an export's graphs optimized for this processor
backends, peak -> profile                  models that run, and what they cost here
stopwatch, segments                        what modules, and the parts of a model, take here
budget -> family                           the model that a budget allows
cascade, rests -> deadline                 a model for each image, a model for each load
"""
