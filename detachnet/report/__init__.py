"""runs -> tables and pages.

record                          all that a run's folder says
comparison                      several runs in one table
chart, figures -> page           drawings, and one HTML page
"""
