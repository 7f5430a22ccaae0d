"""The recipe: everything a run depends on.

schema  fields, units, ranges, defaults and the rules between fields
read    reading, overriding, validating and writing recipes
"""
