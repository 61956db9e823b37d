"""The command line, a module for each verb.

torch and transformers are imported by the commands that need them, so `dymu --help` is quick.
"""
