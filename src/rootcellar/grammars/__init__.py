"""The form that an answer must have: how large a grammar may be, and compiling one where it can do no harm.

Imports no JAX: the process that compiles is started from here.
"""
