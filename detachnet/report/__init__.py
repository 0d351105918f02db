"""runs -> tables and pages.

record                          all that a run's folder says
comparison, fronts              several runs in one table, what a search found as a figure
chart -> page                    drawings, and one HTML page
demo                             the family in a browser
card -> publishing               what is said of a family on the Hugging Face Hub, and how it gets there
"""
