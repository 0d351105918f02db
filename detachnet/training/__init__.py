"""recipe -> run: a training, exact to resume.

tables -> problems -> recipe    an experiment, checked; its mistakes in its own words (shipped: where it is found;
                                presets: what one word says)
data, weights, start            its images, weights that are there already, and the family it starts with
optimizer, step                 one update
processes                       who makes it, and the experiment tracker that is told
state, runs, results            what is kept of it, where, and the final table
loop                            its epochs
trainer                         all of it together
preview                         what a run would be
draft                           the text of a recipe for a model and images
"""
